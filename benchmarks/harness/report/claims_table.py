"""Make the table and figures of the claims: the paper's numbers, these runs' numbers, and the verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from benchmarks.harness import base as paths
from benchmarks.harness.base import DataError, first_problem, read_bytes, write_lines
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.catalogue import Metric, load_metrics, model_title
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS, numbers_file
from benchmarks.harness.report.claims import ClaimTest, Comparison, claimed_benchmarks, load_claims
from benchmarks.harness.report.common import COMPARED, interval_text, name_or_count
from benchmarks.harness.report.evidence import (
    Evidence,
    Verdict,
    compare_with_paper,
    find_evidence,
    is_within,
    judge,
)
from benchmarks.harness.report.plots import draw_forest, placeholder_figure
from benchmarks.harness.report.presentation import has_random_weights
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import Difference, holm

_NUMBER = TypeAdapter(dict[str, str | int | float | None])
_COMPARED = {"benchmark", "method", "against", "domain", "metric"}
_TEXTS = (
    "contrast",
    *sorted(_COMPARED),
    "pair",
    "against_paper",
    "equivalent",
    "unit",
    "n_shown",
    "runs_shown",
)
_NUMBERS = ("delta", "low", "high", "n", "p", "margin", "effect")

CAPTION = (
    "The claims of the paper and the differences that these runs measured, with 95 % intervals (from three pairs on); "
    "thin crosses are the paper's effects. The shaded band has no difference that matters. Tests in other units than points "
    "are in the table."
)
_SMALLER = "undecided, below the paper's"  # the paper's effect lies above the whole interval
_NO_VERDICT = "random weights"
_PAPER = "the paper"
_STYLES = {
    Verdict.SUPPORTED: MethodStyle("#0072b2", "o"),
    Verdict.CONTRADICTED: MethodStyle("#d55e00", "X"),
    Verdict.UNDECIDED: MethodStyle("#777777", "D"),
    Verdict.UNTESTABLE: MethodStyle("#777777", "D", hollow=True),
    _SMALLER: MethodStyle("#8a5a9e", "<"),
    _NO_VERDICT: MethodStyle("#777777", "o"),
    _PAPER: MethodStyle("#222222", "x"),
}


def write_claims(suite: Suite, rows: pd.DataFrame) -> None:
    """Write the table and figures of the claims, from the rows of :func:`judge_claims`."""
    folder = paths.RESULTS / suite.name
    claims_table(suite, rows).write(folder / "tables")
    draw_claims(rows[rows["headline"]], folder / "figures" / CLAIMS.name)
    draw_claims(rows, folder / "figures" / CLAIMS.stem("all"))


def write_claim_numbers(suite: str, benchmark: str, numbers: pd.DataFrame) -> None:
    """Write the numbers of a benchmark that claims compare, one a line, with the columns ``COMPARED`` of :mod:`.common`."""
    # pandas keeps numpy's numbers in columns of mixed types
    lines = (
        json.dumps(row, default=lambda number: number.item(), allow_nan=False)
        for row in numbers.to_dict("records")
    )
    write_lines(Path(numbers_file(suite, benchmark)), lines)


def read_claim_numbers(suite: Suite) -> dict[str, pd.DataFrame]:
    """Read the claim numbers of each benchmark of a suite that tests claims.

    Raises:
        DataError: A file is missing or damaged.
    """
    numbers = {}
    for name in claimed_benchmarks(suite):
        path = Path(numbers_file(suite.name, name))
        # else Snakemake leaves a damaged file as it is
        advice = (
            f"`snakemake --cores all --force {path} --config suite={suite.name}` makes it again"
        )
        lines = read_bytes(path, advice).splitlines()
        try:
            rows = [_NUMBER.validate_json(line) for line in lines]
        except ValidationError as error:
            raise DataError(f"{path} is damaged: {first_problem(error)}; {advice}") from error
        numbers[name] = pd.DataFrame(rows, columns=COMPARED)
    return numbers


def judge_claims(suite: Suite, numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Test every claim on the finished runs of a suite.

    Args:
        suite: The suite.
        numbers: The claim numbers by benchmark.

    Returns:
        One row per test, in the order of ``claims.yaml``. ``delta``, ``low``, ``high``, ``margin`` and the paper's
        ``effect`` are in the row's ``unit``, and ``n`` counts the row's ``pair`` (seeds, trials, …).
    """
    rows = [
        {"claim": name, "claim_title": claim.title, **_test_row(test, numbers)}
        for name, claim in load_claims().items()
        for test in claim.tests
    ]
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    is_random = has_random_weights(suite.runs)
    return frame.assign(
        verdict=[MISSING if is_random else str(_verdict(row)) for row in frame.itertuples()]
    )


