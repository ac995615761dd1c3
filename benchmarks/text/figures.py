"""Draw the figures of text benchmarks: scores, ranks, ablations, experts over training, and their use by sets."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd

from benchmarks.harness.config.methods import CONTROL, setting_text
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import Outcomes, has_random_weights
from benchmarks.harness.report.style import MethodStyle, curve_styles
from benchmarks.harness.results.statistics import SIGNIFICANCE, critical_difference, nemenyi
from benchmarks.text.definition import OOD, TaskEntry
from benchmarks.text.outcomes import PROTOCOLS, Ranking, TextOutcomes
from benchmarks.text.traces import Trace, published_traces, select_traces

_DIFFERENCE = mpl.colormaps["PuOr_r"]
_MOST_SETS = 12  # panels of scores; a map of differences replaces more panels
_CELL, _READABLE = 4.6, 0.27  # inches of all cells of a line, and of one cell with a number


def draw_scores(outcomes: TextOutcomes, path: Path, *, domains: list[str], by_task: bool = False) -> None:
    """Draw the scores under each protocol with runs: a panel per set, or a map of differences for many sets.

    Each selection and model has a line of panels, and with ``by_task`` each training task too.
    """
    seeds = outcomes.seeds
    seeds = seeds[seeds["domain"].isin(domains) & seeds["protocol"].isin(outcomes.run_protocols)]
    sets = ["protocol", "model", "task", "eval_task"]
    line = sets[: 3 if by_task else 2]
    if len(seeds[sets].drop_duplicates()) > _MOST_SETS:
        difference_map(outcomes, path, domains)
        return
    panels = [
        [
            (f"{_model_title(outcomes, protocol, model)}\n{outcomes.pair_title(task, name)}", rows)
            for (protocol, model, task, name), rows in of_line.groupby(sets, sort=False)
        ]
        for _, of_line in seeds.groupby(line, sort=False)
    ]
    plots.score_panels(outcomes, panels, path)


def difference_map(outcomes: TextOutcomes, path: Path, domains: list[str]) -> None:
    """Draw paired differences to the baseline as a heatmap ``[methods, sets]``, a panel per model and selection.

    Cells have numbers if they fit, in bold if the interval excludes 0 and the weights are not random.
    """
    rows = outcomes.rows[outcomes.rows["domain"].isin(domains) & outcomes.rows["protocol"].isin(outcomes.run_protocols)]
    rows = rows[rows["method"] != outcomes.baseline]
    pairs = list(dict.fromkeys(zip(rows["task"], rows["eval_task"], strict=True)))
    methods = [name for name in outcomes.methods if name in set(rows["method"])]
    shown = [
        (protocol, model, group)
        for model, of_model in rows.groupby("model", sort=False)
        for protocol, group in of_model.groupby("protocol", sort=False)
    ]
    columns = min(len(outcomes.run_protocols), len(shown))  # a line per model, if all ran under all selections
    lines = -(-len(shown) // columns)
    has_numbers = _CELL / (columns * len(pairs)) >= _READABLE
    tested = not has_random_weights(outcomes.runs)
    most = max(1.0, float(rows["delta"].abs().quantile(0.95)) * 100)
    norm = mpl.colors.Normalize(-most, most)
    size = (plots.WIDTH, (0.16 * len(methods) + 0.5) * lines + 1.3)
    with plots.panel_figure(path, lines, columns, size, plots.HEATMAP, sharex=True, sharey=True) as (figure, axes):
        for axis, (protocol, model, group) in zip(axes.flat, shown, strict=False):
            table = np.full((len(methods), len(pairs)), np.nan)
            for row in group[group["delta"].notna()].itertuples():
                line, column = methods.index(row.method), pairs.index((row.task, row.eval_task))
                table[line, column] = delta = row.delta * 100
                if has_numbers:
                    weight = "bold" if tested and (row.low > 0 or row.high < 0) else "normal"
                    colour = "w" if abs(norm(delta) - 0.5) > 0.35 else "k"
                    style = {"ha": "center", "va": "center", "weight": weight, "color": colour}
                    axis.text(column, line, f"{delta:+.1f}", **style)
            axis.imshow(table, norm=norm, cmap=_DIFFERENCE, aspect="auto")
            axis.set_yticks(range(len(methods)), [outcomes.title("method", name) for name in methods])
            axis.set_xticks(range(len(pairs)), [outcomes.pair_title(*pair) for pair in pairs], rotation=90)
            axis.set_title(_model_title(outcomes, protocol, model), fontsize=8)
        bar = mpl.cm.ScalarMappable(norm, _DIFFERENCE)
        bold = "; bold: the 95 % interval excludes 0" if has_numbers and tested else ""
        label = f"difference to {outcomes.baseline_title} (points){bold}"
        figure.colorbar(bar, ax=axes, orientation="horizontal", shrink=0.5, aspect=40, label=label, extend="both")


def _model_title(outcomes: TextOutcomes, protocol: Any, model: Any) -> str:
    """Return a model's title, with the selection if there are several."""
    selection = "" if len(outcomes.run_protocols) == 1 else f", {PROTOCOLS[protocol]} selection"
    return outcomes.title("model", model) + selection


