"""Compare the numbers of runs with older ones, mostly with the blessed numbers.

Blessed numbers are those of a reference run, kept in ``results/reference/``. Numbers of the same
machine and code must be equal to the last digit. Other numbers may differ by the ``tolerance`` of
their metric in ``metrics.yaml``, and the means of groups by less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.base import DefinitionError, short_digest, with_noun
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.code import code_digest
from benchmarks.harness.results.content import Metrics, ModelNumbers, Probe
from benchmarks.harness.results.records import (
    GROUP_KEYS,
    Record,
    RunNumber,
    run_numbers,
    settings_of_run,
)
from benchmarks.harness.results.shifts import find_shifts

KEY_COLUMNS = ["run", "seed", "part", "eval_task", "metric"]
COLUMNS = [*KEY_COLUMNS, "value", "machine"]
_FIRST_LOSSES = [f"loss_{step}" for step in range(1, 9)]  # of the first training steps
# Tolerances of numbers that runs record only for this check, as in metrics.yaml. A comment is the
# largest difference that was measured.
_TOLERANCES = {
    "content": 0.0,
    "conversion": 0.0,
    "trained": 0.0,
    **dict.fromkeys(_FIRST_LOSSES, 1e-4),  # 0.000008 in text, 0.000005 in smoke
    "logits": 2e-5,  # 0.0000048, and 0.0000011 in smoke
    "trained_logits": 0.01,  # of a model from another run: 0.0041
    "loads": 0.05,  # two tokens of the busiest expert
}
_TOLERANCES_BY_BENCHMARK = {
    "domainbed": dict.fromkeys(_FIRST_LOSSES, 0.005),  # 0.0021
}
# factors on all tolerances; the tiny models of smoke train for a few steps
_SUITE_SCALES = {"smoke": 0.1}


@dataclass(frozen=True)
class Numbers:
    """The numbers of finished runs.

    Attributes:
        rows: One row per number, with the columns :data:`KEY_COLUMNS`, ``value`` (text with all
            digits) and ``machine``.
        machines: The fingerprints of the machines, by the names in ``rows``.
        code: The digest of the code in this checkout, from :func:`code_digest`. Blessed numbers
            have the digest of the code in the checkout that blessed them.
    """

    rows: pd.DataFrame
    machines: Mapping[str, Mapping[str, str]]
    code: str


@dataclass(frozen=True)
class CheckResult:
    """The result of comparing new numbers with old ones.

    Attributes:
        differences: The numbers that do not agree, with the columns ``status`` (changed, missing or
            new), ``benchmark``, :data:`KEY_COLUMNS`, ``before``, ``after`` and ``tolerance``.
        equal: How many numbers agree, by benchmark.
        shifts: The groups of numbers whose mean has shifted, from :func:`find_shifts`.
        machine_sentences: One sentence per pair of old and new machine: how many numbers were
            compared, and whether exactly or within tolerances.
        is_exact: True if all common numbers had to be equal to the last digit.
        failures: The names of the runs that failed when they were repeated.
    """

    differences: pd.DataFrame
    equal: Mapping[str, int]
    shifts: pd.DataFrame
    machine_sentences: list[str]
    is_exact: bool
    failures: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Return True if all numbers agree, no mean has shifted, and no run has failed."""
        return self.differences.empty and self.shifts.empty and not self.failures

    def __str__(self) -> str:
        lines = [_difference_text(row) for row in self.differences.itertuples()]
        lines += [_shift_text(row) for row in self.shifts.itertuples()]
        if len(self.failures) == 1:
            lines.append(f"1 repeated run failed: {self.failures[0]}")
        elif self.failures:
            count = len(self.failures)
            lines.append(f"{count:,} repeated runs failed, the first is {self.failures[0]}")
        lines += self.machine_sentences

        statuses = list(self.differences["status"])
        changed = statuses.count("changed")
        missing = statuses.count("missing")
        new = statuses.count("new")
        equal = sum(self.equal.values())
        lines.append(f"{equal} agree, {changed} changed, {missing} missing, {new} new")
        return "\n".join(lines)


def _difference_text(row: Any) -> str:
    """Describe a row of :attr:`CheckResult.differences` in one line, with shortened values."""
    before = row.before or "nothing"
    after = row.after or "nothing"
    return (
        f"{row.status} {row.run} s{row.seed} {row.part} {row.eval_task} {row.metric} "
        f"(tolerance {row.tolerance:g}): {before:.80} -> {after:.80}"
    )


