"""Compare the ablations of a text benchmark with the baseline, and with the paper's numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import ABLATION, CONTROL, setting_text, setting_values
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import NUMBER_COLUMNS, check_names
from benchmarks.harness.report.common import SETTING, means_by, published_delta, read_published, with_numbers, with_runs
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.records import collect
from benchmarks.harness.results.statistics import confidence_interval, paired_differences, with_verdicts
from benchmarks.text.definition import ABLATION_COLUMNS, Ablation
from benchmarks.text.figures import draw_curves, draw_differences
from benchmarks.text.grid import CLEAN, ID, OOD, PUBLISHED
from benchmarks.text.outcomes import ARROW, TextOutcomes

_AVERAGE = "average"
AVERAGE_OF = f"{_AVERAGE} of "
# letters of the settings that a figure may have on its axis
_N_AND_K = "top_k_fraction"
AXES = {"train_share": "D", _N_AND_K: "k"}
_FEW = 3  # sets that an average names
_CELL = ["protocol", "domain", "model", "scope"]
_ROW = [*_CELL, "method"]
_PAIRS = ["task", "eval_task"]
_AXIS_VALUES = ["D", "k", "N", "L"]


class Ablations:
    """Compute the ablations of a benchmark, each when it is first asked for.

    Args:
        benchmark: The benchmark, whose definition has ``ablations``.
        runs: All its finished runs.

    Attributes:
        usual: The outcomes without the rows of ablations.
        tables: The function that makes each table, by name.
        figures: The function that draws each figure, by name.
    """

    def __init__(self, benchmark: AnyBenchmark, runs: list[Run]) -> None:
        self._benchmark, self._runs, self._records = benchmark, runs, collect(runs)
        self.usual = TextOutcomes(benchmark, runs, self._records)
        self._definitions: Mapping[str, Ablation] = benchmark.definition.ablations
        self._rows: dict[str, pd.DataFrame] = {}
        self.tables = {name: partial(self._table, name) for name in self._definitions}
        self.figures = {name: partial(self._draw, name) for name in self._definitions}

    def compared(self) -> pd.DataFrame:
        """Return the numbers that claims are tested on, with those of ablations."""
        usual = self.usual.compared()
        if not self._definitions:
            return usual
        found, keys = self._outcomes.compared(), ["method", "setting", "domain"]
        known = set(usual[keys].itertuples(index=False, name=None))
        new = [key not in known for key in found[keys].itertuples(index=False, name=None)]
        return pd.concat([usual, found[new]], ignore_index=True)

    @cached_property
    def _outcomes(self) -> TextOutcomes:
        return TextOutcomes(self._benchmark, self._runs, self._records, ablated=True)

    def _shown(self, name: str) -> pd.DataFrame:
        if name not in self._rows:
            self._rows[name] = ablation_rows(self._outcomes, self._definitions[name])
        return self._rows[name]

    def _table(self, name: str, _usual: TextOutcomes) -> Table:
        table = ablation_table(self._definitions[name], self._shown(name))
        return with_runs(table, self._outcomes.origins, self._benchmark.name)

    def _draw(self, name: str, _usual: TextOutcomes, path: Path) -> None:
        axis = self._definitions[name].axis
        if axis:
            draw_curves(self._outcomes, self._shown(name), path, AXES[axis])
        else:
            reference = "the row above" if self._definitions[name].steps else "the baseline"
            draw_differences(self._outcomes, self._shown(name), path, reference)


def ablation_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute a row for each selection, domain, model, scope (task, pair of tasks or average) and row of the ablation.

    Columns: these keys, ``mean``, ``std``, ``n``, the paired difference to the baseline (``delta``, ``low``, ``high``,
    ``p``, ``p_holm`` over the rows of a scope, ``verdict``), ``active_neurons``, the paper's numbers (``paper``,
    ``paper_delta``, ``status``, ``source``), and titles. A scope needs a row of the ablation and the baseline.
    """
    names = _names(outcomes, ablation)
    seeds = outcomes.seeds[outcomes.seeds["protocol"].isin(outcomes.run_protocols)]
    seeds = seeds[seeds["method"].isin(names) & seeds["domain"].isin([ID, OOD])]
    titles = {
        pair: outcomes.pair_title(*pair) for pair in seeds[_PAIRS].drop_duplicates().itertuples(index=False, name=None)
    }
    seeds = seeds.assign(scope=[titles[pair] for pair in seeds[_PAIRS].itertuples(index=False, name=None)])
    seeds = pd.concat([seeds, _averages(seeds)])[[*_ROW, "seed", "value"]]
    of_ablation = {name: name in outcomes.settings or outcomes.role(name) in (ABLATION, CONTROL) for name in names}
    by_cell = seeds.groupby(_CELL)["method"]
    seeds = seeds[
        by_cell.transform(lambda found: any(of_ablation[name] for name in set(found)))
        & by_cell.transform(lambda found: outcomes.baseline in set(found))
    ]
    by_row = seeds.groupby(_ROW, sort=False)["value"]
    rows = by_row.agg(mean="mean", std="std", population_std=lambda values: values.std(ddof=0), n="size")
    for number, end in enumerate(("low_mean", "high_mean")):
        rows[end] = by_row.agg(lambda values, number=number: confidence_interval(values.to_numpy())[number])
    rows = rows.reset_index()
    rows["std"] = rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"])
    references = itertools.pairwise(names) if ablation.steps else ((outcomes.baseline, None),)
    compared = pd.concat([_compared(seeds, reference, row) for reference, row in references])
    rows = with_verdicts(rows.merge(compared, on=_ROW, how="left"), _CELL)
    rows = with_numbers(rows, ["model", "method"], means_by(outcomes.records, ["model", "method"], ["active_neurons"]))
    rows = _with_paper(outcomes, ablation, rows)
    scopes = list(rows["scope"].drop_duplicates())
    order = sorted(rows["method"].drop_duplicates(), key=lambda name: _place(outcomes, ablation, name))
    rows = rows.assign(
        is_ours=rows["mean"].notna(),
        scope_place=rows["scope"].map(scopes.index),
        method_place=rows["method"].map(order.index),
    ).sort_values(["model", "protocol", "domain", "scope_place", "method_place"], kind="stable")
    # ours first
    rows = rows.sort_values("is_ours", ascending=False, kind="stable").drop(columns=["scope_place", "method_place"])
    rows = outcomes.titled(rows.reset_index(drop=True))
    rows = rows.assign(
        method_title=[_title(outcomes, name) for name in rows["method"]],
        row_title=[outcomes.title("method", _split(outcomes, name)[0]) for name in rows["method"]],
        is_baseline=rows["method"] == outcomes.baseline,
        is_average=rows["scope"].str.startswith(AVERAGE_OF),
    )
    return _with_axes(outcomes, rows)


