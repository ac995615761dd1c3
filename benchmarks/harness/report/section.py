"""The section of a benchmark or set: what its page shows beside tables and figures.

The command `tables` writes it once from records. The command `report` reads it, the tables and the
figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.harness.base import RESULTS, RUNS, distinct, read_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.report.artifacts import Artifacts, remake_advice
from benchmarks.harness.report.common import name_or_count
from benchmarks.harness.report.placeholders import is_drawn
from benchmarks.harness.report.presentation import Presentation, has_random_weights
from benchmarks.harness.report.table import MISSING
from benchmarks.harness.results.content import DataSummary, Environment
from benchmarks.harness.results.records import Record

_FEW_LABELS = 10  # more labels are only counted
# the keys of a spec's sections that limit the evaluated rows
_ROW_LIMITS = ("eval_rows", "ood_rows", "rows")


class ShownTable(Strict):
    """The name and title of a written table."""

    name: str
    """Name of its files without ending."""
    title: str
    is_empty: bool


class ShownFigure(Strict):
    """The name and caption of a written figure."""

    name: str
    """Name of its files without ending."""
    caption: str
    is_empty: bool
    """True for a placeholder."""


class DataRow(Strict):
    """The number of rows in one split of a task, and their labels."""

    task: str
    split: str
    rows: int
    labels: str
    """Rows by label, as text."""
    dropped: int
    """Rows without a clear label or text."""


class MixedSet(Strict):
    """A data set of which some runs evaluated other rows than the others."""

    name: str
    warning: str
    """A sentence that names the versions of the rows, and says how to keep only one."""


class Setting(Strict):
    """A training setting, such as the number of epochs."""

    name: str
    value: str
    """Its value as text. If runs differ, up to three values are listed; more are only counted."""


class Machine(Strict):
    """A machine with its packages and commit."""

    runs: int
    """Runs that it executed."""
    facts: dict[str, str]
    """Facts on the machine as text, by name, such as `processor`."""


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
    mixed_sets: list[MixedSet]
    """Empty if all runs evaluated the same rows of each data set."""
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


def make_section(
    presentation: Presentation,
    records: Sequence[Record],
    mixed_sets: Sequence[MixedSet],
    suite_name: str,
) -> Section:
    """Collect what a page shows of a benchmark, or of one of its data sets.

    The figures must be written already, because placeholders are marked as empty.

    Args:
        presentation: The tables, figures and sentences.
        records: The records of all runs.
        mixed_sets: The data sets with different rows, from :func:`find_mixed_sets`.
        suite_name: The name of the suite.
    """
    runs = [record.run for record in records]
    is_random = has_random_weights(runs)
    costs = [record.metrics.cost for record in records]

    verdicts: list[str] = []  # scores of random weights mean nothing
    if not is_random:
        verdicts = list(presentation.verdicts)

    training: list[Setting] = []
    is_training = bool(presentation.optimizer)
    if is_training:
        training = _training_settings(records)

    # runs without a method measure something else, so their weights do not matter
    random_weights = None
    has_methods = any(run.method for run in runs)
    if has_methods:
        random_weights = is_random
    return Section(
        tables=_shown_tables(presentation),
        figures=_shown_figures(presentation, RESULTS / suite_name / "figures"),
        verdicts=verdicts,
        note=presentation.note,
        optimizer=presentation.optimizer,
        training=training,
        data=_data_rows(records),
        mixed_sets=list(mixed_sets),
        runs={run.folder: run.name for run in runs},
        models=distinct(run.model for run in runs),
        random_weights=random_weights,
        job_seconds=[cost.job_seconds for cost in costs],
        peak_memory_mb=max(cost.peak_memory_mb for cost in costs),
        machines=_machines_of_runs(records),
    )


def _shown_tables(presentation: Presentation) -> list[ShownTable]:
    """List the tables of a presentation, with their names and titles."""
    tables = []
    for table in presentation.tables:
        shown = ShownTable(name=table.name, title=table.title, is_empty=table.frame.empty)
        tables.append(shown)
    return tables


def _shown_figures(presentation: Presentation, folder: Path) -> list[ShownFigure]:
    """List the figures of a presentation, which are already written below ``folder``."""
    figures = []
    for name, figure in presentation.figures.items():
        is_placeholder = not is_drawn(folder / name)
        shown = ShownFigure(name=name, caption=figure.caption, is_empty=is_placeholder)
        figures.append(shown)
    return figures


def read_section(artifacts: Artifacts, suite_name: str) -> Section:
    """Read the section of a benchmark or set from its file.

    Raises:
        DataError: The file is missing or damaged.
    """
    path = Path(artifacts.section_file(suite_name))
    return read_json(path, Section, remake_advice(path, suite_name))


def _data_rows(records: Sequence[Record]) -> list[DataRow]:
    """List the number of rows and labels of each task and split, sorted by both.

    If runs read different numbers of rows of a split, the largest number is listed.
    """
    largest: dict[tuple[str, str], DataRow] = {}
    for record in records:
        data = record.metrics.data or {}
        for key, summary in data.items():
            row = _data_row(key, summary, record.run.task)
            # instructions have no labels or scores
            if row is None:
                continue
            task_and_split = (row.task, row.split)
            known = largest.get(task_and_split)
            # among runs that read equally many rows, the last one is listed
            if known is None or row.rows >= known.rows:
                largest[task_and_split] = row
    return [largest[task_and_split] for task_and_split in sorted(largest)]


def find_mixed_sets(records: Sequence[Record]) -> list[MixedSet]:
    """List the data sets whose evaluated rows differ between the runs of a benchmark.

    For example, a user changed the data after some runs were finished. Training rows are not
    compared, because they depend on the seed. Nor are images and instructions, because their
    records have no digest of the rows.
    """
    # runs with equal `_ExpectedRows` should have evaluated the same rows of a data set
    summaries_by_expected_rows: dict[_ExpectedRows, list[DataSummary]] = {}
    for record in records:
        for expected, summary in _evaluated_rows(record):
            summaries_by_expected_rows.setdefault(expected, []).append(summary)

    mixed = []
    for expected, summaries in summaries_by_expected_rows.items():
        # equal rows have equal digests
        by_digest: dict[str, list[DataSummary]] = {}
        for summary in summaries:
            by_digest.setdefault(str(summary.digest), []).append(summary)
        if len(by_digest) > 1:
            warning = _mixed_warning(expected.data_set, records[0].run.benchmark, by_digest)
            mixed.append(MixedSet(name=expected.data_set, warning=warning))
    return mixed


class _ExpectedRows(NamedTuple):
    """What determines the evaluated rows of a data set. Runs that are equal in it read the same."""

    data_set: str
    split: str
    """``test``, or ``ood`` if the run was trained on another data set."""
    trained_task: str
    limits: tuple[int | None, ...]


def _evaluated_rows(record: Record) -> Iterator[tuple[_ExpectedRows, DataSummary]]:
    """Yield two things for each evaluated split: what determines its rows, and their summary.

    The summary is of the rows that the run has read. Splits without a digest of the rows are left
    out.
    """
    run = record.run
    data = record.metrics.data or {}
    for key, summary in data.items():
        # the key is a split, or `split:task` if the run reads several data sets
        split, _, task = key.partition(":")
        is_evaluated = split in ("test", "ood")
        if not is_evaluated or summary.digest is None:
            continue
        expected = _ExpectedRows(
            data_set=task or run.task,
            split=split,
            trained_task=run.task,
            limits=_row_limits(run.spec),
        )
        yield expected, summary


def _row_limits(spec: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the settings of a run that limit the evaluated rows.

    Runs with other limits evaluate other rows by design.
    """
    limits = []
    for section in ("training", "evaluation", "reading"):
        settings = spec.get(section, {})
        for key in _ROW_LIMITS:
            limits.append(settings.get(key))
    return tuple(limits)


