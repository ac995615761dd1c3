"""Compare the ablations of a text benchmark with the baseline, and with the paper's numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import ABLATION, CONTROL, setting_text, setting_values
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import NUMBER_COLUMNS, check_names
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
from benchmarks.harness.results.records import collect
from benchmarks.harness.results.statistics import shared_pairs, with_verdicts
from benchmarks.text.definition import ABLATION_COLUMNS, CLEAN, ID, OOD, PUBLISHED, Ablation
from benchmarks.text.figures import draw_curves, draw_differences
from benchmarks.text.outcomes import ARROW, TextOutcomes

_AVERAGE_OF = "average of "
AXES = {"train_share": "D", "top_k_fraction": "k"}  # letters of settings that may be the x axis of a figure
_AXIS_WORDS = {"train_share": "the share of the training rows", "top_k_fraction": "the share of experts in use"}
_LETTERS = ["D", "k", "N", "L"]
_CELL = ["protocol", "domain", "model", "scope"]
_ROW = [*_CELL, "method"]


class Ablations:
    """Compute the ablations of a benchmark from its finished runs, each at its first use."""

    def __init__(self, benchmark: AnyBenchmark, runs: list[Run]) -> None:
        self._benchmark, self._runs, self._records = benchmark, runs, collect(runs)
        self.usual = TextOutcomes(benchmark, runs, self._records)  # without the rows of ablations
        self._definitions: Mapping[str, Ablation] = benchmark.definition.ablations
        self._rows = cache(lambda name: ablation_rows(self._outcomes, self._definitions[name]))
        self.tables = {name: partial(self._table, name) for name in self._definitions}
        self.figures = {name: Figure(partial(self._draw, name), self._caption(name)) for name in self._definitions}

    def claim_numbers(self) -> pd.DataFrame:
        """Return the claim numbers of main rows and ablations."""
        usual = self.usual.claim_numbers()
        if not self._definitions:
            return usual
        numbers, keys = self._outcomes.claim_numbers(), ["method", "setting", "domain"]
        is_new = ~pd.MultiIndex.from_frame(numbers[keys]).isin(pd.MultiIndex.from_frame(usual[keys]))
        return pd.concat([usual, numbers[is_new]], ignore_index=True)

    @cached_property
    def _outcomes(self) -> TextOutcomes:
        return TextOutcomes(self._benchmark, self._runs, self._records, include_ablations=True)

    def _table(self, name: str, _usual: TextOutcomes) -> Table:
        table = ablation_table(self._definitions[name], self._rows(name))
        return replace(table, origins=self._outcomes.origins)

    def _caption(self, name: str) -> str:
        """Describe the figure of an ablation."""
        definition, baseline = self._definitions[name], self.usual.baseline_title
        if definition.axis:
            return (
                f"{definition.title}. Scores over {_AXIS_WORDS[definition.axis]}, with 95 % intervals. The dashed line is "
                f"the mean of {baseline}. Separate panels show the paper's numbers. Axes do not start at zero."
            )
        reference = "the row above" if definition.steps else baseline
        crosses = "; crosses are the paper's, averaged over its sets" if definition.paper else ""
        return f"{definition.title}. Differences to {reference}, paired by seed, with 95 % intervals{crosses}."

    def _draw(self, name: str, _usual: TextOutcomes, path: Path) -> None:
        definition = self._definitions[name]
        if definition.axis:
            draw_curves(self._outcomes, self._rows(name), path, AXES[definition.axis])
        else:
            reference = "the row above" if definition.steps else "the baseline"
            draw_differences(self._outcomes, self._rows(name), path, reference)


def ablation_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute the numbers of an ablation, a row per selection, domain, model, scope and method.

    A scope is a task, a pair of tasks or an average, with the baseline and at least one ablated method. Columns: these
    keys, ``mean``, ``std``, ``n``, the paired difference to the baseline (``delta``, ``low``, ``high``, ``p``, ``p_holm``
    over the rows of a scope, ``verdict``), ``active_neurons``, the paper's numbers (``paper``, ``paper_delta``,
    ``status``, ``source``), and titles.
    """
    names = [name for row in ablation.rows for name in outcomes.methods if name.partition(SETTING)[0] == row]
    seeds = outcomes.seeds[outcomes.seeds["protocol"].isin(outcomes.run_protocols)]
    seeds = outcomes.with_scopes(seeds[seeds["method"].isin(names) & seeds["domain"].isin([ID, OOD])])
    seeds = pd.concat([seeds, _averages(seeds)])[[*_ROW, "seed", "value"]]
    ablated = {name for name in names if SETTING in name or outcomes.role(name) in (ABLATION, CONTROL)}
    of_cell = seeds.groupby(_CELL)["method"]
    seeds = seeds[
        of_cell.transform(lambda names: not ablated.isdisjoint(names))
        & of_cell.transform(lambda names: outcomes.baseline in set(names))
    ]
    seeds = shared_pairs(seeds, _CELL, ["method"], "seed")
    rows = summarize(seeds, _ROW, itertools.pairwise(names) if ablation.steps else [(outcomes.baseline, None)])
    # grouped means, because they round differently in the last digit
    rows[["mean", "std"]] = seeds.groupby(_ROW, sort=False)["value"].agg(["mean", "std"]).to_numpy()
    rows["std"] = rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"])
    rows = with_verdicts(rows.drop(columns="pairs"), _CELL)
    rows = with_numbers(
        rows, ["model", "method"], cell_means(outcomes.records, ["model", "method"], ["active_neurons"])
    )
    rows = _join_paper(outcomes, ablation, rows)
    rows = rows.assign(is_ours=rows["mean"].notna())
    methods = sorted(rows["method"].drop_duplicates(), key=lambda name: _sort_key(ablation, name))
    in_order = {"scope": rows["scope"].drop_duplicates(), "method": methods, "is_ours": [True, False]}
    ranks = {column: {name: rank for rank, name in enumerate(names)} for column, names in in_order.items()}
    rows = rows.sort_values(
        ["is_ours", "model", "protocol", "domain", "scope", "method"],
        key=lambda column: column.map(ranks[column.name]) if column.name in ranks else column,
        kind="stable",
    )
    return _add_settings(outcomes, outcomes.titled(rows.reset_index(drop=True)))


