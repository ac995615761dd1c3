"""Compare a suite's numbers with blessed ones: what changed, what is missing, what is new.

On the machine that blessed a number it has to be equal to the last digit. On another one it may be as far off as machines were seen to be.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import REFERENCE, RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.quantities import KEYS, deviation, judged_how, one_counts, quantities
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.reference import (
    MACHINE,
    Reference,
    Tolerances,
    machine_name,
    read_reference,
    read_tolerances,
)

Status = Literal["changed", "missing", "new", "shown"]
_LINES = 6
_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """A number that is not as it was blessed.

    Attributes:
        status: ``shown`` is a time, which decides nothing.
        run: what was run, in words.
        before: the blessed value, empty where it is new.
        after: the present value, empty where it is missing.
        difference: after less before, of numbers.
        spreads: the same in standard deviations of the blessed seeds; None where there are no two of them, or they do not differ.
        n: blessed seeds.
        deviation: how far apart they are.
        tolerance: how far they may be; 0 on the same machine.
    """

    status: Status
    run: str
    seed: int
    part: str
    set: str
    metric: str
    before: str = ""
    after: str = ""
    difference: float | None = None
    spreads: float | None = None
    n: int = 0
    deviation: float = 0.0
    tolerance: float = 0.0

    def __str__(self) -> str:
        name = " ".join(word for word in (self.part, self.set, self.metric) if word)
        if self.status == "missing":
            return f"{name}: {_short(self.before)}"
        if self.status == "new":
            return f"{name}: {_short(self.after)}"
        more = [] if self.difference is None else [f"{self.difference:+.3g}"]
        more += [] if self.spreads is None else [f"{self.spreads:+.1f} sd of the seeds"]
        more += [f"n {self.n}"] if self.n else []
        more += [f"{self.deviation:.2g} apart, tolerance {self.tolerance:.2g}"] if self.tolerance else []
        return f"{name}: {_short(self.before)} -> {_short(self.after)} ({', '.join(more)})"


@dataclass(frozen=True)
class Tier:
    """How numbers were compared.

    Attributes:
        name: ``equal`` to the last digit, or within a ``tolerance``.
        numbers: how many.
        why: what of the machine is the same or another.
    """

    name: Literal["equal", "tolerance"]
    numbers: int
    why: str


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    findings: tuple[Finding, ...]
    tiers: tuple[Tier, ...]
    equal: int
    unfinished: tuple[str, ...] = ()

    def _of(self, status: Status) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == status]

    @property
    def changed(self) -> list[Finding]:
        return self._of("changed")

    @property
    def missing(self) -> list[Finding]:
        return self._of("missing")

    @property
    def new(self) -> list[Finding]:
        return self._of("new")

    @property
    def shown(self) -> list[Finding]:
        """Times that are others, which decide nothing."""
        return self._of("shown")

    @property
    def passed(self) -> bool:
        return not (self.changed or self.missing or self.new)

    def to_json(self) -> str:
        """All of it, for programs."""
        content = asdict(self) | {"passed": self.passed}
        for finding in content["findings"]:
            for name in ("deviation", "tolerance"):
                if not math.isfinite(finding[name]):
                    finding[name] = str(finding[name])
        return json.dumps(content, indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = []
        for status in ("changed", "missing", "new"):
            found = self._of(status)
            for (run, seed), count in Counter((one.run, one.seed) for one in found).items():
                theirs = [one for one in found if (one.run, one.seed) == (run, seed)]
                lines += [f"{status:<8} {run} s{seed} {one}" for one in theirs[:_LINES]]
                if count > _LINES:
                    lines.append(f"{status:<8} {run} s{seed}: {count - _LINES} more numbers")
        apart = sorted(self.shown, key=lambda one: -one.deviation)
        lines += [f"time     {one.run} {one} decides nothing" for one in apart[:_SHOWN]]
        if self.unfinished:
            lines.append(f"{len(self.unfinished)} runs are not finished, the first is {self.unfinished[0]}")
        lines += [f"compared {tier.numbers} numbers, {tier.why}" for tier in self.tiers]
        counts = f"{len(self.changed)} changed, {len(self.missing)} missing, {len(self.new)} new"
        return "\n".join([*lines, f"{self.equal} agree, {counts}"])


def _short(value: str) -> str:
    return value if len(value) < 60 else f"{value[:57]}..."


def present(runs: Sequence[Run], suite: str, root: Path = RUNS) -> tuple[Reference, tuple[str, ...]]:
    """The numbers of the runs that are finished, with their machines; and the names of the others.

    Raises:
        DefinitionError: none is finished; or a file is damaged.
    """
    found, unfinished = [], []
    for run in runs:
        if (root / run.folder / "metrics.json").exists():
            found.append((run, read_metrics(run, root)))
        else:
            unfinished.append(run.id)
    if not found:
        raise DefinitionError(
            f"no run of the suite '{suite}' is finished below {root}: `snakemake --cores all --config suite={suite}`"
        )
    return as_reference(found), tuple(unfinished)


def as_reference(found: Sequence[tuple[Run, Mapping[str, Any]]]) -> Reference:
    """Numbers of finished runs, from their ``metrics.json``, with their machines."""
    machines: dict[str, Mapping[str, str]] = {}
    parts = []
    for run, content in found:
        fingerprint = content.get("environment", {}).get("fingerprint", {})
        name = machine_name(fingerprint)
        machines[name] = fingerprint
        parts.append((run, content, name))
    rows = quantities((run, content) for run, content, _ in parts)
    by_id = {run.id: name for run, _, name in parts}
    return Reference(rows.assign(**{MACHINE: rows.pop("id").map(by_id)}), machines)


def compare(runs: Sequence[Run], suite: str, folder: Path = REFERENCE, *, elsewhere: bool = False) -> Comparison:
    """Compare with the reference.

    Args:
        runs: of the suite.
        suite: its name.
        folder: where references are.
        elsewhere: judge as if this were another machine than the one that blessed.

    Raises:
        DefinitionError: the suite has no reference, or it is damaged or of an older form; no run is finished; or the machine is another one
            and no spread was measured.
    """
    numbers, unfinished = present(runs, suite)
    blessed = read_reference(suite, folder)
    return judge(blessed, numbers, lambda: read_tolerances(suite, folder), unfinished, elsewhere=elsewhere)


def judge(
    blessed: Reference,
    numbers: Reference,
    tolerances: Callable[[], Tolerances],
    unfinished: tuple[str, ...] = (),
    *,
    elsewhere: bool = False,
) -> Comparison:
    """Compare numbers with blessed ones.

    Args:
        blessed: the reference.
        numbers: the present ones.
        tolerances: gives the :class:`~benchmarks.harness.results.reference.Tolerances`; asked where a machine is another.
        unfinished: runs without numbers.
        elsewhere: judge as if all machines were others.
    """
    merged = blessed.rows.merge(numbers.rows, on=KEYS, how="outer", suffixes=("_before", "_after"), indicator="side")
    spreads, ones = _seeds(blessed.rows), one_counts(blessed.rows)
    findings: list[Finding] = []
    used: Counter[tuple[str, str]] = Counter()
    equal, allowed = 0, None
    for row in merged.itertuples():
        key = (str(row.run), int(row.seed), str(row.part), str(row.set), str(row.metric))
        judged = judged_how(key[-1])
        if row.side != "both":
            if judged == "shown":
                continue
            before = row.side == "left_only"
            value = {"before": row.value_before} if before else {"after": row.value_after}
            findings.append(Finding("missing" if before else "new", *key, **value))
            continue
        same = not elsewhere and row.machine_before == row.machine_after != ""
        if judged != "shown":
            used[row.machine_before, row.machine_after] += 1
        apart = deviation(key[-1], row.value_before, row.value_after)
        tolerance = 0.0
        if judged == "measured" and not same and apart:
            allowed = allowed or tolerances()
            tolerance = allowed.of(key[2], key[-1], ones.get(key, 0.0))
        if judged != "shown" and apart <= tolerance:
            equal += 1
            continue
        if apart:
            difference = _difference(row.value_before, row.value_after)
            deviated, n = spreads.get((key[0], *key[2:]), (math.nan, 1))
            findings.append(
                Finding(
                    "shown" if judged == "shown" else "changed",
                    *key,
                    row.value_before,
                    row.value_after,
                    difference,
                    difference / deviated if difference is not None and deviated > 0 else None,
                    n,
                    apart,
                    tolerance,
                )
            )
    return Comparison(
        tuple(findings), tuple(_tiers(used, blessed, numbers, elsewhere=elsewhere)), equal, tuple(unfinished)
    )


def _difference(before: str, after: str) -> float | None:
    try:
        return float(after) - float(before)
    except ValueError:  # several numbers, or words
        return None


def _seeds(rows: pd.DataFrame) -> dict[tuple[str, ...], tuple[float, int]]:
    """Standard deviation over the seeds, and how many, of every quantity of a run."""
    numbers = rows.assign(value=pd.to_numeric(rows["value"], errors="coerce"))
    grouped = numbers.groupby(["run", "part", "set", "metric"])["value"].agg(["std", "size"])
    return {key: (float(one["std"]), int(one["size"])) for key, one in grouped.iterrows()}


def _tiers(
    used: Mapping[tuple[str, str], int], blessed: Reference, numbers: Reference, *, elsewhere: bool
) -> Iterable[Tier]:
    for (before, after), count in used.items():
        if elsewhere:
            yield Tier("tolerance", count, "within a tolerance, as asked")
        elif before == after != "":
            yield Tier("equal", count, f"to the last digit: the machine is the same ({before})")
        else:
            differ = _differ(blessed.machines.get(before, {}), numbers.machines.get(after, {}))
            yield Tier("tolerance", count, f"within a tolerance: the machine is another one ({differ})")


def _differ(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    if not before or not after:
        return "not recorded"
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return "; ".join(f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in names)
