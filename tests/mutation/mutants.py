"""What a mutant is, and whether a check sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from benchmarks.harness.results.reference import Reference, Tolerances
from benchmarks.harness.results.regression import judge


@dataclass(frozen=True)
class Verdict:
    """What the check says of one mutant.

    Attributes:
        mutation: what was done.
        where: to which run.
        same: quantities that show it on the machine that blessed; empty where it passes.
        elsewhere: those that show it on another machine.
        excluded: why it is no mutant: nothing is other than before, by design.
    """

    mutation: str
    where: str
    same: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    excluded: str = ""


def judged(
    mutation: str, where: str, blessed: Reference, mutant: pd.DataFrame, tolerances: Callable[[], Tolerances]
) -> Verdict:
    """Compare a mutant's rows with the blessed ones, as on the same machine and as on another."""
    found = []
    for elsewhere in (False, True):
        comparison = judge(blessed, Reference(mutant, blessed.machines), tolerances, elsewhere=elsewhere)
        found.append(frozenset(_quantity(one.part, one.metric) for one in comparison.findings if one.status != "shown"))
    return Verdict(mutation, where, *found)


def _quantity(part: str, metric: str) -> str:
    """A short name for what showed a mutant."""
    if metric.startswith("loss_"):
        return "first losses"
    if part == "probe":
        return metric
    if part in ("model", "data"):
        return f"{part} {metric}"
    return part


def table(verdicts: Iterable[Verdict]) -> str:
    """The score as a Markdown table: a row a mutation, and the sums."""
    by_name: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_name.setdefault(verdict.mutation, []).append(verdict)
    lines = [
        "| Mutation | Mutants | Same machine | Another machine | Shown there by | Excluded |",
        "|---|--:|--:|--:|---|---|",
    ]
    for name, found in by_name.items():
        real = [verdict for verdict in found if not verdict.excluded]
        counts: dict[str, int] = {}
        for verdict in real:
            for quantity in verdict.elsewhere:
                counts[quantity] = counts.get(quantity, 0) + 1
        shown = ", ".join(
            f"{quantity} {count}" for quantity, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:5]
        )
        reasons = sorted({verdict.excluded for verdict in found if verdict.excluded})
        left = f"{len(found) - len(real)}: {'; '.join(reasons)}" if reasons else ""
        lines.append(
            f"| {name} | {len(real)} | {_share(real, 'same')} | {_share(real, 'elsewhere')} | {shown} | {left} |"
        )
    every = [verdict for found in by_name.values() for verdict in found if not verdict.excluded]
    lines.append(f"| **all** | {len(every)} | {_share(every, 'same')} | {_share(every, 'elsewhere')} | | |")
    missed = [verdict for verdict in every if not (verdict.same and verdict.elsewhere)]
    return "\n".join([*lines, "", *(f"not seen: {one.mutation}: {one.where}" for one in missed)])


def _share(found: list[Verdict], tier: str) -> str:
    seen = sum(bool(getattr(verdict, tier)) for verdict in found)
    return f"{seen} ({seen / len(found):.0%})" if found else "-"
