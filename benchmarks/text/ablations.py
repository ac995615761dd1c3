"""Compare the ablations of a text benchmark with the baseline, and with the paper's numbers: tables and figures."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.config.methods import ABLATION, CONTROL, setting_text, setting_values
from benchmarks.harness.config.yaml import NUMBER_COLUMNS
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import (
    SETTING,
    cell_means,
    name_or_count,
    published_delta,
    read_published,
    summarize,
    with_numbers,
)
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import distinct_styles
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import shared_pairs, with_verdicts
from benchmarks.text.definition import ABLATION_COLUMNS, CLEAN, ID, OOD, PUBLISHED, Ablation
from benchmarks.text.outcomes import ARROW, PROTOCOLS, TextOutcomes

_AVERAGE_OF = "average of "
_LETTERS = ["D", "k", "N", "L"]  # of settings: share of the rows, k/N, N, layers
_CELL = ["protocol", "domain", "model", "scope"]
_ROW = [*_CELL, "method"]


def ablation_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute the numbers of an ablation, a row per selection, domain, model, scope and method.

    A scope is a task, a pair of tasks or an average, with the baseline and at least one ablated method. Columns: these
    keys, ``mean``, ``std``, ``n``, the paired difference to the baseline (``delta``, ``low``, ``high``, ``p``,
    ``p_holm`` over the rows of a scope, ``verdict``), ``active_neurons``, the paper's numbers (``paper``,
    ``paper_delta``, ``status``, ``source``), the settings by letter (k as a share of N), ``kind``, the base method, and
    titles.
    """
    outcomes = outcomes.ablated
    names = [name for row in ablation.rows for name in outcomes.methods if name.partition(SETTING)[0] == row]
    seeds = outcomes.seeds[outcomes.seeds["protocol"].isin(outcomes.run_protocols)]
    seeds = seeds[seeds["method"].isin(names) & seeds["domain"].isin([ID, OOD])]
    seeds = pd.concat([seeds, _averages(seeds)])[[*_ROW, "seed", "value"]]
    is_ablated = {name: SETTING in name or outcomes.role(name) in (ABLATION, CONTROL) for name in names}
    seeds = seeds.groupby(_CELL, sort=False).filter(
        lambda cell: cell["method"].map(is_ablated).any() and cell["method"].eq(outcomes.baseline).any()
    )
    seeds = shared_pairs(seeds, _CELL, ["method"], "seed")
    rows = summarize(seeds, _ROW, itertools.pairwise(names) if ablation.steps else [(outcomes.baseline, None)])
    # grouped means, because they round differently in the last digit
    rows[["mean", "std"]] = seeds.groupby(_ROW, sort=False)["value"].agg(["mean", "std"]).to_numpy()
    rows["std"] = rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"])
    rows = with_verdicts(rows.drop(columns="pairs"), _CELL)
    neurons = cell_means(outcomes.records, ["model", "method"], ["active_neurons"])
    rows = _join_paper(outcomes, ablation, with_numbers(rows, ["model", "method"], neurons))
    rows = rows.assign(is_ours=rows["mean"].notna())
    methods = sorted(rows["method"].drop_duplicates(), key=lambda name: _sort_key(ablation, name))
    in_order = {"scope": list(rows["scope"].unique()), "method": methods, "is_ours": [True, False]}
    rows = rows.sort_values(
        ["is_ours", "model", "protocol", "domain", "scope", "method"],
        key=lambda column: column.map(in_order[column.name].index) if column.name in in_order else column,
        kind="stable",
    )
    return _add_settings(outcomes, outcomes.with_titles(rows.reset_index(drop=True)))


def _sort_key(ablation: Ablation, name: str) -> tuple[int, list[float], str]:
    """Return the sort key of a row: its position in the ablation, then the numbers of its setting."""
    row, _, setting = name.partition(SETTING)
    return ablation.rows.index(row), [float(number) for number in re.findall(r"\d+\.?\d*", setting)], setting


