"""Find the faults of a figure: its size, letters too small to read, texts that touch or are cut."""

from __future__ import annotations

import itertools
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

# inches
_NARROWEST = 1.6
_WIDEST = 6.95
_LOWEST = _NARROWEST / 3
_HIGHEST = 9.6
_SMALLEST_LETTERS = 6.9  # points
_LARGEST_OVERLAP = 1.5  # pixels, because the boxes of texts have a margin


def _write_dot(_: Figure, path: Any, **options: Any) -> None:
    """Write a dot instead of a figure, in place of ``Figure.savefig``."""
    texts = PngInfo()
    # the description tells placeholders from other figures
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
    problems = []
    width, height = figure.get_size_inches()
    fits_width = _NARROWEST < width <= _WIDEST
    fits_height = _LOWEST < height <= _HIGHEST
    if not fits_width or not fits_height:
        problems.append(f"is {width:.1f} by {height:.1f} inches")

    texts = drawn_texts(figure)
    for text, _, size in texts:
        if size < _SMALLEST_LETTERS:
            problems.append(f"{text!r} has {size:g} points")
    for text, box, _ in texts:
        if _is_cut(box, figure.bbox):
            problems.append(f"{text!r} is cut at the edge")
    for (text, box, _), (other_text, other_box, _) in itertools.combinations(texts, 2):
        if _touch(box, other_box):
            problems.append(f"{text!r} touches {other_text!r}")
    return problems


def _is_cut(box: Any, page: Any) -> bool:
    """Return True if a text is more than a pixel outside the page."""
    is_cut_across = box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1
    is_cut_along = box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1
    return is_cut_across or is_cut_along


def _touch(box: Any, other: Any) -> bool:
    """Return True if two texts overlap in both directions."""
    across = min(box.x1, other.x1) - max(box.x0, other.x0)
    along = min(box.y1, other.y1) - max(box.y0, other.y0)
    return across > _LARGEST_OVERLAP and along > _LARGEST_OVERLAP


def drawn_texts(figure: Figure) -> list[tuple[str, Any, float]]:
    """List the drawn texts (no ticks outside the limits), with their boxes and sizes in points."""
    texts = []
    draw = Text.draw

    def note_and_draw(text: Text, renderer: Any, *rest: Any, **named: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent(renderer)
            texts.append((text.get_text(), box, text.get_fontsize()))
        draw(text, renderer, *rest, **named)

    figure.draw_without_rendering()  # lays it out
    figure.set_layout_engine("none")
    with mock.patch.object(Text, "draw", note_and_draw):
        figure.draw_without_rendering()
    return texts
