"""List the rules of the workflow that execute runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness import base as paths

RUN_ID = "[0-9a-f]{12}"  # a regular expression


@dataclass(frozen=True)
class RunRule:
    """A rule that executes runs of one benchmark.

    Attributes:
        name: The name of the rule.
        benchmark: The name of the benchmark.
        keeps_weights: True if the rule is for runs that keep their weights.
        ids: A regular expression that only the ids of the rule's runs match.
        priority: The priority of the rule's jobs. Snakemake starts the highest first.
    """

    name: str
    benchmark: str
    keeps_weights: bool
    ids: str
    priority: int

    @property
    def outputs(self) -> list[str]:
        """Return the files that a run writes, with the wildcards ``benchmark`` and ``run``."""
        folder = f"{paths.RUNS}/{{benchmark}}/{{run}}"
        files = [f"{folder}/metrics.json"]
        if self.keeps_weights:
            files.append(f"{folder}/{paths.WEIGHTS}")
        return files


def run_rules(kept_by_benchmark: Mapping[str, Mapping[str, bool]]) -> list[RunRule]:
    """List the rules that execute the runs of a suite, those of small benchmarks first.

    Small benchmarks also have the higher priority, so that their tables are ready early.

    Args:
        kept_by_benchmark: The result of :func:`.plan.weights_by_benchmark`.
    """
    by_size = sorted(kept_by_benchmark, key=lambda benchmark: len(kept_by_benchmark[benchmark]))
    rules = []
    for place, benchmark in enumerate(by_size):
        rules += _rules_of_benchmark(benchmark, kept_by_benchmark[benchmark], priority=-place)
    return rules


def _rules_of_benchmark(
    benchmark: str, keeps_weights: Mapping[str, bool], priority: int
) -> list[RunRule]:
    """List the rules of a benchmark: one, or two if only some of its runs keep their weights.

    Snakemake expects the same files of all jobs of a rule, so the runs without weights then need
    another rule. A benchmark without runs has no rule.

    Args:
        benchmark: The name of the benchmark.
        keeps_weights: True if the run keeps its weights, by the id of the run.
        priority: The priority of the rules.
    """
    if not keeps_weights:
        return []
    name = f"run_{benchmark}"
    some_keep_weights = any(keeps_weights.values())
    without_weights = [run for run, keeps in keeps_weights.items() if not keeps]
    if not some_keep_weights or not without_weights:
        return [RunRule(name, benchmark, some_keep_weights, ids=RUN_ID, priority=priority)]
    # together the two expressions match every id, and no id twice
    ids = "|".join(without_weights)
    return [
        RunRule(name, benchmark, True, ids=f"(?!{ids}){RUN_ID}", priority=priority),
        RunRule(f"{name}_untrained", benchmark, False, ids=f"(?:{ids})", priority=priority),
    ]
