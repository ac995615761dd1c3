"""Make the table and figures of the claims, with the paper's numbers, our numbers and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from benchmarks.harness import base as paths
from benchmarks.harness.base import DataError, first_problem, read_bytes, with_noun, write_lines
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.catalogue import Metric, load_metrics, model_title
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS, numbers_file, remake_advice
from benchmarks.harness.report.claims import (
    Claim,
    ClaimTest,
    Comparison,
    PaperEffect,
    claimed_benchmarks,
    load_claims,
    loss_test,
)
from benchmarks.harness.report.claims_figure import draw_all_claims
from benchmarks.harness.report.common import (
    COMPARED,
    SEEDS_COVER,
    interval_text,
    name_or_count,
)
from benchmarks.harness.report.evidence import (
    Evidence,
    PaperGap,
    Verdict,
    compare_gains,
    find_evidence,
    find_gap,
    judge,
)
from benchmarks.harness.report.presentation import has_random_weights
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.records import MAY_DIVERGE
from benchmarks.harness.results.statistics import Difference, holm

# One line of a file of claim numbers: a number with its names. The keys are the columns COMPARED of
# :mod:`.common`.
_NUMBER = TypeAdapter(dict[str, str | int | float | None])
# the key of the first line, which has the count of the other lines
_COUNT = "numbers"

_TABLE_CAPTION = (
    "Differences are means over n pairs (seeds, trials or questions), with a 95 % confidence "
    f"interval (Student's t). Each pair is averaged over tasks first. {SEEDS_COVER} Trials of "
    "images have different splits. Intervals over questions cover the choice of questions of "
    "the same subjects, not of the seeds. p is from the paired t-test; p (Holm) is corrected "
    "with Holm's procedure over the {num_tests} tests of this table (tests of losses, a second "
    "endpoint: over their own {num_loss_tests}). Equivalent: the whole interval lies within the "
    "margin, which is at most half of the paper's effect (losses: {loss_share:.1f} % of the "
    "loss of the reference). Otherwise supported or contradicted: corrected p below 5 %, with "
    "the claimed sign or the opposite one. Undecided: the rest, which is no evidence of "
    "equality. Claims without p (the same, not lower, near the dense cost): the whole interval "
    "lies within the margin, or outside. Numbers of parameters have no margin: supported if "
    "equal, else contradicted. Next to the paper: smaller or larger needs two facts. Our "
    "difference differs from the paper's (Welch's t-test with the paper's standard error, "
    "Holm's procedure over all such tests), and our interval excludes the paper's reduction of "
    "errors. Share of errors: the difference, divided by the errors of the reference method. "
    "The interval of a time is its range over all rounds and settings. Untestable: no pair or "
    "one, equal differences, a run that diverged, or two methods that are no better than a "
    "guess. Missing: no runs of both methods that can be compared."
)

# endpoints of the tests
_MAIN = "main"
_LOSS = "loss"


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """One test of a claim, with the paper's effect and ours. p is not corrected yet.

    Unknown texts are a dash, and unknown numbers are nan. The fields are the columns of the table's
    CSV file, in this order, except ``difference_without_unit``, ``comparison`` and ``evidence``.

    Attributes:
        claim: The name of the claim in ``claims.yaml``.
        claim_title: The claim in plain words.
        test: The models and data of the test, in a few words.
        headline: True to show the test in the small figure.
        test_shown: ``test``, with the titles of the two methods.
        contrast: The titles of the two methods.
        against: The name of the reference method.
        benchmark: The name of the benchmark.
        domain: The group of numbers that is compared, such as ``id`` or ``ood``.
        method: The name of the method of the claim.
        metric: The name of the metric.
        pair: What ``n`` counts: ``seed``, ``trial``, ``question``, ``setting`` or ``run``.
        endpoint: ``main``, or ``loss`` for the second endpoint.
        error_share_shown: Our difference as a share of the errors of the reference method, and the
            paper's, as text.
        unit: The unit of the numbers below, such as ``points``.
        n_shown: ``n`` with a noun, such as ``5 seeds``.
        difference_shown: Our difference and its interval as text.
        difference_without_unit: The same text without ``unit``, for figures. Counts keep their
            noun.
        delta: Our difference.
        low: The lower end of its interval.
        high: The upper end of its interval.
        n: The number of pairs.
        p: The uncorrected p of the t-test. Only claims of a higher or lower number have one.
        margin: The largest negligible difference. If a score is claimed to be higher or lower, it
            is at most half of the paper's effect.
        margin_shown: The margin with its unit, as text.
        effect: The paper's difference; nan if it is unknown or has another unit.
        expected: The difference that reduces our errors by the paper's share; nan if it is unknown.
        gap: Our difference minus the paper's; nan if the paper's is unknown.
        gap_p: The uncorrected p of the test that there is no gap; nan if it cannot be tested.
        paper: The paper's difference and where the paper reports it, as text.
        comparison: The comparison; None if no suite can run the test.
        evidence: The result of the comparison; None if the suite lacks the runs.
        remark: The compared models and tasks, or why there is no result.
    """

    claim: str
    claim_title: str
    test: str
    headline: bool
    test_shown: str
    contrast: str = MISSING
    against: str = MISSING
    benchmark: str = MISSING
    domain: str = MISSING
    method: str = MISSING
    metric: str = MISSING
    pair: str = MISSING
    endpoint: str
    error_share_shown: str = MISSING
    unit: str = MISSING
    n_shown: str = MISSING
    difference_shown: str = MISSING
    difference_without_unit: str = MISSING
    delta: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: float = math.nan
    p: float = math.nan
    margin: float = math.nan
    margin_shown: str = MISSING
    effect: float = math.nan
    expected: float = math.nan
    gap: float = math.nan
    gap_p: float = math.nan
    paper: str
    comparison: Comparison | None = None
    evidence: Evidence | None = None
    remark: str


def write_claims(suite: Suite, rows: pd.DataFrame) -> None:
    """Write the table and the figures of the claims. ``rows`` are from :func:`judge_claims`."""
    folder = paths.RESULTS / suite.name
    claims_table(suite, rows).write(folder / "tables")
    draw_all_claims(suite, rows, folder / "figures")


def write_claim_numbers(suite_name: str, benchmark: str, numbers: pd.DataFrame) -> None:
    """Write the numbers of a benchmark that claims compare, one per line as JSON.

    The first line has the count of the numbers, which shows if the file was cut. ``numbers`` has
    the columns ``COMPARED`` of :mod:`.common`.
    """
    # the loss of a run that diverged is nan, for which JSON has null; any other nan is an error
    has_diverged = numbers["metric"].isin(MAY_DIVERGE) & numbers["value"].isna()
    values = numbers["value"].astype(object).mask(has_diverged, None)
    lines = [_to_json({_COUNT: len(numbers)})]
    for row in numbers.assign(value=values).to_dict("records"):
        lines.append(_to_json(row))
    write_lines(Path(numbers_file(suite_name, benchmark)), lines)


def _to_json(row: Mapping[Any, Any]) -> str:
    """Format a line of a file of claim numbers as JSON."""
    # columns of mixed types may have numbers of numpy, which `json` cannot write
    return json.dumps(row, default=lambda number: number.item(), allow_nan=False)


def read_claim_numbers(suite: Suite) -> dict[str, pd.DataFrame]:
    """Read the scores, counts and ratios from which claims are tested, a frame by benchmark.

    The columns of each frame are ``COMPARED`` of :mod:`.common`. Benchmarks of the suite that test
    no claim are left out.

    Raises:
        DataError: A file is missing or damaged.
    """
    numbers = {}
    for name in claimed_benchmarks(suite):
        path = Path(numbers_file(suite.name, name))
        advice = remake_advice(path, suite.name)
        lines = read_bytes(path, advice).splitlines()
        try:
            entries = [_NUMBER.validate_json(line) for line in lines]
        except ValidationError as error:
            raise DataError(f"{path} is damaged: {first_problem(error)}; {advice}") from error
        # the first line has the count of the numbers, and each other line is a number
        rows = entries[1:]
        if not entries or entries[0].get(_COUNT) != len(rows):
            raise DataError(f"{path} is damaged: it was cut or is of an older form; {advice}")
        numbers[name] = pd.DataFrame(rows, columns=COMPARED)
    return numbers


def judge_claims(suite: Suite, numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Test every claim on the finished runs of a suite.

    Args:
        suite: The suite.
        numbers: The numbers that claims compare, by benchmark, from :func:`read_claim_numbers`.

    Returns:
        One row per test, in the order of ``claims.yaml``. If a test is repeated with the loss, the
        row of the repetition comes next. The columns are the fields of :class:`ClaimRow` and:

        - ``p_holm``: ``p``, corrected over all tests with the same endpoint.
        - ``verdict``: the verdict. It is a dash if all models have random weights.
        - ``gap_p_holm``: ``gap_p``, corrected over all tests.
        - ``gain``: how our gain compares with the paper's: ``smaller``, ``larger``, ``not shown``,
          or a dash if that was not tested.
        - ``against_paper``: ``gain``, ``gap`` and ``gap_p_holm`` as text.
    """
    claim_rows = []
    for name, claim in load_claims().items():
        for test in claim.tests:
            claim_rows.append(_claim_row(name, claim, test, numbers))
            if test.loss and test.compare is not None:
                test_of_loss = loss_test(test, test.compare)
                claim_rows.append(_claim_row(name, claim, test_of_loss, numbers))

    frame = pd.DataFrame([vars(row) for row in claim_rows])  # a column per field
    # main tests are corrected apart from those of losses; the result has the order of the rows
    p_holm = frame.groupby("endpoint", sort=False)["p"].transform(holm)
    # only main tests have a gap to the paper, because the paper reports no losses
    gap_p_holm = holm(frame["gap_p"])

    is_random = has_random_weights(suite.runs)
    verdicts = []
    for row, p_corrected in zip(claim_rows, p_holm, strict=True):
        verdict = MISSING if is_random else str(_verdict(row, p_corrected))
        verdicts.append(verdict)
    gains = []
    for row, gap_p_corrected in zip(claim_rows, gap_p_holm, strict=True):
        gains.append(_gain_of_row(row, gap_p_corrected))
    judged = frame.assign(p_holm=p_holm, verdict=verdicts, gap_p_holm=gap_p_holm, gain=gains)
    texts = [_against_paper(row) for row in judged.itertuples()]
    return judged.assign(against_paper=texts)


