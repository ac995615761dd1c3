"""The paper's claims, and the comparison that tests each: ``benchmarks/claims.yaml``."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, distinct
from benchmarks.harness.config.benchmark import Domain, benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.yaml import (
    Key,
    Location,
    Names,
    Number,
    Strict,
    check_names,
    optional,
    read,
    refusal,
)

# the claimed direction of the loss, by that of the score
_LOSS_DIRECTIONS = {"higher": "lower", "lower": "higher", "same": "same"}


class PaperEffect(Strict):
    """The effect that the paper reports."""

    key_requirements = (
        ("error", "effect"),
        ("error", "seeds"),
        ("error", "reference"),
        ("seeds", "error"),
        ("reference", "effect"),
    )
    effect: Number | None = None
    """Difference of the two methods; null if the paper gives none."""
    unit: str = "points"
    """Unit of the difference, such as percentage points."""
    error: Annotated[float, Field(gt=0)] | None = optional()
    """Standard error of the effect, in the same unit. Without it, our difference cannot be tested
    against the paper's. It needs `reference`, because smaller and larger need both."""
    seeds: Annotated[int, Field(ge=2)] | None = optional()
    """Seeds of each method behind the standard error."""
    reference: Annotated[float, Field(ge=0, lt=100)] | None = optional()
    """The paper's score of the reference method in percent. With it, the effect is also stated as a
    share of the errors that the reference method makes."""
    where: str
    """Where the paper reports it: table, figure or section, and the averaged numbers."""


class Comparison(Strict):
    """Two methods of a benchmark, and the number that compares them."""

    benchmark: str
    """A folder of benchmarks/."""
    method: str
    """The method of the claim."""
    against: str
    """The reference method."""
    domain: str
    """The group of compared numbers. Text benchmarks have `id`, `ood`, `ood_mean` and `routing`; if
    they train, also `training` and `memory`; if they rank methods out of domain, also `ood_rank`.
    Images have `held_out`, and instructions have `held_out` and `questions`. Counts of parameters
    are in `model`. For measurements it is the name of a measure."""
    metric: str
    """Name in metrics.yaml."""
    direction: Literal["higher", "lower", "same", "not_lower", "equal", "near"]
    """Claimed direction. `higher` and `lower` are tested with a paired t-test, unless the whole
    interval lies within the margin: then both methods are equivalent. `same` is supported
    if the whole interval lies within the metric's margin. `not_lower` is supported if the interval
    lies above the margin's lower end. `equal` compares counts. `near` claims a ratio of about 1 or
    less. It is supported if the upper end of the range lies within the margin."""
    selection: str | None = optional()
    """The selection of epoch and hyper-parameters, if a benchmark reports several."""
    models: Names | None = optional()
    """Compared models; by default all that both methods have."""
    tasks: Names | None = optional()
    """Compared tasks (sets of images or instructions); by default all that both methods have."""
    tunings: Names | None = optional()
    """Compared fine-tuning methods of instruction tuning."""
    questions: Names | None = optional()
    """Compared sets of questions, such as `mmlu 5-shot`; by default all that both methods have."""
    chance: Annotated[float, Field(ge=0, lt=1)] | None = optional()
    """The score of a guess, as a share. A test in which neither method is better than a guess has
    no verdict."""
    settings: Names | Literal["all"] | None = optional()
    """Compared settings of a method that has several: a list such as `[D0.8]`, or `all`. The
    numbers of each pair, such as a seed, are averaged over these settings. By default the settings
    of main tables are compared."""

    @property
    def is_paired(self) -> bool:
        """Return True if scores are compared by pairs; False for counts and ratios."""
        return self.direction not in ("equal", "near")

    @property
    def scale(self) -> float:
        """Return the factor from stored numbers to printed ones, such as from shares to points.

        Numbers of parameters and ratios of times are printed as they are stored.
        """
        if not self.is_paired:
            return 1
        return load_metrics()[self.metric].scale