def rank_diagram(outcomes: TextOutcomes, path: Path, rankings: list[Ranking]) -> None:
    """Draw a critical difference diagram (Demšar 2006) per ranking."""
    import scikit_posthocs  # it imports a plotting library

    if not rankings:
        plots.placeholder_figure(path, "the ranked rows have no common set and seed")
        return
    rows = max(len(each.scores) for each in rankings)
    size = (plots.WIDTH, (1.1 + 0.2 * rows) * len(rankings))
    with plots.panel_figure(path, len(rankings), 1, size, {**plots.STYLE, "axes.grid": False}) as (_, axes):
        for axis, each in zip(axes[:, 0], rankings, strict=True):
            names = {method: outcomes.title("method", method) for method in each.scores.index}
            ranks, p = each.ranks.rename(names), nemenyi(each.scores).rename(index=names, columns=names)
            diagram = scikit_posthocs.critical_difference_diagram(
                ranks,
                p,
                alpha=SIGNIFICANCE,
                ax=axis,
                label_fmt_left="{label} ({rank:.2f}) ",
                label_fmt_right=" ({rank:.2f}) {label}",
                color_palette={names[method]: outcomes.style(method).colour for method in names},
                crossbar_props={"color": plots.REFERENCE},
            )
            for (bar,) in diagram["crossbars"]:  # the library draws their points in the order of a set
                bar.set_xdata(sorted(bar.get_xdata()))
            axis.set_xlim(1, len(ranks))  # all possible ranks
            for drawn in (*axis.lines, *axis.collections):
                drawn.set_clip_on(False)  # the first and the last rank are on the edge
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axis.spines["top"].set(visible=True, color="black")  # the diagram hides its own axis
            title = (
                f"{outcomes.title('model', each.key['model'])}, {PROTOCOLS[each.key['protocol']]} selection: mean rank "
                f"over {each.scores.shape[1]} sets, critical difference {critical_difference(*each.scores.shape):.2f}"
            )
            axis.set_title(plots.wrap_text(title, plots.WIDTH), fontsize=8)


_COLUMNS, _NAMES = 3, 2.3  # panels per line, inches of names beside them
_TITLE, _TICKS, _LINE = 1.4, 6, 34  # inches of a panel's title, tick labels, letters of a forest plot's labels
_MOST_DIFFERENCES = 40  # differences in a forest plot
_AXIS_LABELS = {"D": "Share of the training rows", "k": "Experts in use, k/N"}
_NO_RUNS = "this suite runs no row of this ablation"


