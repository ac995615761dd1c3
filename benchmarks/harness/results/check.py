"""Compare a suite's numbers with the blessed numbers, rerun finished runs, and bless new numbers.

Numbers of the same machine and code must be equal to the last digit. Other numbers may differ by the ``tolerance`` of
their metric in ``metrics.yaml``.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.harness.base import (
    BENCHMARKS,
    REFERENCE,
    ROOT,
    DefinitionError,
    atomic_write,
    check_is_file,
    first_line,
    git,
    write_json,
    write_text,
)
from benchmarks.harness.config.benchmark import benchmark_names
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.results.content import Metrics, ModelNumbers, Probe
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.records import (
    GROUP_KEYS,
    Record,
    check_current,
    check_finished,
    read_record,
    read_records,
    run_keys,
    run_numbers,
)
from benchmarks.harness.results.reference import bless_advice, read_origin

KEYS = ["run", "seed", "part", "set", "metric"]
_COLUMNS = [*KEYS, "value", "machine"]
# Tolerances of numbers that runs record only for this check, measured like those in metrics.yaml.
_TOLERANCES = {
    **dict.fromkeys(("content", "conversion", "trained"), 0.0),
    **{f"loss_{step}": 0.007 for step in range(1, 9)},
    "logits": 4e-5,
    "trained_logits": 0.02,  # logits of a model from another run
    "loads": 0.05,
}
_PRESENTATION_FILES = ("figures.py", "presentation.py", "tables.py")  # these files change no number
_SUITE_SCALES = {
    "smoke": 0.1
}  # factors on all tolerances; smoke's tiny models train for a few steps


@dataclass(frozen=True)
class Numbers:
    """Hold the numbers of finished runs."""

    rows: pd.DataFrame  # one per number: KEYS, value (text with all digits) and machine
    machines: Mapping[str, Mapping[str, str]]  # fingerprints by name
    code: str  # code_digest() at the time of the runs


@dataclass(frozen=True)
class CheckResult:
    """Hold the result of comparing two sets of numbers."""

    differences: pd.DataFrame  # KEYS, status (changed, missing or new), before, after and tolerance
    equal: int  # numbers that agree
    machines: list[str]  # a sentence per pair of machines: count of numbers and kind of comparison
    unfinished: Sequence[str] = ()  # runs without numbers, with the reason if known

    @property
    def passed(self) -> bool:
        """Return True if all numbers agree."""
        return self.differences.empty and not self.unfinished

    def __str__(self) -> str:
        statuses = list(self.differences["status"])
        lines = [
            f"{row.status} {row.run} s{row.seed} {row.part} {row.set} {row.metric} (tolerance {row.tolerance:g}): "
            f"{row.before or 'nothing':.80} -> {row.after or 'nothing':.80}"
            for row in self.differences.itertuples()
        ]
        if self.unfinished:
            lines.append(
                f"{len(self.unfinished)} runs are not finished, the first is {self.unfinished[0]}"
            )
        counts = ", ".join(
            f"{statuses.count(status)} {status}" for status in ("changed", "missing", "new")
        )
        return "\n".join([*lines, *self.machines, f"{self.equal} agree, {counts}"])


def tolerance_of(metric: str) -> float | None:
    """Return the tolerance of a metric between machines; None if the metric is not compared."""
    metrics = load_metrics()
    return metrics[metric].tolerance if metric in metrics else _TOLERANCES.get(metric)


def values_agree(before: str, after: str, tolerance: float) -> bool:
    """Return True if two values are equal or differ by at most the tolerance (relative for values above 1)."""
    if before == after or not tolerance:
        return before == after
    try:
        old = np.array(before.split(), dtype=float)
        new = np.array(after.split(), dtype=float)
    except ValueError:  # a damaged number is a difference
        return False
    if old.shape != new.shape or not np.isfinite([old, new]).all():
        return False
    return bool(np.abs(old - new).max() <= tolerance * max(1, np.abs(old).max()))


def compare(
    before: Numbers,
    after: Numbers,
    suite: str,
    *,
    elsewhere: bool = False,
    unfinished: Sequence[str] = (),
) -> CheckResult:
    """Compare new numbers with old ones. ``elsewhere`` applies tolerances even on the same machine."""
    rows = before.rows.merge(
        after.rows, on=KEYS, how="outer", suffixes=("_before", "_after"), indicator=True
    )
    rows["tolerance"] = pd.to_numeric(rows["metric"].map(tolerance_of)) * _SUITE_SCALES.get(
        suite, 1
    )
    rows = rows.dropna(subset="tolerance").fillna("")
    if before.code == after.code and not elsewhere:
        rows["tolerance"] = rows["tolerance"].where(
            rows["machine_before"] != rows["machine_after"], 0.0
        )
    values = zip(rows["value_before"], rows["value_after"], rows["tolerance"], strict=True)
    is_equal = pd.Series(
        [bool(old and new) and values_agree(old, new, limit) for old, new, limit in values],
        rows.index,
        bool,
    )
    status = (
        rows["_merge"]
        .astype(str)
        .map({"both": "changed", "left_only": "missing", "right_only": "new"})
    )
    differences = rows.assign(status=status).rename(
        columns={"value_before": "before", "value_after": "after"}
    )
    pairs = rows[rows["_merge"] == "both"].groupby(["machine_before", "machine_after"]).size()
    return CheckResult(
        differences.loc[~is_equal, ["status", *KEYS, "before", "after", "tolerance"]],
        int(is_equal.sum()),
        [
            f"compared {count} numbers "
            f"{'within tolerances, as asked' if elsewhere else _comparison_kind(before, after, *pair)}"
            for pair, count in pairs.items()
        ],
        unfinished,
    )


def _comparison_kind(before: Numbers, after: Numbers, old: str, new: str) -> str:
    """Describe the comparison of two machines: exact, or within tolerances and the reason."""
    if old == new:
        is_older = before.code != after.code
        return "within tolerances: the reference was made by older code" if is_older else "exactly"
    first, second = before.machines[old], after.machines[new]
    changes = [
        f"{name}: {first.get(name, 'none')} -> {second.get(name, 'none')}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]
    return f"within tolerances: the reference was made on another machine ({'; '.join(changes)})"


def code_digest() -> str:
    """Hash the code that numbers depend on: experts, models, data and training of all benchmarks."""
    harness = [BENCHMARKS / "harness" / room for room in ("models", "sources", "training")]
    folders = [
        ROOT / "emoe",
        *harness,
        BENCHMARKS / "text",
        *(BENCHMARKS / name for name in benchmark_names()),
    ]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(
            path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")
        ):
            if file.name not in _PRESENTATION_FILES:
                digest.update(
                    f"{file.relative_to(folder.parent).as_posix()}\0".encode() + file.read_bytes()
                )
    return digest.hexdigest()


def check_numbers(records: Iterable[Record]) -> Numbers:
    """Make the compared numbers of finished runs, without costs.

    Raises:
        DefinitionError: Two runs have the same name.
    """
    numbers: list[tuple[object, ...]] = []
    machines: dict[str, Mapping[str, str]] = {}
    for record in records:
        run, metrics = record.run, record.metrics
        fingerprint = metrics.environment.fingerprint
        machine = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
        machines[machine] = fingerprint
        keys = run_keys(run)
        keys["learning_rate"] = f"{keys['learning_rate']:g}"
        name = " ".join(str(keys[key]) for key in GROUP_KEYS if keys[key])
        for value in (*_scores(run, metrics), *_other_numbers(run, metrics)):
            numbers.append((name, keys["seed"], *value, machine))
    rows = pd.DataFrame(numbers, columns=_COLUMNS)
    twice = rows[rows.duplicated(KEYS)]
    if len(twice):
        raise DefinitionError(
            f"two finished runs have the same number '{' '.join(map(str, twice.iloc[0][KEYS]))}'"
        )
    sorted_rows = rows.sort_values(KEYS, kind="stable", ignore_index=True)
    return Numbers(sorted_rows, machines, code_digest())


def _scores(run: Run, metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    """Yield part, set, metric and value (text with all digits) of the numbers that tables show."""
    for part, task, metric, number in run_numbers(run, metrics):
        if metric in load_metrics() and part not in ("cost", "dev_best"):
            value = float(number)
            is_count = value.is_integer() and tolerance_of(metric) == 0
            yield part, task, metric, repr(int(value) if is_count else value)


def _other_numbers(run: Run, metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    """Yield part, set, metric and value (text) of a run's probe, model and data."""
    if metrics.probe:
        is_evaluation = "candidates" in run.spec
        yield from _probe_numbers(metrics.probe, "trained_logits" if is_evaluation else "logits")
    if metrics.model:
        yield from _model_numbers(metrics.model)
    for name, summary in (metrics.data or {}).items():
        yield "data", name, "content", summary.content