def _shift_text(row: Any) -> str:
    """Describe a row of :attr:`CheckResult.shifts` in one line."""
    shift = row.after - row.before
    return (
        f"shifted {row.group}, {row.part} {row.metric}: mean of {row.numbers} numbers "
        f"{row.before:.5g} -> {row.after:.5g} ({shift:+.2g}, limit {row.limit:.2g})"
    )


def tolerance_of(metric: str, benchmark: str) -> float | None:
    """Return the tolerance of a metric between machines; None if the metric is not compared."""
    metrics = load_metrics()
    if metric in metrics:
        definition = metrics[metric]
        # a benchmark may have its own tolerance for the metric
        if benchmark in definition.tolerance_by_benchmark:
            return definition.tolerance_by_benchmark[benchmark]
        return definition.tolerance

    # metrics.yaml lacks the numbers that runs record only for this check
    tolerances_of_benchmark = _TOLERANCES_BY_BENCHMARK.get(benchmark, {})
    if metric in tolerances_of_benchmark:
        return tolerances_of_benchmark[metric]
    return _TOLERANCES.get(metric)


def values_agree(before: str, after: str, tolerance: float) -> bool:
    """Return True if two values are equal or differ by at most the tolerance.

    A value is a text with one number, or with several numbers separated by blanks. The tolerance is
    relative to the largest old number if that is above 1, else absolute.
    """
    if before == after:
        return True
    # without a tolerance, any other text is a difference
    if not tolerance:
        return False
    try:
        old = np.array(before.split(), dtype=float)
        new = np.array(after.split(), dtype=float)
    except ValueError:  # a damaged number is a difference
        return False
    # another count of numbers is a difference, and so is an infinite number or nan
    if old.shape != new.shape or not np.isfinite([old, new]).all():
        return False
    largest_difference = np.abs(old - new).max()
    scale = max(1, np.abs(old).max())
    return bool(largest_difference <= tolerance * scale)


def compare(
    before: Numbers,
    after: Numbers,
    suite_name: str,
    *,
    elsewhere: bool = False,
    failures: Sequence[str] = (),
) -> CheckResult:
    """Compare new numbers with old ones.

    Args:
        before: The old numbers.
        after: The new numbers.
        suite_name: The name of the suite, which may have its own scale of tolerances.
        elsewhere: True to apply tolerances even on the same machine.
        failures: The names of the runs that failed when they were repeated.
    """
    joined = _join_numbers(before, after, suite_name)

    # the same code on the same machine repeats every digit, so these numbers have no tolerance
    is_same_machine = joined["machine_before"] == joined["machine_after"]
    digits_must_repeat = before.code == after.code and not elsewhere
    must_be_equal = is_same_machine & digits_must_repeat
    tolerance = joined["tolerance"].mask(must_be_equal, 0.0)
    rows = joined.assign(tolerance=tolerance)

    agrees = _rows_agree(rows)
    num_equal_by_benchmark = rows.loc[agrees, "benchmark"].value_counts().to_dict()
    # exact if no number that exists on both sides was compared with a tolerance
    has_both_numbers = rows["status"] == "compared"
    is_exact = bool(must_be_equal[has_both_numbers].all())
    return CheckResult(
        differences=_differences(rows[~agrees]),
        equal=num_equal_by_benchmark,
        shifts=find_shifts(rows),
        machine_sentences=_machine_sentences(rows, before, after, elsewhere=elsewhere),
        is_exact=is_exact,
        failures=failures,
    )


def _differences(disagreeing: pd.DataFrame) -> pd.DataFrame:
    """Return :attr:`CheckResult.differences` for rows of :func:`_join_numbers` that disagree."""
    # a number that was compared and does not agree has changed
    status = disagreeing["status"].replace({"compared": "changed"})
    differences = disagreeing.assign(
        status=status, before=disagreeing["value_before"], after=disagreeing["value_after"]
    )
    return differences[["status", "benchmark", *KEY_COLUMNS, "before", "after", "tolerance"]]


