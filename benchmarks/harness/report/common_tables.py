"""Tables of every kind of benchmark that trains: results, tests against the baseline, what it took, what was published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.harness.report.rendering import MISSING, Column, Table
from benchmarks.harness.results.records import COST, LOADS, MODEL, information_numbers
from benchmarks.harness.results.statistics import confidence_interval

_COST = (*COST, *MODEL, *LOADS, *information_numbers("class", "environment"))


def with_numbers(frame: pd.DataFrame, on: Sequence[str], numbers: pd.DataFrame, prefix: str = "") -> pd.DataFrame:
    """Rows with the numbers that have the same values in the columns ``on``, the numbers' columns prefixed."""
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
    best: str | None = "mean",
    joint: str = " ",
) -> tuple[pd.DataFrame, list[Column]]:
    """Spread numbers over one column a name.

    Args:
        frame: rows, with the columns ``on``.
        on: columns that numbers and rows share.
        numbers: those, ``mean``, ``std``, ``best``, and, as the first column, the name of all columns.
        headings: by name, in the order of columns.
        metric: that the numbers are of.
        std: column of the numbers with their spread.
        best: column of the numbers by which the best row is marked.
        joint: between a name and a column of the numbers, in columns of the frame.

    Returns:
        The rows with the numbers, and the columns of the table.
    """
    by, columns = numbers.columns[0], []
    for name, heading in headings.items():
        prefix = f"{name}{joint}"
        frame = with_numbers(frame, on, numbers[numbers[by] == name].drop(columns=by), prefix)
        columns.append(Column(metric, f"{prefix}mean", heading, std=f"{prefix}{std}", best=best and f"{prefix}{best}"))
    return frame, columns


def with_average(frame: pd.DataFrame, columns: list[Column], metric: str) -> tuple[pd.DataFrame, list[Column]]:
    """With the average of columns, where a row has all of them: an average over fewer is another number."""
    averages = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
    average = Column(metric, "average", "Average", best="average")
    return frame.assign(average=averages), [*columns, average]


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """A confidence interval of a difference for a sentence, with a blank before it; nothing where there is none."""
    return "" if math.isnan(low) else f" [{low:+z.{decimals}f}, {high:+z.{decimals}f}]"


def difference_text(row: Any, unit: str = "") -> str:
    """A difference of shares for a sentence: in points, with its interval and verdict."""
    interval = interval_text(row.low * 100, row.high * 100)
    return f"{row.delta * 100:+z.1f}{unit}{interval}, {row.verdict or 'no test'}"


def tests_table(against: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame) -> Table:
    """Paired differences to the baseline, with intervals, p and verdicts.

    Args:
        against: titles of what rows are compared with.
        caption: what was paired and corrected.
        keys: columns that name a row, with their headings.
        metric: that the differences are of.
        frame: one row a difference, as :func:`~benchmarks.harness.results.statistics.with_verdicts` makes them, with titles.
    """
    return Table(
        f"Tests against {against}",
        caption,
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
    """Means by cell as :func:`published_table` reads them: ``ours``, the ends of its 95 % interval from two values on, and their number ``n``."""
    rows = values.groupby(list(cell), sort=False)
    found = rows.agg(ours="mean", n="size")
    for number, end in enumerate(("low", "high")):
        ends = rows.agg(lambda own, number=number: confidence_interval(own.to_numpy())[number])
        found[end] = ends.where(found["n"] > 1)
    return found.reset_index()


def published_table(title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame) -> Table:
    """Published accuracies beside ours.

    Args:
        title: heading.
        caption: what the columns and their gaps mean.
        keys: columns that name a row, with their headings.
        frame: with ``value``, what :func:`our_means` gives, ``difference``, ``status`` and ``source``.
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
        frame.assign(status=frame["status"].fillna(MISSING), source=frame["source"].fillna(MISSING)),
        notes={"status": "Status", "source": "Source of the published number"},
    )


def means_by(records: pd.DataFrame, cell: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Means of what runs took and of how their experts were used, a row a cell, a column a metric."""
    records = records[records["part"].isin(("cost", "model", "routing"))]
    by_metric = {metric: records[records["metric"] == metric].groupby(list(cell), sort=False) for metric in metrics}
    return pd.DataFrame({metric: rows["value"].mean() for metric, rows in by_metric.items()}).reset_index()


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
    """Time, memory, parameters and loads.

    Args:
        keys: columns that name a row, with their headings.
        frame: one row a cell, with titles.
        cell: columns that identify a row.
        records: numbers of the runs of each cell.
        averaged: which runs' means these are.
        measured_on: where loads were counted.
        published: rows of what others report, with titles and ``source``, which stand below ours.
    """
    frame, elsewhere = with_numbers(frame, cell, means_by(records, cell, _COST)), ""
    if published is not None:
        frame = pd.concat([frame, published], ignore_index=True)
        elsewhere = (
            f" Below ours: what others report of machines of their own ({'; '.join(published['source'].unique())})."
        )
    return Table(
        "What it took, and how the experts were used",
        f"{averaged}, on the machine of the runs (see the environment below). Runs share the machine, so times are rough: "
        "they do not compare methods. Start-up is what passes before the run's own work begins, mostly imports. Active neurons are the FFN neurons "
        f"that a token uses, as a share of the dense model's. Load entropy is 1 for a perfectly balanced load; loads and drops are measured on {measured_on}. "
        "Operations are two for every parameter in use that a token is multiplied with, without attention's own products; what a CPU or GPU executes is more where the masked path computes "
        f"experts that are not used. Only the published settings limit the capacity of experts, so only there are choices dropped.{elsewhere}",
        dict(keys),
        [Column(metric, metric) for metric in _COST],
        frame,
    )