def _probe_numbers(probe: Probe, logits: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield the losses, logits (under the given metric) and expert loads of a probe."""
    for step, loss in enumerate(probe.losses, 1):
        yield "probe", "", f"loss_{step}", loss
    if probe.logits:
        yield "probe", "", logits, " ".join(repr(value) for _, value in probe.logits)
    for layer, loads in probe.loads.items():
        yield "probe", f"layer {layer}", "loads", " ".join(map(str, loads))


def _model_numbers(model: ModelNumbers) -> Iterator[tuple[str, str, str, str]]:
    """Yield the conversion of each layer, and the trained parameters of each group."""
    for layer in model.conversion:
        name = f"layer {layer.index}"
        yield (
            "model",
            name,
            "conversion",
            f"{layer.experts} experts of {layer.expert_size}, top {layer.top_k}",
        )
        if layer.explained is not None:
            yield "model", name, "inertia", repr(1 - layer.explained)
    for group, trained in model.trained.items():
        yield "model", group, "trained", f"{trained.parameters} {trained.names}"


def read_reference(suite: str) -> Numbers:
    """Read blessed numbers.

    Raises:
        DefinitionError: The csv is missing, damaged or of an older form.
        DataError: The origin is.
    """
    path = REFERENCE / f"{suite}.csv"
    advice = bless_advice(suite)
    try:
        check_is_file(path)
        rows = pd.read_csv(path, keep_default_na=False, dtype=str)[_COLUMNS].astype({"seed": int})
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}; {advice}") from error
    except (KeyError, ValueError) as error:
        raise DefinitionError(
            f"{path} is damaged or of an older form: {first_line(error)}; {advice}"
        ) from error
    origin = read_origin(path.with_suffix(".json"))
    unknown = sorted(set(rows["machine"]) - set(origin.machines))
    if unknown:
        raise DefinitionError(
            f"{path} names the machine '{unknown[0]}', which its json does not have; {advice}"
        )
    return Numbers(rows, origin.machines, origin.code)


def write_reference(suite: str, numbers: Numbers, commit: str) -> Path:
    """Write blessed numbers as csv, and their origin (commit, machines, …) as JSON; return the csv's path."""
    path = REFERENCE / f"{suite}.csv"
    with atomic_write(path) as temporary:
        numbers.rows.to_csv(temporary, index=False, lineterminator="\n")
    origin = {"commit": commit, "machines": numbers.machines, "code": numbers.code}
    write_json(path.with_suffix(".json"), origin)
    return path


def check(suite: Suite, *, elsewhere: bool = False) -> CheckResult:
    """Compare the collected records of a suite with its blessed numbers.

    Runs without a collected record, or without their ``metrics.json``, are listed as unfinished.

    Raises:
        DefinitionError: No finished run is collected, or the reference is missing or damaged.
        DataError: A file of records is damaged, or older than a ``metrics.json``.
    """
    records: list[Record] = []
    for name in suite.settings.benchmarks:
        for part in suite.record_parts(name):
            if records_file(suite.name, name, part).exists():
                collected = read_records(suite, name, part)
                records += [record for record in collected if record.run.metrics_file.exists()]
    if not records:
        raise DefinitionError(
            f"no finished run of the suite '{suite.name}' is collected: `make run SUITE={suite.name}`"
        )
    for record in records:
        check_current(record)
    finished = {record.run.folder for record in records}
    unfinished = sorted(run.name for run in suite.runs if run.folder not in finished)
    before = read_reference(suite.name)
    return compare(
        before, check_numbers(records), suite.name, elsewhere=elsewhere, unfinished=unfinished
    )


def run_again(records: Sequence[Record], say: Callable[[str], None]) -> tuple[Numbers, list[str]]:
    """Rerun finished runs, each in a new process that writes to a temporary folder.

    Returns:
        The new numbers, and for each failed run its name and last line of output.
    """
    repeated: list[Record] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="again-") as folder:
        for record in records:
            run = record.run
            say(f"running {run.name} again, about {record.metrics.cost.job_seconds:.0f} s")
            path = Path(folder) / run.folder / "run.json"
            write_text(path, run.to_json())
            threads = str(record.metrics.environment.threads)
            command = [sys.executable, "-m", "benchmarks", "run", str(path), "--threads", threads]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                output = process.stderr.strip() or "no output"
                failures.append(f"{run.name}: {output.splitlines()[-1]}")
            else:
                repeated.append(read_record(run, Path(folder)))
    return check_numbers(repeated), failures


