"""The table that a report opens with: what the paper claims, what these runs say, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.catalogue import Metric, load_metrics, load_models
from benchmarks.harness.config.claims import ClaimTest, Comparison, PaperEffect, load_claims, suites_with
from benchmarks.harness.config.definition import AnyBenchmark, load_benchmark
from benchmarks.harness.config.kinds import kind_of
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.variants import setting_text
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.rendering import MISSING, Column, Table
from benchmarks.harness.results.evidence import (
    MOST_PAIRS,
    Evidence,
    Verdict,
    beyond_p,
    counted,
    equivalence_p,
    judge,
    measured,
    paired,
    pairs_needed,
    summary,
)
from benchmarks.harness.results.statistics import SIGNIFICANCE, holm

PAIRED = ("higher", "lower", "same", "not_lower")  # directions of what is compared pair by pair
_FEW = 3
_NUMBERS = ("delta", "low", "high", "deviation", "n", "p", "margin", "equivalence_p", "beyond_p", "effect")
_TEXTS = ("benchmark", "method", "against", "domain", "metric", "unit", "pair")


def claimed_numbers(suite: Suite) -> dict[str, pd.DataFrame]:
    """The numbers of every benchmark that claims are tested on, in the columns :data:`~benchmarks.harness.report.outcomes.COMPARED`.

    Raises:
        DefinitionError: a run is not finished, or a benchmark has no numbers to compare.
    """
    return {name: _numbers(suite, name) for name in suite.claimed}


def judged(suite: Suite, numbers: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Test every claim on a suite's finished runs.

    Args:
        suite: the suite.
        numbers: what :func:`claimed_numbers` gave; asked for where left out.

    Returns:
        A row a test, in the order of the file: ``claim``, ``claim_title``, ``test``, ``contrast``, ``paper``, ``where``; what was compared (``benchmark``, ``method``, ``against``,
        ``domain``, ``metric``); the paper's ``effect``, our ``delta``, ``low``, ``high`` and ``margin``, all as they are printed, in ``unit``; ``deviation`` of the
        pairs' differences, ``n`` and what a ``pair`` is; ``p`` and ``p_holm``; ``equivalence_p`` and ``equivalence_p_holm`` (TOST); ``verdict``, ``equivalent``,
        ``pairs_needed`` (for the corrected test), ``pairs_needed_alone`` (for a test at 5 %) and ``remark``.

    Raises:
        DefinitionError: a run is not finished, or a benchmark has no numbers to compare.
    """
    numbers = claimed_numbers(suite) if numbers is None else numbers
    found = []
    for name, claim in load_claims().items():
        for test in claim.tests:
            row: dict[str, Any] = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, math.nan)
            row |= {
                "claim": name,
                "claim_title": claim.title,
                "test": test.title,
                "contrast": "",
                "where": test.paper.where,
            }
            row |= {"paper": _paper_text(test.paper), "unit": test.paper.unit, "compare": test.compare}
            found.append(row | _tested(test, numbers))
    return _with_verdicts(pd.DataFrame(found))


def _numbers(suite: Suite, name: str) -> pd.DataFrame:
    benchmark = load_benchmark(name)
    found = present(benchmark, suite.runs_of(name)).compared()
    if found.empty:
        raise DefinitionError(f"{benchmark.folder / 'presentation.py'} gives no 'compared', which claims.yaml needs")
    return found


