"""What runs need that is not theirs: models, packages, sets; where it comes from, how large it is, whether it is here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.jobs import model_files, rebuilt_from
from benchmarks.harness.config.kinds import SetPart, kind_of
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.specs import all_sets
from benchmarks.harness.config.workload import shape_of_model
from benchmarks.harness.run import data_check
from benchmarks.harness.sources.hub import cached_commit
from benchmarks.harness.sources.local import own_folder
from benchmarks.harness.sources.packages import PackageFile

_STORED = {"fp32": 4, "fp16": 2, "bf16": 2}
_MEGA = 1e6


@dataclass(frozen=True)
class Need:
    """Something that runs need beside their settings.

    Attributes:
        name: the model's, the package file's, the set's.
        place: where it comes from.
        there: whether it is on this machine.
        bytes: how large it is: a model by its parameters, a set unpacked; None where that is not known.
        rows: of a set, as far as they are known.
    """

    name: str
    place: str
    there: bool
    bytes: float | None = None
    rows: int | None = None


def packages_needed(runs: Iterable[Run]) -> list[Need]:
    """The package files that runs read sets and rebuilt models from."""
    found: dict[str, PackageFile] = {}
    for run in runs:
        kind = kind_of(run.benchmark)
        files = [file for task in all_sets(run.spec) for file in kind.package_files(task)]
        if "rebuilt" in run.spec["model"]:
            files.append(rebuilt_from(run.spec["model"]["name"]))
        found |= {file.name: file for file in files}
    return [
        Need(
            file.name,
            f"package {file.package} {file.version}",
            file.path.exists(),
            file.path.stat().st_size if file.path.exists() else None,
        )
        for file in found.values()
    ]


def models_needed(runs: Iterable[Run]) -> Iterator[Need]:
    """The models with weights that runs load, each once."""
    seen = set[str]()
    for run in runs:
        model = run.spec["model"]
        if model["name"] not in seen and kind_of(run.benchmark).has_models:
            seen.add(model["name"])
            yield from _model(model)


def sets_needed(parts: Iterable[SetPart], runs: Iterable[Run]) -> list[Need]:
    """The sets that runs read, each once.

    Args:
        parts: of them, as ``data --check`` finds them.
        runs: those that read them.
    """
    of: dict[str, list[SetPart]] = {}
    for part in parts:
        of.setdefault(part.name, []).append(part)
    read_by = {task["name"]: (run.benchmark, task) for run in runs for task in all_sets(run.spec)}
    found = []
    for name, its in of.items():
        benchmark, task = read_by[name]
        kind = kind_of(benchmark)
        size = kind.set_megabytes(load_benchmark(benchmark).tasks, name)
        rows = [part.rows if part.rows is not None else part.expected for part in its]
        files = kind.package_files(task)
        hub = task.get("source", {}).get("hub")
        found.append(
            Need(
                name,
                f"package {files[0].package}" if files else f"hub {hub}" if hub else "by hand",
                all(part.rows is not None for part in its),
                None if size is None else size * _MEGA,
                None if None in rows else sum(count for count in rows if count),
            )
        )
    return found


def _model(model: Mapping[str, Any]) -> Iterator[Need]:
    name, revision = model["name"], model.get("revision")
    if model.get("config") or model.get("random"):  # nothing is read
        return
    shape = shape_of_model(model)
    size = None if shape is None else float(shape.parameters * _STORED[shape.stored])
    if folder := own_folder(model):
        yield Need(name, str(folder), True, size)
    elif "rebuilt" in model:
        yield Need(name, f"rebuilt from the package {model['rebuilt']}", all(map(exists, model_files(model))), size)
    elif "package" in model:
        yield Need(name, f"package {model['package']}", _is_installed(model["package"]), size)
    elif "timm" in model:
        place = f"timm/{model['timm']}"
        yield Need(name, f"hub {place}", cached_commit(place, "model.safetensors", revision) is not None, size)
    else:
        yield Need(name, f"hub {model['hub']}", cached_commit(model["hub"], "config.json", revision) is not None, size)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def exists(file: str) -> bool:
    """Whether a file is there."""
    return Path(file).exists()


def check_sets(runs: Iterable[Run]) -> list[SetPart]:
    """Every part of every set that runs read, as ``data --check`` finds it; nothing is downloaded."""
    data_check.stay_offline()
    return list(data_check.check_data(runs))
