"""Make the tables that several benchmarks share: tests against the baseline, costs, published numbers."""

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
    best: str | None = "mean",
    joint: str = " ",
) -> tuple[pd.DataFrame, list[Column]]:
    """Add one column of numbers per name.

    Args:
        frame: The rows, with the columns ``on``.
        on: The columns that numbers and rows share.
        numbers: These columns, ``mean``, ``std``, ``best``, and as the first column the name.
        headings: The headings by name, in the order of the columns.
        metric: The metric of the numbers.
        std: The column of the numbers with their standard deviation.
        best: The column of the numbers by which the best row is marked.
        joint: The text between name and column in the columns of the frame.

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
    """Add the average of the columns for the rows with all of them; an average over fewer is another number."""
    averages = frame[[column.value for column in columns]].mean(axis=1, skipna=False)
    average = Column(metric, "average", "Average", best="average")
    return frame.assign(average=averages), [*columns, average]


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """Print the confidence interval of a difference after a blank; empty if there is none."""
    return "" if math.isnan(low) else f" [{low:+z.{decimals}f}, {high:+z.{decimals}f}]"


def difference_text(row: Any, unit: str = "") -> str:
    """Print a difference of shares in points, with its interval and verdict."""
    interval = interval_text(row.low * 100, row.high * 100)
    return f"{row.delta * 100:+z.1f}{unit}{interval}, {row.verdict or 'no test'}"


def tests_table(against: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame) -> Table:
    """Make a table of paired differences to the baseline, with intervals, p and verdicts.

    Args:
        against: The title of the baseline.
        caption: The explanation of pairs and correction.
        keys: The columns that name a row, with their headings.
        metric: The metric of the differences.
        frame: One row per difference, as :func:`~benchmarks.harness.results.statistics.with_verdicts` makes them, with titles.
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
    """Compute the means of cells for :func:`published_table`: ``ours``, its 95 % interval from two values on, and the number ``n``."""
    rows = values.groupby(list(cell), sort=False)
    means = rows.agg(ours="mean", n="size")
    for number, end in enumerate(("low", "high")):
        ends = rows.agg(lambda cell_values, number=number: confidence_interval(cell_values.to_numpy())[number])
        means[end] = ends.where(means["n"] > 1)
    return means.reset_index()


def published_table(title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame) -> Table:
    """Make a table of published accuracies and ours.

    Args:
        title: The heading.
        caption: The explanation of columns and gaps.
        keys: The columns that name a row, with their headings.
        frame: The rows with ``value``, the columns of :func:`our_means`, ``difference``, ``status`` and ``source``.
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
    """Compute the means of costs and expert loads, one row per cell and one column per metric."""
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
    """Make a table of time, memory, parameters and loads.

    Args:
        keys: The columns that name a row, with their headings.
        frame: One row per cell, with titles.
        cell: The columns that identify a row.
        records: The numbers of the runs of each cell.
        averaged: The runs of the means, as the caption says it.
        measured_on: The rows on which loads were counted.
        published: The rows of others' numbers, with titles and ``source``, below ours.
    """
    frame, others = with_numbers(frame, cell, means_by(records, cell, _COST)), ""
    if published is not None:
        frame = pd.concat([frame, published], ignore_index=True)
        others = (
            f" Below ours: what others report of machines of their own ({'; '.join(published['source'].unique())})."
        )
    return Table(
        "What it took, and how the experts were used",
        f"{averaged}, on the machine of the runs (see the environment below). Runs share the machine, so times are rough: "
        "they do not compare methods. Start-up is what passes before the run's own work begins, mostly imports. Active neurons are the FFN neurons "
        f"that a token uses, as a share of the dense model's. Load entropy is 1 for a perfectly balanced load; loads and drops are measured on {measured_on}. "
        "Operations are two for every parameter in use that a token is multiplied with, without attention's own products; what a CPU or GPU executes is more where the masked path computes "
        f"experts that are not used. Only the published settings limit the capacity of experts, so only there are choices dropped.{others}",
        dict(keys),
        [Column(metric, metric) for metric in _COST],
        frame,
    )
