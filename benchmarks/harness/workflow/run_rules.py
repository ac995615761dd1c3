"""List the rules of the workflow that execute runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness import base as paths
from benchmarks.harness.config.runs import RUN_ID


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


def run_rules(keeps_weights_by_run: Mapping[str, Mapping[str, bool]]) -> list[RunRule]:
    """List the rules that execute the runs of a suite.

    The rules of small benchmarks come first and have a higher priority, so that the tables of these
    benchmarks are ready early.

    Args:
        keeps_weights_by_run: For each benchmark, a dictionary from the id of a run to True if it
            keeps its weights.
    """
    smallest_first = sorted(keeps_weights_by_run, key=lambda name: len(keeps_weights_by_run[name]))
    rules = []
    for place, benchmark in enumerate(smallest_first):
        # the priorities are 0, -1, -2 and so on: Snakemake starts the highest first
        rules += _rules_of_benchmark(benchmark, keeps_weights_by_run[benchmark], priority=-place)
    return rules


def _rules_of_benchmark(
    benchmark: str, keeps_weights: Mapping[str, bool], priority: int
) -> list[RunRule]:
    """List the rules that execute the runs of a benchmark.

    All jobs of a rule write the same files. If only some runs keep their weights, there are two
    rules: one for these runs, and one for the others. A benchmark without runs has no rule.

    Args:
        benchmark: The name of the benchmark.
        keeps_weights: True if the run keeps its weights, by the id of the run.
        priority: The priority of the rules.
    """
    if not keeps_weights:
        return []
    name = f"run_{benchmark}"
    all_keep = all(keeps_weights.values())
    none_keeps = not any(keeps_weights.values())
    if all_keep or none_keeps:
        return [RunRule(name, benchmark, keeps_weights=all_keep, ids=RUN_ID, priority=priority)]
    ids_without_weights = [run_id for run_id, keeps in keeps_weights.items() if not keeps]
    # a regular expression that matches these ids
    without_weights = "|".join(ids_without_weights)
    with_weights_rule = RunRule(
        name,
        benchmark,
        keeps_weights=True,
        ids=f"(?!{without_weights}){RUN_ID}",  # every id except those of the other rule
        priority=priority,
    )
    without_weights_rule = RunRule(
        f"{name}_without_weights",
        benchmark,
        keeps_weights=False,
        ids=f"(?:{without_weights})",
        priority=priority,
    )
    return [with_weights_rule, without_weights_rule]