def _verdict(row: ClaimRow, p_holm: float) -> Verdict:
    """Judge a test by its corrected p or its interval.

    The verdict is ``MISSING`` if the suite has no runs for the test.
    """
    if row.comparison is None or row.evidence is None:
        return Verdict.MISSING
    # the row is scaled for printing, the evidence is not
    margin = row.margin / row.comparison.scale
    return judge(row.comparison, row.evidence, p_holm, margin)


def _gain_of_row(row: ClaimRow, gap_p_holm: float) -> str:
    """Say if our gain is smaller or larger than the paper's; a dash if that was not tested.

    ``gap_p_holm`` is the corrected p of the gap; nan if it was not tested.
    """
    if row.comparison is None or row.evidence is None or math.isnan(gap_p_holm):
        return MISSING
    difference = row.evidence.difference.scaled(row.comparison.scale)
    return compare_gains(row.comparison, difference, row.gap, gap_p_holm, row.expected)


def _against_paper(row: Any) -> str:
    """Describe our difference next to the paper's, such as ``not shown (gap -0.89, p 0.380)``.

    ``row`` is a row of :func:`judge_claims`. The text is a dash if there is nothing to compare, or
    if our difference has no interval.
    """
    if math.isnan(row.gap) or math.isnan(row.low):
        return MISSING
    if row.gain == MISSING:
        return "the paper's error is unknown"
    p = f"p {row.gap_p_holm:.3f}"
    if row.gap_p_holm < 0.001:
        p = "p < 0.001"
    return f"{row.gain} (gap {row.gap:+z.2f}, {p})"


