"""Compare the ablations of a text benchmark with the baseline, and with the paper's numbers: tables and figures."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.harness.config.method_specs import setting_text, setting_values
from benchmarks.harness.config.methods import ABLATION, CONTROL
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
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import shared_pairs, with_verdicts
from benchmarks.text.definition import ABLATION_COLUMNS, CLEAN, ID, OOD, PUBLISHED, Ablation
from benchmarks.text.outcomes import ARROW, DOMAINS, TextOutcomes

_AVERAGE_OF = "average of "
_CELL = ["protocol", "domain", "model", "scope"]
_ROW = [*_CELL, "method"]


def ablation_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute the numbers of an ablation, a row per selection, domain, model, scope and method.

    A scope is a task, a pair of tasks or an average, with the baseline and at least one ablated method. Columns: these
    keys, ``mean``, ``std``, ``n``, the paired difference to the baseline (``delta``, ``low``, ``high``, ``p``,
    ``p_holm`` over the rows of a scope, ``verdict``), ``active_neurons``, the paper's numbers (``paper``,
    ``paper_delta``, ``status``, ``source``), ``is_ours``, ``is_average``, and titles.
    """
    outcomes = outcomes.ablated
    names = [
        name
        for row in ablation.rows
        for name in outcomes.methods
        if name.partition(SETTING)[0] == row
    ]
    seeds = outcomes.seeds[outcomes.seeds["protocol"].isin(outcomes.run_protocols)]
    seeds = seeds[seeds["method"].isin(names) & seeds["domain"].isin([ID, OOD])]
    seeds = pd.concat([seeds, _averages(seeds)])[[*_ROW, "seed", "value"]]
    is_ablated = {
        name: SETTING in name or outcomes.role(name) in (ABLATION, CONTROL) for name in names
    }
    seeds = seeds.groupby(_CELL, sort=False).filter(
        lambda cell: (
            cell["method"].map(is_ablated).any() and cell["method"].eq(outcomes.baseline).any()
        )
    )
    seeds = shared_pairs(seeds, _CELL, ["method"], "seed")
    rows = summarize(
        seeds, _ROW, itertools.pairwise(names) if ablation.steps else [(outcomes.baseline, None)]
    )
    # grouped means, which differ from others in the last digit
    rows[["mean", "std"]] = seeds.groupby(_ROW, sort=False)["value"].agg(["mean", "std"]).to_numpy()
    rows["std"] = rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"])
    rows = with_verdicts(rows.drop(columns="pairs"), _CELL)
    neurons = cell_means(outcomes.records, ["model", "method"], ["active_neurons"])
    rows = _join_paper(outcomes, ablation, with_numbers(rows, ["model", "method"], neurons))
    rows = rows.assign(is_ours=rows["mean"].notna())
    scopes = list(rows["scope"].unique())
    sort_keys = [
        (
            not row.is_ours,
            row.model,
            row.protocol,
            row.domain,
            scopes.index(row.scope),
            _sort_key(ablation, row.method),
        )
        for row in rows.itertuples()
    ]
    rows = rows.iloc[sorted(range(len(rows)), key=lambda number: sort_keys[number])]
    return _add_titles(outcomes, outcomes.with_titles(rows.reset_index(drop=True)))


def _sort_key(ablation: Ablation, name: str) -> tuple[int, list[float], str]:
    """Return the sort key of a row: its position in the ablation, then the numbers of its setting."""
    row, _, setting = name.partition(SETTING)
    return (
        ablation.rows.index(row),
        [float(number) for number in re.findall(r"\d+\.?\d*", setting)],
        setting,
    )


def _averages(seeds: pd.DataFrame) -> pd.DataFrame:
    """Average each seed over the tasks (or pairs) that all rows of a selection, domain and model have."""
    averages = [seeds.iloc[:0]]
    for (protocol, domain, model), group in seeds.groupby(
        ["protocol", "domain", "model"], sort=False
    ):
        scopes = group.groupby("scope", sort=False)["method"].nunique()
        shared = list(scopes[scopes == group["method"].nunique()].index)
        if len(shared) < 2:
            continue
        wide = group[group["scope"].isin(shared)].pivot_table(
            index=["method", "seed"], columns="scope", values="value", sort=False
        )
        means = wide.dropna().mean(axis=1).rename("value").reset_index()
        listed = name_or_count(shared, "tasks" if domain == ID else "pairs")
        averages.append(
            means.assign(protocol=protocol, domain=domain, model=model, scope=_AVERAGE_OF + listed)
        )
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
    published = published.assign(
        paper=published["value"], paper_delta=published_delta(published, outcomes.baseline)
    )
    on = ["protocol", "model", "scope", "method"]
    rows = rows.merge(
        published[[*on, "paper", "paper_delta", "status", "source"]], on=on, how="outer", sort=False
    )
    return rows.assign(
        domain=rows["domain"].fillna(rows["scope"].map(lambda name: OOD if ARROW in name else ID))
    )


