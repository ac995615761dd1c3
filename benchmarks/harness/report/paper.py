"""Write the paper's tables and figures under its numbers, and draw its main averages (Fig. 2)."""

from __future__ import annotations

import itertools
import string
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness import base as paths
from benchmarks.harness.base import atomic_write
from benchmarks.harness.config import paper_items
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, Artifacts
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.paper_items import MainAverage, PaperOutput
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import SETTING, name_or_count
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.style import DENSE, EMOE, GMOE
from benchmarks.harness.report.table import RUNS, Table
from benchmarks.harness.results.claims import find_evidence
from benchmarks.harness.results.statistics import mean_difference

from matplotlib import pyplot as plt  # isort: skip  (plots chooses the backend)

_PROTOCOLS = ("published", "clean")  # in order of preference


def write_paper_items(suite: Suite, artifacts: Artifacts, presentation: Presentation) -> None:
    """Write the paper's tables and figures into ``results/<suite>/paper/``, with its numbering and rows.

    The figures of the benchmark or set must be drawn already, because they are copied.
    """
    folder = paths.RESULTS / suite.name / "paper"
    tables = {table.name: table for table in presentation.tables}
    for output in paper_items.outputs_of(artifacts):
        name = artifacts.stem(output.part.name)
        if output.part.figure:
            for end in FIGURE_FORMATS:
                with atomic_write(folder / f"{output.name}.{end}") as temporary:
                    temporary.write_bytes((folder.parent / "figures" / f"{name}.{end}").read_bytes())
        else:
            _select_paper_rows(tables[name], output, suite).write(folder)


def _select_paper_rows(table: Table, output: PaperOutput, suite: Suite) -> Table:
    """Keep the rows that the paper has, under the authors' selection if the suite runs it, else the clean one."""
    frame, caption = table.frame, [table.caption]
    if output.part.rows and "method" in frame:
        frame = frame[frame["method"].str.split(SETTING, regex=False).str[0].isin(output.part.rows)]
    if "protocol" in frame:
        ran = {run.spec.get("protocol") for run in suite.runs_of(output.part.benchmark)}
        protocol = next((name for name in _PROTOCOLS if name in ran), None)
        is_paper = frame["is_ours"].eq(False) if "is_ours" in frame else pd.Series(False, index=frame.index)
        frame = frame[frame["protocol"].eq(protocol) | is_paper]
    if "p_holm" in frame and len(frame) < len(table.frame):
        caption.append(f"p is corrected over all rows of `{table.name}`; this table shows some of them.")
    if RUNS in frame and len(frame) > 0 and frame[RUNS].eq("").all():
        caption.append("All numbers are published: this suite runs none of these rows.")
    caption.append(f"Made by `snakemake --cores all {output.item} --config suite={suite.name}`.")
    is_named = table.title == paper_items.load_paper().items[output.item].title
    title = output.title if is_named else f"{output.title}. {table.title}"
    return replace(table, frame=frame.reset_index(drop=True), name=output.name, title=title, caption=" ".join(caption))


def paper_index(suite: Suite) -> list[dict[str, Any]]:
    """List the paper's items with ``item``, ``title``, ``naacl``, ``command``, ``files`` of the suite and
    ``status``.
    """
    rows: list[dict[str, Any]] = []
    for name, item in paper_items.load_paper().items.items():
        files = paper_items.paper_files(suite, name)
        existing = sum(Path(file).exists() for file in files)
        shown = [file for file in files if file.endswith((".md", ".png"))]
        if item.missing:
            status = f"not made: {item.missing}"
        elif not files:
            status = f"not in this suite (benchmark {', '.join(paper_items.item_benchmarks(item))})"
        elif existing < len(files):
            status = f"{existing} of {len(files)} files"
        else:
            shown = [file for file in shown if file.endswith(".md") or plots.is_drawn(Path(file))]
            status = "made" if shown else "no run of this suite is of it"
        command = "" if item.missing else f"snakemake --cores all {name} --config suite={suite.name}"
        row = {"item": name, "title": item.title, "naacl": item.naacl, "command": command}
        rows.append({**row, "files": shown, "status": status})
    return rows