def _tested(test: ClaimTest, numbers: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What of a row depends on runs."""
    if test.compare is None:
        return {"evidence": None, "remark": f"not tested in this suite: needs {test.needs}"}
    compare, benchmark = test.compare, load_benchmark(test.compare.benchmark)
    metric, domain = load_metrics()[compare.metric], benchmark.kind.compared_domains(benchmark.definition)
    row: dict[str, Any] = {key: getattr(compare, key) for key in _TEXTS if hasattr(compare, key)}
    row |= {"contrast": _contrast(compare, benchmark), "pair": domain[compare.domain].pair}
    row |= {"unit": difference_unit(metric), "margin": (metric.equivalence_margin or math.nan) * metric.scale}
    if test.paper.effect is not None and test.paper.unit == row["unit"]:
        row["effect"] = float(test.paper.effect)
    evidence = None
    if compare.benchmark in numbers:
        by = {"equal": counted, "near": measured}.get(compare.direction, paired)
        evidence = by(numbers[compare.benchmark], compare)
    if evidence is None:
        where = ", ".join(suites_with(compare)) or "no suite"
        return row | {"evidence": None, "remark": f"not tested in this suite: its runs are in {where}"}
    scale = metric.scale if compare.direction in PAIRED else 1
    difference = evidence.difference
    row |= {"delta": difference.mean * scale, "low": difference.low * scale, "high": difference.high * scale}
    row |= {"deviation": evidence.deviation * scale, "n": difference.n, "p": difference.p}
    margin = metric.equivalence_margin or math.nan
    if compare.direction in ("higher", "lower"):
        row["equivalence_p"] = equivalence_p(difference, evidence.deviation, margin)
    elif compare.direction in PAIRED:  # what decides is no test of a difference
        below_only = compare.direction == "not_lower"
        row["p"] = equivalence_p(difference, evidence.deviation, margin, below_only=below_only)
        row["beyond_p"] = beyond_p(difference, evidence.deviation, margin, below_only=below_only)
    return row | {"evidence": evidence, "remark": _remark(compare, evidence, row["pair"], benchmark)}


def difference_unit(metric: Metric) -> str:
    """The unit of a difference: points of what is in percent, times of the dense one of ratios."""
    if metric.unit == "%":
        return "points"
    return metric.unit if metric.unit not in ("", "M") else metric.label.split(" ")[0].lower()


def _with_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with what depends on how many there are: corrected p, verdicts, and pairs that would decide."""
    tested = int(rows["p"].notna().sum())
    rows = rows.assign(p_holm=holm(rows["p"]), equivalence_p_holm=holm(rows["equivalence_p"]))
    found = []
    for row in rows.itertuples():
        verdict = Verdict.NOT_TESTED
        if row.evidence is not None:
            # against a claim of sameness by Bonferroni's correction, Holm's strictest step
            verdict = judge(row.compare, row.evidence, row.p_holm, row.margin, min(1.0, row.beyond_p * tested))
        needed = alone = math.nan
        if verdict is Verdict.UNDECIDED and row.compare.direction in ("higher", "lower"):
            needed = pairs_needed(row.effect, row.deviation, SIGNIFICANCE / tested)
            alone = pairs_needed(row.effect, row.deviation, SIGNIFICANCE)
        found.append((verdict.value, needed, alone))
    judged_rows = pd.DataFrame(found, columns=["verdict", "pairs_needed", "pairs_needed_alone"], index=rows.index)
    equivalent = (rows["equivalence_p_holm"] < SIGNIFICANCE).astype(object).where(rows["equivalence_p"].notna(), "")
    return rows.join(judged_rows).assign(equivalent=equivalent)


def _contrast(compare: Comparison, benchmark: AnyBenchmark) -> str:
    titles = benchmark.kind.row_titles(benchmark.definition)
    joint = "÷" if compare.direction == "near" else "−"
    method, against = (
        f"({title})" if "+" in title else title for title in (titles[compare.method], titles[compare.against])
    )
    if compare.settings:
        every = compare.settings == "all"
        method += ", every setting" if every else f", {'; '.join(map(setting_text, compare.settings))}"
    return f"{method} {joint} {against}"


def _paper_text(paper: PaperEffect) -> str:
    if paper.effect is None:
        return f"no number ({paper.where})"
    number = "0" if paper.effect == 0 else f"{paper.effect:+z.2f}"
    return f"{number} {paper.unit} ({paper.where})"


def _remark(compare: Comparison, evidence: Evidence, pair: str, benchmark: AnyBenchmark) -> str:
    """What the numbers are over, and what they lack."""
    known = benchmark.kind.task_titles(benchmark.definition, benchmark.tasks)
    tasks = [known.get(name, name) for name in evidence.tasks]
    models = [load_models()[name].title if name in load_models() else name for name in evidence.models]
    over = [_listed(models, "models"), _listed(tasks, "tasks")]
    found = ["; ".join(filter(None, over))]
    difference = evidence.difference
    if compare.direction not in PAIRED:
        return found[0]
    if evidence.settings > 1:
        found.append(f"the furthest from it of {evidence.settings} settings: {setting_text(evidence.setting)}")
    if evidence.left_out:
        found.append(f"{counted_noun(evidence.left_out, pair)} left out, which lack a part of it")
    if math.isnan(difference.p) and math.isfinite(evidence.deviation):
        found.append("no test: all differences are equal")
    elif difference.n < 2:
        found.append(f"no test: {counted_noun(difference.n, pair)}")
    return "; ".join(filter(None, found))


def _listed(names: Sequence[str], noun: str) -> str:
    return ", ".join(names) if len(names) <= _FEW else f"{len(names)} {noun}"


def counted_noun(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def has_random_weights(runs: Sequence[Run]) -> bool:
    """Whether the models of all these runs have random weights, so that their scores mean nothing."""
    models = [run.spec["model"] for run in runs if kind_of(run.benchmark).has_models]
    return bool(models) and all({"config", "random"} & set(model) for model in models)


def claims_table(suite: Suite, rows: pd.DataFrame) -> Table:
    """Lay out what :func:`judged` found."""
    tested = int(rows["p"].notna().sum())
    warning = ""
    if has_random_weights(suite.runs):
        warning = "The models of this suite have random weights: it shows that everything works, and neither its scores nor its verdicts mean anything. "
    first = ~rows["claim"].duplicated()
    frame = rows.drop(columns=["compare", "evidence"]).assign(
        claim_shown=rows["claim_title"].where(first, ""),
        test_shown=[": ".join(filter(None, (row.test, row.contrast))) for row in rows.itertuples()],
        n_shown=[_n_text(row) for row in rows.itertuples()],
        runs_shown=[runs_text(row) for row in rows.itertuples()],
        equal_shown=[_equal_text(row) for row in rows.itertuples()],
        needed_shown=[_needed_text(row) for row in rows.itertuples()],
    )
    return Table(
        "Claims of the paper",
        f"{warning}Differences are means over n pairs (a seed's or trial's numbers are averaged over tasks first), with a 95 % confidence interval and a paired t-test (Student's t), p corrected by Holm's "
        f"procedure over the {tested} tests of this table. Supported or contradicted: corrected p below 5 %, in the claimed direction or the other. Of a claim that two numbers are the same, or that one is not lower, p is that of two one-sided t-tests against the margin, or of one, and it is contradicted where a test says that "
        "the difference is beyond the margin. A claim of every setting of a method is tested on the setting furthest from it. Practically equal: two one-sided t-tests at 5 %, corrected likewise, "
        "say that the true difference is below the margin of benchmarks/metrics.yaml; this is a finding beside the verdict. Pairs to decide: how many would find an effect of the paper's size with 80 % "
        f"power, given the deviation of the pairs here, by a two-sided test at 5 % ÷ {max(tested, 1)}, which is Holm's strictest step. Parameters are counted, without a test. Of times the range over all rounds and settings has to "
        "lie within the margin. Where the paper gives a difference in another unit, or none, there is no number of pairs.",
        {
            "claim_shown": "Claim",
            "test_shown": "Tested on",
            "paper": "The paper",
            "runs_shown": "These runs",
            "n_shown": "n",
        },
        [Column("p_value", "p", "p"), Column("p_value", "p_holm", "p (Holm)")],
        frame,
        notes={
            "verdict": "Verdict",
            "equal_shown": "Practically equal",
            "needed_shown": "Pairs to decide",
            "remark": "Over, and remarks",
        },
        name="claims",
        wraps=True,
    )


def runs_text(row: Any) -> str:
    """What runs say, for a cell."""
    if row.evidence is None:
        return MISSING
    if row.compare.direction == "equal":
        return "0 parameters" if row.delta == 0 else f"{row.delta:+,.0f} parameters"
    if row.compare.direction == "near":
        return f"× {row.delta + 1:.2f} [{row.low + 1:.2f}, {row.high + 1:.2f}]"
    decimals = _decimals(row.compare)
    if math.isnan(row.delta):
        return MISSING
    interval = "" if math.isnan(row.low) else f" [{row.low:+z.{decimals}f}, {row.high:+z.{decimals}f}]"
    return f"{row.delta:+z.{decimals}f}{' points' if row.unit == 'points' else ''}{interval}"


def _decimals(compare: Comparison) -> int:
    # differences are smaller than what they are of
    metric = load_metrics()[compare.metric]
    return metric.decimals + (1 if metric.unit == "%" else 0)


def _n_text(row: Any) -> str:
    if row.evidence is None:
        return MISSING
    return counted_noun(int(row.n), "run" if row.compare.direction == "equal" else row.pair)


def _equal_text(row: Any) -> str:
    if math.isnan(row.equivalence_p):
        return MISSING
    margin = f"{row.margin:g} {row.unit.removesuffix('s') if row.margin == 1 else row.unit}"
    return f"yes, within {margin}" if row.equivalent else f"not shown ({margin})"


def _needed_text(row: Any) -> str:
    if math.isnan(row.pairs_needed):
        return MISSING
    if math.isinf(row.pairs_needed):
        return f"> {MOST_PAIRS} {row.pair}s"
    return f"{row.pairs_needed:g} {row.pair}s"


def as_records(rows: pd.DataFrame) -> str:
    """All columns of :func:`judged` as a JSON list; null where there is no number, or none below the most that is looked for."""
    plain = rows.drop(columns=["compare", "evidence"]).replace(math.inf, math.nan)
    return str(plain.to_json(orient="records", indent=1, force_ascii=False, double_precision=15))


def sentences(rows: pd.DataFrame) -> Iterator[str]:
    """What a reader should know before the table."""
    claims = rows["claim"].nunique()
    yield f"{claims} claims, {len(rows)} tests: {summary(list(rows['verdict']))}."
    equal = int((rows["equivalent"] == True).sum())  # noqa: E712  (a column of objects)
    if equal:
        yield f"Of {counted_noun(equal, 'comparison')} it is shown that there is no difference larger than the margin."


def cards(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What a reader sees first of every claim: ``title``, and of its ``tests`` the texts of ``test``, ``benchmark``, ``paper``, ``runs``, ``n`` and ``verdict``.

    Args:
        rows: the frame of :func:`claims_table`, as its CSV has it.
    """
    names = {
        "test_shown": "test",
        "benchmark": "benchmark",
        "paper": "paper",
        "runs_shown": "runs",
        "n_shown": "n",
        "verdict": "verdict",
    }
    for title, tests in rows.fillna("").groupby("claim_title", sort=False):
        yield {"title": title, "tests": tests[list(names)].rename(columns=names).to_dict("records")}
