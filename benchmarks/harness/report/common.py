"""Finished runs of a benchmark, published numbers, and the tables that benchmarks share."""

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
from benchmarks.harness.report.style import MethodStyle, distinct_styles, style_of
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import information_metrics, mean_difference

# separates a row's name from its setting, if each setting is a separate row
SETTING_SEPARATOR = "|"
# the columns of the numbers that claims compare, one row per number
COMPARED = [
    "selection",
    "domain",
    "metric",
    "model",
    "task",
    "eval_task",
    "tuning",
    "method",
    "setting",
    "seed",
    "question",
    "value",
]
_COST_TABLE_METRICS = (*COST, *MODEL, *LOADS, *information_metrics("class", "environment"))


# what intervals over seeds cover, for captions
SEEDS_COVER = (
    "Intervals over seeds cover what a seed draws: new head, adapters, order of the rows, random "
    "partitions and routers, and the training rows if the suite limits their number."
)
# for captions of tables that show the paper's numbers beside ours
OTHER_MODELS = "The paper's numbers are for its own models and tasks."
# the end of the caption of tests_table
_TESTS_CAPTION = (
    "Intervals are 95 % confidence intervals (Student's t). p is from the paired t-test; p (Holm) "
    "is corrected with Holm's procedure over all {num_tests} tests of this table. The verdict uses "
    "p (Holm) at 5 %. “equal”: every difference is zero. A dash: untestable, because there is one "
    "pair, all differences are the same and not zero, or a run diverged."
)
# the end of the caption of cost_table
_COST_CAPTION = (
    "on the machine of the runs (see Environment in report.html). Runs share the machine, so "
    "times are rough and do not compare methods. Start-up is the time before the run's own work "
    "begins, mostly imports. Active neurons are the FFN neurons that a token uses, as a share of "
    "the dense model's. Load entropy is 1 for a perfectly balanced load; loads and drops are "
    "measured on {measured_on}. Operations count two per active parameter and token, without "
    "attention's own products; a CPU or GPU executes more if the masked path computes unused "
    "experts. Only the published settings limit the capacity of experts, so only they drop choices."
)


def join_claim_numbers(*frames: pd.DataFrame) -> pd.DataFrame:
    """Join frames of claim numbers, with the columns :data:`COMPARED`.

    If a frame lacks a column, its rows get an empty text there.
    """
    same_columns = [frame.reindex(columns=COMPARED, fill_value="") for frame in frames]
    return pd.concat(same_columns, ignore_index=True)


def parameter_counts(numbers: pd.DataFrame) -> pd.DataFrame:
    """Select the parameter counts of all runs, and set their ``domain`` to ``model``.

    ``numbers`` are rows of :func:`.records.tabulate_numbers`. :func:`join_claim_numbers` accepts
    the result.
    """
    is_of_model = numbers["part"] == "model"
    is_count = numbers["metric"].isin(COUNTS.metrics)
    return numbers[is_of_model & is_count].assign(domain="model")


def _in_order(titles: Mapping[str, str], ran: Iterable[str]) -> dict[str, str]:
    """Return the titles by name: first the names in ``ran``, in their order, then the others."""
    ordered = {}
    for name in (*ran, *titles):
        # some names that ran have no title; a name that occurs again keeps its first place
        if name in titles:
            ordered[name] = titles[name]
    return ordered