def verify(suite: Suite, count: int, say: Callable[[str], None]) -> CheckResult:
    """Draw some finished runs, execute them again, and compare their numbers.

    Raises:
        DefinitionError: No run is finished.
        DataError: A ``metrics.json`` is damaged.
    """
    finished = [run for run in suite.runs if run.metrics_file.exists()]
    if not finished:
        raise DefinitionError(
            f"no run of the suite '{suite.name}' is finished: `make run SUITE={suite.name}`"
        )
    chosen = random.sample(finished, min(count, len(finished)))
    records = [read_record(run) for run in chosen]
    after, failures = run_again(records, say)
    return compare(check_numbers(records), after, suite.name, unfinished=failures)


def bless(suite: Suite, say: Callable[[str], None]) -> Path:
    """Bless the present numbers, if the fastest run of every benchmark repeats its numbers exactly.

    Returns the path of the written csv.

    Raises:
        DefinitionError: The checkout is not clean, a run is not finished, or a rerun has other numbers.
        DataError: A file of records is missing, damaged, or older than a ``metrics.json``.
    """
    commit = clean_commit()
    check_finished(suite.runs, f"of the suite '{suite.name}'", f"make run SUITE={suite.name}")
    records: list[Record] = []
    fastest: list[Record] = []
    for name in suite.settings.benchmarks:
        of_benchmark = read_records(suite, name)
        records += of_benchmark
        fastest.append(min(of_benchmark, key=lambda record: record.metrics.cost.job_seconds))
    for record in records:
        check_current(record)
    after, failures = run_again(fastest, say)
    result = compare(check_numbers(fastest), after, suite.name, unfinished=failures)
    if not result.passed or not all(kind.endswith("exactly") for kind in result.machines):
        say(str(result))
        raise DefinitionError(
            "the runs do not repeat here exactly, so their numbers cannot be blessed"
        )
    return write_reference(suite.name, check_numbers(records), commit)


def clean_commit() -> str:
    """Return the commit of a checkout without changes, except to blessed numbers.

    Raises:
        DefinitionError: A file is not committed.
    """
    changed = git(
        ROOT, "status", "--porcelain", "--", ".", ":(exclude)results/reference"
    ).splitlines()
    if changed:
        raise DefinitionError(
            f"{len(changed)} files are not committed, the first is {changed[0].split()[-1]}"
        )
    return git(ROOT, "rev-parse", "HEAD")