def _mixed_warning(
    name: str, benchmark: str, by_digest: Mapping[str, Sequence[DataSummary]]
) -> str:
    """Describe the versions of a data set's rows, and say how to keep only one of them."""
    versions = []
    for digest, summaries in by_digest.items():
        noun = "run" if len(summaries) == 1 else "runs"
        versions.append(f"{len(summaries):,} {noun} read {summaries[0].source} (digest {digest})")
    rarest = min(by_digest, key=lambda digest: len(by_digest[digest]))
    return (
        f"The runs evaluated different rows of {name}, so their scores do not compare: "
        f"{', '.join(versions)}. `grep -rl --include=metrics.json {rarest} {RUNS / benchmark}` "
        "lists the runs of one kind. Delete their folders, and start the workflow again."
    )


def _data_row(key: str, summary: DataSummary, task_of_run: str) -> DataRow | None:
    """Describe one split that a run read.

    ``key`` is the name of the split, or ``split:task`` if the run reads several data sets.

    Returns None for instructions, because they have no labels or scores.
    """
    labels = _label_text(summary)
    if not labels:
        return None
    split, _, task = key.partition(":")
    # the split `ood` is the test split of another task
    if split == "ood":
        split = "test"
    return DataRow(
        task=task or task_of_run,
        split=split,
        rows=summary.rows,
        labels=labels,
        dropped=summary.dropped or 0,
    )