def _compared(seeds: pd.DataFrame, reference: str, row: str | None) -> pd.DataFrame:
    """Compute paired differences of one row, or of all, to a reference."""
    own = seeds if row is None else seeds[seeds["method"].isin([reference, row])]
    return paired_differences(own, _ROW, {"method": reference}, "seed").drop(columns=["values", "n"])


def _names(outcomes: TextOutcomes, ablation: Ablation) -> list[str]:
    """List the names of an ablation's rows in ``method``: each row, then its settings."""
    return [
        name
        for row in ablation.rows
        for name in (row, *(own for own, (of, _) in outcomes.settings.items() if of == row))
    ]


def _place(outcomes: TextOutcomes, ablation: Ablation, name: str) -> tuple[int, list[tuple[str, float, str]]]:
    """Return the sort key of a row: its place in the ablation, then the numbers of its setting."""
    row, setting = _split(outcomes, name)
    return ablation.rows.index(row), [(key, *_number_or_text(value)) for key, value in setting_values(setting).items()]


def _number_or_text(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _averages(seeds: pd.DataFrame) -> pd.DataFrame:
    """Average over the tasks (or pairs) that all rows of a selection, domain and model share, by seed."""
    found = []
    for (protocol, domain, model), group in seeds.groupby(["protocol", "domain", "model"], sort=False):
        scopes = group.groupby("scope", sort=False)["method"].nunique()
        shared = list(scopes[scopes == group["method"].nunique()].index)
        if len(shared) < 2:
            continue
        wide = group[group["scope"].isin(shared)].pivot_table(
            index=["method", "seed"], columns="scope", values="value", sort=False
        )
        means = wide.dropna().mean(axis=1).rename("value").reset_index()
        listed = ", ".join(shared) if len(shared) <= _FEW else f"{len(shared)} {'tasks' if domain == ID else 'pairs'}"
        found.append(means.assign(protocol=protocol, domain=domain, model=model, scope=AVERAGE_OF + listed))
    return pd.concat(found) if found else seeds.iloc[:0]


def _split(outcomes: TextOutcomes, name: str) -> tuple[str, str]:
    """Split a name into its row and its setting."""
    row, _, setting = name.partition(SETTING)
    return outcomes.settings.get(name, (row, setting))


def _title(outcomes: TextOutcomes, name: str) -> str:
    row, setting = _split(outcomes, name)
    return ", ".join(filter(None, (outcomes.title("method", row), setting_text(setting))))


def _with_paper(outcomes: TextOutcomes, ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Join the paper's numbers, which are by its authors' selection, and add rows that only the paper has."""
    published = pd.DataFrame(columns=[*ABLATION_COLUMNS, *NUMBER_COLUMNS])
    if ablation.paper:
        published = read_published(outcomes.benchmark, ablation.paper, ABLATION_COLUMNS)
        where = f"{outcomes.benchmark.folder / ablation.paper}: '"
        check_names(where, "method", published["method"], ablation.rows)
        check_names(where, "model", filter(None, published["model"]), load_models())
        known = _scopes(outcomes)
        named = [scope for scope in published["scope"] if not scope.startswith(_AVERAGE)]
        check_names(where, "scope", named, known)
        twice = published[published.duplicated(list(ABLATION_COLUMNS))]
        if len(twice):
            raise DefinitionError(f"{where}{' '.join(twice.iloc[0][list(ABLATION_COLUMNS)])}' stands there twice")
    settings = published["setting"].astype(str)
    published = published.assign(
        method=published["method"].where(settings.eq(""), published["method"] + SETTING + settings),
        paper=published["value"].astype(float) / 100,
        protocol=PUBLISHED,
    )
    published["paper_delta"] = published_delta(published.assign(value=published["paper"]), outcomes.baseline)
    on = ["protocol", "model", "scope", "method"]
    found = rows.merge(published[[*on, "paper", "paper_delta", "status", "source"]], on=on, how="outer", sort=False)
    domains = found["scope"].map(lambda scope: OOD if ARROW in scope else ID)
    return found.assign(domain=found["domain"].fillna(domains))


def _scopes(outcomes: TextOutcomes) -> list[str]:
    """List the scopes of a number: each task and each pair of tasks."""
    tasks = outcomes.benchmark.tasks
    return [outcomes.pair_title(name, other) for name, task in tasks.items() for other in (name, *task.ood)]


def _with_axes(outcomes: TextOutcomes, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the axes of figures (N, k as a share of N, layers, share of training rows) and ``kind``, the plain method."""
    found = []
    for row in rows.itertuples():
        name, setting = _split(outcomes, row.method)
        definition = outcomes.benchmark.definition.methods[name]
        given = setting_values(setting)
        if row.is_ours:
            given |= _values_of(outcomes.specs[row.model, row.method])
        found.append({**dict.fromkeys(_AXIS_VALUES, ""), "D": "1", **given, "kind": definition.method or name})
    return rows.join(pd.DataFrame(found, index=rows.index, columns=[*_AXIS_VALUES, "kind"]))


def _values_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a run's settings by their letters."""
    config = spec["method"]["config"]
    found = {"D": f"{spec.get('training', {}).get('train_share', 1)}"}
    if config and config["kind"] == "emoe":
        layers = config["layers"]
        found |= {"N": str(config["num_experts"]), "k": f"{config['top_k'] / config['num_experts']:g}"}
        found["L"] = "+".join(map(str, layers)) if isinstance(layers, list) else layers
    return found


def _with_n_and_k(row: Any) -> str:
    """Return the title of a row; of a main row with N and k."""
    return f"{row.method_title}, N {row.N}, k/N {row.k}" if row.N and SETTING not in row.method else row.method_title


def ablation_table(definition: Ablation, rows: pd.DataFrame) -> Table:
    """Lay out the rows of :func:`ablation_rows`."""
    frame = rows.assign(
        **{key: rows[key].fillna("").replace("", MISSING) for key in ("verdict", "status", "source")},
        n=[MISSING if math.isnan(n) else f"{n:.0f}" for n in rows["n"]],
        model_title=rows["model_title"].replace("", MISSING),
        method_title=[
            _with_n_and_k(row) if definition.axis == _N_AND_K else row.method_title for row in rows.itertuples()
        ],
        on=[f"{row.scope} ({'in domain' if row.domain == ID else 'out of domain'})" for row in rows.itertuples()],
    )
    return Table(
        definition.title,
        f"{definition.question} Score (%): mean ± standard deviation over n seeds; Δ is the difference to the "
        f"{'row above' if definition.steps else 'first row'}, paired by seed, with a 95 % confidence interval "
        "(Student's t); p of the "
        "paired t-test is corrected by Holm's procedure over the rows of a set and selection, and the verdict takes it "
        "at 5 %. The paper's numbers are of its own models and tasks, in rows of their own "
        "where these did not run here.",
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
