"""Tables of every kind of benchmark that trains: tests against the baseline, and what it took."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks.harness.reporting.rendering import MISSING, Column, Table

_SHOWN = (
    ("cost", "train_seconds"),
    ("cost", "step_seconds"),
    ("cost", "evaluation_seconds"),
    ("cost", "startup_seconds"),
    ("cost", "job_seconds"),
    ("cost", "peak_memory_mb"),
    ("model", "active_neurons"),
    ("model", "parameters"),
    ("model", "trainable_parameters"),
    ("routing", "load_entropy"),
    ("routing", "load_max_over_mean"),
    ("routing", "drop_rate"),
    ("routing", "class_information"),
    ("routing", "class_information_chance"),
    ("routing", "class_information_chance_95"),
    ("routing", "environment_information"),
    ("routing", "environment_information_chance"),
    ("routing", "environment_information_chance_95"),
)


def in_order(frame: pd.DataFrame, places: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Rows sorted by columns, each by the place of its value in a list; values that the list does not have come last.

    Args:
        frame: the rows.
        places: the columns, the first one first, with their lists.
    """

    def place(column: pd.Series) -> pd.Series:
        known = places[str(column.name)]
        return column.map(lambda value: known.index(value) if value in known else len(known))

    return frame.sort_values(list(places), key=place, kind="stable").reset_index(drop=True)


def interval_text(low: float, high: float, decimals: int = 1) -> str:
    """A confidence interval of a difference for a sentence, with a blank before it; nothing where there is none."""
    return "" if math.isnan(low) else f" [{low:+z.{decimals}f}, {high:+z.{decimals}f}]"


def tests_table(
    name: str, baseline: str, caption: str, keys: Mapping[str, str], metric: str, frame: pd.DataFrame
) -> Table:
    """Paired differences to the baseline, with intervals, p and verdicts.

    Args:
        name: of the file.
        baseline: title of the baseline.
        caption: what was paired and corrected.
        keys: columns that name a row, with their headings.
        metric: that the differences are of.
        frame: one row a difference, as :func:`~benchmarks.harness.results.statistics.with_verdicts` makes them, with titles.
    """
    return Table(
        name,
        f"Tests against {baseline}",
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


def published_table(name: str, title: str, caption: str, keys: Mapping[str, str], frame: pd.DataFrame) -> Table:
    """Published accuracies beside ours.

    Args:
        name: of the file.
        title: heading.
        caption: what the columns and their gaps mean.
        keys: columns that name a row, with their headings.
        frame: with ``value``, ``ours``, ``difference``, ``status`` and ``source``.
    """
    return Table(
        name,
        title,
        caption,
        dict(keys),
        [
            Column("accuracy", "value", "Published", decimals=2),
            Column("accuracy", "ours", "Ours", decimals=2),
            Column("accuracy", "difference", "Ours − published", signed=True, decimals=2),
        ],
        frame.assign(status=frame["status"].fillna(MISSING), source=frame["source"].fillna(MISSING)),
        notes={"status": "Status", "source": "Source of the published number"},
    )


def means_by(records: pd.DataFrame, cell: Sequence[str]) -> Callable[[str, str], pd.Series]:
    """What :func:`cost_table` takes: the mean of a part's metric over the runs of each cell."""

    def means(part: str, metric: str) -> pd.Series:
        rows = records[(records["part"] == part) & (records["metric"] == metric)]
        return rows.groupby(list(cell), sort=False)["value"].mean()

    return means


def cost_table(
    name: str,
    keys: Mapping[str, str],
    frame: pd.DataFrame,
    cell: Sequence[str],
    means: Callable[[str, str], pd.Series],
    *,
    averaged: str,
    measured_on: str,
) -> Table:
    """Time, memory, parameters and loads.

    Args:
        name: of the file.
        keys: columns that name a row, with their headings.
        frame: one row a cell, with titles.
        cell: columns that identify a row.
        means: of a part and metric of the records, over the runs of each cell.
        averaged: which runs' means these are.
        measured_on: where loads were counted.
    """
    for part, metric in _SHOWN:
        frame = frame.merge(means(part, metric).rename(metric), left_on=list(cell), right_index=True, how="left")
    return Table(
        name,
        "What it took, and how the experts were used",
        f"{averaged}, on the machine of the runs (see the environment below). Runs share the machine, so times are rough: "
        "they do not compare methods. Start-up is what passes before the run's own work begins, mostly imports. Active neurons are the FFN neurons "
        f"that a token uses, as a share of the dense model's. Load entropy is 1 for a perfectly balanced load; loads and drops are measured on {measured_on}. "
        "Only the published settings limit the capacity of experts, so only there are choices dropped.",
        dict(keys),
        [Column(metric, metric) for _, metric in _SHOWN],
        frame,
    )