def _join_numbers(before: Numbers, after: Numbers, suite_name: str) -> pd.DataFrame:
    """Put old and new numbers side by side, with their tolerance.

    Metrics that are not compared, such as times, are left out.

    Returns:
        One row per number. Besides :data:`KEY_COLUMNS`, the columns are

        - ``benchmark`` and ``tolerance``,
        - ``value_before``, ``value_after``, ``machine_before`` and ``machine_after``: an absent
          number and its machine are empty texts, and
        - ``status``: ``compared`` with both numbers, ``missing`` without a new number, or ``new``
          without an old one.
    """
    # An outer join also keeps numbers of one side only. The column "sides" says where a number is.
    joined = before.rows.merge(
        after.rows, on=KEY_COLUMNS, how="outer", suffixes=("_before", "_after"), indicator="sides"
    )
    status_by_sides = {"both": "compared", "left_only": "missing", "right_only": "new"}
    status = joined["sides"].astype(str).map(status_by_sides)

    # the name of a run begins with the benchmark
    benchmarks = joined["run"].str.split(" ").str[0]
    tolerances = []
    for metric, benchmark in zip(joined["metric"], benchmarks, strict=True):
        tolerances.append(tolerance_of(metric, benchmark))
    suite_scale = _SUITE_SCALES.get(suite_name, 1)
    # the type float turns None into nan
    scaled = pd.Series(tolerances, joined.index, float) * suite_scale
    without_sides = joined.drop(columns="sides")
    with_tolerance = without_sides.assign(benchmark=benchmarks, tolerance=scaled, status=status)
    # metrics that are not compared have no tolerance
    compared = with_tolerance.dropna(subset="tolerance")
    # only an absent number and its machine are still missing
    return compared.fillna("")