class Outcomes:
    """The finished runs of a benchmark in grid order, and the titles of names in tables.

    Each kind of benchmark has a subclass, which adds the results.

    Args:
        benchmark: The benchmark.
        runs: The finished runs.
        keys: The columns of tables whose names have titles: ``model``, ``method``, ``task``,
            ``eval_task``, or a column of ``titles``.
        titles: For each further column, the title of each name, in the order of table rows.
    """

    pair = "seed"  # the unit of paired differences
    seeds_cover = SEEDS_COVER  # what intervals over seeds cover, for captions
    titles: dict[str, Mapping[str, str]]  # by column and name; names that ran come first
    recorded_numbers: pd.DataFrame  # every number of every run; a subclass sets it

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

        method_titles = {name: method.title for name, method in self.methods.items()}
        all_model_titles = {name: model.title for name, model in load_models().items()}
        # models and tasks with runs come first, in the order of the runs
        model_titles = _in_order(all_model_titles, [run.model for run in runs])
        task_titles = _in_order(benchmark.task_titles, [run.task for run in runs])
        titles_by_column = {
            "model": model_titles,
            "method": method_titles,
            "task": task_titles,
            "eval_task": task_titles,
            **titles,
        }
        # a kind of benchmark has only some of these columns
        self.titles = {key: titles_by_column[key] for key in keys}

    def title(self, key: str, name: str) -> str:
        """Return the title of a name, or the name if it has none."""
        return self.titles[key].get(name, name)

    @property
    def origins(self) -> pd.DataFrame:
        """Return the ``run_id`` and the names of each run, one row per recorded number.

        :func:`.presentation.with_runs` matches the names, such as the model and the method, with
        the rows of a table.
        """
        return self.recorded_numbers

    @property
    def shared_note(self) -> str:
        """Return two sentences for captions: only pairs that all compared rows have are used."""
        return (
            f"n counts the {self.pair}s that all compared rows have. Scores, Δ and marks use only "
            "these."
        )

    @property
    def baseline_title(self) -> str:
        return self.title("method", self.baseline)

    def role(self, method: str) -> str:
        """Return the role of a method: ``baseline``, ``method``, ``control`` or ``ablation``."""
        if method not in self.methods:
            return "method"  # a row that only the paper has
        return self.methods[method].role

    def style(self, method: str) -> MethodStyle:
        """Return the style of a method. ``method`` may have a setting: ``<name>|<setting>``."""
        name, _, _setting = method.partition(SETTING_SEPARATOR)
        return style_of(self.methods[name])

    def styles_by_title(self, titled: pd.DataFrame) -> dict[str, MethodStyle]:
        """Return the style of each ``method_title`` of a frame, changed to tell lines apart.

        A method with several settings has several titles.
        """
        methods = titled[["method_title", "method"]].drop_duplicates()
        titles_and_styles = []
        for row in methods.itertuples():
            titles_and_styles.append((row.method_title, self.style(row.method)))
        return distinct_styles(titles_and_styles)

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add a column ``<key>_title`` for every column with titles, and ``is_method``.

        ``is_method`` is False only for controls. It is True for the baseline and ablations, too.
        """
        # with types, because pandas cannot see the type of a column without rows
        columns: dict[str, pd.Series] = {}
        for key in self.titles:
            if key in frame:
                titles = [self.title(key, name) for name in frame[key]]
                columns[f"{key}_title"] = pd.Series(titles, frame.index, dtype=str)
        is_method = [self.role(name) != CONTROL for name in frame["method"]]
        columns["is_method"] = pd.Series(is_method, frame.index, dtype=bool)
        return frame.assign(**columns)

    def order(self, frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Sort rows by the columns ``keys``, and add titles with :meth:`with_titles`.

        Columns with titles are sorted in the order of ``titles``, with unknown names last. Other
        columns are sorted by value.
        """
        by_rank = frame.sort_values(list(keys), key=self._ranks, kind="stable")
        return self.with_titles(by_rank.reset_index(drop=True))

    def _ranks(self, column: pd.Series) -> pd.Series:
        """Replace the names of a column by their places in ``titles``.

        A column without titles stays as it is.
        """
        names = self.titles.get(str(column.name))
        if not names:
            return column
        ranks = {name: rank for rank, name in enumerate(names)}
        return column.map(lambda name: ranks.get(name, len(ranks)))