def _sort_key(ablation: Ablation, name: str) -> tuple[int, list[tuple[str, float, str]]]:
    """Return the sort key of a row: its position in the ablation, then the numbers of its setting."""
    row, _, setting = name.partition(SETTING)
    values = []
    for key, text in setting_values(setting).items():
        number = pd.to_numeric(text, errors="coerce")  # layers may be words
        values.append((key, math.inf if math.isnan(number) else float(number), text))
    return ablation.rows.index(row), values


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
        published = read_published(outcomes.benchmark, ablation.paper, ABLATION_COLUMNS)
        tasks = outcomes.benchmark.tasks
        scopes = [outcomes.pair_title(name, other) for name, task in tasks.items() for other in (name, *task.ood)]
        valid = {"method": ablation.rows, "model": load_models(), "scope": scopes}
        for column, names in valid.items():
            given = [name for name in published[column] if name and not name.startswith("average")]
            check_names(f"{outcomes.benchmark.folder / ablation.paper}: '", column, given, names)
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
    """Add titles with settings, the settings by letter (k as a share of N), and ``kind``, the base method."""
    settings = []
    for row in rows.itertuples():
        name, _, setting = row.method.partition(SETTING)
        title = outcomes.title("method", name)
        letters = {**dict.fromkeys(_LETTERS, ""), "D": "1", **setting_values(setting)}
        if row.is_ours:
            letters |= _settings_by_letter(outcomes.specs[row.model, row.method])
        shown = {
            "method_title": ", ".join(filter(None, (title, setting_text(setting)))),
            "row_title": title,
            "is_baseline": row.method == outcomes.baseline,
            "is_average": row.scope.startswith(_AVERAGE_OF),
            **letters,
            "kind": outcomes.benchmark.definition.methods[name].method or name,
        }
        settings.append(shown)
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


def ablation_table(definition: Ablation, rows: pd.DataFrame) -> Table:
    """Make a table from the rows of :func:`ablation_rows`; over k, titles of main rows include N and k/N."""
    if definition.axis == "top_k_fraction":
        is_main_row = rows["N"].ne("") & ~rows["method"].str.contains(SETTING, regex=False)
        titles = rows["method_title"] + ", N " + rows["N"] + ", k/N " + rows["k"]
        rows = rows.assign(method_title=rows["method_title"].mask(is_main_row, titles))
    frame = rows.assign(
        **{key: rows[key].fillna("").replace("", MISSING) for key in ("verdict", "status", "source")},
        n=[MISSING if math.isnan(n) else f"{n:.0f}" for n in rows["n"]],
        model_title=rows["model_title"].replace("", MISSING),
        on=[f"{row.scope} ({'in domain' if row.domain == ID else 'out of domain'})" for row in rows.itertuples()],
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
    )
