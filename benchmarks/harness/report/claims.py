"""Make the table and figure of the claims: the paper's numbers, these runs' numbers, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness import base as paths
from benchmarks.harness.config.artifacts import CLAIMS
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.catalogue import Metric, load_metrics, model_title
from benchmarks.harness.config.claims import Comparison, PaperEffect, load_claims
from benchmarks.harness.config.method_specs import setting_text
from benchmarks.harness.config.paper_items import main_figure
from benchmarks.harness.config.suite import Suite, suites_with
from benchmarks.harness.report.common import RANDOM_WEIGHTS, has_random_weights, interval_text, name_or_count
from benchmarks.harness.report.paper import draw_main, main_rows
from benchmarks.harness.report.plots import REFERENCE, WIDTH, legend_below, panel_figure, placeholder_figure
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.claims import (
    Evidence,
    Verdict,
    compare_with_paper,
    find_evidence,
    is_within,
    judge,
)
from benchmarks.harness.results.statistics import holm

_TESTED = ("higher", "lower")  # the directions that a test decides
_PAIRED = (*_TESTED, "same", "not_lower")  # the directions that compare pair by pair
_COMPARED = ("benchmark", "method", "against", "domain", "metric")
_TEXTS = ("contrast", *_COMPARED, "pair", "against_paper", "equivalent")
_NUMBERS = ("delta", "low", "high", "n", "p", "margin", "effect")

CAPTION = (
    "The claims of the paper and the differences that these runs measured, with 95 % intervals. Blue circles are "
    "supported, orange crosses contradicted, grey diamonds undecided. A purple triangle is undecided too, but the "
    "paper's effect (thin line) lies above the whole interval. Differences within the band are negligible. Tests in "
    "other units than points are in the table."
)
_SMALLER = "undecided, smaller than the paper's"
_MARKS: dict[str, dict[str, Any]] = {
    Verdict.SUPPORTED: {"marker": "o", "color": "#0072b2"},
    Verdict.CONTRADICTED: {"marker": "X", "color": "#d55e00"},
    _SMALLER: {"marker": "<", "color": "#8a5a9e"},
    Verdict.UNDECIDED: {"marker": "D", "color": "#777777"},
    Verdict.UNTESTABLE: {"marker": "D", "color": "#777777", "mfc": "white"},
}
_PLAIN = {"marker": "o", "color": "#777777"}  # of random weights, which have no verdicts
_PAPER, _BAND = "#222222", "#dcebf5"
_NEGLIGIBLE = "no difference that matters"


def write_claims(suite: Suite) -> None:
    """Write the table and figures of the claims of a finished suite, and the figure of the main averages."""
    numbers = collect_claim_numbers(suite)
    rows = judge_claims(suite, numbers)
    folder = paths.RESULTS / suite.name
    claims_table(suite, rows).write(folder / "tables")
    draw_claims(rows[rows["headline"]], folder / "figures" / CLAIMS.name)
    draw_claims(rows, folder / "figures" / CLAIMS.stem("all"))
    draw_main(main_rows(numbers), main_figure(suite.name))


def collect_claim_numbers(suite: Suite) -> dict[str, pd.DataFrame]:
    """Collect the claim numbers of each benchmark, with the columns ``COMPARED`` of :mod:`.common`."""
    return {name: present(load_benchmark(name), suite.runs_of(name)).claim_numbers() for name in suite.claimed}


def judge_claims(suite: Suite, numbers: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Test every claim on the finished runs of a suite.

    Args:
        suite: The suite.
        numbers: The claim numbers by benchmark; None to collect them.

    Returns:
        One row per test, in the order of ``claims.yaml``. ``delta``, ``low``, ``high``, ``margin`` and the paper's
        ``effect`` are in the row's ``unit``, and ``n`` counts the row's ``pair`` (seeds, trials, …).
    """
    numbers = collect_claim_numbers(suite) if numbers is None else numbers
    rows = []
    for name, claim in load_claims().items():
        for test in claim.tests:
            row: dict[str, Any] = {"claim": name, "claim_title": claim.title, "test": test.title}
            row |= {"headline": test.headline}
            row |= dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, math.nan)
            row |= {"paper": _paper_text(test.paper), "where": test.paper.where, "unit": test.paper.unit}
            row |= {"compare": test.compare, "evidence": None, "remark": f"needs {test.needs}"}
            rows.append(row | (_test_columns(test.compare, test.paper, numbers) if test.compare else {}))
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    is_random = has_random_weights(suite.runs)
    return frame.assign(verdict=[MISSING if is_random else str(_verdict(row)) for row in frame.itertuples()])