def _averages(seeds: pd.DataFrame) -> pd.DataFrame:
    """Average per seed over the tasks (or pairs) that all rows of a selection, domain and model share."""
    averages = [seeds.iloc[:0]]
    for (protocol, domain, model), group in seeds.groupby(["protocol", "domain", "model"], sort=False):
        scopes = group.groupby("scope", sort=False)["method"].nunique()
        shared = list(scopes[scopes == group["method"].nunique()].index)
        if len(shared) < 2:
            continue
        wide = group[group["scope"].isin(shared)].pivot_table(
            index=["method", "seed"], columns="scope", values="value", sort=False
        )
        means = wide.dropna().mean(axis=1).rename("value").reset_index()
        listed = name_or_count(shared, "tasks" if domain == ID else "pairs")
        averages.append(means.assign(protocol=protocol, domain=domain, model=model, scope=_AVERAGE_OF + listed))
    return pd.concat(averages)


def _join_paper(outcomes: TextOutcomes, ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Join the paper's numbers (authors' selection), and add the rows that only the paper has."""
    published = pd.DataFrame(columns=[*ABLATION_COLUMNS, *NUMBER_COLUMNS])
    if ablation.paper:
        published = read_published(outcomes.benchmark, ablation.paper)
    settings = published["setting"].astype(str)
    published = published.assign(
        method=published["method"].where(settings.eq(""), published["method"] + SETTING + settings),
        value=published["value"].astype(float) / 100,
        protocol=PUBLISHED,
    )
    published = published.assign(paper=published["value"], paper_delta=published_delta(published, outcomes.baseline))
    on = ["protocol", "model", "scope", "method"]
    rows = rows.merge(published[[*on, "paper", "paper_delta", "status", "source"]], on=on, how="outer", sort=False)
    return rows.assign(domain=rows["domain"].fillna(rows["scope"].map(lambda name: OOD if ARROW in name else ID)))


def _add_settings(outcomes: TextOutcomes, rows: pd.DataFrame) -> pd.DataFrame:
    """Add titles with settings, the settings by letter, and ``kind``."""
    by_id = {run.id: run.spec for run in outcomes.runs}
    first_runs = outcomes.records.drop_duplicates(["model", "method"]).set_index(["model", "method"])["run_id"]
    settings = []
    for row in rows.itertuples():
        name, _, setting = row.method.partition(SETTING)
        letters = dict.fromkeys(_LETTERS, "") | {"D": "1"} | setting_values(setting)
        if row.is_ours:
            letters |= _settings_by_letter(by_id[first_runs[row.model, row.method]])
        title = outcomes.title("method", name)
        shown = {
            "method_title": ", ".join(filter(None, (title, setting_text(setting)))),
            "row_title": title,
            "is_baseline": row.method == outcomes.baseline,
            "is_average": row.scope.startswith(_AVERAGE_OF),
        }
        settings.append({**shown, **letters, "kind": outcomes.benchmark.definition.methods[name].method or name})
    columns = ["method_title", "row_title", "is_baseline", "is_average", *_LETTERS, "kind"]
    return rows.assign(**pd.DataFrame(settings, columns=columns, index=rows.index).to_dict("series"))


def _settings_by_letter(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's settings by letter."""
    config = spec["method"]["config"]
    letters = {"D": f"{spec.get('training', {}).get('train_share', 1)}"}
    if config and config["kind"] == "emoe":
        layers = config["layers"]
        letters |= {"N": str(config["num_experts"]), "k": f"{config['top_k'] / config['num_experts']:g}"}
        letters["L"] = "+".join(map(str, layers)) if isinstance(layers, list) else layers
    return letters