def _claim_row(
    name: str, claim: Claim, test: ClaimTest, numbers: Mapping[str, pd.DataFrame]
) -> ClaimRow:
    """Make the row of a test: the paper's effect, and ours if the suite has the runs.

    ``name`` is the name of the claim. ``numbers`` are the numbers that claims compare, by
    benchmark.
    """
    comparison = test.compare
    if comparison is None:
        return _bare_row(name, claim, test, remark=f"needs {test.needs}")

    bare_row = _bare_row(name, claim, test, remark="not in this suite")
    row_without_evidence = _with_comparison(bare_row, comparison, test.paper)
    if comparison.benchmark not in numbers:
        return row_without_evidence
    evidence = find_evidence(numbers[comparison.benchmark], comparison)
    if evidence is None:
        remark = "no runs of both methods that can be compared"
        return replace(row_without_evidence, remark=remark)
    return _with_evidence(row_without_evidence, comparison, test.paper, evidence)


def _bare_row(name: str, claim: Claim, test: ClaimTest, remark: str) -> ClaimRow:
    """Make a row with the titles of a test and the paper's effect.

    ``name`` is the name of the claim, and ``remark`` says why we have no result.
    """
    if test.paper.effect is None:
        effect = "no number"
    else:
        # a rank has no unit
        effect = f"{test.paper.effect:+g} {test.paper.unit}".rstrip()
    return ClaimRow(
        claim=name,
        claim_title=claim.title,
        test=test.title,
        headline=test.headline,
        endpoint=test.endpoint,
        test_shown=test.title,
        paper=f"{effect} ({test.paper.where})",
        remark=remark,
    )