def read_published(benchmark: AnyBenchmark, file: str | None = None) -> pd.DataFrame:
    """Read a benchmark's file of published numbers, one row per number.

    Each ``value`` (a score or gain in points, or a rank) has a ``status`` and a ``source``. The
    frame is empty if there is no file. ``file`` is by default ``paper`` of the definition.
    """
    name = file or benchmark.definition.paper
    if not name:
        return pd.DataFrame(columns=[*benchmark.paper_columns, *NUMBER_COLUMNS])
    # only in the column `value`, an empty cell is nan; elsewhere it is an empty text
    return pd.read_csv(benchmark.folder / name, keep_default_na=False, na_values={"value": [""]})


def published_delta(published: pd.DataFrame, baseline: str) -> pd.Series[float]:
    """Return each published ``value`` minus the baseline's for the same ``model`` and ``scope``.

    The difference is nan for the baseline itself, and if the baseline's value is unknown.
    """
    same = ["model", "scope"]
    is_baseline = published["method"] == baseline
    baseline_values = published[is_baseline].set_index(same)["value"].rename("baseline")
    # the baseline's value beside each row
    values_beside_rows = published[same].join(baseline_values, on=same)["baseline"]
    differences = published["value"] - values_beside_rows
    return differences.mask(is_baseline)


def with_numbers(
    frame: pd.DataFrame, on: Sequence[str], numbers: pd.DataFrame, prefix: str = ""
) -> pd.DataFrame:
    """Join the columns of ``numbers`` to a frame, matched by the columns ``on``.

    ``prefix`` is put before the names of the joined columns. A row without numbers gets nan.
    """
    # the columns `on` become the index, so that they get no prefix
    named = numbers.set_index(list(on)).add_prefix(prefix)
    return frame.merge(named, left_on=list(on), right_index=True, how="left")


def spread_over_columns(
    frame: pd.DataFrame,
    on: Sequence[str],
    numbers: pd.DataFrame,
    name_column: str,
    headings: Mapping[str, str],
    metric: str,
    *,
    std: str = "std",
    joint: str = " ",
) -> tuple[pd.DataFrame, list[Column]]:
    """Join numbers to the rows of a table, with one printed column per name, such as per data set.

    Args:
        frame: The rows of the table.
        on: The columns that link a row to its numbers.
        numbers: One row per name and table row. The columns are ``on``, ``name_column``, ``mean``
            and the deviation ``std``.
        name_column: The column of ``numbers`` whose names become printed columns, such as ``task``.
        headings: The heading of each name, in the order of the printed columns.
        metric: The metric of the numbers.
        std: The column of ``numbers`` with the standard deviation to print.
        joint: The text between a name and ``mean`` in the names of the frame's new columns.

    Returns:
        The frame with the new columns, and the printed columns.
    """
    extended = frame
    columns = []
    for name, heading in headings.items():
        has_name = numbers[name_column] == name
        numbers_of_name = numbers[has_name].drop(columns=name_column)
        prefix = f"{name}{joint}"
        extended = with_numbers(extended, on, numbers_of_name, prefix)
        column = Column(metric, f"{prefix}mean", heading, std=f"{prefix}{std}", marks_best=True)
        columns.append(column)
    return extended, columns


def with_average(
    frame: pd.DataFrame, columns: list[Column], metric: str
) -> tuple[pd.DataFrame, list[Column]]:
    """Add a printed column with the average of the columns.

    The average is nan if a row lacks a value, because averages must be comparable. Returns the
    extended frame, and the printed columns with the new one.
    """
    names = [column.value for column in columns]
    averages = frame[names].mean(axis=1, skipna=False)
    average = Column(metric, "average", "Average", marks_best=True)
    return frame.assign(average=averages), [*columns, average]


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """Format an interval as `` [+0.1, +0.9]``, with a leading blank.

    The text is empty if ``low`` is nan.
    """
    if math.isnan(low):
        return ""
    # without z, so that an end that is rounded to 0 keeps its sign
    return f" [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def difference_text(row: Any, unit: str = "") -> str:
    """Format a difference of shares in points, such as ``+0.5 [+0.1, +0.9], better``.

    ``row`` has ``delta``, ``low``, ``high`` and ``verdict``. A missing interval or verdict is left
    out.
    """
    interval = interval_text(row.low * 100, row.high * 100)
    difference = f"{row.delta * 100:+z.1f}{unit}{interval}"
    if not row.verdict:
        return difference
    return f"{difference}, {row.verdict}"


