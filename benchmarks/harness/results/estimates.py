"""What runs will take: the cost model, corrected by what finished runs took, and how far it was off on these."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.devices import Device, device_of
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.workload import Workload
from benchmarks.harness.results.durations import benchmark_of, but_the_seed, means, read_cost

_MOST = 200  # settings of a benchmark that are looked at
Basis = Literal["seed", "finished", "blessed", "others", "stated"]


@dataclass(frozen=True)
class Recorded:
    """What a finished run took.

    Attributes:
        folder: of the run.
        device: it ran on, by its name in ``devices.yaml``.
        threads: it was given.
        seconds: of the job.
        megabytes: its memory at the highest; None where it was not recorded.
        steps: of the optimiser that it took; None where it took none.
    """

    folder: str
    device: str
    threads: int
    seconds: float
    megabytes: float | None
    steps: int | None


def recorded(folder: str, root: Path = RUNS) -> Recorded:
    """What a finished run took.

    Raises:
        DefinitionError: its ``metrics.json`` is damaged, or does not say.
    """
    cost, environment = read_cost(folder, root)
    return Recorded(
        folder,
        device_of(environment.get("gpus", ())),
        environment.get("threads", 1),
        float(cost["job_seconds"]),
        cost.get("peak_memory_mb"),
        cost.get("steps") or None,
    )


@dataclass(frozen=True)
class Point:
    """What the model says of a finished run, and what is recorded of it.

    Attributes:
        benchmark: of the run.
        like: what it has in common with runs that differ in the seed alone.
        said: by the model, uncorrected.
        was: as recorded.
    """

    benchmark: str
    like: str
    said: float
    was: float

    @property
    def factor(self) -> float:
        return self.was / self.said


@dataclass(frozen=True)
class Error:
    """How far the model is off on finished runs of a benchmark.

    Every run is estimated from the others, those that differ from it in the seed alone left out.

    Attributes:
        name: of the benchmark, or ``all``.
        runs: how many.
        median: of what the estimates are off by, as a share of what was recorded.
        worst: the largest of these.
        total: the sum of the estimates over that of what was recorded.
    """

    name: str
    runs: int
    median: float
    worst: float
    total: float


def factors(points: Iterable[Point]) -> dict[str, float]:
    """By which the model is corrected: the median over each benchmark's finished runs."""
    found: dict[str, list[float]] = {}
    for point in points:
        found.setdefault(point.benchmark, []).append(point.factor)
    return {name: statistics.median(values) for name, values in found.items()}