_METHODS = {"dense": "dense", "gmoe": "GMoE", "emoe": "EMoE"}
_STYLES = {"dense": DENSE, "gmoe": GMOE, "emoe": EMOE}
_COLUMNS = ["axis", "whose", "is_rank", "method", "mean", "delta", "low", "high", "n", "of", "compared"]
_TITLES = {"ours": "these runs", "paper": "the paper (OOD: ranks, lower is better)"}
_EXPLANATION, _LABEL = 58, 52  # letters of a line below a radar, and beside a difference
_RADAR, _LINE = 2.9, 0.135  # inches of a radar with its title, and of a line below it
_PADDING = 0.25  # share of a radar axis below the least and above the greatest value


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute the main averages of a suite from its claim numbers, and add the paper's.

    Returns one row per average, model and method (``dense``, ``gmoe``, ``emoe``) with the ``axis`` (title and model),
    ``whose`` (``ours``, ``paper``), the ``mean`` in points (a rank if ``is_rank``), the paired difference to the dense
    row in points (``delta``, ``low``, ``high``, ``n``), and texts that name the tasks and pairs of our mean (``of``)
    and of our difference (``compared``).
    """
    averages = []
    for average in paper_items.load_paper().main.values():
        if average.of.benchmark in numbers:
            averages += _our_averages(average, numbers[average.of.benchmark])
        for is_rank, models in ((False, average.paper), (True, average.paper_ranks)):
            for model, published in models.items():
                for method, value in published.items():
                    row = {"axis": f"{average.title}, {model}", "whose": "paper", "is_rank": is_rank, "method": method}
                    row |= {"mean": value, "delta": value - published["dense"], "n": 0, "of": "", "compared": ""}
                    averages.append(row)
    return pd.DataFrame(averages, columns=_COLUMNS)


def _our_averages(average: MainAverage, numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """Average over the tasks and pairs that all methods share, and compare each method with the dense one."""
    of = average.of
    selected = [of.selection, of.domain, of.metric, ""]
    rows = numbers[(numbers[["selection", "domain", "metric", "setting"]] == selected).all(axis=1)]
    averages = []
    for model, of_model in rows.groupby("model", sort=False):
        cell = ["task", "eval_task", "pair"]
        wide = of_model.pivot_table(index=cell, columns="method", values="value", aggfunc="mean")
        names = {method: getattr(of, method) for method in _METHODS if getattr(of, method) in wide}
        shared = wide[list(names.values())].dropna()
        by_pair = shared.groupby("pair")
        means = by_pair.mean()[by_pair.size() == shared.groupby(["task", "eval_task"]).ngroups]
        if "dense" not in names or len(names) == 1 or means.empty:
            continue
        for method, name in names.items():
            evidence = None if method == "dense" else find_evidence(of_model, of.comparison(name))
            difference = evidence.difference if evidence else mean_difference(np.zeros(len(means)))
            row = {"axis": f"{average.title}, {model_title(str(model))}", "whose": "ours", "is_rank": False}
            row |= {"method": method, "mean": float(means[name].mean()) * 100, "n": difference.n}
            row |= {key: value * 100 for key, value in difference.columns().items() if key != "p"}
            row["of"] = _tasks_text(of.benchmark, shared, len(means))
            row["compared"] = _tasks_text(of.benchmark, wide[[of.dense, name]].dropna(), difference.n)
            averages.append(row)
    return averages


def _tasks_text(benchmark: str, numbers: pd.DataFrame, pairs: int) -> str:
    """Name or count the tasks of numbers, and add the number of pairs."""
    titles = load_benchmark(benchmark).task_titles
    names = [titles.get(name, name) for name in numbers.index.get_level_values("task").unique()]
    return f"{name_or_count(names, 'sets')}; {plots.count_text([pairs], 'pairs')}"


def draw_main(rows: pd.DataFrame, folder: Path) -> None:
    """Draw the radar and the differences into a folder."""
    has_runs = (rows["whose"] == "ours").any()
    for stem, draw in zip(paper_items.main_stems(""), (draw_radar, draw_differences), strict=True):
        if has_runs:
            draw(rows, folder / stem.name)
        else:
            plots.placeholder_figure(folder / stem.name, "this suite runs none of the main averages")


def draw_radar(rows: pd.DataFrame, path: Path) -> None:
    """Draw two radars, ours and the paper's. Each axis has its own range, and a letter with a legend below."""
    letters = iter(string.ascii_uppercase + string.ascii_lowercase)
    sides = []
    for whose, group in rows.groupby("whose"):
        wide = group.pivot_table(index="axis", columns="method", values="mean", sort=False)
        wide = wide[[method for method in _METHODS if method in wide]]
        axes = group.drop_duplicates("axis").set_index("axis").loc[wide.index]
        axes["letter"] = list(itertools.islice(letters, len(axes)))
        sides.append((str(whose), wide, axes, _axes_legend(wide, axes)))
    words = _LINE * max(text.count("\n") + 1 for *_, text in sides)
    with mpl.rc_context({**plots.STYLE, "axes.grid.axis": "both"}):
        figure = plt.figure(figsize=(plots.WIDTH, _RADAR + words + 0.3), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=[_RADAR, words])
        for column, (whose, wide, axes, text) in enumerate(sides):
            panel: Any = figure.add_subplot(grid[0, column], projection="polar")
            _draw_polygons(panel, wide, axes)
            panel.set_title(_TITLES[whose], fontsize=8)
            below = figure.add_subplot(grid[1, column])
            below.axis("off")
            below.text(0, 1, text, va="top", fontsize=7, linespacing=1.25)
        plots.legend_below(figure, [panel], 3)
        plots.save(figure, path)