def tests_table(
    against: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame
) -> Table:
    """Make the table of tests against a reference, with intervals, p values and verdicts.

    Args:
        against: The title of the reference.
        caption: The beginning of the caption.
        keys: The headings of the text columns, by column of ``frame``.
        metric: The metric of the differences.
        frame: Rows of :func:`.statistics.with_verdicts`, corrected over all rows.
    """
    num_tests = frame["p"].notna().sum()
    return Table(
        title=f"Tests against {against}",
        caption=f"{caption} {_TESTS_CAPTION.format(num_tests=num_tests)}",
        keys=dict(keys),
        columns=[
            Column(metric, "delta", label="Δ", interval=("low", "high"), signed=True),
            Column("p_value", "p", label="p"),
            Column("p_value", "p_holm", label="p (Holm)"),
        ],
        frame=frame.assign(verdict=frame["verdict"].replace("", MISSING)),
        notes={"verdict": "Verdict"},
    )


def our_means(values: pd.Series[float], cell_columns: Sequence[str]) -> pd.DataFrame:
    """Average the values of each cell.

    A cell is a combination of names in the index levels ``cell_columns``. Returns one row per cell:
    these columns, the mean ``ours``, the 95 % interval ``low`` and ``high`` (nan for a single
    value and for equal values), and the count ``n``. If a value is nan, the mean and the interval
    are nan.
    """
    by_cell = values.groupby(list(cell_columns), sort=False)
    means = pd.DataFrame({"ours": by_cell.mean(skipna=False), "n": by_cell.size()})

    # in the order of the rows of `means`
    lows = []
    highs = []
    for _, cell_values in by_cell:
        # the interval of a mean is that of the differences to 0
        interval = mean_difference(cell_values.to_numpy())
        lows.append(interval.low)
        highs.append(interval.high)
    # without cells, the lists are empty, and only arrays with a type give columns of floats
    return means.assign(low=np.array(lows, float), high=np.array(highs, float)).reset_index()


def published_table(
    title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame, origins: pd.DataFrame
) -> Table:
    """Make a table of our accuracies beside the published ones.

    ``frame`` has the published ``value``, the columns of :func:`our_means`, ``difference``,
    ``status`` and ``source``. ``origins`` links rows to runs (see :attr:`Outcomes.origins`).
    """
    return Table(
        title=title,
        caption=f"{caption} Ours: mean over n runs, with a 95 % confidence interval.",
        keys=dict(keys),
        columns=[
            Column("accuracy", "value", label="Published", decimals=2),
            Column("accuracy", "ours", label="Ours", interval=("low", "high"), decimals=2),
            Column("runs", "n", label="n"),
            Column("accuracy", "difference", label="Ours − published", signed=True, decimals=2),
        ],
        frame=frame.fillna({"status": MISSING, "source": MISSING}),
        notes={"status": "Status", "source": "Source of the published number"},
        origins=origins,
    )