def _add_titles(outcomes: TextOutcomes, rows: pd.DataFrame) -> pd.DataFrame:
    """Add titles with settings, and ``is_average``; if k varies, titles of main rows include N and k/N."""
    configs = {run.id: run.config for run in outcomes.runs}
    first_runs = outcomes.records.drop_duplicates(["model", "method"]).set_index(
        ["model", "method"]
    )["run_id"]
    k_varies = any("k" in setting_values(name.partition(SETTING)[2]) for name in rows["method"])
    titles = []
    for row in rows.itertuples():
        name, _, setting = row.method.partition(SETTING)
        config = configs[first_runs[row.model, row.method]] if row.is_ours else {}
        if k_varies and not setting and config.get("kind") == "emoe":
            setting = f"N{config['num_experts']}-k{config['top_k'] / config['num_experts']:g}"
        titles.append(
            ", ".join(filter(None, (outcomes.title("method", name), setting_text(setting))))
        )
    return rows.assign(method_title=titles, is_average=rows["scope"].str.startswith(_AVERAGE_OF))


def ablation_table(outcomes: TextOutcomes, name: str) -> Table:
    """Make the table of an ablation."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    rows = ablation_rows(outcomes, definition)
    frame = rows.assign(
        **{
            key: rows[key].fillna("").replace("", MISSING)
            for key in ("verdict", "status", "source")
        },
        n=[MISSING if math.isnan(n) else f"{n:.0f}" for n in rows["n"]],
        model_title=rows["model_title"].replace("", MISSING),
        on=rows["scope"] + " (" + rows["domain"].map(DOMAINS) + ")",
    )
    return Table(
        definition.title,
        f"{definition.question} Score (%): mean ± standard deviation over the n seeds that all rows of a set and "
        f"selection share. Δ is the difference to the {'row above' if definition.steps else 'first row'}, paired by "
        "seed, with a 95 % confidence interval (Student's t). p is from the paired t-test, corrected with Holm's "
        "procedure over the rows of a set and selection; the verdict uses it at 5 %. The paper's numbers are for its "
        "own models and tasks.",
        {
            "model_title": "Model",
            "selection": "Selection",
            "on": "On",
            "method_title": "Method",
            "n": "n",
        },
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


def ablation_figure(outcomes: TextOutcomes, name: str) -> Figure:
    """Return the figure of an ablation: a forest plot of the differences."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    reference = "the row above" if definition.steps else outcomes.baseline_title
    return Figure(
        partial(draw_differences, name=name),
        f"{definition.title}. Differences to {reference}, paired by seed, with 95 % intervals: averages over the sets, "
        "hollow out of domain. The table has every set and selection. Crosses, if any, are the paper's, averaged over "
        "its sets.",
    )


def draw_differences(outcomes: TextOutcomes, path: Path, name: str) -> None:
    """Draw the differences of :func:`ablation_rows` to their reference as a forest plot.

    Panels are models (with their first selection), and lines are methods. A mark is the average over the sets (or the
    single set), in domain or out of domain. Intervals (95 %) need three seeds.
    """
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    rows = ablation_rows(outcomes, definition)
    rows = rows.assign(panel=rows["model_title"].replace("", "the paper"))
    paper = (
        rows[rows["paper_delta"].notna()]
        .drop(columns=["delta", "n"])
        .rename(columns={"paper_delta": "delta"})
    )
    ours = rows[rows["is_ours"] & rows["delta"].notna()]
    if ours.empty:
        plots.placeholder_figure(path)
        return
    ours = ours[ours["protocol"] == ours.groupby("model")["protocol"].transform("first")]
    has_average = ours.groupby(["panel", "domain"])["is_average"].transform("any")
    means = (
        paper.groupby(["panel", "domain", "method", "method_title"], sort=False)["delta"]
        .mean()
        .reset_index()
    )
    rows = pd.concat([ours[ours["is_average"] == has_average], means.assign(is_ours=False)])
    marks = []
    for row in rows.itertuples():
        style = outcomes.style(row.method)
        if not row.is_ours:
            style = replace(style, marker="+" if row.domain == OOD else "x")
        elif row.domain == OOD:
            style = replace(style, hollow=True)
        marks.append(style)
    series = rows["is_ours"].map({True: "", False: "the paper, "}) + rows["domain"].map(DOMAINS)
    lines = [plots.wrap_text(title, 2, 7) for title in rows["method_title"]]
    reference = "the row above" if definition.steps else "the baseline"
    label = f"Difference to {reference} (points), {plots.count_text(ours['n'])}"
    plots.draw_forest(rows.assign(line=lines, series=series, style=marks), path, label)