def _with_comparison(row: ClaimRow, comparison: Comparison, paper_effect: PaperEffect) -> ClaimRow:
    """Add to a row what is known without runs: names, unit, and the paper's effect."""
    benchmark = load_benchmark(comparison.benchmark)
    metric = load_metrics()[comparison.metric]

    title = benchmark.row_titles[comparison.method]
    other_title = benchmark.row_titles[comparison.against]
    contrast = f"{title} against {other_title}"

    # what n counts: a kind of pairs, or the runs if numbers of parameters are compared
    pair = benchmark.domains[comparison.domain].pair
    if comparison.direction == "equal":
        pair = "run"
    unit = _unit_of_difference(metric)

    return replace(
        row,
        test_shown=f"{row.test}: {contrast}",
        contrast=contrast,
        against=comparison.against,
        benchmark=comparison.benchmark,
        domain=comparison.domain,
        method=comparison.method,
        metric=comparison.metric,
        pair=pair,
        unit=unit,
        effect=_effect_in_unit(paper_effect, unit),
        comparison=comparison,
    )


def _unit_of_difference(metric: Metric) -> str:
    """Return the unit of a difference between two numbers of a metric."""
    if metric.unit == "%":
        return "points"
    if metric.unit == "M":  # differences of counts are printed as stored, not in millions
        return "parameters"
    return metric.unit


def _effect_in_unit(paper_effect: PaperEffect, unit: str) -> float:
    """Return the paper's effect; nan if the paper gives none, or gives it in another unit."""
    if paper_effect.effect is None or paper_effect.unit != unit:
        return math.nan
    return float(paper_effect.effect)


def _margin(
    comparison: Comparison, evidence: Evidence, metric: Metric, effects: Sequence[float]
) -> float:
    """Return the largest negligible difference in the unit of the row; nan for equal counts.

    Args:
        comparison: The comparison.
        evidence: The measured difference. The margin of some metrics is a share of its reference.
        metric: The metric, which has a margin.
        effects: The paper's effect, and ``expected`` of :class:`ErrorShares`, in the unit of the
            row. Unknown effects are nan.
    """
    # counts are equal or not
    if comparison.direction == "equal":
        return math.nan
    margin_of_metric = metric.margin(evidence.reference_mean) * comparison.scale
    if comparison.direction not in ("higher", "lower"):
        return margin_of_metric
    # A claim of a higher or lower number has an effect. An equivalent difference must be smaller
    # than it, in points and as a share of the errors. So the margin is at most half of each.
    known_effects = [effect for effect in effects if not math.isnan(effect)]
    halves = [abs(effect) / 2 for effect in known_effects]
    return min([margin_of_metric, *halves])


def _margin_text(margin: float, unit: str) -> str:
    """Format a margin with its unit; a dash if there is none."""
    if math.isnan(margin):
        return MISSING
    return f"{margin:.2g} {unit}".rstrip()


def _p_of_test(comparison: Comparison, evidence: Evidence) -> float:
    """Return the uncorrected p of the t-test, or nan if there is no test.

    Only claims of a higher or lower number are tested, and only if no run diverged.
    """
    is_tested = comparison.direction in ("higher", "lower")
    if not is_tested or evidence.num_diverged:
        return math.nan
    return evidence.difference.p