def _rows_agree(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return True for the rows of :func:`_join_numbers` whose values agree."""
    agree = []
    for old, new, tolerance in zip(
        rows["value_before"], rows["value_after"], rows["tolerance"], strict=True
    ):
        is_on_both_sides = old != "" and new != ""  # an absent number is an empty text
        agree.append(is_on_both_sides and values_agree(old, new, tolerance))
    return pd.Series(agree, rows.index, bool)


def _machine_sentences(
    rows: pd.DataFrame, before: Numbers, after: Numbers, *, elsewhere: bool
) -> list[str]:
    """Write a sentence per pair of old and new machine: how many numbers were compared, and how."""
    on_both_sides = rows[rows["status"] == "compared"]
    counts = on_both_sides.groupby(["machine_before", "machine_after"]).size()
    sentences = []
    for (old_machine, new_machine), count in counts.items():
        if elsewhere:
            kind = "within tolerances, as asked"
        else:
            kind = _comparison_kind(before, after, old_machine, new_machine)
        sentences.append(f"compared {with_noun(count, 'number')} {kind}")
    return sentences


def _comparison_kind(before: Numbers, after: Numbers, old_machine: str, new_machine: str) -> str:
    """Say how the numbers of two machines were compared: exactly, or within tolerances and why."""
    if old_machine == new_machine:
        if before.code != after.code:
            return "within tolerances: other code than that of this checkout made the reference"
        return "exactly"

    old = before.machines[old_machine]
    new = after.machines[new_machine]
    changes = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            changes.append(f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}")
    return f"within tolerances: the reference was made on another machine ({'; '.join(changes)})"


def collect_numbers(records: Iterable[Record]) -> Numbers:
    """Collect the numbers of finished runs that the check compares.

    Costs and the best epoch on the dev split are left out.

    Raises:
        DefinitionError: Two runs have the same name.
    """
    rows = []
    machines: dict[str, Mapping[str, str]] = {}
    for record in records:
        fingerprint = record.metrics.environment.fingerprint
        machine = _machine_name(fingerprint)
        machines[machine] = fingerprint
        name = name_without_seed(record.run)
        for number in _numbers_of(record):
            row = {
                "run": name,
                "seed": record.run.seed,
                "part": number.part,
                "eval_task": number.data_set,
                "metric": number.metric,
                "value": number.value,
                "machine": machine,
            }
            rows.append(row)
    # without rows, pandas would give the seeds another type
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"seed": int})
    _check_unique(frame)
    in_order = frame.sort_values(KEY_COLUMNS, kind="stable", ignore_index=True)
    return Numbers(in_order, machines, code_digest())


def _check_unique(rows: pd.DataFrame) -> None:
    """Check that no two rows of numbers have the same :data:`KEY_COLUMNS`.

    Raises:
        DefinitionError: Two rows have the same keys, so a comparison would mix up two runs.
    """
    repeated = rows[rows.duplicated(KEY_COLUMNS)]
    if repeated.empty:
        return
    first = repeated.iloc[0]
    keys = [str(first[column]) for column in KEY_COLUMNS]
    raise DefinitionError(f"two finished runs have the same number '{' '.join(keys)}'")


def _machine_name(fingerprint: Mapping[str, str]) -> str:
    """Name a machine by the hash of its fingerprint."""
    text = json.dumps(fingerprint, sort_keys=True)
    return short_digest(text, 8)


def name_without_seed(run: Run) -> str:
    """Join the settings of a run in one text, without the seed and empty settings."""
    settings = settings_of_run(run)
    texts = []
    for key in GROUP_KEYS:
        value = settings[key]
        if key == "learning_rate":
            texts.append(f"{value:g}")
        elif value:  # some settings may be empty, such as the method of a measurement
            texts.append(str(value))
    return " ".join(texts)


def _numbers_of(record: Record) -> list[RunNumber]:
    """List the numbers of a run that are compared with blessed ones, with their values as text."""
    return [
        *_numbers_in_tables(record.run, record.metrics),
        *_other_numbers(record.run, record.metrics),
    ]


def _numbers_in_tables(run: Run, metrics: Metrics) -> Iterator[RunNumber]:
    """Yield the compared numbers that tables show: scores, sizes of the model, and routing.

    Costs and the best epoch on the dev split are not compared.
    """
    for number in run_numbers(run, metrics):
        is_known = number.metric in load_metrics()
        # costs vary from run to run
        if is_known and number.part not in ("cost", "dev_best"):
            text = _number_text(number.metric, float(number.value))
            yield RunNumber(number.part, number.data_set, number.metric, text)


def _number_text(metric: str, value: float) -> str:
    """Format a number with all its digits, and a count without a decimal point."""
    # counts are whole numbers that are compared exactly
    is_count = value.is_integer() and load_metrics()[metric].tolerance == 0
    if is_count:
        return repr(int(value))
    return repr(value)


def _other_numbers(run: Run, metrics: Metrics) -> Iterator[RunNumber]:
    """Yield the numbers that only this check uses, not the tables.

    They describe the first training steps (the probe), the model and the data.
    """
    if metrics.probe:
        # A run with candidates (trained runs to choose from) is an evaluation. Its logits are those
        # of a model that another run trained.
        logits_metric = "trained_logits" if run.candidates else "logits"
        yield from _probe_numbers(metrics.probe, logits_metric)
    if metrics.model:
        yield from _model_numbers(metrics.model)
    for name, summary in (metrics.data or {}).items():
        yield RunNumber("data", name, "content", summary.content)


def _probe_numbers(probe: Probe, logits_metric: str) -> Iterator[RunNumber]:
    """Yield the losses of the first steps, the summary of the logits and the expert loads.

    ``logits_metric`` is the metric whose tolerance applies to the logits.
    """
    for step, loss in enumerate(probe.losses, start=1):
        yield RunNumber("probe", "", f"loss_{step}", loss)
    if probe.logits:
        logits = probe.logits
        values = [logits.deviation, logits.mean, logits.projection, logits.rms]
        texts = [repr(value) for value in values]  # with all digits
        # one number of the check, whose value is a text with four numbers
        yield RunNumber("probe", "", logits_metric, " ".join(texts))
    for layer, loads in probe.loads.items():
        counts = [str(count) for count in loads]
        yield RunNumber("probe", f"layer {layer}", "loads", " ".join(counts))


def _model_numbers(model: ModelNumbers) -> Iterator[RunNumber]:
    """Yield the expert sizes and inertia of each converted layer, then the trained parameters."""
    for layer in model.conversion:
        name = f"layer {layer.index}"
        sizes = f"{layer.experts} experts of {layer.expert_size}, top {layer.top_k}"
        yield RunNumber("model", name, "conversion", sizes)
        # the share of the variance that the partition leaves unexplained; GMoE has no partition
        if layer.explained is not None:
            yield RunNumber("model", name, "inertia", repr(1 - layer.explained))
    for group, trained in model.trained.items():
        yield RunNumber("model", group, "trained", f"{trained.parameters} {trained.names}")
