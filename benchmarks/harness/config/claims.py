"""The paper's claims, and the comparison that tests each: ``benchmarks/claims.yaml``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, DefinitionError
from benchmarks.harness.config.benchmark import AnyBenchmark, Offer, benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.suite_file import suite_parts
from benchmarks.harness.config.yaml import Key, Names, Number, Strict, check_names, optional, read

_FILE = "claims.yaml"


class PaperEffect(Strict):
    """The paper's number."""

    effect: Number | None = None
    """The method's number minus the other's; null if the paper gives none."""
    unit: str = "points"
    """Its unit: percentage points of a score, or another one."""
    where: str
    """Table, figure or section, and the numbers that it is a mean of."""


class Comparison(Strict):
    """Two methods of a benchmark, and the number that compares them."""

    benchmark: str
    """A folder of benchmarks/."""
    method: str
    """The method of the claim."""
    against: str
    """The method that it is compared with."""
    domain: str
    """`id`, `ood`, `ood_mean` of text; `held_out` of images; `held_out`, `questions` of instructions; `model` of
    counts; a measure of measurements."""
    metric: str
    """Name in metrics.yaml."""
    direction: Literal["higher", "lower", "same", "not_lower", "equal", "near"]
    """The claim on the method's number: `higher` or `lower` (paired t-test), the `same` or `not_lower` (interval within
    the metric's margin, or above its lower end), `equal` (counts), a ratio `near` 1 or below (range within the
    margin)."""
    selection: str | None = optional()
    """The selection of epoch and hyper-parameters, if a benchmark reports several."""
    models: Names | None = optional()
    """Only these models; left out: all that both methods have."""
    tasks: Names | None = optional()
    """Only these tasks (sets of images or instructions); left out: all that both methods have."""
    tunings: Names | None = optional()
    """Only these ways of instruction tuning."""
    questions: Names | None = optional()
    """Only these sets of questions, such as `mmlu 5-shot`; left out: all that both methods have."""
    settings: Names | Literal["all"] | None = optional()
    """For a method with several settings: some of them (`[D0.8]`) or `all`; each pair is averaged over them. Left
    out: the settings of main tables."""


class ClaimTest(Strict):
    """A test of a claim: a comparison of runs, or the requirement that it lacks."""

    title: str
    """Models and data of the test, in a few words."""
    paper: PaperEffect
    """The paper's number."""
    compare: Comparison | None = optional()
    """The comparison."""
    needs: str | None = optional()
    """A requirement that no suite meets."""
    headline: bool = False
    """True to show the test in the small figure of README and report."""

    def model_post_init(self, _context: Any, /) -> None:
        self.need_one_of("compare", "needs")


class Claim(Strict):
    """One claim of the paper."""

    title: str
    """The claim in plain words."""
    tests: Annotated[list[ClaimTest], Field(min_length=1)]
    """Its tests, each with a verdict."""


class ClaimFile(Strict):
    """The claims of the paper's abstract and analysis."""

    claims: Annotated[dict[Key, Claim], Field(min_length=1)]
    """The claims, by name, in the order of the table."""


@functools.cache
def load_claims() -> dict[str, Claim]:
    """Read the paper's claims, by name.

    Raises:
        DefinitionError: the file is wrong, or names a benchmark, method or metric that does not exist.
    """
    file = BENCHMARKS / _FILE
    claims = read(file, ClaimFile).claims
    for name, claim in claims.items():
        for number, test in enumerate(claim.tests):
            if test.compare:
                check_comparison(test.compare, file, f"claims.{name}.tests[{number}].compare")
    return claims


