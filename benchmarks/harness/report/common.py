"""Share the finished runs of a benchmark, published numbers, and the tables of several benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import COUNTS, AnyBenchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import CONTROL
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import NUMBER_COLUMNS, check_names
from benchmarks.harness.report.style import MethodStyle, style_of
from benchmarks.harness.report.table import MISSING, RUNS, Column, Table
from benchmarks.harness.results.records import COST, LOADS, MODEL, information_numbers
from benchmarks.harness.results.statistics import confidence_interval, paired_differences

SETTING = "|"  # between a row and a setting of it that is a row of its own
ALL = "*"  # in place of a name: a mean over all
RANDOM_WEIGHTS = (
    "The models of this suite have random weights: it shows that everything works, and neither its scores nor its "
    "verdicts mean anything. "
)
_ORIGIN = (
    *("run_id", "protocol", "model", "task", "set", "method", "tuning", "variant", "learning_rate"),
    *("layer", "num_experts", "seed"),
)
# the numbers of the claims, one row per number: Presentation.compared
COMPARED = [
    *("selection", "domain", "metric", "model", "task", "eval_task", "tuning", "method", "setting", "pair", "value")
]


def compared(*parts: pd.DataFrame) -> pd.DataFrame:
    """Join numbers in the columns :data:`COMPARED`; a missing column is empty text."""
    frames = [part.reindex(columns=COMPARED, fill_value="") for part in parts]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COMPARED)


def with_runs(table: Table, origins: pd.DataFrame, benchmark: str) -> Table:
    """Name the runs of each row of a table in the column :data:`~benchmarks.harness.report.table.RUNS`.

    These are the runs with the row's names in every shared column; an empty name and :data:`ALL` stand for all names.
    If a benchmark chooses among finished runs (DomainBed's draws), all candidates are named. A row of published numbers
    has none. ``origins`` has the ``run_id`` and the names, one or more rows per run.
    """
    keys = [key for key in _ORIGIN if key in table.frame and key in origins]
    if not keys or RUNS in table.frame:  # the table has named them
        return table
    tried = origins[[*dict.fromkeys([*keys, "run_id"])]].astype(str).drop_duplicates(ignore_index=True)
    numbers = {key: tried.groupby(key).indices for key in keys}  # of the runs with a name
    folders = []
    for names in table.frame[keys].fillna("").astype(str).to_dict("records"):
        matching = (numbers[key].get(name, ()) for key, name in names.items() if name not in ("", ALL))
        of_row = sorted(set(tried.index).intersection(*matching))
        folders.append(" ".join(f"{benchmark}/{run}" for run in tried["run_id"].iloc[of_row].unique()))
    return replace(table, frame=table.frame.assign(**{RUNS: folders}))


def counts(records: pd.DataFrame) -> pd.DataFrame:
    """Return the numbers of parameters of all runs, for :func:`compared`."""
    rows = records[(records["part"] == "model") & records["metric"].isin(COUNTS.metrics)]
    return rows.rename(columns={"seed": "pair"}).assign(domain="model")


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Return True if the models of all runs have random weights, so that their scores mean nothing."""
    models = [run.spec["model"] for run in runs if run.spec["method"]["name"]]  # no measurements
    return bool(models) and all({"config", "random"} & set(model) for model in models)


class Outcomes:
    """Collect the finished runs of a benchmark that trains; a subclass adds its results.

    The runs are in the order of the grid. ``keys`` are the columns whose names have titles: ``model``, ``method``,
    ``task``, ``eval_task``, ``set``, or one of ``titles``, which has them by name in the order of rows.
    """

    titles: dict[str, Mapping[str, str]]  # by column and name, in the order of rows: as they ran, then as defined
    records: pd.DataFrame  # every number of every run; a subclass sets it

    def __init__(
        self, benchmark: AnyBenchmark, runs: Sequence[Run], keys: Sequence[str], **titles: Mapping[str, str]
    ) -> None:
        self.benchmark, self.runs, self.name = benchmark, list(runs), benchmark.name
        self.methods = benchmark.methods()
        self.baseline = benchmark.definition.baseline

        def in_order(titles: Mapping[str, str], part: str) -> dict[str, str]:
            ran = [run.spec[part]["name"] for run in runs]
            return {name: titles[name] for name in dict.fromkeys([*ran, *titles]) if name in titles}

        models = in_order({name: model.title for name, model in load_models().items()}, "model")
        tasks = in_order(benchmark.task_titles, "task")
        methods = {name: method.title for name, method in self.methods.items()}
        by_key = {"model": models, "method": methods, **dict.fromkeys(("task", "eval_task", "set"), tasks), **titles}
        self.titles = {key: by_key[key] for key in keys}

    def title(self, key: str, name: str) -> str:
        """Return the title of a name, or the name if it has none."""
        return self.titles[key].get(name, name)

    @property
    def origins(self) -> pd.DataFrame:
        """Return the runs and their names for :func:`with_runs`."""
        return self.records

    @property
    def baseline_title(self) -> str:
        return self.title("method", self.baseline)

    def role(self, method: str) -> str:
        """Return ``baseline``, ``method`` or ``control``; ``method`` for a row that only the paper has."""
        return self.methods[method].role if method in self.methods else "method"

    def style(self, method: str) -> MethodStyle:
        """Return the style of a method or of one of its settings."""
        return style_of(self.methods[method.partition(SETTING)[0]])

    def titled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add ``<key>_title`` for every key of the rows, and ``is_method``: True if the row is no control."""
        titles = {f"{key}_title": [self.title(key, name) for name in frame[key]] for key in self.titles if key in frame}
        return frame.assign(**titles, is_method=[self.role(name) != CONTROL for name in frame["method"]])

    def order(self, frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Add titles and sort by columns: names as their titles, unknown ones last; other columns by value."""

        def rank(column: pd.Series) -> pd.Series:
            ranks = {name: number for number, name in enumerate(self.titles.get(str(column.name), ()))}
            return column.map(lambda name: ranks.get(name, len(ranks))) if ranks else column

        return self.titled(frame.sort_values(list(keys), key=rank, kind="stable").reset_index(drop=True))

    def explain_n(self, scores: pd.DataFrame, shared: pd.DataFrame, keys: Sequence[str], pair: str = "seed") -> str:
        """Explain n for a caption, and name the tables that leave out pairs; for :func:`.statistics.shared_pairs`."""
        counts = [rows.groupby(list(keys), sort=False)[pair].nunique() for rows in (scores, shared)]
        both = pd.concat(counts, axis=1, keys=["all", "used"]).fillna(0).astype(int)
        left_out = [
            f"{', '.join(self.title(*named) for named in zip(keys, names, strict=True))}: {row.used} of {row.all}"
            for names, row in zip(both.index, both.itertuples(), strict=True)
            if row.used < row.all
        ]
        listed = f" ({'; '.join(left_out)})" if left_out else ""
        return f"n counts the {pair}s that all compared rows have, and scores, Δ and marks are over these{listed}."


_STATUS = ("published", "inferred", "unknown")


def read_published(benchmark: AnyBenchmark, file: str | None = None, of: Sequence[str] | None = None) -> pd.DataFrame:
    """Read and check published numbers in points (ranks unchanged), each with status and source.

    The file is by default ``paper`` of the definition, and the columns ``of`` a number those of the benchmark's kind.
    """
    file = file or benchmark.definition.paper
    columns = [*(of or benchmark.paper_columns), *NUMBER_COLUMNS]
    if not file:
        return pd.DataFrame(columns=columns)
    path = benchmark.folder / file
    published = pd.read_csv(path, keep_default_na=False, na_values={"value": [""]})
    if list(published.columns) != columns:
        raise DefinitionError(f"{path}: the columns are {list(published.columns)}, but must be {columns}")
    check_names(f"{path}: '", "status", published["status"], _STATUS)
    for number in published.index[published["value"].isna() != (published["status"] == "unknown")]:
        raise DefinitionError(f"{path}, line {number + 2}: a value is given if the status is not 'unknown'")
    return published


def published_delta(published: pd.DataFrame, baseline: str) -> list[float]:
    """Subtract the baseline of the same ``model`` and ``scope`` from each published ``value``; nan for the baseline."""
    base = published[published["method"] == baseline].set_index(["model", "scope"])["value"]
    return [
        math.nan if row.method == baseline else row.value - base.get((row.model, row.scope), math.nan)
        for row in published.itertuples()
    ]


_COST = (*COST, *MODEL, *LOADS, *information_numbers("class", "environment"))


def with_numbers(frame: pd.DataFrame, on: Sequence[str], numbers: pd.DataFrame, prefix: str = "") -> pd.DataFrame:
    """Add the numbers with the same values in the columns ``on``; their columns get the prefix."""
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
    """Add one column of numbers per name, and return the rows with the columns of the table.

    ``numbers`` has the name as its first column, the columns ``on``, ``mean`` and ``std``. The order is that of
    ``headings``, which are by name. ``joint`` stands between the name and ``mean`` in the columns of the frame.
    """
    by, columns = numbers.columns[0], []
    for name, heading in headings.items():
        prefix = f"{name}{joint}"
        frame = with_numbers(frame, on, numbers[numbers[by] == name].drop(columns=by), prefix)
        columns.append(Column(metric, f"{prefix}mean", heading, std=f"{prefix}{std}", best=best))
    return frame, columns


def with_average(frame: pd.DataFrame, columns: list[Column], metric: str) -> tuple[pd.DataFrame, list[Column]]:
    """Add the average of the columns for the rows with all of them; an average over fewer is another number."""
    averages = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
    average = Column(metric, "average", "Average", best=True)
    return frame.assign(average=averages), [*columns, average]


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """Print the confidence interval of a difference after a blank; empty if there is none."""
    return "" if math.isnan(low) else f" [{low:+z.{decimals}f}, {high:+z.{decimals}f}]"


def difference_text(row: Any, unit: str = "") -> str:
    """Print a difference of shares in points, with its interval, and its verdict if there is one."""
    interval = interval_text(row.low * 100, row.high * 100)
    return ", ".join(filter(None, (f"{row.delta * 100:+z.1f}{unit}{interval}", row.verdict)))


def tests_table(against: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame) -> Table:
    """Make a table of the differences of :func:`.statistics.with_verdicts`, which are corrected over all rows."""
    return Table(
        f"Tests against {against}",
        f"{caption} Intervals are 95 % confidence intervals (Student's t). p is of the paired t-test; p (Holm) is "
        f"corrected by Holm's procedure over all {frame['p'].notna().sum()} tests of this table, and the verdict takes "
        "it at 5 %. “equal”: every difference is zero. A dash: no test, because there is one pair, or all differences "
        "are the same and not zero.",
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
    """Compute ``ours`` for :func:`published_table`: means, their 95 % interval and the count ``n``."""
    rows = values.groupby(list(cell), sort=False)
    means = rows.agg(ours="mean", n="size")
    ends = [confidence_interval(row.to_numpy()) if len(row) > 1 else (math.nan, math.nan) for _, row in rows]
    means[["low", "high"]] = np.reshape(ends, (-1, 2))
    return means.reset_index()


def published_table(
    title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame, origins: pd.DataFrame
) -> Table:
    """Make a table of published accuracies and ours.

    The rows have ``value``, the columns of :func:`our_means`, ``difference``, ``status`` and ``source``.
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


def means_by(records: pd.DataFrame, cell: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Compute the means of costs and expert loads, one row per cell and one column per metric."""
    records = records[records["part"].isin(("cost", "model", "routing"))]
    rows = {metric: records[records["metric"] == metric] for metric in metrics}
    means = {metric: of.groupby(list(cell), sort=False)["value"].mean() for metric, of in rows.items()}
    return pd.DataFrame(means).reset_index()


def counts_by(rows: pd.DataFrame, cell: Sequence[str]) -> pd.DataFrame:
    """Write the number ``n`` of each cell, such as ``5``, or ``5–8`` if the rows of the cell differ."""
    ends = rows.groupby(list(cell), sort=False)["n"].agg(["min", "max"])
    texts = [f"{low}" if low == high else f"{low}–{high}" for low, high in ends.to_numpy()]
    return ends.assign(n=texts)[["n"]].reset_index()


def name_or_count(names: Sequence[str], noun: str) -> str:
    """List up to three names, or count more of them."""
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} {noun}"


def over_seeds(frame: pd.DataFrame, cell: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Average columns of numbers over the rows of each cell, with ``<number>_std`` and the count ``n``."""
    rows = frame.astype(dict.fromkeys(numbers, float)).groupby(list(cell), sort=False)
    values = rows[list(numbers)]
    return values.mean().join(values.std().add_suffix("_std")).join(rows.size().rename("n")).reset_index()


def summarize(scores: pd.DataFrame, cell: Sequence[str], references: Iterable[tuple[str, str | None]]) -> pd.DataFrame:
    """Summarize the ``value`` of each cell over seeds, and compare it with a reference.

    Each reference comes with the method that is compared with it, or with None for all methods. Returns one row per
    cell with ``mean``, ``std`` (sample), ``population_std`` and ``n``; the 95 % interval of the mean (``low_mean``,
    ``high_mean``); and over ``pairs`` of seeds the difference to the reference (``delta``, ``low``, ``high``, ``p``),
    without a correction.
    """
    rows = []
    for key, values in scores.groupby(list(cell), sort=False)["value"]:
        interval = confidence_interval(values.to_numpy())
        rows.append((*key, values.mean(), values.std(), values.std(ddof=0), len(values), *interval))
    names = [*cell, "mean", "std", "population_std", "n", "low_mean", "high_mean"]
    differences = []
    for reference, method in references:
        both = scores if method is None else scores[scores["method"].isin([reference, method])]
        differences.append(paired_differences(both, cell, {"method": reference}, "seed").drop(columns="values"))
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
    published: pd.DataFrame | None = None,
) -> Table:
    """Make a table of time, memory, parameters and loads: the means of the records of each cell, a row of the frame.

    The caption says over which runs they are ``averaged``, and what loads are ``measured_on``. ``published`` has rows
    of others' numbers, with titles and ``source``.
    """
    frame = with_numbers(frame, cell, means_by(records, cell, _COST))
    others = ""
    if published is not None:
        frame = pd.concat([frame, published], ignore_index=True)
        sources = "; ".join(published["source"].unique())
        others = f" Below ours: what others report of machines of their own ({sources})."
    return Table(
        "What it took, and how the experts were used",
        f"{averaged}, on the machine of the runs (see the environment below). Runs share the machine, so times are "
        "rough: they do not compare methods. Start-up is what passes before the run's own work begins, mostly "
        "imports. Active neurons are the FFN neurons that a token uses, as a share of the dense model's. Load entropy "
        f"is 1 for a perfectly balanced load; loads and drops are measured on {measured_on}. Operations are two for "
        "every parameter in use that a token is multiplied with, without attention's own products; what a CPU or GPU "
        "executes is more where the masked path computes experts that are not used. Only the published settings limit "
        f"the capacity of experts, so only there are choices dropped.{others}",
        dict(keys),
        [Column(metric, metric) for metric in _COST],
        frame,
    )