def _draw_polygons(panel: Any, wide: pd.DataFrame, axes: pd.DataFrame) -> None:
    """Draw a polygon per method. Each axis spans its least to its greatest number; lower ranks are further out."""
    angles = np.linspace(0, 2 * np.pi, len(wide), endpoint=False)
    better = wide.mul(np.where(axes["is_rank"], -1.0, 1.0), axis=0)
    low, high = better.min(axis=1), better.max(axis=1)
    radii = better.sub(low, axis=0).div((high - low).where(high > low, 1.0), axis=0) * (1 - 2 * _PADDING) + _PADDING
    for method, values in radii.items():
        label, style = _METHODS[str(method)], _STYLES[str(method)].mark
        panel.plot([*angles, angles[0]], [*values, values.iloc[0]], ms=3.5, lw=1.2, label=label, **style)
    panel.set_xticks(angles, axes["letter"], fontsize=8)
    panel.tick_params(axis="x", pad=1)
    panel.set_ylim(0, 1)
    panel.set_yticks([_PADDING, 0.5, 1 - _PADDING], ["", "", ""])


def _axes_legend(wide: pd.DataFrame, axes: pd.DataFrame) -> str:
    """Return the legend of the axes: letter, title, tasks and numbers, one axis per line."""
    lines = [f"   {' / '.join(_METHODS[method] for method in wide)} (rings: worst, middle, best)"]
    for axis, row in axes.iterrows():
        numbers = " / ".join(f"{value:.1f}" for value in wide.loc[axis])
        of = f" ({row['of']})" if row["of"] else ""
        text = f"{row['letter']}  {axis}{of}: {numbers}"
        lines.append(textwrap.fill(text, _EXPLANATION, subsequent_indent="     "))
    return "\n".join(lines)


def draw_differences(rows: pd.DataFrame, path: Path) -> None:
    """Draw differences to the dense model in points: ours with 95 % intervals, the paper's as crosses. Omit ranks."""
    drawn = rows[(rows["method"] != "dense") & ~rows["is_rank"]]
    axes = list(drawn["axis"].drop_duplicates())
    with mpl.rc_context(plots.STYLE):
        figure, panel = plt.subplots(figsize=(plots.WIDTH, 0.36 * len(axes) + 1.0), layout="constrained")
        for row in drawn.itertuples():
            style = _STYLES[row.method]
            height = axes.index(row.axis) + (0.14 if row.method == "gmoe" else -0.14)
            plots.draw_difference(panel, row, height, style if row.whose == "ours" else replace(style, marker="x"))
        panel.axvline(0, color=plots.REFERENCE, lw=0.8, zorder=0.5)
        labels = [_difference_label(axis, drawn[drawn["axis"] == axis]) for axis in axes]
        panel.set_yticks(range(len(axes)), labels, fontsize=7)
        panel.set_ylim(len(axes) - 0.4, -0.6)
        panel.set_xlabel("Difference to the dense model (points)")
        note = "bars: 95 % intervals of these runs, over n pairs of seeds or trials; crosses: the paper"
        figure.supxlabel(note, fontsize=7.5)
        handles = [
            mpl.lines.Line2D([], [], ls="", ms=5, label=_METHODS[name], **_STYLES[name].mark)
            for name in ("gmoe", "emoe")
        ]
        panel.legend(handles=handles, loc="best", fontsize=7, frameon=False)
        plots.save(figure, path)


def _difference_label(axis: str, rows: pd.DataFrame) -> str:
    """Return the label of a row of differences, with its tasks and pairs per method, once if all are equal."""
    ours = rows[rows["whose"] == "ours"]  # the paper may have a row of the same model
    of = [f"{_METHODS[row.method]}: {row.compared}" for row in ours.itertuples()]
    of = list(ours["compared"].unique()) if ours["compared"].nunique() == 1 else of
    return "\n".join(textwrap.fill(text, _LABEL) for text in (axis, ". ".join(of)) if text)