def draw_differences(outcomes: TextOutcomes, rows: pd.DataFrame, path: Path, reference: str) -> None:
    """Draw the differences of :func:`~benchmarks.text.ablations.ablation_rows` to their reference as a forest plot.

    Lines are sets, and marks are methods. If ours and the paper's have one set each, lines are methods instead. Many
    sets are replaced by averages. Intervals (95 %) need three seeds; crosses are the paper's means over its sets.
    """
    rows = _with_paper_rows(rows)
    rows = rows[rows["delta"].notna()]
    ours = rows[rows["is_ours"]]
    if ours.empty:
        plots.placeholder_figure(path, _NO_RUNS)
        return
    if len(ours) > _MOST_DIFFERENCES and ours["is_average"].any():  # every set is in the table
        ours = ours[ours["is_average"]]
    paper = rows[~rows["is_ours"]]
    rows = pd.concat([ours, _paper_means(paper)]) if len(paper) else ours
    styles: dict[str, MethodStyle] = {}
    if rows.groupby("who")["where"].nunique().max() == 1:
        rows = rows.assign(panel="", line=rows["method_title"], series=rows["who"] + ", " + rows["where"])
    else:
        rows = rows.assign(panel=rows["who"], line=rows["where"], series=rows["method_title"])
        for name in rows["method"].unique():
            style = outcomes.style(name)
            styles[name] = replace(style, hollow=True) if style in styles.values() else style
    marks = [styles.get(name, outcomes.style(name)) for name in rows["method"]]
    shown = zip(marks, rows["is_ours"], strict=True)
    marks = [style if is_ours else replace(style, marker="x") for style, is_ours in shown]
    lines = [textwrap.fill(line, _LINE) for line in rows["line"]]
    plots.draw_forest(rows.assign(style=marks, line=lines), path, plots.difference_label(reference, ours["n"]))


def _paper_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the paper's differences over its sets, separately in and out of domain."""
    rows = rows.groupby(["who", "domain", "method", "method_title", "is_ours"], sort=False).agg(
        delta=("delta", "mean"), n=("n", "first"), where=("where", "first"), sets=("where", "size")
    )
    rows = rows.reset_index()
    means = "mean of " + rows["sets"].astype(str) + " sets" + np.where(rows["domain"] == OOD, " (OOD)", "")
    return rows.assign(where=rows["where"].where(rows["sets"].eq(1), means))


def draw_curves(outcomes: TextOutcomes, rows: pd.DataFrame, path: Path, axis: str) -> None:
    """Draw the scores of :func:`~benchmarks.text.ablations.ablation_rows` over the setting with the letter ``axis``.

    Each model, selection and scope has a panel. Intervals (95 %) need three seeds. The dashed line is the baseline.
    """
    panels = [
        (title, group, list(_curves(group, axis)))
        for title, group in panel_rows(rows)
        if group.loc[group[axis].ne(""), axis].nunique() > 1
    ]
    if not any(group["is_ours"].any() for _, group, _ in panels):
        plots.placeholder_figure(path, _NO_RUNS)
        return
    styles = curve_styles(
        (label, outcomes.style(points["method"].iloc[0])) for _, _, series in panels for label, points in series
    )
    labels = list(styles)
    columns = min(len(panels), _COLUMNS)
    lines = math.ceil(len(panels) / columns)
    size = (min(2.1 * columns + _NAMES, plots.WIDTH), 2.2 * lines + 0.5)
    with plots.panel_figure(path, lines, columns, size, plots.CURVES) as (figure, axes):
        for panel, (title, group, series) in zip(axes.flat, panels, strict=False):
            values = sorted({float(value) for value in group[axis] if value})
            apart = 0.012 * (values[-1] - values[0])
            for label, points in series:
                shift = apart * (labels.index(label) - (len(labels) - 1) / 2)  # so that no interval hides another
                half = None if points["half"].isna().all() else points["half"] * 100
                style = {"label": label, "ms": 3.5, "lw": 1.2, "capsize": 2, **styles[label]}
                panel.errorbar(points[axis].astype(float) + shift, points["score"] * 100, yerr=half, **style)
            for score in group.loc[group["is_baseline"], "score"].head(1):
                label = f"mean of {outcomes.baseline_title}"
                panel.axhline(score * 100, color=plots.REFERENCE, lw=0.8, ls="--", zorder=0, label=label)
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0.0), min(high, 101.0))  # intervals of few seeds may exceed the range of scores
            every = math.ceil(len(values) / _TICKS)
            is_named = [(len(values) - 1 - number) % every == 0 for number in range(len(values))]
            names = [f"{value:g}" if named else "" for value, named in zip(values, is_named, strict=True)]
            panel.set_xticks(values, names, size=7)
            panel.set_title(title, fontsize=8)
            panel.set_xlabel(_AXIS_LABELS[axis], fontsize=7)
        plots.legend_below(figure, axes.flat, 2)
        figure.supylabel("Score (%)", fontsize=8)


