"""The main averages (Fig. 2 of the paper), ours and the paper's: a radar, and differences with their intervals."""

from __future__ import annotations

import itertools
import string
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.paper_items import MainAverage, load_main_averages, main_files
from benchmarks.harness.report.looks import DENSE, EMOE, GMOE
from benchmarks.harness.report.plots import (
    REFERENCE,
    STYLE,
    WIDTH,
    count_text,
    draw_difference,
    placeholder_figure,
    save,
)
from benchmarks.harness.results.claims import find_evidence
from benchmarks.harness.results.statistics import mean_difference

from matplotlib import pyplot as plt  # isort: skip  (plots chooses the backend)

_METHODS = {"dense": "dense", "gmoe": "GMoE", "emoe": "EMoE"}
_LOOKS = {"dense": DENSE, "gmoe": GMOE, "emoe": EMOE}
_NOTHING = "this suite runs none of the main averages"
_FEW_TASKS = 3  # whose names are listed
_LETTERS = string.ascii_uppercase  # of the axes of a radar
_WORDS, _LABEL = 58, 52  # letters of a line below a radar, and beside a difference
_RADAR, _LINE = 2.9, 0.135  # inches of a radar with its title, and of a line below it
_PADDING = 0.25  # of the range of an axis of the radar, inside its least and outside its greatest value


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute the main averages of a suite, beside the paper's.

    Args:
        numbers: The numbers by benchmark, see :func:`~benchmarks.harness.report.claims.claimed_numbers`.

    Returns:
        A row an average, model and method (``dense``, ``gmoe``, ``emoe``): ``axis`` (title and model), ``whose``
        (``ours``, ``paper``), ``is_rank``, ``mean`` (points, or the rank), the paired difference to the dense row
        (``delta``, ``low``, ``high``, in points) and its ``n``; ``of`` and ``compared`` name the data of our mean and
        of our difference.
    """
    rows: list[dict[str, Any]] = []
    for average in load_main_averages().values():
        if average.of.benchmark in numbers:
            rows += _ours(average, numbers[average.of.benchmark])
        for models, is_rank in ((average.paper, False), (average.paper_ranks, True)):
            for model, values in models.items():
                for method in _METHODS:
                    value, dense = getattr(values, method), values.dense
                    row = {"axis": f"{average.title}, {model}", "whose": "paper", "is_rank": is_rank, "method": method}
                    rows.append({**row, "mean": value, "delta": value - dense, "n": 0, "of": "", "compared": ""})
    columns = ["axis", "whose", "is_rank", "method", "mean", "delta", "low", "high", "n", "of", "compared"]
    return pd.DataFrame(rows, columns=columns)


def _ours(average: MainAverage, numbers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield means over the tasks, sets and pairs that all methods have, and differences over those that two share."""
    of = average.of
    kept = numbers["selection"].eq(of.selection) & numbers["domain"].eq(of.domain) & numbers["metric"].eq(of.metric)
    for model, rows in numbers[kept & numbers["setting"].eq("")].groupby("model", sort=False):
        title = load_models()[model].title if model in load_models() else str(model)
        wide = rows.pivot_table(index=["task", "eval_task", "pair"], columns="method", values="value", aggfunc="mean")
        if of.dense not in wide or not {of.gmoe, of.emoe} & set(wide):
            continue
        shared = wide[[name for name in (of.dense, of.gmoe, of.emoe) if name in wide]].dropna()
        by_pair = shared.groupby("pair")
        means = by_pair.mean()[by_pair.size() == shared.groupby(["task", "eval_task"]).ngroups]
        for method in _METHODS:
            name = getattr(of, method)
            if name not in wide or means.empty:
                continue
            evidence = None if name == of.dense else find_evidence(rows, of.comparison(name))
            difference = evidence.difference if evidence else mean_difference(np.zeros(len(means)))
            yield {
                "axis": f"{average.title}, {title}",
                "whose": "ours",
                "is_rank": False,
                "method": method,
                "mean": float(means[name].mean()) * 100,
                "delta": difference.mean * 100,
                "low": difference.low * 100,
                "high": difference.high * 100,
                "n": difference.n,
                "of": _data_text(of.benchmark, shared, len(means)),
                "compared": _data_text(of.benchmark, wide[[of.dense, name]].dropna(), difference.n),
            }


def _data_text(benchmark: str, numbers: pd.DataFrame, pairs: int) -> str:
    """Name the tasks of numbers, or their count, and the number of pairs."""
    known = load_benchmark(benchmark)
    titles = known.kind.task_titles(known.definition, known.tasks)
    names = [titles.get(name, name) for name in numbers.index.get_level_values("task").unique()]
    return f"{', '.join(names) if len(names) <= _FEW_TASKS else f'{len(names)} sets'}; {count_text([pairs], 'pairs')}"


def draw_main(rows: pd.DataFrame, folder: Path) -> None:
    """Draw the radar and the differences into a folder."""
    radar, differences = dict.fromkeys(folder / Path(file).stem for file in main_files(""))
    if not (rows["whose"] == "ours").any():
        placeholder_figure(radar, _NOTHING)
        placeholder_figure(differences, _NOTHING)
        return
    draw_radar(rows, radar)
    draw_differences(rows, differences)