def _gap_to_paper(
    comparison: Comparison, difference: Difference, effect: float, paper_effect: PaperEffect
) -> PaperGap:
    """Compare our difference with the paper's; nan if there is nothing to compare.

    Args:
        comparison: The comparison.
        difference: Our difference.
        effect: The paper's difference in the same unit; nan if it is unknown.
        paper_effect: Its standard error and number of seeds, if known.
    """
    # counts do not vary by chance, and ratios have a range instead of an interval
    if not comparison.is_paired or math.isnan(effect):
        return PaperGap(mean=math.nan, p=math.nan)
    return find_gap(difference, effect, paper_effect)


def _with_evidence(
    row: ClaimRow, comparison: Comparison, paper_effect: PaperEffect, evidence: Evidence
) -> ClaimRow:
    """Add our difference to a row, and compare it with the paper's effect."""
    benchmark = load_benchmark(comparison.benchmark)
    metric = load_metrics()[comparison.metric]
    # in the unit of the row, such as points
    difference = evidence.difference.scaled(comparison.scale)
    reference = evidence.reference_mean * comparison.scale

    shares = _error_shares(difference, row.effect, reference, metric, paper_effect)
    margin = _margin(comparison, evidence, metric, effects=[row.effect, shares.expected])
    gap = _gap_to_paper(comparison, difference, row.effect, paper_effect)
    return replace(
        row,
        margin=margin,
        margin_shown=_margin_text(margin, row.unit),
        error_share_shown=_error_share_text(shares),
        n_shown=with_noun(difference.n, row.pair),
        difference_shown=_difference_text(difference, row.unit, comparison, metric),
        difference_without_unit=_difference_text(difference, "", comparison, metric),
        delta=difference.mean,
        low=difference.low,
        high=difference.high,
        n=difference.n,
        p=_p_of_test(comparison, evidence),
        expected=shares.expected,
        gap=gap.mean,
        gap_p=gap.p,
        evidence=evidence,
        remark=_remark(evidence, row.pair, benchmark),
    )


@dataclass(frozen=True)
class ErrorShares:
    """Differences of scores as shares of the errors that the reference method makes.

    A score of 80 % has 20 points of errors, so a gain of one point is a share of 5 %. Unknown
    numbers are nan.

    Attributes:
        ours: Our difference as a share of our errors.
        of_paper: The paper's difference as a share of the paper's errors.
        expected: The difference in points that is the paper's share of our errors.
    """

    ours: Difference
    of_paper: float
    expected: float


def _error_shares(
    difference: Difference,
    effect: float,
    reference: float,
    metric: Metric,
    paper_effect: PaperEffect,
) -> ErrorShares:
    """Express our difference and the paper's as shares of the reference method's errors.

    Args:
        difference: Our difference in points.
        effect: The paper's difference in points; nan if it is unknown.
        reference: Our score of the reference method in percent; nan if there is none.
        metric: The metric. Only scores in percent have errors.
        paper_effect: The paper's effect, with its score of the reference method.
    """
    our_errors = math.nan
    if metric.unit == "%":
        our_errors = 100 - reference
    if our_errors == 0:
        # without errors, there is no share of them: all numbers become nan
        our_share = difference.scaled(math.nan)
    else:
        our_share = difference.scaled(1 / our_errors)

    if paper_effect.reference is None:
        return ErrorShares(ours=our_share, of_paper=math.nan, expected=math.nan)
    paper_errors = 100 - paper_effect.reference
    paper_share = effect / paper_errors
    # our difference, if our method also removed this share of the errors
    expected = paper_share * our_errors
    return ErrorShares(ours=our_share, of_paper=paper_share, expected=expected)


def _error_share_text(shares: ErrorShares) -> str:
    """Format shares of errors, such as ``+1.4 % [-4.0, +6.8]; the paper +5.1 %``."""
    if math.isnan(shares.ours.mean):
        return MISSING
    percent = shares.ours.scaled(100)
    text = f"{percent.mean:+z.1f} %" + interval_text(percent.low, percent.high)
    if math.isnan(shares.of_paper):
        return text
    return f"{text}; the paper {shares.of_paper * 100:+z.1f} %"