def check_comparison(compare: Comparison, file: Path, at: str) -> None:
    """Check that the names in a comparison exist and go together.

    Args:
        compare: The comparison.
        file: The file of the comparison.
        at: The keys that lead to it in the file.

    Raises:
        DefinitionError: a name does not exist; names the file, the key and the nearest valid value.
    """

    def check(key: str, names: Collection[str | None] | None, options: Collection[str]) -> None:
        check_names(f"{file}: '{at}", key, [name for name in names or () if name is not None], options)

    check("benchmark", [compare.benchmark], benchmark_names())
    benchmark = load_benchmark(compare.benchmark)
    check("method", [compare.method], benchmark.row_titles)
    check("against", [compare.against], benchmark.row_titles)
    check("domain", [compare.domain], benchmark.domains)
    domain = benchmark.domains[compare.domain]
    check("metric", [compare.metric], [name for name in domain.metrics if name in load_metrics()])
    check("models", compare.models, load_models())
    check("tasks", compare.tasks, benchmark.task_titles)
    check("tunings", compare.tunings, getattr(benchmark.definition, "finetuning", ()))
    check("selection", [compare.selection], domain.selections)
    if compare.settings:
        settings = _settings(benchmark, compare.method)
        if not settings:
            raise DefinitionError(
                f"{file}: '{at}.settings' is for rows with several settings; '{compare.method}' has one"
            )
        check("settings", compare.settings if isinstance(compare.settings, list) else (), settings)
    if domain.selections and compare.selection is None:
        options = ", ".join(domain.selections)
        raise DefinitionError(f"{file}: '{at}' needs the key 'selection'; choose from {options}")
    if compare.method == compare.against:
        raise DefinitionError(f"{file}: '{at}.against' is '{compare.against}', which is the method itself")
    if compare.direction != "equal" and load_metrics()[compare.metric].equivalence_margin is None:
        raise DefinitionError(
            f"{file}: '{at}.metric' is '{compare.metric}', which has no equivalence_margin in metrics.yaml"
        )
    if compare.direction == "near" and not {f"{compare.metric}_low", f"{compare.metric}_high"} <= set(domain.metrics):
        raise DefinitionError(f"{file}: '{at}.direction' is 'near', but {compare.metric} has no interval of its own")


def compared_benchmarks(names: Collection[str]) -> list[str]:
    """Select the benchmarks that a claim is tested on, in the order of the claims."""
    claimed = [test.compare.benchmark for claim in load_claims().values() for test in claim.tests if test.compare]
    return [name for name in dict.fromkeys(claimed) if name in names]


def _settings(benchmark: AnyBenchmark, method: str) -> list[str]:
    """Return the variants of a method in the grids of all suites."""
    offers = [offer for part in suite_parts(benchmark.name).values() for offer in benchmark.offers(part)]
    return sorted({setting for offer in offers if method in offer.methods for setting in offer.settings if setting})


def suites_with(compare: Comparison) -> list[str]:
    """List the suites that run both methods, on models with real weights."""
    benchmark = load_benchmark(compare.benchmark)
    parts = suite_parts(compare.benchmark)
    return [suite for suite, part in parts.items() if _can_compare(benchmark.offers(part), compare)]


def _can_compare(offers: Sequence[Offer], compare: Comparison) -> bool:
    """Return True if both rows share a model with real weights, the selection and the way of tuning."""
    models = load_models()
    # the other row needs the settings of main tables, or the first row's if it has no others
    ours = [offer for offer in offers if compare.method in offer.methods and _has_settings(offer, compare.settings)]
    others = [offer for offer in offers if compare.against in offer.methods]
    others = [offer for offer in others if "" in offer.settings] or [
        offer for offer in others if _has_settings(offer, compare.settings)
    ]
    for first, second in itertools.product(ours, others):
        shared = {name for name in first.models & second.models if not compare.models or name in compare.models}
        if (
            any(name not in models or not (models[name].config or models[name].random) for name in shared)
            and all(compare.domain in offer.domains for offer in (first, second))
            and compare.metric not in first.lacks | second.lacks
            and all(_has_selection(offer, compare.selection) for offer in (first, second))
            and (not compare.tunings or first.tunings & second.tunings & set(compare.tunings))
        ):
            return True
    return False


def _has_selection(offer: Offer, selection: str | None) -> bool:
    return selection is None or offer.selections is None or selection in offer.selections


def _has_settings(offer: Offer, settings: Sequence[str] | str | None) -> bool:
    if settings == "all":
        return any(offer.settings)
    return bool(offer.settings & set(settings or [""]))
