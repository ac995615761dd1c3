"""What a suite will take, before anything runs: jobs, time, memory, GPUs, disk, downloads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.definition import benchmark_names, load_benchmark
from benchmarks.harness.config.devices import CPU, USUAL_GPU, Device, device_of, find_device
from benchmarks.harness.config.jobs import partition_jobs
from benchmarks.harness.config.kinds import kind_of
from benchmarks.harness.config.paper_items import load_paper_items, runs_shown
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.workload import Workload
from benchmarks.harness.results.estimates import Basis, Error, Estimate, Estimator, errors, recorded
from benchmarks.harness.run.downloads import Need, check_sets, exists, models_needed, packages_needed, sets_needed
from emoe.errors import EMoEError

_FILES = 40e3  # bytes of a run's settings, numbers and log, in the mini suite


@dataclass(frozen=True)
class Work:
    """What the runs of one benchmark take, of one table or figure, or all.

    Attributes:
        name: the benchmark's, the table's, or ``all``.
        runs: how many.
        done: how many of them have their numbers.
        seconds: what those that are missing take, one after the other, as far as that is known.
        least_seconds: the same, where all that may stop early do so as early as they may.
        core_seconds: of those without GPUs, times their cores.
        longest_seconds: of a single one.
        by_basis: of how many of them it is known, by :class:`~benchmarks.harness.results.estimates.Estimate`'s basis.
        unknown: of how many nothing is known.
        gpu_seconds: the seconds of those with GPUs, times their GPUs.
        gpus: most that one of the missing takes.
        threads: most that one of them asks for; 0 is all.
        mem_mb: most that one of them asks the machine for, in MB.
        memory_bytes: what the largest of them needs, by the model: of each GPU where it has any, else of the machine; None where that is not known.
        too_large: how many of them need more than a GPU has.
        kept_bytes: what they leave behind.
        checkpoint_bytes: what the largest of them takes besides while it runs.
    """

    name: str
    runs: int
    done: int
    seconds: float
    least_seconds: float
    core_seconds: float
    longest_seconds: float
    by_basis: Mapping[Basis, int]
    unknown: int
    gpu_seconds: float
    gpus: int
    threads: int
    mem_mb: int
    memory_bytes: float | None
    too_large: int
    kept_bytes: float
    checkpoint_bytes: float

    @property
    def missing(self) -> int:
        return self.runs - self.done


@dataclass(frozen=True)
class Outlook:
    """What is done and what is missing of a suite.

    Attributes:
        work: a row a benchmark.
        total: all of them.
        tables: a row for each of the paper's tables and figures that the suite shows, with all runs that it needs; runs that several of them
            show count in each, and once in ``total``.
        devices: the devices that estimates are of, by their names.
        errors: how far the model is off on finished runs, by what it says: ``time``, ``time of other benchmarks`` (corrected by these alone), ``memory``.
        partitions: clusterings that the missing runs need; ``partitions_there`` of them are made.
        packages: package files that data or weights are read from.
        models: the missing runs' models.
        sets: those that the missing runs read.
        cache_bytes: of tokens, and of what frozen layers make of them, which all runs share.
        assumed: what the model does not know and takes at its most, or leaves out.
    """

    work: Sequence[Work]
    total: Work
    tables: Sequence[Work]
    devices: Mapping[str, Device]
    errors: Mapping[str, Sequence[Error]]
    partitions: int
    partitions_there: int
    packages: Sequence[Need]
    models: Sequence[Need]
    sets: Sequence[Need]
    cache_bytes: float
    assumed: Sequence[str]


def look_ahead(
    suite: Suite,
    benchmark: str | None = None,
    table: str | None = None,
    device: str | None = None,
    tflops: float | None = None,
) -> Outlook:
    """What is done and missing of a suite, and what the rest takes. Nothing runs and nothing is downloaded.

    Args:
        suite: the suite.
        benchmark: only the runs of this one.
        table: only the runs that this table or figure of the paper needs.
        device: what all runs are taken to run on; None for this machine, and a usual GPU for those that ask for one where it has none.
        tflops: what it does, in 10¹² operations a second, instead of what ``devices.yaml`` says.

    Raises:
        DefinitionError: a finished run's ``metrics.json`` is damaged; no such device.
    """
    tables = {name: runs_shown(suite, name) for name in load_paper_items() if table in (None, name)}
    if table and not tables.get(table):
        runs_shown(suite, table)  # where there is no such table
        why = load_paper_items()[table].missing
        raise DefinitionError(f"the suite {suite.name} runs nothing of {table}" + (f": {why}" if why else ""))
    chosen = None if table is None else {run.folder for run in tables[table]}
    runs = {
        run.folder: run
        for run in suite.runs
        if benchmark in (None, run.benchmark) and (chosen is None or run.folder in chosen)
    }
    if not runs:
        raise DefinitionError(f"of {table} the suite {suite.name} runs nothing in the benchmark {benchmark}")
    look = _Look(suite, runs, device, tflops)
    missing = list(look.missing)
    # of thousands of runs few want another clustering, and to name one takes a hash
    partitions = {
        (job.model["name"], str(job.config)): job for folder in missing for job in partition_jobs(runs[folder])
    }
    works = [found for folder in missing if (found := look.work[folder])]
    of_benchmark: dict[str, list[str]] = {}
    for folder, run in runs.items():
        of_benchmark.setdefault(run.benchmark, []).append(folder)
    wanted = [runs[folder] for folder in missing]
    return Outlook(
        [look.sum_up(name, folders) for name, folders in of_benchmark.items()],
        look.sum_up("all", list(runs)),
        [
            look.sum_up(name, [run.folder for run in found])
            for name, found in tables.items()
            if found and all(run.folder in runs for run in found)
        ],
        look.devices,
        look.errors(),
        len(partitions),
        sum(exists(job.file) for job in partitions.values()),
        packages_needed(wanted),
        list(models_needed(wanted)),
        sets_needed(check_sets(wanted), wanted),
        sum(dict(pair for work in works for pair in work.caches).values()),
        list(dict.fromkeys(note for work in works for note in work.assumed)),
    )


@dataclass(frozen=True)
class _Missing:
    """A run that is missing, and what it takes."""

    resources: Mapping[str, int]
    work: Workload | None
    estimate: Estimate | None
    memory: float | None
    gpus: int
    cores: int
    too_large: bool


class _Look:
    """What is finished of a suite, and estimates of the rest, device by device.

    Attributes:
        work: what each run of the suite computes, by its folder.
        missing: the runs that are looked at and have no numbers.
        devices: those that they run on.
    """

    def __init__(self, suite: Suite, runs: Mapping[str, Run], device: str | None, tflops: float | None) -> None:
        every = suite.runs_by_folder
        specs = {folder: run.spec for folder, run in every.items()}
        self.work = {folder: _workload(run, specs) for folder, run in every.items()}
        done = [folder for folder in every if exists(f"{RUNS}/{folder}/metrics.json")]
        elsewhere = _measured()
        measured = {folder: _workload(run, {}) for folder, run in elsewhere.items() if folder not in every}
        finished = [recorded(folder) for folder in (*done, *measured)] if not tflops else []
        here = _device_here()
        of = {
            folder: device or (USUAL_GPU if run.resources["gpu"] and here == CPU else here)
            for folder, run in every.items()
        }
        self.devices = {
            name: _overridden(find_device(name), tflops) for name in dict.fromkeys(of[folder] for folder in runs)
        }
        self._estimators = {
            name: Estimator(
                name,
                found,
                self.work,
                every.values(),
                finished,
                measured,
                suite.blessed_seconds if name == CPU and not tflops else {},
            )
            for name, found in self.devices.items()
        }
        there = set(done)
        self.missing = {folder: self._missing(run, of[folder]) for folder, run in runs.items() if folder not in there}

    def _missing(self, run: Run, name: str) -> _Missing:
        device, estimator, resources = self.devices[name], self._estimators[name], run.resources
        memory = estimator.memory_bytes(run.folder)
        return _Missing(
            resources,
            self.work[run.folder],
            estimator.estimate(run.folder),
            memory,
            0 if name == CPU else max(resources["gpu"], 1),
            resources["threads"] or os.cpu_count() or 1,
            memory is not None and device.memory_gb is not None and memory > device.memory_gb * 1e9,
        )

    def sum_up(self, name: str, folders: Sequence[str]) -> Work:
        """What some of the runs take."""
        missing = [self.missing[folder] for folder in folders if folder in self.missing]
        estimated = [(one, one.estimate) for one in missing if one.estimate]
        works = [one.work for one in missing if one.work]
        threads = {one.resources["threads"] for one in missing}
        return Work(
            name,
            len(folders),
            len(folders) - len(missing),
            sum(found.seconds for _, found in estimated),
            sum(found.least for _, found in estimated),
            sum(found.seconds * one.cores for one, found in estimated if not one.gpus),
            max((found.seconds for _, found in estimated), default=0.0),
            dict(Counter(found.basis for _, found in estimated)),
            len(missing) - len(estimated),
            sum(found.seconds * one.gpus for one, found in estimated),
            max((one.gpus for one in missing), default=0),
            0 if 0 in threads else max(threads, default=0),
            max((one.resources["mem_mb"] for one in missing), default=0),
            max((one.memory for one in missing if one.memory is not None), default=None),
            sum(one.too_large for one in missing),
            len(missing) * _FILES + sum(found.size.trained_bytes for found in works if found.keeps),
            max((2 * found.size.checkpoint_bytes for found in works), default=0.0),
        )

    def errors(self) -> dict[str, list[Error]]:
        """How far the model is off on finished runs."""
        times = [point for one in self._estimators.values() for point in one.times]
        memory = [point for one in self._estimators.values() for point in one.memory]
        return {
            "time": errors(times),
            "time of other benchmarks": errors(times, over_benchmarks=True),
            "memory": errors(memory),
        }


def _workload(run: Run, specs: Mapping[str, Mapping[str, object]]) -> Workload | None:
    try:
        return kind_of(run.benchmark).workload(run.spec, load_benchmark(run.benchmark).tasks, specs)
    except EMoEError as error:  # layers that the model's shape does not have
        place = f"by '{run.spec['model']['name']}.shape' in benchmarks/models.yaml"
        raise DefinitionError(f"{run.folder}: {error}, {place}") from error


def _measured() -> dict[str, Run]:
    """Finished measurements, of whatever suite: they say how fast this machine is."""
    found = {}
    for name in benchmark_names():
        if not kind_of(name).has_models:
            version = load_benchmark(name).definition.version
            for file in sorted((RUNS / name).glob("*/metrics.json")):
                run = read_run(file.with_name("run.json"))
                if run.spec["version"] == version:
                    found[run.folder] = run
    return found


def _device_here() -> str:
    """The device of this machine, as ``devices.yaml`` names it."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    return device_of([torch.cuda.get_device_name()])


def _overridden(device: Device, tflops: float | None) -> Device:
    return device if tflops is None else device.model_copy(update={"tflops": {"fp32": tflops}, "share": {"fp32": 1.0}})