def errors(points: Sequence[Point], *, over_benchmarks: bool = False) -> list[Error]:
    """How far the model is off, a row a benchmark and one of all.

    Args:
        points: finished runs. Of a benchmark with thousands some that stand evenly among them are looked at.
        over_benchmarks: correct each benchmark by the others alone, as if none of its own runs had finished.
    """
    of: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        of.setdefault(point.benchmark, {}).setdefault(point.like, []).append(point)
    whole = factors(points)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for name, groups in of.items():
        for like in list(groups)[:: 1 + len(groups) // _MOST]:
            if over_benchmarks:
                known = [factor for other, factor in whole.items() if other != name]
            else:
                known = [point.factor for other, group in groups.items() if other != like for point in group]
            if known:
                factor = statistics.median(known)
                pairs.setdefault(name, []).extend((factor * point.said, point.was) for point in groups[like])
    rows = [_error(name, found) for name, found in pairs.items()]
    return [*rows, _error("all", [pair for found in pairs.values() for pair in found])] if rows else []


def _error(name: str, pairs: Sequence[tuple[float, float]]) -> Error:
    off = [abs(said - was) / was for said, was in pairs]
    total = sum(said for said, _ in pairs) / sum(was for _, was in pairs)
    return Error(name, len(pairs), statistics.median(off), max(off), total)


@dataclass(frozen=True)
class Estimate:
    """What one run will take.

    Attributes:
        seconds: of its job, at most.
        least: at least, where it may stop early.
        basis: as a finished one that differs in the ``seed`` alone; by the model, corrected by ``finished`` runs of its benchmark, by those of
            its benchmark where the suite was ``blessed``, or by those of ``others`` on the same device; or by what is ``stated`` of the device alone.
    """

    seconds: float
    least: float
    basis: Basis


class Estimator:
    """Estimates runs on a device.

    Args:
        name: of the device in ``devices.yaml``.
        device: what it does.
        work: of the suite's runs, by their folders; None of one whose work nobody can say.
        runs: the suite's runs.
        finished: what finished runs of the suite took, and of measurements.
        measured: what measurements compute that are not of the suite, by their folders.
        blessed: seconds of a run by benchmark where the suite was blessed, on a CPU.

    Attributes:
        times: of finished runs on this device.
        memory: of the same, in megabytes.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        work: Mapping[str, Workload | None],
        runs: Iterable[Run],
        finished: Iterable[Recorded],
        measured: Mapping[str, Workload | None],
        blessed: Mapping[str, float],
    ) -> None:
        self._device, self._work = device, work
        self._resources = {run.folder: run.resources for run in runs}
        here = [one for one in finished if one.device == name]
        known = {**measured, **work}
        points = [(one, found) for one in here if (found := known.get(one.folder))]
        self.times = [self._point(one, self._seconds_of(one, found), one.seconds) for one, found in points]
        self.memory = [
            self._point(one, device.memory_bytes(found) / 1e6, one.megabytes) for one, found in points if one.megabytes
        ]
        self._factors, self._memory_factors = factors(self.times), factors(self.memory)
        self._alike = means((but_the_seed(one.folder), one.seconds) for one in here)
        self._means = means((benchmark_of(one.folder), one.seconds) for one in here)
        self._blessed = blessed
        said = means((benchmark_of(folder), self._said(folder, found)) for folder, found in work.items() if found)
        self._blessed_factors = {key: seconds / said[key] for key, seconds in blessed.items() if key in said}
        self._others = statistics.median(self._factors.values()) if self._factors else None

    def estimate(self, folder: str) -> Estimate | None:
        """What a run will take; None where nothing is known."""
        benchmark, work = benchmark_of(folder), self._work[folder]
        if (alike := self._alike.get(but_the_seed(folder))) is not None:
            return Estimate(alike, alike, "seed")
        if work is None:
            for basis, known in (("finished", self._means), ("blessed", self._blessed)):
                if benchmark in known:
                    return Estimate(known[benchmark], known[benchmark], basis)  # type: ignore[arg-type]
            return None
        factor, basis = self._factor(benchmark)
        shorter = dataclasses.replace(
            work, training=_share(work.training, work.least), updates=round(work.updates * work.least)
        )
        return Estimate(factor * self._said(folder, work), factor * self._said(folder, shorter), basis)

    def memory_bytes(self, folder: str) -> float | None:
        """Memory that a run takes, of several processes each on its own device."""
        work = self._work[folder]
        if work is None:
            return None
        factor = self._memory_factors.get(benchmark_of(folder), 1.0)
        return factor * self._device.memory_bytes(work, processes=self._processes(folder))

    def _factor(self, benchmark: str) -> tuple[float, Basis]:
        if benchmark in self._factors:
            return self._factors[benchmark], "finished"
        if benchmark in self._blessed_factors:
            return self._blessed_factors[benchmark], "blessed"
        return (1.0, "stated") if self._others is None else (self._others, "others")

    def _said(self, folder: str, work: Workload) -> float:
        threads = self._resources[folder].get("threads", 1) or 1
        sharded = self._resources[folder].get("parallel") == "fsdp"
        return self._device.seconds(work, processes=self._processes(folder), threads=threads, sharded=sharded)

    def _processes(self, folder: str) -> int:
        return int(self._resources[folder].get("processes", 1))

    def _seconds_of(self, one: Recorded, work: Workload) -> float:
        """What the model says of a finished run, which may have stopped early."""
        if one.steps and one.steps < work.updates:
            share = one.steps / work.updates
            work = dataclasses.replace(work, training=_share(work.training, share), updates=one.steps)
        return self._device.seconds(work, threads=one.threads)

    @staticmethod
    def _point(one: Recorded, said: float, was: float | None) -> Point:
        return Point(benchmark_of(one.folder), but_the_seed(one.folder), said, was or 0.0)


def _share(passes: Any, share: float) -> Any:
    return dataclasses.replace(passes, count=passes.count * share, tokens=passes.tokens * share)