def ablation_table(outcomes: TextOutcomes, name: str) -> Table:
    """Make the table of an ablation; over k, titles of main rows include N and k/N."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    rows = ablation_rows(outcomes, definition)
    if definition.axis == "top_k_fraction":
        is_main_row = rows["N"].ne("") & ~rows["method"].str.contains(SETTING, regex=False)
        titles = rows["method_title"] + ", N " + rows["N"] + ", k/N " + rows["k"]
        rows = rows.assign(method_title=rows["method_title"].mask(is_main_row, titles))
    frame = rows.assign(
        **{key: rows[key].fillna("").replace("", MISSING) for key in ("verdict", "status", "source")},
        n=[MISSING if math.isnan(n) else f"{n:.0f}" for n in rows["n"]],
        model_title=rows["model_title"].replace("", MISSING),
        on=rows["scope"] + rows["domain"].map({ID: " (in domain)", OOD: " (out of domain)"}),
    )
    return Table(
        definition.title,
        f"{definition.question} Score (%): mean ± standard deviation over the n seeds that all rows of a set and "
        f"selection share. Δ is the difference to the {'row above' if definition.steps else 'first row'}, paired by "
        "seed, with a 95 % confidence interval (Student's t). p is from the paired t-test, corrected with Holm's "
        "procedure over the rows of a set and selection; the verdict uses it at 5 %. The paper's numbers are for its "
        "own models and tasks.",
        {"model_title": "Model", "selection": "Selection", "on": "On", "method_title": "Method", "n": "n"},
        [
            Column("score", "mean", "Score", std="std"),
            Column("score", "delta", "Δ", interval=("low", "high"), signed=True, decimals=2),
            Column("p_value", "p_holm", "p (Holm)"),
            Column("active_neurons", "active_neurons"),
            Column("score", "paper", "Paper", decimals=2),
            Column("score", "paper_delta", "Δ paper", signed=True, decimals=2),
        ],
        frame,
        notes={"verdict": "Verdict", "status": "Status", "source": "Source of the paper's number"},
        origins=outcomes.ablated.origins,
    )


_COLUMNS, _NAMES = 3, 2.3  # panels per line, inches for their names
_TITLE, _LINE = 1.4, 34  # inches of a panel's title, letters of a forest plot's labels
_MOST_DIFFERENCES = 40  # differences in a forest plot
# setting of the x axis: its letter and its label
_AXES = {"train_share": ("D", "Share of the training rows"), "top_k_fraction": ("k", "Share of experts in use")}


def ablation_figure(outcomes: TextOutcomes, name: str) -> Figure:
    """Return the figure of an ablation: curves over its axis, else a forest plot of differences."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    if definition.axis:
        return Figure(
            partial(draw_curves, name=name),
            f"{definition.title}. Scores over the {_AXES[definition.axis][1].lower()}, with 95 % intervals. The dashed "
            f"line is the mean of {outcomes.baseline_title}. Separate panels show the paper's numbers. Axes do not "
            "start at zero.",
        )
    reference = "the row above" if definition.steps else outcomes.baseline_title
    crosses = "; crosses are the paper's, averaged over its sets" if definition.paper else ""
    return Figure(
        partial(draw_differences, name=name),
        f"{definition.title}. Differences to {reference}, paired by seed, with 95 % intervals{crosses}.",
    )


def draw_differences(outcomes: TextOutcomes, path: Path, name: str) -> None:
    """Draw the differences of :func:`ablation_rows` to their reference as a forest plot.

    Lines are sets, and marks are methods. If ours and the paper's have one set each, lines are methods instead. Many
    sets are replaced by averages. Intervals (95 %) need three seeds; crosses are the paper's means over its sets.
    """
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    rows = _with_paper_rows(ablation_rows(outcomes, definition))
    rows = rows[rows["delta"].notna()]
    ours, paper = rows[rows["is_ours"]], rows[~rows["is_ours"]]
    if ours.empty:
        plots.placeholder_figure(path)
        return
    if len(ours) > _MOST_DIFFERENCES and ours["is_average"].any():  # every set is in the table
        ours = ours[ours["is_average"]]
    rows = pd.concat([ours, _paper_means(paper)]) if len(paper) else ours
    styles = {method: outcomes.style(method) for method in rows["method"].unique()}
    if rows.groupby("who")["where"].nunique().max() == 1:
        rows = rows.assign(panel="", line=rows["method_title"], series=rows["who"] + ", " + rows["where"])
    else:
        rows = rows.assign(panel=rows["who"], line=rows["where"], series=rows["method_title"])
        styles = distinct_styles(styles.items())
    marks = [
        styles[row.method] if row.is_ours else replace(styles[row.method], marker="x") for row in rows.itertuples()
    ]
    lines = [textwrap.fill(line, _LINE) for line in rows["line"]]
    label = f"Difference to {'the row above' if definition.steps else 'the baseline'} (points)"
    label = ", ".join(filter(None, (label, plots.count_text(ours["n"]))))
    plots.draw_forest(rows.assign(style=marks, line=lines), path, label)