def _with_paper_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Concatenate our rows and the paper's, with the titles ``who`` (model, selection) and ``where`` (set)."""
    several = rows.loc[rows["is_ours"], "protocol"].nunique() > 1
    ours = rows[rows["is_ours"]]
    half = ((ours["high_mean"] - ours["low_mean"]) / 2).where(ours["n"] >= plots.FEW)
    who = [f"{row.model_title}{f', {PROTOCOLS[row.protocol]}' if several else ''}" for row in ours.itertuples()]
    ours = ours.assign(score=ours["mean"], half=half, who=who)
    paper = rows[rows["paper"].notna()]
    paper = paper.assign(score=paper["paper"], delta=paper["paper_delta"], is_ours=False, n=math.nan, half=math.nan)
    paper["who"] = [f"the paper, {model}".removesuffix(", ") for model in paper["model_title"]]
    both = pd.concat([ours, paper])
    where = [row.scope + (" (OOD)" if row.domain == OOD else "") for row in both.itertuples()]
    return both.assign(where=where)


def panel_rows(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the title and rows of each panel (model, selection, scope): ours first, then the paper's."""
    for (who, _, where), group in _with_paper_rows(rows).groupby(["who", "protocol", "where"], sort=False):
        yield plots.wrap_text(f"{who}\n{where}", _TITLE), group


def _curves(rows: pd.DataFrame, axis: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the label and points of each curve, whose rows differ only in the setting ``axis``."""
    rows = rows[rows[axis].ne("")]
    others = [key for key in ("N", "L", "k", "D") if key != axis and rows.groupby("kind")[key].nunique().max() > 1]
    for key, group in rows.groupby(["kind", *others], sort=False):
        values = dict(zip(others, key[1:], strict=True))
        named = setting_text("-".join(f"{name}{value}" for name, value in values.items() if value))
        title = group["row_title"].iloc[0]
        # a main row may repeat a setting of the ablation; it comes first and is kept
        points = group.drop_duplicates(axis).sort_values(axis, key=lambda column: column.astype(float))
        yield ", ".join(filter(None, (title, named))), points


_MOST_TASKS = 4  # rows of panels


def draw_traces(outcomes: TextOutcomes, path: Path) -> None:
    """Draw expert loads over training: a row per model and task (at most four), then the paper's; a panel per
    method.
    """
    rows = [
        (f"{outcomes.title('model', model)}\n{outcomes.title('task', task)}", by_method)
        for (model, task), by_method in list(select_traces(outcomes).items())[:_MOST_TASKS]
    ]
    published = {name: (outcomes.title("method", name), trace) for name, trace in published_traces(outcomes).items()}
    rows += [("the paper's", published)] if published else []
    if not rows:
        plots.placeholder_figure(path, "this suite trains no routed method")
        return
    columns = max(len(by_method) for _, by_method in rows)
    size = (plots.WIDTH, 1.75 * len(rows) + 0.3)
    with plots.panel_figure(path, len(rows), columns, size, plots.HEATMAP, sharey="row") as (figure, axes):
        for axis_row, (title, by_method) in zip(axes, rows, strict=True):
            shown = [by_method[name] for name in outcomes.methods if name in by_method]
            for axis, (label, trace) in zip(axis_row, shown, strict=False):
                _draw_trace(axis, trace)
                axis.set_title(plots.wrap_text(label, (plots.WIDTH - 1.7) / columns, 7), fontsize=7)
                axis.set_xlabel("experts")
            axis_row[0].set_ylim(max(trace.steps for _, trace in shown), 0)
            axis_row[0].set_ylabel(f"{plots.wrap_text(title, 1.6, 7)}\nstep")
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="load ÷ mean load", extend="max")


def _draw_trace(axis: Any, trace: Trace) -> None:
    count = trace.shares.shape[1]
    plots.show_use(axis, trace.shares * count, interpolation="nearest", extent=(-0.5, count - 0.5, trace.steps, 0))
    axis.set_xticks([0, count - 1], ["1", str(count)])
    axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))


_MOST_MARKED = 32  # experts in a panel with marks
_MOST_LINES = 40  # lines of sets and classes
_MOST_PANELS = 3
_MARKS = {
    "^": "used more than by chance (shuffled rows, 5 % over the panel)",
    "v": "used less than by chance (shuffled rows, 5 % over the panel)",
    "o": "below a panel: every set uses the expert above the average and equally",
}


# a title, and the numbers and shares of :func:`~benchmarks.text.usage.describe_usage`
UsagePanel = tuple[str, Mapping[str, float], Mapping[str, Any]]


def draw_usage_by_set(outcomes: TextOutcomes, path: Path) -> None:
    """Draw expert use per routed method (without controls, at most three), for the first model, task and seed."""
    panels: dict[str, UsagePanel] = {}
    cell = None
    for record, content in outcomes.training:
        if not content["usage"] or outcomes.role(record.method) == CONTROL:
            continue
        cell = cell or (record.model, record.task)
        if cell == (record.model, record.task) and record.method not in panels:
            sets = content["usage"]["tasks"]
            usage = {**content["usage"], "tasks": {record.task: sets[record.task], **sets}}
            method, model, task = (outcomes.title(key, getattr(record, key)) for key in ("method", "model", "task"))
            panels[record.method] = (f"{method}, {model}, trained on {task}", content["routing"], usage)
    draw_usage(list(panels.values())[:_MOST_PANELS], outcomes, path)


def draw_usage(panels: Sequence[UsagePanel], outcomes: Outcomes, path: Path) -> None:
    """Draw expert use as heatmaps below each other: rows are sets (with classes if they fit), columns experts."""
    if not panels:
        plots.placeholder_figure(path, "this suite has no experts to show")
        return
    sets = [usage["tasks"].values() for _, _, usage in panels]
    heights = [sum(1 + len(use["classes"]) for use in uses) for uses in sets]
    classes = sum(heights) <= _MOST_LINES
    marked = not has_random_weights(outcomes.runs)
    if not classes:
        heights = [len(uses) for uses in sets]
    size = (plots.WIDTH, 0.16 * sum(heights) + 0.5 * len(panels) + 0.8)
    with plots.panel_figure(path, len(panels), 1, size, plots.HEATMAP, height_ratios=heights) as (figure, axes):
        for axis, (title, information, usage) in zip(axes[:, 0], panels, strict=True):
            _draw_use(axis, outcomes, usage, classes=classes, marked=marked)
            axis.set_title("\n".join(filter(None, (title, _information_text(information)))), fontsize=7.5)
        axes[-1, 0].set_xlabel("experts")
        if marked:
            for marker, meaning in _MARKS.items():
                axes[0, 0].plot([], [], marker, ms=4, color="black", label=meaning)
            plots.legend_below(figure, axes[:1, 0], 1)
        figure.colorbar(plots.USE, ax=axes, shrink=0.6, label="use ÷ mean use over sets", extend="max")


def _information_text(numbers: Mapping[str, float]) -> str:
    """Format the mutual information of experts with set and class; empty if it was not measured."""
    return "; ".join(
        f"{label} {numbers[name]:.3f} bit (chance {numbers[f'{name}_chance']:.3f}, 95 % "
        f"{numbers[f'{name}_chance_95']:.3f})"
        for name, label in (("task_information", "set"), ("class_information", "class"))
        if name in numbers
    )


def _draw_use(axis: Any, outcomes: Outcomes, usage: Mapping[str, Any], *, classes: bool, marked: bool) -> None:
    sets = usage["tasks"]
    mean = np.mean([use["shares"] for use in sets.values()], axis=0)
    lines: list[tuple[str, list[float], list[int] | None]] = []  # label, shares, and the marks of a set
    for name, use in sets.items():
        lines.append((outcomes.title("task", name), use["shares"], use["marks"]))
        labels = cast(TaskEntry, outcomes.benchmark.tasks[name]).labels
        lines += [(f"{labels[int(number)]} ", shares, None) for number, shares in use["classes"].items() if classes]
    shares = np.array([shares for _, shares, _ in lines])
    plots.show_use(axis, plots.divide_by_mean(shares, mean))
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    for tick, (_, _, marks) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if marks is None else "bold")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if not marked:
        return
    for line, (_, _, marks) in enumerate(lines if len(mean) <= _MOST_MARKED else ()):
        for expert, mark in enumerate(marks or ()):
            if mark:
                axis.plot(expert, line, "^" if mark > 0 else "v", ms=4, color="black", mec="white", mew=0.4)
    if shared := usage["shared"]:  # a line without points would be drawn in the corner of the figure
        axis.plot(shared, [len(lines) - 0.15] * len(shared), "o", ms=2.5, color="black", clip_on=False)