def _verdict(row: Any) -> Verdict:
    if row.evidence is None:
        return Verdict.MISSING
    margin = load_metrics()[row.metric].equivalence_margin or 0.0
    return judge(row.compare, row.evidence.difference, row.p_holm, margin)


def _test_columns(compare: Comparison, paper: PaperEffect, numbers: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the columns of a row that depend on the comparison and its runs."""
    benchmark, metric = load_benchmark(compare.benchmark), load_metrics()[compare.metric]
    margin = metric.equivalence_margin or math.nan
    row = {
        **compare.model_dump(include={*_COMPARED}),
        "contrast": _contrast(compare, benchmark),
        "unit": _difference_unit(metric),
        "margin": margin * metric.scale,
        "pair": benchmark.domains[compare.domain].pair,
    }
    if paper.effect is not None and paper.unit == row["unit"]:
        row["effect"] = float(paper.effect)
    evidence = find_evidence(numbers[compare.benchmark], compare) if compare.benchmark in numbers else None
    if evidence is None:
        suites = ", ".join(suites_with(compare)) or "no suite"
        return row | {"remark": f"both methods run in {suites}"}
    difference, is_paired = evidence.difference, compare.direction in _PAIRED
    scale = metric.scale if is_paired else 1
    row |= {"delta": difference.mean * scale, "low": difference.low * scale, "high": difference.high * scale}
    row |= {"n": difference.n, "p": difference.p if compare.direction in _TESTED else math.nan}
    if is_paired and not math.isnan(difference.low):
        row["equivalent"] = is_within(difference, -margin, margin)
        if "effect" in row and compare.direction in _TESTED:
            row["against_paper"] = compare_with_paper(compare, difference, row["effect"] / scale)
    return row | {"evidence": evidence, "remark": _remark(compare, evidence, row["pair"], benchmark)}


def _difference_unit(metric: Metric) -> str:
    """Return the unit of a difference: points for percentages, the label's first word for metrics without a unit."""
    if metric.unit == "%":
        return "points"
    return metric.unit if metric.unit not in ("", "M") else metric.label.split(" ")[0].lower()


def _contrast(compare: Comparison, benchmark: AnyBenchmark) -> str:
    titles = benchmark.row_titles
    titles = {name: f"({title})" if "+" in title else title for name, title in titles.items()}
    method, against = titles[compare.method], titles[compare.against]
    if compare.settings == "all":
        method += ", all settings"
    elif compare.settings and len(compare.settings) == 1:
        # several settings belong to several models, which the title names
        method += f", {setting_text(compare.settings[0])}"
    return f"{method} {'÷' if compare.direction == 'near' else '−'} {against}"


def _paper_text(paper: PaperEffect) -> str:
    if paper.effect is None:
        return f"no number ({paper.where})"
    number = "0" if paper.effect == 0 else f"{paper.effect:+z.2f}"
    return f"{number} {paper.unit} ({paper.where})"


def _remark(compare: Comparison, evidence: Evidence, pair: str, benchmark: AnyBenchmark) -> str:
    """Name the models and tasks of a comparison, and the reason if it has no test."""
    titles = benchmark.task_titles
    models = [model_title(name) for name in evidence.models]
    tasks = [titles.get(name, name) for name in evidence.tasks]
    remarks = [name_or_count(models, "models"), name_or_count(tasks, "tasks")]
    difference = evidence.difference
    if evidence.incomplete:
        remarks.append(f"{_with_noun(evidence.incomplete, pair)} left out as incomplete")
    if math.isnan(difference.p if compare.direction in _TESTED else difference.low):
        reason = _with_noun(difference.n, pair) if difference.n < 2 else "all differences are equal"
        remarks.append(f"untestable: {reason}")
    return "; ".join(filter(None, remarks))


def _with_noun(count: int, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def claims_table(suite: Suite, rows: pd.DataFrame) -> Table:
    """Make a table from the rows of :func:`judge_claims`."""
    frame = rows.drop(columns=["compare", "evidence"]).assign(
        claim_shown=rows["claim_title"].where(~rows["claim"].duplicated(), ""),
        test_shown=[": ".join(filter(None, (row.test, row.contrast))) for row in rows.itertuples()],
        n_shown=[_count_text(row) for row in rows.itertuples()],
        runs_shown=[_runs_text(row) for row in rows.itertuples()],
        against_shown=rows["against_paper"].replace("", MISSING),
        equal_shown=[_equal_text(row) for row in rows.itertuples()],
    )
    table = Table(
        "Claims of the paper",
        "Differences are means over n pairs (seeds or trials), with a 95 % confidence interval (Student's t). Each pair "
        "is averaged over tasks first. p is from the "
        f"paired t-test, corrected with Holm's procedure over the {int(rows['p'].notna().sum())} tests of this table. "
        "Supported or contradicted: corrected p below 5 %, with the claimed sign or the opposite one. Next to the "
        "paper: the whole interval is smaller or larger than the paper's effect, or compatible with it. No difference "
        "that matters: the whole interval lies within the margin of benchmarks/metrics.yaml. The interval alone "
        "decides other claims (the same, not lower, near the dense time): supported if all of it lies within the "
        "margin, contradicted if all of it lies outside. The interval of a time is its range over all rounds and "
        "settings. Parameters are counted. Untestable: one pair, or equal differences. Missing: no such runs in this "
        "suite.",
        {"claim_shown": "Claim", "test_shown": "Tested on", "paper": "The paper"}
        | {"runs_shown": "These runs", "n_shown": "n"},
        [Column("p_value", "p", "p"), Column("p_value", "p_holm", "p (Holm)")],
        frame,
        notes={"verdict": "Verdict", "against_shown": "Next to the paper"}
        | {"equal_shown": "No difference that matters", "remark": "Over, and remarks"},
        name="claims",
        wraps=True,
    )
    return table.without_verdicts(RANDOM_WEIGHTS) if has_random_weights(suite.runs) else table


def _count_text(row: Any) -> str:
    if row.evidence is None:
        return MISSING
    return _with_noun(int(row.n), "run" if row.compare.direction == "equal" else row.pair)


def _runs_text(row: Any) -> str:
    if math.isnan(row.delta):
        return MISSING
    if row.compare.direction == "equal":
        return "0 parameters" if row.delta == 0 else f"{row.delta:+,.0f} parameters"
    if row.compare.direction == "near":
        return f"× {row.delta + 1:.2f} [{row.low + 1:.2f}, {row.high + 1:.2f}]"
    metric = load_metrics()[row.metric]
    decimals = metric.decimals + (1 if metric.unit == "%" else 0)  # differences are smaller than scores
    points = " points" if row.unit == "points" else ""
    return f"{row.delta:+z.{decimals}f}{points}{interval_text(row.low, row.high, decimals)}"


def _equal_text(row: Any) -> str:
    if row.equivalent == "":
        return MISSING
    margin = f"{row.margin:g} {row.unit.removesuffix('s') if row.margin == 1 else row.unit}"
    return f"yes, within {margin}" if row.equivalent else f"not shown within {margin}"


def claims_json(rows: pd.DataFrame) -> str:
    """Return the rows of :func:`judge_claims` as a JSON list; a missing number is null."""
    frame = rows.drop(columns=["compare", "evidence"])
    return str(frame.to_json(orient="records", indent=1, force_ascii=False, double_precision=15))


def verdict_sentences(rows: pd.DataFrame) -> Iterator[str]:
    """Summarise the verdicts in sentences: first the tests of gains, then equality and cost."""
    tested = rows[rows["verdict"] != Verdict.MISSING]
    missing = f"; {len(rows) - len(tested)} more lack their runs in this suite" if len(tested) < len(rows) else ""
    yield f"{_with_noun(len(tested), 'test')} of {_with_noun(tested['claim'].nunique(), 'claim')} of the paper{missing}."
    is_gain = tested["p"].notna()
    for name, group in (("gains", tested[is_gain]), ("equality, parameters and time", tested[~is_gain])):
        counts = group["verdict"].value_counts()
        verdicts = ", ".join(f"{counts[word]} {word}" for word in map(str, Verdict) if word in counts)
        if verdicts:
            yield f"Of {_with_noun(len(group), 'test')} of {name}: {verdicts}."
    undecided = tested[is_gain & (tested["verdict"] == Verdict.UNDECIDED)]
    smaller = int((undecided["against_paper"] == "smaller").sum())
    if smaller:
        yield f"In {smaller} of the undecided ones any gain is smaller than the paper's."


def claim_cards(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the title and the tests of each claim for a report, from the CSV of :func:`claims_table`."""
    shown = rows.fillna("").drop(columns=["test", "n"])
    shown = shown.rename(columns={"test_shown": "test", "runs_shown": "runs", "n_shown": "n"})
    for title, tests in shown.groupby("claim_title", sort=False):
        yield {"title": title, "tests": tests.to_dict("records")}


def draw_claims(rows: pd.DataFrame, path: Path) -> None:
    """Draw the tests in points: differences with their intervals, margins and the paper's effects, a panel per claim.

    Write ``<path>.pdf`` and ``.png``. Tests in other units, and untested claims, appear only in the table.
    """
    drawn = rows[rows["delta"].notna() & rows["unit"].eq("points")]
    if drawn.empty:
        placeholder_figure(path, "no claim was tested")
        return
    claims = list(drawn.groupby("claim_title", sort=False))
    heights = [len(tests) for _, tests in claims]
    size = (WIDTH, 0.19 * len(drawn) + 0.3 * len(claims) + 1)
    with panel_figure(path, len(claims), 1, size, height_ratios=heights, sharex=True) as (figure, axes):
        for axis, (title, tests) in zip(axes[:, 0], claims, strict=True):
            for height, row in enumerate(tests.itertuples()):
                _draw_test(axis, row, height)
            axis.axvline(0, color=REFERENCE, lw=0.8, zorder=1)
            axis.set_title(title, fontsize=8)
            axis.set_yticks(range(len(tests)), tests["test"], fontsize=7)
            axis.set_ylim(len(tests) - 0.5, -0.5)
        legend_below(figure, axes[:, 0], 3)
        axes[-1, 0].set_xlabel("Difference in points")


def _draw_test(axis: Any, row: Any, height: int) -> None:
    """Draw one test on a line of its panel, and write its numbers beside the panel."""
    is_smaller = row.verdict == Verdict.UNDECIDED and row.against_paper == "smaller"
    kind = _SMALLER if is_smaller else row.verdict
    mark = _MARKS.get(kind, _PLAIN)
    axis.fill_betweenx(
        [height - 0.5, height + 0.5], -row.margin, row.margin, color=_BAND, lw=0, zorder=0, label=_NEGLIGIBLE
    )
    axis.plot([row.low, row.high], [height, height], lw=1.4, color=mark["color"], zorder=2)
    axis.plot(row.effect, height, "|", ms=9, mew=1.6, color=_PAPER, zorder=3, label="the paper")
    axis.plot(row.delta, height, ls="", ms=5, zorder=4, label=kind if kind in _MARKS else None, **mark)
    numbers = f"{_runs_text(row).replace(' points', '')}, n {int(row.n)}"
    axis.text(1.02, height, numbers, va="center", fontsize=7, transform=axis.get_yaxis_transform())
