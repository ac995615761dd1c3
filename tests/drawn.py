"""Find faults of a figure on a page: its size, letters too small to read, texts that touch or are cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

NARROWEST, WIDEST, HIGHEST, SMALLEST = 1.6, 6.95, 9.6, 6.9  # inches, the last in points


def _write_dot(_: Figure, path: Any, **options: Any) -> None:
    texts = PngInfo()
    texts.add_text("Description", options["metadata"].get("Description") or "")
    Image.new("RGB", (1, 1)).save(path, options["format"], pnginfo=texts)


@contextmanager
def watched() -> Iterator[list[str]]:
    """List the faults of all figures drawn in the context; write each as a dot."""
    problems: list[str] = []

    def check(figure: Figure, path: Any, **options: Any) -> None:
        if options["format"] == "png":
            problems.extend(faults(figure))
        _write_dot(figure, path, **options)

    with mock.patch.object(Figure, "savefig", check):
        yield problems


@contextmanager
def saved_figures() -> Iterator[list[Figure]]:
    """List the figures that are saved in the context, once each."""
    figures: list[Figure] = []

    def save(figure: Figure, path: Any, **options: Any) -> None:
        Path(path).touch()
        if options["format"] == "png":
            figure.draw_without_rendering()  # lays it out
            figures.append(figure)

    with mock.patch.object(Figure, "savefig", save):
        yield figures


def undraw(patch: pytest.MonkeyPatch) -> None:
    """Write every figure as a dot."""
    patch.setattr(Figure, "savefig", _write_dot)


def faults(figure: Figure) -> list[str]:
    """Describe the faults of a figure, a sentence each."""
    width, height = figure.get_size_inches()
    problems = []
    if not NARROWEST < width <= WIDEST or not NARROWEST / 3 < height <= HIGHEST:
        problems.append(f"is {width:.1f} by {height:.1f} inches")
    texts = drawn_texts(figure)
    problems += [f"{text!r} has {size:g} points" for text, _, size in texts if size < SMALLEST]
    page = figure.bbox
    for text, box, _ in texts:
        if (
            box.x0 < page.x0 - 1
            or box.x1 > page.x1 + 1
            or box.y0 < page.y0 - 1
            or box.y1 > page.y1 + 1
        ):
            problems.append(f"{text!r} is cut at the edge")
    for number, (text, box, _) in enumerate(texts):
        for other, beside, _ in texts[number + 1 :]:
            across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            along = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if across > 1.5 and along > 1.5:
                problems.append(f"{text!r} touches {other!r}")
    return problems


def drawn_texts(figure: Figure) -> list[tuple[str, Any, float]]:
    """List the drawn texts (no ticks outside the limits), with their boxes and sizes in points."""
    texts = []
    draw = Text.draw

    def noted(text: Text, renderer: Any, *rest: Any, **named: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            texts.append((text.get_text(), text.get_window_extent(renderer), text.get_fontsize()))
        draw(text, renderer, *rest, **named)

    figure.draw_without_rendering()  # lays it out
    figure.set_layout_engine("none")
    with mock.patch.object(Text, "draw", noted):
        figure.draw_without_rendering()
    return texts