class ClaimTest(Strict):
    """A test of a claim: a comparison of runs, or the reason why it cannot be tested."""

    exactly_one_of = ("compare", "needs")
    title: str
    """Models and data of the test, in a few words."""
    paper: PaperEffect
    """The paper's number."""
    compare: Comparison | None = optional()
    """The comparison."""
    needs: str | None = optional()
    """The missing requirement, if no suite can run the test."""
    headline: bool = False
    """True to show the test in the small figure of README and report."""
    endpoint: Literal["main", "loss"] = "main"
    """`loss` for a test of the second endpoint. The p values of each endpoint are corrected apart
    from those of the other."""
    loss: bool = False
    """True to repeat the comparison with the loss, as a second endpoint. This is possible for
    scores that are claimed to be higher, lower or the same."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse ``loss`` for a test that has no loss to compare."""
        super().model_post_init(context)
        can_repeat = (
            self.compare is not None
            and self.compare.direction in _LOSS_DIRECTIONS
            and self.compare.chance is None
        )
        if self.loss and not can_repeat:
            raise refusal(
                "'loss' needs a comparison that claims higher, lower or same, without 'chance'"
            )


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
    """Read the paper's claims, by name, and check their comparisons.

    Raises:
        DefinitionError: The file is damaged, or :func:`check_comparison` finds a wrong name.
    """
    file = BENCHMARKS / "claims.yaml"
    claims = read(file, ClaimFile).claims
    for name, claim in claims.items():
        for number, test in enumerate(claim.tests):
            if test.compare is None:
                continue
            where = Location(file, f"claims.{name}.tests[{number}].compare")
            check_comparison(test.compare, where)
            if test.loss:
                check_comparison(loss_comparison(test.compare), where)
    return claims


def loss_test(test: ClaimTest, comparison: Comparison) -> ClaimTest:
    """Return the test that repeats a test with the loss. ``comparison`` is that of the test."""
    return ClaimTest(
        title=f"{test.title}: loss",
        paper=PaperEffect(where="no losses"),
        compare=loss_comparison(comparison),
        endpoint="loss",
    )


def loss_comparison(comparison: Comparison) -> Comparison:
    """Return the same comparison of losses instead of scores.

    A claim of a higher score becomes a claim of a lower loss, and the reverse. One of the same
    score becomes one of the same loss.
    """
    direction = _LOSS_DIRECTIONS[comparison.direction]
    return comparison.model_copy(update={"metric": "loss", "direction": direction})


def claimed_benchmarks(suite: Suite) -> list[str]:
    """Return a suite's benchmarks that test the paper's claims, in the order of the claims."""
    compared = []
    for claim in load_claims().values():
        for test in claim.tests:
            if test.compare is not None:
                compared.append(test.compare.benchmark)
    return [name for name in distinct(compared) if name in suite.settings.benchmarks]


def check_comparison(comparison: Comparison, where: Location) -> None:
    """Check that the names in a comparison exist, and that they fit its benchmark.

    Its ``settings`` and ``questions`` are not checked. They are names of measured rows, which only
    the results have.

    Args:
        comparison: The comparison.
        where: The location of the comparison in its YAML file, for messages.

    Raises:
        DefinitionError: A name does not exist or does not fit. The message names the file and the
            key.
    """
    check_names(where.at("benchmark"), [comparison.benchmark], benchmark_names())
    benchmark = load_benchmark(comparison.benchmark)

    # the two methods must differ
    methods = list(benchmark.row_titles)
    other_methods = [name for name in methods if name != comparison.method]
    check_names(where.at("method"), [comparison.method], methods)
    check_names(where.at("against"), [comparison.against], other_methods)

    check_names(where.at("domain"), [comparison.domain], benchmark.domains)
    domain = benchmark.domains[comparison.domain]
    metrics = _comparable_metrics(comparison, domain)
    check_names(where.at("metric"), [comparison.metric], metrics)

    check_names(where.at("models"), comparison.models or (), load_models())
    check_names(where.at("tasks"), comparison.tasks or (), benchmark.task_titles)
    # only instruction tuning compares several fine-tuning methods
    tunings = getattr(benchmark.definition, "finetuning", ())
    check_names(where.at("tunings"), comparison.tunings or (), tunings)

    # a comparison must name a selection if its domain has several, and none otherwise
    if domain.selections or comparison.selection:
        # a missing selection becomes an empty name, which the check refuses
        selection = comparison.selection or ""
        check_names(where.at("selection"), [selection], domain.selections)


def _comparable_metrics(comparison: Comparison, domain: Domain) -> list[str]:
    """List the metrics of a domain that can test a comparison.

    The metrics need an equivalence margin in metrics.yaml. A claim of equal counts needs none.
    """
    # counts are equal or not, so they need no margin
    needs_margin = comparison.direction != "equal"

    metrics = load_metrics()
    comparable = []
    for name in domain.metrics:
        if name not in metrics:
            continue
        if metrics[name].has_margin or not needs_margin:
            comparable.append(name)
    return comparable