def _verdict(row: Any) -> Verdict:
    if row.evidence is None:
        return Verdict.MISSING
    margin = load_metrics()[row.metric].equivalence_margin or 0.0
    return judge(row.compare, row.evidence.difference, row.p_holm, margin)


def _test_row(test: ClaimTest, numbers: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Compute the row of a test, except its corrected p and its verdict."""
    paper, compare = test.paper, test.compare
    effect = "no number" if paper.effect is None else f"{paper.effect:+g} {paper.unit}"
    row: dict[str, Any] = {"test": test.title, "headline": test.headline, "test_shown": test.title}
    row |= dict.fromkeys(_TEXTS, MISSING) | dict.fromkeys(_NUMBERS, math.nan)
    row |= {
        "paper": f"{effect} ({paper.where})",
        "compare": compare,
        "evidence": None,
        "remark": f"needs {test.needs}",
    }
    if compare is None:
        return row
    benchmark, metric = load_benchmark(compare.benchmark), load_metrics()[compare.metric]
    contrast = (
        f"{benchmark.row_titles[compare.method]} against {benchmark.row_titles[compare.against]}"
    )
    row |= {
        **compare.model_dump(include=_COMPARED),
        "contrast": contrast,
        "test_shown": f"{test.title}: {contrast}",
    }
    row["unit"] = {"%": "points", "M": "parameters"}.get(metric.unit, metric.unit)
    row["pair"] = "run" if compare.direction == "equal" else benchmark.domains[compare.domain].pair
    row["margin"] = (metric.equivalence_margin or math.nan) * metric.scale
    if paper.effect is not None and paper.unit == row["unit"]:
        row["effect"] = float(paper.effect)
    evidence = (
        find_evidence(numbers[compare.benchmark], compare) if compare.benchmark in numbers else None
    )
    if evidence is None:
        return row | {"remark": "not in this suite"}
    row |= _evidence_columns(row, compare, metric, evidence.difference)
    return row | {"evidence": evidence, "remark": _remark(evidence, row["pair"], benchmark)}


def _evidence_columns(
    row: Mapping[str, Any], compare: Comparison, metric: Metric, difference: Difference
) -> dict[str, Any]:
    """Compute the columns of a difference in the row's unit, compared with the margin and the paper."""
    is_paired, is_tested = (
        compare.direction not in ("equal", "near"),
        compare.direction in ("higher", "lower"),
    )
    scale = metric.scale if is_paired else 1
    mean, low, high = difference.mean * scale, difference.low * scale, difference.high * scale
    scaled = replace(
        difference, mean=mean, low=low, high=high, p=difference.p if is_tested else math.nan
    )
    columns: dict[str, Any] = {
        **scaled.columns(),
        "n": difference.n,
        "n_shown": _with_noun(difference.n, row["pair"]),
    }
    columns["runs_shown"] = _runs_text(scaled, row["unit"], compare, metric)
    if is_paired and not math.isnan(difference.low):
        margin = metric.equivalence_margin or math.nan
        is_negligible = is_within(difference, -margin, margin)
        columns["equivalent"] = (
            f"{'yes' if is_negligible else 'not shown'}, margin {row['margin']:g}"
        )
        if is_tested and not math.isnan(row["effect"]):
            columns["against_paper"] = compare_with_paper(
                compare, difference, row["effect"] / scale
            )
    return columns


def _runs_text(difference: Difference, unit: str, compare: Comparison, metric: Metric) -> str:
    """Format a difference with its interval, a number of parameters, or the ratio of times."""
    delta, low, high = difference.mean, difference.low, difference.high
    if compare.direction == "equal":
        return f"{delta:+,.0f} parameters"
    if compare.direction == "near":
        return f"× {delta + 1:.2f} [{low + 1:.2f}, {high + 1:.2f}]"
    decimals = metric.decimals + (
        1 if metric.unit == "%" else 0
    )  # differences are smaller than scores
    return f"{delta:+z.{decimals}f} {unit}".rstrip() + interval_text(low, high, decimals)


def _remark(evidence: Evidence, pair: str, benchmark: AnyBenchmark) -> str:
    """Name the models and tasks of a comparison, and count the omitted pairs."""
    models = name_or_count([model_title(name) for name in evidence.models], "models")
    tasks = name_or_count(
        [benchmark.task_titles.get(name, name) for name in evidence.tasks], "tasks"
    )
    omitted = (
        f"{_with_noun(evidence.incomplete, pair)} left out as incomplete"
        if evidence.incomplete
        else ""
    )
    return "; ".join(filter(None, (models, tasks, omitted)))


def _with_noun(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def claims_table(suite: Suite, rows: pd.DataFrame) -> Table:
    """Make a table from the rows of :func:`judge_claims`."""
    table = Table(
        "Claims of the paper",
        "Differences are means over n pairs (seeds or trials), with a 95 % confidence interval (Student's t). Each pair "
        "is averaged over tasks first. p is from the paired t-test, corrected with Holm's procedure over the "
        f"{int(rows['p'].notna().sum())} tests of this table. Supported or contradicted: corrected p below 5 %, with "
        "the claimed sign or the opposite one. Claims without p (the same, not lower, near the dense time): the whole "
        "interval lies within the margin, or outside. Next to the paper: the whole interval is smaller or larger than "
        "the paper's effect, or compatible with it. No difference that matters: the whole interval lies within the "
        "margin. The interval of a time is its range over all rounds and settings. Untestable: one pair, or equal "
        "differences. Missing: no such runs in this suite.",
        {"claim_title": "Claim", "test_shown": "Tested on", "paper": "The paper"}
        | {"runs_shown": "These runs", "n_shown": "n"},
        [Column("p_value", "p", "p"), Column("p_value", "p_holm", "p (Holm)")],
        rows.drop(columns=["compare", "evidence"]),
        notes={"verdict": "Verdict", "against_paper": "Next to the paper"}
        | {"equivalent": "No difference that matters", "remark": "Over, and remarks"},
        name=CLAIMS.name,
        wraps=True,
    )
    return table.with_random_weights_note() if has_random_weights(suite.runs) else table


def verdict_sentences(rows: pd.DataFrame) -> list[str]:
    """Return sentences that count verdicts, and undecided tests with intervals below the paper's effect."""
    counts = rows["verdict"].value_counts()
    verdicts = ", ".join(f"{counts[word]} {word}" for word in map(str, Verdict) if word in counts)
    sentences = [f"{len(rows)} tests of {rows['claim'].nunique()} claims of the paper: {verdicts}."]
    smaller = int(
        (rows["verdict"].eq(Verdict.UNDECIDED) & rows["against_paper"].eq("smaller")).sum()
    )
    if smaller:
        sentences.append(
            f"In {smaller} of the undecided ones any gain is smaller than the paper's."
        )
    return sentences


def draw_claims(rows: pd.DataFrame, path: Path) -> None:
    """Draw a forest plot of the tests in points, with a panel per claim and crosses for the paper's effects.

    Write ``<path>.pdf`` and ``.png``. Tests in other units, and untested claims, appear only in the table.
    """
    ours = rows[rows["delta"].notna() & rows["unit"].eq("points")]
    if ours.empty:
        placeholder_figure(path)
        return
    is_smaller = ours["verdict"].eq(Verdict.UNDECIDED) & ours["against_paper"].eq("smaller")
    ours = ours.assign(
        series=ours["verdict"].mask(is_smaller, _SMALLER).replace(MISSING, _NO_VERDICT)
    )
    ours["text"] = (
        ours["runs_shown"].str.replace(" points", "") + ", n " + ours["n"].astype(int).astype(str)
    )
    paper = ours[ours["effect"].notna()].assign(delta=ours["effect"], n=0, series=_PAPER, text="")
    drawn = pd.concat([ours, paper])
    drawn = drawn.assign(
        panel=drawn["claim_title"], line=drawn["test"], style=drawn["series"].map(_STYLES)
    )
    label = "Points; shaded: no difference that matters"
    numbers = ["delta", "low", "high", "margin"]
    drawn[numbers] /= 100  # draw_forest takes shares
    draw_forest(drawn, path, label)
