"""Compare a suite's numbers with the blessed numbers, rerun finished runs, and bless new numbers.

Numbers of the same machine and code must be equal to the last digit. Other numbers may differ by the ``tolerance`` of
their metric in ``metrics.yaml``.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.base import (
    BENCHMARKS,
    REFERENCE,
    ROOT,
    RUNS,
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
from benchmarks.harness.config.reference import bless_advice, read_origin
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.records import GROUP_KEYS, check_finished, read_metrics, run_keys, run_numbers

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
_SUITE_SCALES = {"smoke": 0.1}  # factors on all tolerances; smoke's tiny models train for a few steps


@dataclass(frozen=True)
class Numbers:
    """Hold the numbers of finished runs."""

    rows: pd.DataFrame  # one per number: KEYS, value (text with all digits) and machine
    machines: Mapping[str, Mapping[str, str]]  # fingerprints by name
    code: str  # code_digest() at the time of the runs
    seconds: Mapping[str, float]  # the median duration of a run of each benchmark, for the time left of a workflow


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
            lines.append(f"{len(self.unfinished)} runs are not finished, the first is {self.unfinished[0]}")
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("changed", "missing", "new"))
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
    before: Numbers, after: Numbers, suite: str, *, elsewhere: bool = False, unfinished: Sequence[str] = ()
) -> CheckResult:
    """Compare new numbers with old ones. ``elsewhere`` applies tolerances even on the same machine."""
    rows = before.rows.merge(after.rows, on=KEYS, how="outer", suffixes=("_before", "_after"), indicator=True)
    rows["tolerance"] = pd.to_numeric(rows["metric"].map(tolerance_of)) * _SUITE_SCALES.get(suite, 1)
    rows = rows.dropna(subset="tolerance").fillna("")
    if before.code == after.code and not elsewhere:
        rows["tolerance"] = rows["tolerance"].where(rows["machine_before"] != rows["machine_after"], 0.0)
    values = zip(rows["value_before"], rows["value_after"], rows["tolerance"], strict=True)
    is_equal = pd.Series(
        [bool(old and new) and values_agree(old, new, limit) for old, new, limit in values], rows.index, bool
    )
    status = rows["_merge"].astype(str).map({"both": "changed", "left_only": "missing", "right_only": "new"})
    differences = rows.assign(status=status).rename(columns={"value_before": "before", "value_after": "after"})
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
    folders = [ROOT / "emoe", *harness, BENCHMARKS / "text", *(BENCHMARKS / name for name in benchmark_names())]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
            if file.name not in _PRESENTATION_FILES:
                digest.update(f"{file.relative_to(folder.parent).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def collect_numbers(results: Sequence[tuple[Run, Mapping[str, Any]]]) -> Numbers:
    """Collect the numbers of finished runs from their ``metrics.json``, without costs.

    Raises:
        DefinitionError: Two runs have the same name.
    """
    numbers, machines = list[tuple[object, ...]](), dict[str, Mapping[str, str]]()
    seconds = dict[str, list[float]]()
    for run, metrics in results:
        fingerprint = metrics["environment"]["fingerprint"]
        machine = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
        machines[machine] = fingerprint
        seconds.setdefault(run.benchmark, []).append(float(metrics["cost"]["job_seconds"]))
        keys = run_keys(run)
        keys["learning_rate"] = f"{keys['learning_rate']:g}"
        name = " ".join(str(keys[key]) for key in GROUP_KEYS if keys[key])
        values = [*_scores(run, metrics), *_other_numbers(run, metrics)]
        numbers += [(name, keys["seed"], *value, machine) for value in values]
    rows = pd.DataFrame(numbers, columns=_COLUMNS)
    twice = rows[rows.duplicated(KEYS)]
    if len(twice):
        raise DefinitionError(f"two finished runs have the same number '{' '.join(map(str, twice.iloc[0][KEYS]))}'")
    medians = {name: round(statistics.median(times), 1) for name, times in seconds.items()}
    return Numbers(rows.sort_values(KEYS, kind="stable", ignore_index=True), machines, code_digest(), medians)


def _scores(run: Run, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield part, set, metric and value (text with all digits) of the numbers that tables show."""
    for part, task, metric, number in run_numbers(run, metrics):
        if metric in load_metrics() and part not in ("cost", "dev_best"):
            value = float(number)
            yield part, task, metric, repr(int(value) if value.is_integer() and tolerance_of(metric) == 0 else value)