def cell_means(
    numbers: pd.DataFrame, cell_columns: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """Average costs, model sizes and expert loads over the runs of each cell.

    ``numbers`` are rows of :func:`.records.tabulate_numbers`. A cell is a combination of values of
    ``cell_columns``. Returns one row per cell: these columns, and one column per metric.
    """
    costs = numbers[numbers["part"].isin(("cost", "model", "routing"))]
    means = {}
    for metric in metrics:
        of_metric = costs[costs["metric"] == metric]
        means[metric] = of_metric.groupby(list(cell_columns), sort=False)["value"].mean()
    # a cell without a number of some metric has nan there
    return pd.DataFrame(means).reset_index()


def format_counts(
    rows: pd.DataFrame, cell_columns: Sequence[str], count: str = "n"
) -> pd.DataFrame:
    """Format the column ``count`` of each cell as text: ``5``, or ``5–8`` if its rows differ.

    A cell is a combination of values of ``cell_columns``. If all its counts are nan, its text is a
    dash. Returns these columns and ``count``.
    """
    by_cell = rows.groupby(list(cell_columns), sort=False)
    extremes = by_cell[count].agg(["min", "max"])
    texts = []
    for fewest, most in zip(extremes["min"], extremes["max"], strict=True):
        if math.isnan(fewest):
            texts.append(MISSING)
        elif fewest == most:
            texts.append(f"{fewest:.0f}")
        else:
            texts.append(f"{fewest:.0f}–{most:.0f}")
    # the new column has the name that `count` holds
    with_texts = extremes.assign(**{count: texts})
    return with_texts[[count]].reset_index()


def name_or_count(names: Sequence[str], noun: str) -> str:
    """List up to three names, such as ``a, b``. More are only counted, such as ``5 tasks``."""
    if len(names) > 3:
        return f"{len(names)} {noun}"
    return ", ".join(names)


def average_over_seeds(
    frame: pd.DataFrame, cell_columns: Sequence[str], numbers: Sequence[str]
) -> pd.DataFrame:
    """Average ``numbers`` over the rows of each cell (usually one row per seed).

    A cell is a combination of values of ``cell_columns``. Returns one row per cell: these columns,
    the mean of each number, its sample deviation ``<number>_std``, and the count of rows ``n``. If
    a row lacks a number, the mean and the deviation are nan, because ``n`` counts this row, too.
    """
    as_floats = frame.astype(dict.fromkeys(numbers, float))
    by_cell = as_floats.groupby(list(cell_columns), sort=False)
    values = by_cell[list(numbers)]
    means = values.mean(skipna=False)
    deviations = values.std(skipna=False).add_suffix("_std")  # nan for a single row
    counts = by_cell.size().rename("n")
    return means.join(deviations).join(counts).reset_index()


def summarize_scores(scores: pd.DataFrame, cell_columns: Sequence[str]) -> pd.DataFrame:
    """Summarize the ``value`` of each cell over seeds.

    Args:
        scores: The scores, one row per seed.
        cell_columns: The columns that identify a cell.

    Returns:
        One row per cell with ``mean``, ``std`` (sample), ``population_std`` and ``n``. If a score
        is nan, only ``n`` is not.
    """
    rows = []
    for names, cell_scores in scores.groupby(list(cell_columns), sort=False)["value"]:
        names_by_column = dict(zip(cell_columns, names, strict=True))
        row = {
            **names_by_column,
            "mean": cell_scores.mean(skipna=False),
            "std": cell_scores.std(skipna=False),
            "population_std": cell_scores.std(skipna=False, ddof=0),
            "n": len(cell_scores),
        }
        rows.append(row)
    # the columns are named, so that they exist even without rows
    return pd.DataFrame(rows, columns=[*cell_columns, "mean", "std", "population_std", "n"])


def cost_table(
    keys: Mapping[str, str],
    frame: pd.DataFrame,
    cell_columns: Sequence[str],
    numbers: pd.DataFrame,
    *,
    averaged: str,
    measured_on: str,
) -> Table:
    """Make a table of time, memory, parameters and expert loads, averaged over the runs of a cell.

    Args:
        keys: The headings of the text columns, by column of ``frame``.
        frame: One row per cell, with the columns ``cell_columns``.
        cell_columns: The columns that identify a cell.
        numbers: The numbers of all runs, from :func:`.records.tabulate_numbers`.
        averaged: The beginning of the caption, which names the averaged runs.
        measured_on: The data on which loads are measured, for the caption.
    """
    means = cell_means(numbers, cell_columns, metrics=_COST_TABLE_METRICS)
    return Table(
        title="Cost, and use of the experts",
        caption=f"{averaged}, {_COST_CAPTION.format(measured_on=measured_on)}",
        keys=dict(keys),
        columns=[Column(metric, value=metric) for metric in _COST_TABLE_METRICS],
        frame=with_numbers(frame, on=cell_columns, numbers=means),
    )
