"""Compare a suite's numbers with blessed ones: what changed, what is missing, what is new."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import REFERENCE
from benchmarks.harness.planning.catalogue import load_metrics
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.results.records import GROUP_KEYS, collect

_KEYS = [*GROUP_KEYS, "part", "eval_task", "metric"]


@dataclass(frozen=True)
class Comparison:
    """Rows of :func:`compare` by what happened to them; ``changed`` has both numbers and the tolerance."""

    changed: pd.DataFrame
    missing: pd.DataFrame
    new: pd.DataFrame
    equal: int

    @property
    def passed(self) -> bool:
        return self.changed.empty and self.missing.empty and self.new.empty

    def __str__(self) -> str:
        lines = []
        for row in self.changed.itertuples():
            lines.append(f"changed  {_name(row)}: {row.blessed:.6g} -> {row.mean:.6g} (tolerance {row.tolerance:.3g})")
        lines += [f"missing  {_name(row)}: {row.blessed:.6g}" for row in self.missing.itertuples()]
        lines += [f"new      {_name(row)}: {row.mean:.6g}" for row in self.new.itertuples()]
        summary = f"{self.equal} equal within tolerance, {len(self.changed)} changed, {len(self.missing)} missing, {len(self.new)} new"
        return "\n".join([*lines, summary])


def _name(row: object) -> str:
    values = [getattr(row, key) for key in _KEYS]
    return " ".join(str(value) for value in values if value != "")


def summarise(runs: list[Run]) -> pd.DataFrame:
    """Mean over seeds of every number that has a tolerance."""
    records = collect(runs)
    compared = {name for name, metric in load_metrics().items() if metric.tolerance is not None}
    records = records[records["metric"].isin(compared)]
    return records.groupby(_KEYS, sort=True)["value"].agg(mean="mean", n="count").reset_index()


def reference_file(suite: str, folder: Path = REFERENCE) -> Path:
    """Where a suite's blessed numbers are."""
    return folder / f"{suite}.csv"


def bless(runs: list[Run], suite: str, folder: Path = REFERENCE) -> Path:
    """Make the present numbers the reference."""
    path = reference_file(suite, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    summarise(runs).to_csv(path, index=False, float_format="%.12g", lineterminator="\n")
    return path


def compare(runs: list[Run], suite: str, folder: Path = REFERENCE) -> Comparison:
    """Compare with the reference, each metric by its tolerance in ``metrics.yaml``.

    Raises:
        DefinitionError: the suite has no reference, or it is damaged; or a run is not finished.
    """
    path = reference_file(suite, folder)
    if not path.exists():
        raise DefinitionError(
            f"{path} does not exist: bless a run of the suite first (`python -m benchmarks bless --suite {suite}`)"
        )
    present = summarise(runs)
    try:
        blessed = pd.read_csv(path, keep_default_na=False, dtype={"variant": str, "eval_task": str}).rename(
            columns={"mean": "blessed"}
        )
        merged = blessed.drop(columns="n").merge(present, on=_KEYS, how="outer", indicator=True)
    except (KeyError, ValueError) as error:
        raise DefinitionError(f"{path} is no table of blessed numbers: {error}") from error
    unknown = sorted(set(merged["metric"]) - set(load_metrics()))
    if unknown:
        raise DefinitionError(f"{path} has the metric '{unknown[0]}', which metrics.yaml does not know")
    merged["tolerance"] = [_tolerance(row.metric, row.blessed) for row in merged.itertuples()]
    both = merged["_merge"] == "both"
    off = both & ((merged["mean"] - merged["blessed"]).abs() > merged["tolerance"])
    return Comparison(
        merged[off],
        merged[merged["_merge"] == "left_only"],
        merged[merged["_merge"] == "right_only"],
        int((both & ~off).sum()),
    )


def _tolerance(metric: str, blessed: float) -> float:
    tolerance = load_metrics()[metric].tolerance
    return math.nan if tolerance is None or math.isnan(blessed) else tolerance.around(blessed)