def _other_numbers(run: Run, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield part, set, metric and value (text) of a run's probe, model and data."""
    probe, model = metrics.get("probe", {}), metrics.get("model", {})
    for step, loss in enumerate(probe.get("losses", ()), 1):
        yield "probe", "", f"loss_{step}", loss
    if probe.get("logits"):
        name = "trained_logits" if "candidates" in run.spec else "logits"
        yield "probe", "", name, " ".join(map(repr, probe["logits"].values()))
    for layer, loads in probe.get("loads", {}).items():
        yield "probe", f"layer {layer}", "loads", " ".join(map(str, loads))
    for layer in model.get("conversion", ()):
        name, experts = f"layer {layer['index']}", f"{layer['experts']} experts of {layer['expert_size']}"
        yield "model", name, "conversion", f"{experts}, top {layer['top_k']}"
        if layer["explained"] is not None:
            yield "model", name, "inertia", repr(1 - layer["explained"])
    for group, content in model.get("trained", {}).items():
        yield "model", group, "trained", f"{content['parameters']} {content['names']}"
    for name, summary in metrics.get("data", {}).items():
        counts = [f"{key} {count}" for key, count in sorted(summary.items()) if isinstance(count, int)]
        labels = [f"{label}: {count}" for label, count in summary.get("labels", {}).items()]
        digest = [summary["digest"]] if "digest" in summary else []
        yield "data", name, "content", ", ".join([*counts, *labels, *digest])


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
        raise DefinitionError(f"{path} is damaged or of an older form: {first_line(error)}; {advice}") from error
    origin = read_origin(path.with_suffix(".json"))
    unknown = sorted(set(rows["machine"]) - set(origin.machines))
    if unknown:
        raise DefinitionError(f"{path} names the machine '{unknown[0]}', which its json does not have; {advice}")
    return Numbers(rows, origin.machines, origin.code, origin.seconds)


def write_reference(suite: str, numbers: Numbers, commit: str) -> Path:
    """Write blessed numbers as csv, and their origin (commit, machines, …) as JSON; return the csv's path."""
    path = REFERENCE / f"{suite}.csv"
    with atomic_write(path) as temporary:
        numbers.rows.to_csv(temporary, index=False, lineterminator="\n")
    origin = {"commit": commit, "machines": numbers.machines, "code": numbers.code, "seconds": numbers.seconds}
    write_json(path.with_suffix(".json"), origin)
    return path


def _finished_runs(runs: Sequence[Run], suite: str) -> list[Run]:
    finished = [run for run in runs if (RUNS / run.folder / "metrics.json").exists()]
    if not finished:
        raise DefinitionError(f"no run of the suite '{suite}' is finished below {RUNS}: `make run SUITE={suite}`")
    return finished


def read_numbers(runs: Sequence[Run]) -> Numbers:
    """Read the numbers of finished runs; see :func:`collect_numbers`."""
    return collect_numbers([(run, read_metrics(run)) for run in runs])


def check(runs: Sequence[Run], suite: str, *, elsewhere: bool = False) -> CheckResult:
    """Compare the finished runs of a suite with its blessed numbers.

    Raises:
        DefinitionError: No run is finished, or a file is missing or damaged.
    """
    finished = _finished_runs(runs, suite)
    unfinished = sorted({run.id for run in runs} - {run.id for run in finished})
    before, after = read_reference(suite), read_numbers(finished)
    return compare(before, after, suite, elsewhere=elsewhere, unfinished=unfinished)


def run_again(runs: Sequence[Run], say: Callable[[str], None]) -> tuple[Numbers, list[str]]:
    """Rerun finished runs, each in a new process that writes to a temporary folder.

    Returns:
        The new numbers, and for each failed run its id and last line of output.
    """
    results, failures = [], []
    with tempfile.TemporaryDirectory(prefix="again-") as folder:
        for run in runs:
            before = read_metrics(run)
            say(f"running {run.id} again, about {before['cost']['job_seconds']:.0f} s")
            path = Path(folder) / run.folder / "run.json"
            write_text(path, run.to_json())
            threads = str(before["environment"]["threads"])
            command = [sys.executable, "-m", "benchmarks", "run", str(path), "--threads", threads]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                failures.append(f"{run.id}: {(process.stderr.strip() or 'no output').splitlines()[-1]}")
            else:
                results.append((run, read_metrics(run, Path(folder))))
    return collect_numbers(results), failures


def verify(runs: Sequence[Run], suite: str, count: int, say: Callable[[str], None]) -> CheckResult:
    """Draw some finished runs, execute them again, and compare their numbers.

    Raises:
        DefinitionError: No run is finished, or a file is damaged.
    """
    finished = _finished_runs(runs, suite)
    chosen = random.sample(finished, min(count, len(finished)))
    after, failures = run_again(chosen, say)
    return compare(read_numbers(chosen), after, suite, unfinished=failures)


def bless(runs: Sequence[Run], suite: str, say: Callable[[str], None]) -> Path:
    """Bless the present numbers, if the fastest run of every benchmark repeats its numbers exactly.

    Returns the path of the written csv.

    Raises:
        DefinitionError: The checkout is not clean, a run is not finished, or a rerun has other numbers.
    """
    commit = clean_commit()
    check_finished(runs, f"of the suite '{suite}'", f"make run SUITE={suite}")
    by_speed = sorted(runs, key=lambda run: float(read_metrics(run)["cost"]["job_seconds"]), reverse=True)
    fastest = list({run.benchmark: run for run in by_speed}.values())
    after, failures = run_again(fastest, say)
    result = compare(read_numbers(fastest), after, suite, unfinished=failures)
    if not result.passed or not all(kind.endswith("exactly") for kind in result.machines):
        say(str(result))
        raise DefinitionError("the runs do not repeat here exactly, so their numbers cannot be blessed")
    return write_reference(suite, read_numbers(runs), commit)


def clean_commit() -> str:
    """Return the commit of a checkout without changes, except to blessed numbers.

    Raises:
        DefinitionError: A file is not committed.
    """
    changed = git(ROOT, "status", "--porcelain", "--", ".", ":(exclude)results/reference").splitlines()
    if changed:
        raise DefinitionError(f"{len(changed)} files are not committed, the first is {changed[0].split()[-1]}")
    return git(ROOT, "rev-parse", "HEAD")