def _paper_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the paper's differences over its sets, separately in and out of domain."""
    rows = rows.groupby(["who", "domain", "method", "method_title", "is_ours"], sort=False).agg(
        delta=("delta", "mean"), n=("n", "first"), where=("where", "first"), sets=("where", "size")
    )
    rows = rows.reset_index()
    means = "mean of " + rows["sets"].astype(str) + " sets" + np.where(rows["domain"] == OOD, " (OOD)", "")
    return rows.assign(where=rows["where"].where(rows["sets"].eq(1), means))


def draw_curves(outcomes: TextOutcomes, path: Path, name: str) -> None:
    """Draw the scores of :func:`ablation_rows` over the axis of an ablation.

    Each model, selection and scope has a panel. Intervals (95 %) need three seeds. The dashed line is the baseline.
    """
    definition = outcomes.benchmark.definition.ablations[name]
    axis, axis_label = _AXES[definition.axis]
    panels = [
        (title, group, list(_curves(group, axis)))
        for title, group in panel_rows(ablation_rows(outcomes, definition))
        if group.loc[group[axis].ne(""), axis].nunique() > 1
    ]
    if not any(group["is_ours"].any() for _, group, _ in panels):
        plots.placeholder_figure(path)
        return
    styles = distinct_styles(
        (label, outcomes.style(points["method"].iloc[0])) for _, _, curves in panels for label, points in curves
    )
    labels = list(styles)
    columns = min(len(panels), _COLUMNS)
    lines = math.ceil(len(panels) / columns)
    size = (min(2.1 * columns + _NAMES, plots.WIDTH), 2.2 * lines + 0.5)
    with plots.panel_figure(path, lines, columns, size, plots.CURVES) as (figure, axes):
        for panel, (title, group, curves) in zip(axes.flat, panels, strict=False):
            values = sorted({float(value) for value in group[axis] if value})
            apart = 0.012 * (values[-1] - values[0])
            for label, points in curves:
                shift = apart * (labels.index(label) - (len(labels) - 1) / 2)  # so that no interval hides another
                half = None if points["half"].isna().all() else points["half"] * 100
                style = {"label": label, "ms": 3.5, "lw": 1.2, "capsize": 2, **styles[label].line}
                panel.errorbar(points[axis].astype(float) + shift, points["score"] * 100, yerr=half, **style)
            for score in group.loc[group["is_baseline"], "score"].head(1):
                reference = f"mean of {outcomes.baseline_title}"
                panel.axhline(score * 100, color=plots.REFERENCE, lw=0.8, ls="--", zorder=0, label=reference)
            panel.set_xticks(values, [f"{value:g}" for value in values], size=7, rotation=90)
            panel.set_title(title, fontsize=8)
            panel.set_xlabel(axis_label, fontsize=7)
        plots.legend_below(figure, axes.flat, 2)
        figure.supylabel("Score (%)", fontsize=8)


def _with_paper_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Concatenate our rows and the paper's, with the titles ``who`` (model, selection) and ``where`` (set)."""
    ours, paper = rows[rows["is_ours"]], rows[rows["paper"].notna()]
    half = ((ours["high_mean"] - ours["low_mean"]) / 2).where(ours["n"] >= plots.FEW)
    selections = ", " + ours["protocol"].map(PROTOCOLS) if ours["protocol"].nunique() > 1 else ""
    ours = ours.assign(score=ours["mean"], half=half, who=ours["model_title"].astype(str) + selections)
    paper = paper.assign(score=paper["paper"], delta=paper["paper_delta"], is_ours=False, n=math.nan, half=math.nan)
    paper["who"] = [f"the paper, {model}".removesuffix(", ") for model in paper["model_title"]]
    both = pd.concat([ours, paper])
    return both.assign(where=both["scope"] + both["domain"].map({ID: "", OOD: " (OOD)"}))


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
