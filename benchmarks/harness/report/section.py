"""The section of a benchmark or set: what its page shows beside tables and figures.

`tables` writes it once from records. `report` reads it, the tables and the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.harness.base import RESULTS, read_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.report.artifacts import Artifacts
from benchmarks.harness.report.common import name_or_count
from benchmarks.harness.report.plots import is_drawn
from benchmarks.harness.report.presentation import Presentation, has_random_weights
from benchmarks.harness.report.table import MISSING
from benchmarks.harness.results.content import DataSummary, Environment
from benchmarks.harness.results.records import Record

_FEW_LABELS = 10


class ShownTable(Strict):
    """A table that is written."""

    name: str
    """Name of its files without ending."""
    title: str
    is_empty: bool


class ShownFigure(Strict):
    """A figure that is written."""

    name: str
    """Name of its files without ending."""
    caption: str
    is_empty: bool
    """True for a placeholder."""


class DataRow(Strict):
    """The rows of one split of a task."""

    task: str
    split: str
    rows: int
    labels: str
    """Rows by label, as text."""
    dropped: int
    """Rows without a clear label or text."""


class Setting(Strict):
    """A training setting."""

    name: str
    value: str
    """Its values as text; up to three if runs differ."""


class Machine(Strict):
    """A machine with its packages and commit."""

    runs: int
    """Runs that it executed."""
    facts: dict[str, str]
    """Texts by name."""


class Section(Strict):
    """What a page says about a benchmark, or about one of its sets."""

    tables: list[ShownTable]
    figures: list[ShownFigure]
    verdicts: list[str]
    """Sentences on differences to the dense model; empty with random weights."""
    note: str
    """How to read the verdicts."""
    optimizer: str
    """Empty if nothing is trained."""
    training: list[Setting]
    """Training settings, in the order of the definition."""
    data: list[DataRow]
    runs: dict[str, str]
    """Readable names of the runs, by folder."""
    models: list[str]
    """Names of the models."""
    random_weights: bool | None
    """True if all models have random weights; null if no run has a method."""
    job_seconds: list[float]
    """Durations of the runs."""
    peak_memory_mb: float
    machines: list[Machine]


def make_section(presentation: Presentation, records: Sequence[Record], suite: str) -> Section:
    """Describe the written tables and figures of a presentation, and its runs."""
    runs = [record.run for record in records]
    is_random = has_random_weights(runs)
    has_methods = any(run.method for run in runs)
    figures = RESULTS / suite / "figures"
    return Section(
        tables=[
            ShownTable(name=table.name, title=table.title, is_empty=table.frame.empty)
            for table in presentation.tables
        ],
        figures=[
            ShownFigure(name=name, caption=figure.caption, is_empty=not is_drawn(figures / name))
            for name, figure in presentation.figures.items()
        ],
        verdicts=[] if is_random else list(presentation.verdicts),
        note=presentation.note,
        optimizer=presentation.optimizer,
        training=_training_settings(records) if presentation.optimizer else [],
        data=_data_rows(records),
        runs={run.folder: run.name for run in runs},
        models=list(dict.fromkeys(run.model for run in runs)),
        random_weights=is_random if has_methods else None,
        job_seconds=[record.metrics.cost.job_seconds for record in records],
        peak_memory_mb=max(record.metrics.cost.peak_memory_mb for record in records),
        machines=_machines(records),
    )


def read_section(artifacts: Artifacts, suite: str) -> Section:
    """Read what a page says about a benchmark or set.

    Raises:
        DataError: The file is missing or damaged.
    """
    path = Path(artifacts.section_file(suite))
    # else Snakemake leaves a damaged file as it is
    advice = f"`snakemake --cores all --force {path} --config suite={suite}` makes it again"
    return read_json(path, Section, advice)


def _data_rows(records: Sequence[Record]) -> list[DataRow]:
    """List row and label counts per task and split; use the largest split if runs differ."""
    largest: dict[tuple[str, str], DataRow] = {}
    for record in records:
        for key, summary in (record.metrics.data or {}).items():
            split, _, task = key.partition(":")  # "split:task" if a run has several sets
            task = task or record.run.task
            split = "test" if split == "ood" else split
            labels = _label_text(summary)
            if not labels:
                continue
            row = DataRow(
                task=task,
                split=split,
                rows=summary.rows,
                labels=labels,
                dropped=summary.dropped or 0,
            )
            known = largest.get((task, split))
            if known is None or row.rows >= known.rows:
                largest[task, split] = row
    return [largest[key] for key in sorted(largest)]


def _label_text(summary: DataSummary) -> str:
    """List the rows by label, or the range of a regression; count many labels."""
    if summary.range:
        lowest, highest = summary.range
        return f"from: {lowest}, to: {highest}"
    texts = [f"{label}: {count}" for label, count in summary.labels.items()]
    return ", ".join(texts) if len(texts) <= _FEW_LABELS else f"{len(texts)} classes"


def _training_settings(records: Sequence[Record]) -> list[Setting]:
    """Describe the training settings; list up to three values if runs differ."""
    settings = pd.DataFrame(
        [
            {**record.run.spec["training"], **record.run.spec.get("hparams", {})}
            for record in records
        ]
    )
    texts = settings.astype(object).where(settings.notna(), MISSING).astype(str)
    return [
        Setting(name=name, value=name_or_count(list(texts[name].unique()), "values"))
        for name in texts
    ]


def _machines(records: Sequence[Record]) -> list[Machine]:
    """List the machines, those with most runs first."""
    counts = Counter(
        tuple(_environment_texts(record.metrics.environment).items()) for record in records
    )
    return [Machine(runs=count, facts=dict(facts)) for facts, count in counts.most_common()]


def _environment_texts(environment: Environment) -> dict[str, str]:
    """Format the machine, packages and commit of a run."""
    texts = {}
    for key, value in sorted(environment):
        if key == "fingerprint":  # for `check`
            continue
        if isinstance(value, dict):
            value = [f"{name} {version}" for name, version in value.items()]
        text = ", ".join(value) if isinstance(value, list) else str(value)
        texts[key.replace("_", " ")] = text or "none"
    return texts


def section_title(artifacts: Artifacts) -> str:
    """Return the title of a benchmark, or of one of its sets."""
    benchmark = load_benchmark(artifacts.benchmark)
    return benchmark.tasks[artifacts.part].title if artifacts.part else benchmark.definition.title
