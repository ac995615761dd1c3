"""What a suite will take, before anything runs: jobs, time, memory, GPUs, downloads."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.planning.jobs import model_files, partition_jobs, rebuilt_from
from benchmarks.harness.planning.kinds import SetPart, kind_of
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.suite import Suite
from benchmarks.harness.results.durations import Estimate, estimate
from benchmarks.harness.running import data_check
from benchmarks.harness.sources.hub import cached_commit
from benchmarks.harness.sources.packages import PackageFile


@dataclass(frozen=True)
class Work:
    """What the runs of one benchmark take, or those of all.

    Attributes:
        name: the benchmark's, or ``all``.
        runs: how many.
        done: how many of them have their numbers.
        seconds: what those that are missing take, one after the other, as far as that is known.
        by_basis: of how many of them it is known, by :class:`~benchmarks.harness.results.durations.Estimate`'s basis.
        unknown: of how many nothing is known.
        gpu_seconds: the seconds of those with GPUs, times their GPUs.
        gpus: most that one of the missing asks for.
        threads: most that one of them asks for; 0 is all.
        mem_mb: most that one of them asks for, in MB.
    """

    name: str
    runs: int
    done: int
    seconds: float
    by_basis: Mapping[str, int]
    unknown: int
    gpu_seconds: float
    gpus: int
    threads: int
    mem_mb: int

    @property
    def missing(self) -> int:
        return self.runs - self.done


@dataclass(frozen=True)
class Need:
    """Something that runs need beside their settings.

    Attributes:
        name: the model's, the package file's, the set's.
        place: where it comes from.
        there: whether it is on this machine.
    """

    name: str
    place: str
    there: bool


@dataclass(frozen=True)
class Outlook:
    """What is done and what is missing of a suite.

    Attributes:
        work: a row a benchmark.
        total: all of them.
        partitions: clusterings that the missing runs need; ``partitions_there`` of them are made.
        packages: package files that data or weights are read from.
        models: the missing runs' models.
        sets: parts of sets that the suite reads, as ``data --check`` finds them.
    """

    work: Sequence[Work]
    total: Work
    partitions: int
    partitions_there: int
    packages: Sequence[Need]
    models: Sequence[Need]
    sets: Sequence[SetPart]


def look_ahead(suite: Suite, benchmark: str | None = None) -> Outlook:
    """What is done and missing of a suite, or of one of its benchmarks, and what the rest takes.

    Nothing is downloaded, and where no run of a kind was recorded its time stays unknown.

    Raises:
        DefinitionError: a finished run's ``metrics.json`` is damaged.
    """
    data_check.stay_offline()
    runs = [run for run in suite.runs if benchmark in (None, run.benchmark)]
    done = {run.folder for run in runs if (RUNS / run.folder / "metrics.json").exists()}
    models = {run.folder: f"{run.benchmark}/{run.spec['model']['name']}" for run in runs}
    known = estimate(models, done, suite.blessed_seconds, models.__getitem__)
    missing = [run for run in runs if run.folder not in done]
    names = dict.fromkeys(run.benchmark for run in runs)
    partitions = {job.id: job for run in missing for job in partition_jobs(run)}
    return Outlook(
        [_work(name, [run for run in runs if run.benchmark == name], done, known) for name in names],
        _work("all", runs, done, known),
        len(partitions),
        sum(_exists(job.file) for job in partitions.values()),
        [Need(file.name, f"package {file.package} {file.version}", file.path.exists()) for file in _packages(missing)],
        list(_models(missing)),
        list(data_check.check_data(missing)),
    )


def _work(name: str, runs: Sequence[Run], done: set[str], known: Mapping[str, Estimate]) -> Work:
    missing = [run for run in runs if run.folder not in done]
    estimated = [(run, known[run.folder]) for run in missing if run.folder in known]
    threads = {run.resources["threads"] for run in missing}
    return Work(
        name,
        len(runs),
        len(runs) - len(missing),
        sum(found.seconds for _, found in estimated),
        dict(Counter(found.basis for _, found in estimated)),
        len(missing) - len(estimated),
        sum(found.seconds * run.resources["gpu"] for run, found in estimated),
        max((run.resources["gpu"] for run in missing), default=0),
        0 if 0 in threads else max(threads, default=0),
        max((run.resources["mem_mb"] for run in missing), default=0),
    )


def _packages(runs: Iterable[Run]) -> list[PackageFile]:
    """The package files that runs read sets and rebuilt models from."""
    found: dict[str, PackageFile] = {}
    for run in runs:
        kind = kind_of(run.benchmark)
        files = [file for task in (run.spec["task"], *run.spec["ood"]) for file in kind.package_files(task)]
        if "rebuilt" in run.spec["model"]:
            files.append(rebuilt_from(run.spec["model"]["name"]))
        found |= {file.name: file for file in files}
    return list(found.values())


def _models(runs: Iterable[Run]) -> Iterator[Need]:
    """The models with weights that runs load, each once."""
    seen = set[str]()
    for run in runs:
        model = run.spec["model"]
        if model["name"] not in seen and kind_of(run.benchmark).has_models:
            seen.add(model["name"])
            yield from _model(model)


def _model(model: Mapping[str, Any]) -> Iterator[Need]:
    from benchmarks.harness.modeling.loading import own_folder  # with transformers, which takes seconds

    name, revision = model["name"], model.get("revision")
    if model.get("config") or model.get("random"):  # nothing is read
        return
    if folder := own_folder(model):
        yield Need(name, str(folder), True)
    elif "rebuilt" in model:
        yield Need(name, f"rebuilt from the package {model['rebuilt']}", all(map(_exists, model_files(model))))
    elif "package" in model:
        yield Need(name, f"package {model['package']}", _is_installed(model["package"]))
    elif "timm" in model:
        place = f"timm/{model['timm']}"
        yield Need(name, f"hub {place}", cached_commit(place, "model.safetensors", revision) is not None)
    else:
        yield Need(name, f"hub {model['hub']}", cached_commit(model["hub"], "config.json", revision) is not None)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _exists(file: str) -> bool:
    return Path(file).exists()