def _label_text(summary: DataSummary) -> str:
    """List the number of rows by label, or the range of a regression's scores.

    If there are many labels, they are only counted.
    """
    if summary.range:
        lowest, highest = summary.range
        return f"from: {lowest}, to: {highest}"
    texts = [f"{label}: {count}" for label, count in summary.labels.items()]
    if len(texts) > _FEW_LABELS:
        return f"{len(texts)} classes"
    return ", ".join(texts)


def _training_settings(records: Sequence[Record]) -> list[Setting]:
    """List the training settings of all runs.

    If runs differ in a setting, :func:`.common.name_or_count` lists up to three values, and only
    counts more.
    """
    rows = []
    for record in records:
        spec = record.run.spec
        hyper_parameters = spec.get("hparams", {})  # only runs on images (DomainBed) have them
        rows.append({**spec["training"], **hyper_parameters})

    # Columns of objects keep the values as they are. In a column of numbers, 960 beside null would
    # become 960.0.
    settings = pd.DataFrame(rows, dtype=object)
    # a setting that a run lacks, or that is null, becomes a dash
    with_dashes = settings.where(settings.notna(), MISSING)
    texts = with_dashes.astype(str)

    described = []
    for name in texts:
        values = list(texts[name].unique())
        described.append(Setting(name=name, value=name_or_count(values, "values")))
    return described


def _machines_of_runs(records: Sequence[Record]) -> list[Machine]:
    """List the machines of the runs, those with most runs first."""
    machines = []
    for record in records:
        facts = _environment_texts(record.metrics.environment)
        machines.append(Machine(runs=1, facts=facts))
    return merge_machines(machines)


def merge_machines(machines: Iterable[Machine]) -> list[Machine]:
    """List each machine once with the sum of its runs, those with most runs first."""
    # the keys of a Counter must be hashable, so the facts become a tuple of (name, text)
    runs: Counter[tuple[tuple[str, str], ...]] = Counter()
    for machine in machines:
        facts = tuple(machine.facts.items())
        runs[facts] += machine.runs
    return [Machine(runs=count, facts=dict(facts)) for facts, count in runs.most_common()]


def _environment_texts(environment: Environment) -> dict[str, str]:
    """Format the machine, packages and commit of a run, by name in alphabetical order."""
    texts = {}
    # pydantic models iterate over (key, value)
    for key, value in sorted(environment):
        # the fingerprint is only for the command `check`
        if key != "fingerprint":
            texts[key.replace("_", " ")] = _fact_text(value)
    return texts


def _fact_text(value: object) -> str:
    """Format a fact of an environment: versions by package, a list of GPUs, or a single value.

    An unknown fact is a dash. A machine without packages or GPUs has ``none``.
    """
    if value is None:
        return MISSING
    if isinstance(value, dict):
        texts = [f"{name} {version}" for name, version in value.items()]
    elif isinstance(value, list):
        texts = value
    else:
        texts = [str(value)]
    return ", ".join(texts) or "none"


def section_title(artifacts: Artifacts) -> str:
    """Return the title of a benchmark, or of one of its sets."""
    benchmark = load_benchmark(artifacts.benchmark)
    if artifacts.data_set:
        return benchmark.tasks[artifacts.data_set].title
    return benchmark.definition.title
