"""Mutants of a finished suite's records: numbers that stand in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, permutations

import pandas as pd

from benchmarks.harness.results.reference import Reference, Tolerances
from tests.mutation.mutants import Verdict, judged

SCORES = ("dev", "test", "ood", "ood_mean")
_EQUAL = "the same numbers in both places"


def record_mutants(blessed: Reference, tolerances: Callable[[], Tolerances]) -> Iterator[Verdict]:
    """Judge every mutant of the records."""
    rows = blessed.rows[~blessed.rows["run"].str.startswith("speed ")]
    groups = {key: found.reset_index(drop=True) for key, found in rows.groupby(["run", "seed"], sort=False)}
    yield from _swapped_methods(groups, blessed, tolerances)
    for (run, seed), theirs in groups.items():
        lost = theirs.iloc[:0]
        yield judged("a run or seed is lost", f"{run} s{seed}", _of(blessed, theirs), lost, tolerances)
        yield from _swapped_rows("a metric swapped", ["part", "set"], "metric", theirs, blessed, tolerances)
        ood = theirs[theirs["part"] == "ood"]
        yield from _swapped_rows("an OOD set swapped", ["part", "metric"], "set", ood, blessed, tolerances)


def _of(blessed: Reference, rows: pd.DataFrame) -> Reference:
    return Reference(rows, blessed.machines)


def _swapped_methods(
    groups: dict[tuple[str, int], pd.DataFrame], blessed: Reference, tolerances: Callable[[], Tolerances]
) -> Iterator[Verdict]:
    for (run, seed), (other, others_seed) in permutations(groups, 2):
        if seed != others_seed or run.split(" ")[0] != other.split(" ")[0]:
            continue
        mine, theirs = groups[run, seed], groups[other, others_seed].assign(run=run)
        where = f"{run} s{seed} by {other}"
        for name, parts in (("method A by B, whole records", None), ("method A by B, scores alone", SCORES)):
            if parts is None:
                mutant, reference = theirs, mine
            else:
                reference = mine[mine["part"].isin(parts)]
                mutant = theirs[theirs["part"].isin(parts)]
            if _same(reference, mutant):
                yield Verdict(name, where, excluded=_EQUAL)
            else:
                yield judged(name, where, _of(blessed, reference), mutant, tolerances)


def _same(some: pd.DataFrame, others: pd.DataFrame) -> bool:
    columns = ["part", "set", "metric", "value"]
    return set(some[columns].itertuples(index=False)) == set(others[columns].itertuples(index=False))


def _swapped_rows(
    name: str,
    same: list[str],
    swapped: str,
    rows: pd.DataFrame,
    blessed: Reference,
    tolerances: Callable[[], Tolerances],
) -> Iterator[Verdict]:
    scores = rows[rows["part"].isin(SCORES)]
    for _, found in scores.groupby(same, sort=False):
        for (_, one), (_, other) in combinations(found.iterrows(), 2):
            where = f"{one['run']} s{one['seed']} {one['part']} {one['set']} {one['metric']} and {other[swapped]}"
            mutant = pd.DataFrame(
                [one.to_dict() | {"value": other["value"]}, other.to_dict() | {"value": one["value"]}]
            )
            if one["value"] == other["value"]:
                yield Verdict(name, where, excluded=_EQUAL)
            else:
                yield judged(name, where, _of(blessed, pd.DataFrame([one, other])), mutant, tolerances)
