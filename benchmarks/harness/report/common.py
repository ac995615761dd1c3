"""Collect the finished runs of a benchmark, read published numbers, and make tables that benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.config.benchmark import COUNTS, AnyBenchmark
from benchmarks.harness.config.catalogue import COST, LOADS, MODEL, load_models
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import NUMBER_COLUMNS
from benchmarks.harness.report.style import MethodStyle, style_of
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import (
    confidence_interval,
    information_numbers,
    paired_differences,
)

SETTING = "|"  # separates a row's name from its setting, if each setting is a separate row
# the numbers of the claims, one row per number
COMPARED = [
    *("selection", "domain", "metric", "model", "task", "eval_task", "tuning", "method", "setting"),
    *("seed", "question", "value"),
]


def join_claim_numbers(*parts: pd.DataFrame) -> pd.DataFrame:
    """Join frames of claim numbers, with the columns :data:`COMPARED`; a missing column becomes empty text."""
    return pd.concat(
        [part.reindex(columns=COMPARED, fill_value="") for part in parts], ignore_index=True
    )


def parameter_counts(records: pd.DataFrame) -> pd.DataFrame:
    """Return the parameter counts of all runs, for :func:`join_claim_numbers`."""
    rows = records[(records["part"] == "model") & records["metric"].isin(COUNTS.metrics)]
    return rows.assign(domain="model")


class Outcomes:
    """The finished runs of a benchmark in grid order. Subclasses add their results.

    ``keys`` are the columns whose names have titles: ``model``, ``method``, ``task``, ``eval_task``, or a key of
    ``titles``. ``titles`` maps names to titles, in the order of rows.
    """

    pair = "seed"  # the unit of paired differences
    titles: dict[str, Mapping[str, str]]  # by column and name; names that ran come first
    records: pd.DataFrame  # every number of every run; a subclass sets it

    def __init__(
        self,
        benchmark: AnyBenchmark,
        runs: Sequence[Run],
        keys: Sequence[str],
        **titles: Mapping[str, str],
    ) -> None:
        self.benchmark = benchmark
        self.runs = list(runs)
        self.name = benchmark.name
        self.methods = benchmark.methods()
        self.baseline = benchmark.definition.baseline

        def in_order(titles: Mapping[str, str], ran: Iterable[str]) -> dict[str, str]:
            return {name: titles[name] for name in dict.fromkeys([*ran, *titles]) if name in titles}

        model_titles = {name: model.title for name, model in load_models().items()}
        models = in_order(model_titles, [run.model for run in runs])
        tasks = in_order(benchmark.task_titles, [run.task for run in runs])
        methods = {name: method.title for name, method in self.methods.items()}
        by_key = {"model": models, "method": methods, "task": tasks, "eval_task": tasks, **titles}
        self.titles = {key: by_key[key] for key in keys}

    def title(self, key: str, name: str) -> str:
        """Return the title of a name, or the name if it has none."""
        return self.titles[key].get(name, name)

    @property
    def origins(self) -> pd.DataFrame:
        """Return run ids and row names, for :func:`.presentation.with_runs`."""
        return self.records

    @property
    def shared_note(self) -> str:
        """Return caption sentences on the use of :func:`.statistics.shared_pairs`."""
        return f"n counts the {self.pair}s that all compared rows have. Scores, Δ and marks use only these."

    @property
    def baseline_title(self) -> str:
        return self.title("method", self.baseline)

    def role(self, method: str) -> str:
        """Return ``baseline``, ``method`` or ``control``; ``method`` for a row that only the paper has."""
        return self.methods[method].role if method in self.methods else "method"

    def style(self, method: str) -> MethodStyle:
        """Return the style of a method or of one of its settings."""
        return style_of(self.methods[method.partition(SETTING)[0]])

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add ``<key>_title`` for every key of the rows, and ``is_method``, False for controls."""
        titles = {
            f"{key}_title": [self.title(key, name) for name in frame[key]]
            for key in self.titles
            if key in frame
        }
        return frame.assign(
            **titles, is_method=[self.role(name) != CONTROL for name in frame["method"]]
        )

    def order(self, frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Add titles, and sort by columns: names in the order of ``titles`` (unknown last), others by value."""

        def rank(column: pd.Series) -> pd.Series:
            ranks = {
                name: number for number, name in enumerate(self.titles.get(str(column.name), ()))
            }
            return column.map(lambda name: ranks.get(name, len(ranks))) if ranks else column

        return self.with_titles(
            frame.sort_values(list(keys), key=rank, kind="stable").reset_index(drop=True)
        )


def read_published(benchmark: AnyBenchmark, file: str | None = None) -> pd.DataFrame:
    """Read published numbers in points (ranks unchanged), with their status and source.

    ``file`` defaults to ``paper`` of the definition.
    """
    file = file or benchmark.definition.paper
    if not file:
        return pd.DataFrame(columns=[*benchmark.paper_columns, *NUMBER_COLUMNS])
    return pd.read_csv(benchmark.folder / file, keep_default_na=False, na_values={"value": [""]})


def published_delta(published: pd.DataFrame, baseline: str) -> pd.Series[float]:
    """Subtract the baseline's published ``value`` with the same ``model`` and ``scope``; nan for the baseline."""
    base = published[published["method"] == baseline].set_index(["model", "scope"])["value"]
    reference = published[["model", "scope"]].join(base.rename("reference"), on=["model", "scope"])[
        "reference"
    ]
    return (published["value"] - reference).where(published["method"] != baseline)


_COST = (*COST, *MODEL, *LOADS, *information_numbers("class", "environment"))


def with_numbers(
    frame: pd.DataFrame, on: Sequence[str], numbers: pd.DataFrame, prefix: str = ""
) -> pd.DataFrame:
    """Join numbers on the columns ``on``, and prefix their other columns."""
    named = numbers.set_index(list(on)).add_prefix(prefix)
    return frame.merge(named, left_on=list(on), right_index=True, how="left")


def with_columns(
    frame: pd.DataFrame,
    on: Sequence[str],
    numbers: pd.DataFrame,
    headings: Mapping[str, str],
    metric: str,
    *,
    std: str = "std",
    best: bool = True,
    joint: str = " ",
) -> tuple[pd.DataFrame, list[Column]]:
    """Add one column of numbers per name; return the extended frame and the columns of the table.

    ``numbers`` has the name in its first column, then the columns ``on``, ``mean`` and ``std``. ``headings`` maps names
    to headings, in the order of columns. ``joint`` separates the name from ``mean`` in the frame's column names.
    """
    by, columns = numbers.columns[0], []
    for name, heading in headings.items():
        prefix = f"{name}{joint}"
        frame = with_numbers(frame, on, numbers[numbers[by] == name].drop(columns=by), prefix)
        columns.append(Column(metric, f"{prefix}mean", heading, std=f"{prefix}{std}", best=best))
    return frame, columns


def with_average(
    frame: pd.DataFrame, columns: list[Column], metric: str
) -> tuple[pd.DataFrame, list[Column]]:
    """Add the average of the columns; nan if a row lacks a value, because averages must be comparable."""
    averages = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
    average = Column(metric, "average", "Average", best=True)
    return frame.assign(average=averages), [*columns, average]


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """Format the confidence interval of a difference, with a leading blank; empty if ``low`` is nan."""
    return "" if math.isnan(low) else f" [{low:+z.{decimals}f}, {high:+z.{decimals}f}]"


def difference_text(row: Any, unit: str = "") -> str:
    """Format a difference of shares in points, with its interval and its verdict, if any."""
    interval = interval_text(row.low * 100, row.high * 100)
    return ", ".join(filter(None, (f"{row.delta * 100:+z.1f}{unit}{interval}", row.verdict)))


def tests_table(
    against: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame
) -> Table:
    """Make a table from the rows of :func:`.statistics.with_verdicts`, corrected over all rows."""
    return Table(
        f"Tests against {against}",
        f"{caption} Intervals are 95 % confidence intervals (Student's t). p is from the paired t-test; p (Holm) is "
        f"corrected with Holm's procedure over all {frame['p'].notna().sum()} tests of this table. The verdict uses p "
        "(Holm) at 5 %. “equal”: every difference is zero. A dash: untestable, because there is one pair, or all "
        "differences are the same and not zero.",
        dict(keys),
        [
            Column(metric, "delta", "Δ", interval=("low", "high"), signed=True),
            Column("p_value", "p", "p"),
            Column("p_value", "p_holm", "p (Holm)"),
        ],
        frame.assign(verdict=frame["verdict"].replace("", MISSING)),
        notes={"verdict": "Verdict"},
    )


def our_means(values: pd.Series[float], cell: Sequence[str]) -> pd.DataFrame:
    """Compute per cell the mean ``ours``, its 95 % interval ``low`` and ``high``, and the count ``n``."""
    rows = values.groupby(list(cell), sort=False)
    means = rows.agg(ours="mean", n="size")
    ends = [
        confidence_interval(row.to_numpy()) if len(row) > 1 else (math.nan, math.nan)
        for _, row in rows
    ]
    means[["low", "high"]] = np.reshape(ends, (-1, 2))
    return means.reset_index()


def published_table(
    title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame, origins: pd.DataFrame
) -> Table:
    """Make a table of our accuracies and the published ones.

    ``frame`` has ``value``, the columns of :func:`our_means`, ``difference``, ``status`` and ``source``.
    """
    return Table(
        title,
        f"{caption} Ours: mean over n runs, with a 95 % confidence interval.",
        dict(keys),
        [
            Column("accuracy", "value", "Published", decimals=2),
            Column("accuracy", "ours", "Ours", interval=("low", "high"), decimals=2),
            Column("runs", "n", "n"),
            Column("accuracy", "difference", "Ours − published", signed=True, decimals=2),
        ],
        frame.fillna({"status": MISSING, "source": MISSING}),
        notes={"status": "Status", "source": "Source of the published number"},
        origins=origins,
    )


def cell_means(records: pd.DataFrame, cell: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Compute the means of costs and expert loads, one row per cell and one column per metric."""
    records = records[records["part"].isin(("cost", "model", "routing"))]
    rows = {metric: records[records["metric"] == metric] for metric in metrics}
    means = {
        metric: of.groupby(list(cell), sort=False)["value"].mean() for metric, of in rows.items()
    }
    return pd.DataFrame(means).reset_index()


def format_counts(rows: pd.DataFrame, cell: Sequence[str]) -> pd.DataFrame:
    """Format the count ``n`` of each cell, such as ``5``, or ``5–8`` if its rows differ."""
    ends = rows.groupby(list(cell), sort=False)["n"].agg(["min", "max"])
    texts = [f"{low}" if low == high else f"{low}–{high}" for low, high in ends.to_numpy()]
    return ends.assign(n=texts)[["n"]].reset_index()


def name_or_count(names: Sequence[str], noun: str) -> str:
    """List up to three names; count more than three."""
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} {noun}"


def average_over_seeds(
    frame: pd.DataFrame, cell: Sequence[str], numbers: Sequence[str]
) -> pd.DataFrame:
    """Return per cell the mean of each column of numbers, ``<number>_std`` and the row count ``n``."""
    rows = frame.astype(dict.fromkeys(numbers, float)).groupby(list(cell), sort=False)
    values = rows[list(numbers)]
    return (
        values.mean()
        .join(values.std().add_suffix("_std"))
        .join(rows.size().rename("n"))
        .reset_index()
    )


def summarize(
    scores: pd.DataFrame, cell: Sequence[str], references: Iterable[tuple[str, str | None]]
) -> pd.DataFrame:
    """Summarize the ``value`` of each cell over seeds, and compare it with a reference.

    ``references`` pairs each reference method with the method to compare, or with None for all methods. Returns one row
    per cell with ``mean``, ``std`` (sample), ``population_std`` and ``n``, and the uncorrected difference to the
    reference over ``pairs`` of seeds (``delta``, ``low``, ``high``, ``p``).
    """
    rows = []
    for key, values in scores.groupby(list(cell), sort=False)["value"]:
        rows.append((*key, values.mean(), values.std(), values.std(ddof=0), len(values)))
    names = [*cell, "mean", "std", "population_std", "n"]
    differences = []
    for reference, method in references:
        both = scores if method is None else scores[scores["method"].isin([reference, method])]
        differences.append(
            paired_differences(both, cell, {"method": reference}, "seed").drop(columns="values")
        )
    compared = pd.concat(differences).rename(columns={"n": "pairs"})
    return pd.DataFrame(rows, columns=names).merge(compared, on=list(cell), how="left")


def cost_table(
    keys: Mapping[str, str],
    frame: pd.DataFrame,
    cell: Sequence[str],
    records: pd.DataFrame,
    *,
    averaged: str,
    measured_on: str,
) -> Table:
    """Make a table of time, memory, parameters and expert loads, with the mean of the records of each cell.

    ``averaged`` and ``measured_on`` are caption texts: the averaged runs, and the data of the loads.
    """
    return Table(
        "Cost, and use of the experts",
        f"{averaged}, on the machine of the runs (see the environment below). Runs share the machine, so times are "
        "rough and do not compare methods. Start-up is the time before the run's own work begins, mostly imports. "
        "Active neurons are the FFN neurons that a token uses, as a share of the dense model's. Load entropy is 1 for "
        f"a perfectly balanced load; loads and drops are measured on {measured_on}. Operations count two per active "
        "parameter and token, without attention's own products; a CPU or GPU executes more if the masked path computes "
        "unused experts. Only the published settings limit the capacity of experts, so only they drop choices.",
        dict(keys),
        [Column(metric, metric) for metric in _COST],
        with_numbers(frame, cell, cell_means(records, cell, _COST)),
    )