def _difference_text(
    difference: Difference, unit: str, comparison: Comparison, metric: Metric
) -> str:
    """Format a difference as text.

    A difference of counts gets a sign, and a ratio of times gets its range. Any other difference
    gets its unit and interval, or a dash if no pair is complete.
    """
    if comparison.direction == "equal":
        return f"{difference.mean:+,.0f} parameters"
    if comparison.direction == "near":
        # a ratio is stored as its distance from 1
        ratio = difference.mean + 1
        lowest = difference.low + 1
        highest = difference.high + 1
        return f"× {ratio:.2f} [{lowest:.2f}, {highest:.2f}]"

    if difference.n == 0:
        return MISSING
    decimals = metric.decimals
    if metric.unit == "%":
        decimals += 1  # differences are smaller than scores
    # z: no minus sign for a number that is rounded to 0
    number = f"{difference.mean:+z.{decimals}f} {unit}".rstrip()
    interval = interval_text(difference.low, difference.high, decimals)
    return number + interval


def _remark(evidence: Evidence, pair: str, benchmark: AnyBenchmark) -> str:
    """List the compared models and tasks, and count the pairs that were left out.

    More than three models or tasks are only counted. ``pair`` is the noun for a pair, such as
    ``seed``.
    """
    models = [model_title(name) for name in evidence.models]
    tasks = [benchmark.task_titles.get(name, name) for name in evidence.tasks]
    texts = [name_or_count(models, "models")]
    tasks_text = name_or_count(tasks, "tasks")
    # a comparison of times has no tasks
    if tasks_text:
        texts.append(tasks_text)
    unfinished = evidence.num_incomplete - evidence.num_diverged
    if unfinished:
        texts.append(f"{with_noun(unfinished, pair)} left out as incomplete")
    if evidence.num_diverged:
        texts.append(f"{with_noun(evidence.num_diverged, pair)} left out because training diverged")
    return "; ".join(texts)


def claims_table(suite: Suite, rows: pd.DataFrame) -> Table:
    """Make the table of the claims from the rows of :func:`judge_claims`."""
    num_tests_by_endpoint = rows.groupby("endpoint")["p"].count()  # nan is no test
    loss_share = load_metrics()["loss"].equivalence_share or math.nan
    table = Table(
        title="Claims of the paper",
        caption=_TABLE_CAPTION.format(
            num_tests=num_tests_by_endpoint[_MAIN],
            num_loss_tests=num_tests_by_endpoint.get(_LOSS, 0),
            loss_share=100 * loss_share,
        ),
        keys={
            "claim_title": "Claim",
            "test_shown": "Tested on",
            "paper": "The paper",
            "difference_shown": "These runs",
            "n_shown": "n",
        },
        columns=[
            Column(metric="p_value", value="p", label="p"),
            Column(metric="p_value", value="p_holm", label="p (Holm)"),
        ],
        frame=rows.drop(columns=["difference_without_unit", "comparison", "evidence"]),
        notes={
            "verdict": "Verdict",
            "margin_shown": "Margin",
            "error_share_shown": "Share of errors",
            "against_paper": "Next to the paper",
            "remark": "Over, and remarks",
        },
        name=CLAIMS.name,
        wraps=True,
    )
    if has_random_weights(suite.runs):
        return table.with_random_weights_note()
    return table


def verdict_sentences(rows: pd.DataFrame) -> list[str]:
    """Return a sentence that counts the verdicts of the main tests, and one for the losses, if any.

    ``rows`` are from :func:`judge_claims`.
    """
    main = rows[rows["endpoint"] == _MAIN]
    num_claims = main["claim"].nunique()
    sentences = [f"{len(main)} tests of {num_claims} claims of the paper: {_count_text(main)}."]

    losses = rows[rows["endpoint"] == _LOSS]
    if len(losses):
        sentences.append(f"{len(losses)} tests of losses: {_count_text(losses)}.")
    return sentences


def _count_text(rows: pd.DataFrame) -> str:
    """Count the verdicts of some tests, such as ``2 supported, 5 undecided``."""
    counts = rows["verdict"].value_counts()
    texts = []
    for verdict in Verdict:
        if verdict in counts:
            texts.append(f"{counts[verdict]} {verdict}")
    return ", ".join(texts)