def draw_radar(rows: pd.DataFrame, path: Path) -> None:
    """Draw two radars, ours and the paper's, with a range an axis and the best outside; a list below explains the axes."""
    with mpl.rc_context({**STYLE, "axes.grid": True, "axes.grid.axis": "both"}):
        letters, sides = map("".join, itertools.product(("", *_LETTERS), _LETTERS)), {}
        for whose in ("ours", "paper"):
            side = rows[rows["whose"] == whose]
            wide = side.pivot_table(index="axis", columns="method", values="mean", sort=False)
            named = dict(zip(itertools.islice(letters, len(wide)), wide.index, strict=True))
            sides[whose] = (side, wide, named, "\n".join(_explained(side, wide, named)))
        words = _LINE * max(text.count("\n") + 1 for *_, text in sides.values())
        figure = plt.figure(figsize=(WIDTH, _RADAR + words + 0.3), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=[_RADAR, words])
        handles: dict[str, Any] = {}
        for column, (whose, (side, wide, named, text)) in enumerate(sides.items()):
            panel: Any = figure.add_subplot(grid[0, column], projection="polar")
            handles |= _draw_polygons(panel, wide, side.drop_duplicates("axis").set_index("axis")["is_rank"], named)
            panel.set_title("these runs" if whose == "ours" else "the paper (OOD: ranks, lower is better)", fontsize=8)
            below = figure.add_subplot(grid[1, column])
            below.axis("off")
            below.text(0, 1, text, va="top", fontsize=7, linespacing=1.25)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
        save(figure, path)


def _draw_polygons(panel: Any, wide: pd.DataFrame, ranks: pd.Series, named: Mapping[str, str]) -> dict[str, Any]:
    """Draw a line a method over the axes, each from the least to the greatest number; return the lines by label."""
    angles = np.linspace(0, 2 * np.pi, len(wide), endpoint=False)
    better = wide.mul(np.where(ranks.loc[wide.index], -1.0, 1.0), axis=0)
    low, high = better.min(axis=1), better.max(axis=1)
    span = (high - low).where(high > low, 1.0)
    radii = better.sub(low, axis=0).div(span, axis=0) * (1 - 2 * _PADDING) + _PADDING
    drawn = {}
    for method, label in _METHODS.items():
        if method in radii:
            values = radii[method].to_numpy(dtype=float)
            (drawn[label],) = panel.plot(
                [*angles, angles[0]], [*values, values[0]], ms=3.5, lw=1.2, **_LOOKS[method].mark
            )
    panel.set_xticks(angles, list(named), fontsize=8)
    panel.tick_params(axis="x", pad=1)
    panel.set_ylim(0, 1)
    panel.set_yticks([_PADDING, 0.5, 1 - _PADDING], ["", "", ""])
    return drawn


def _explained(rows: pd.DataFrame, wide: pd.DataFrame, named: Mapping[str, str]) -> Iterator[str]:
    """Yield a line an axis: its letter, title and numbers."""
    first = rows.drop_duplicates("axis").set_index("axis")
    yield f"   {' / '.join(label for method, label in _METHODS.items() if method in wide)}"
    for letter, axis in named.items():
        numbers = " / ".join(f"{wide.loc[axis, method]:.1f}" for method in _METHODS if method in wide)
        of = first.loc[axis, "of"]
        yield textwrap.fill(f"{letter}  {axis}{f' ({of})' if of else ''}: {numbers}", _WORDS, subsequent_indent="     ")


def draw_differences(rows: pd.DataFrame, path: Path) -> None:
    """Draw differences to the dense model in points: ours with 95 % intervals, the paper's as crosses; no ranks."""
    drawn = rows[(rows["method"] != "dense") & ~rows["is_rank"]]
    axes = list(drawn["axis"].drop_duplicates())
    with mpl.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(WIDTH, 0.36 * len(axes) + 1.0), layout="constrained")
        for row in drawn.itertuples():
            look = _LOOKS[row.method]
            y = axes.index(row.axis) + (0.14 if row.method == "gmoe" else -0.14)
            draw_difference(panel, row, y, look if row.whose == "ours" else replace(look, marker="x"))
        panel.axvline(0, color=REFERENCE, lw=0.8, ls="--", zorder=0)
        labels = [_labelled(axis, drawn[drawn["axis"] == axis]) for axis in axes]
        panel.set_yticks(range(len(axes)), labels, fontsize=7)
        panel.set_ylim(len(axes) - 0.4, -0.6)
        panel.set_xlabel("Difference to the dense model (points)")
        figure.supxlabel(
            "bars: 95 % intervals of these runs, over n pairs of seeds or trials; crosses: the paper", fontsize=7.5
        )
        handles = [
            mpl.lines.Line2D([], [], ls="", ms=5, label=_METHODS[name], **_LOOKS[name].mark)
            for name in ("gmoe", "emoe")
        ]
        panel.legend(handles=handles, loc="best", fontsize=7, frameon=False)
        save(figure, path)


def _labelled(axis: str, rows: pd.DataFrame) -> str:
    """Label a row of differences with its axis and data; the data stand once if all methods have the same."""
    ours = rows[rows["whose"] == "ours"]  # the paper may have a row of the same model
    compared = dict(zip(ours["method"].map(_METHODS), ours["compared"], strict=True))
    texts = set(compared.values())
    if not texts:
        return textwrap.fill(axis, _LABEL)
    of = texts.pop() if len(texts) == 1 else ". ".join(f"{name}: {text}" for name, text in compared.items())
    return "\n".join((textwrap.fill(axis, _LABEL), textwrap.fill(of, _LABEL)))
