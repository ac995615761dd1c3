"""How a method looks in every figure: by what it is, so that it is known again in a benchmark that calls it otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.config.methods import CONTROL, Method
from emoe.config import ROUTERS


@dataclass(frozen=True)
class Look:
    """Colour (of Okabe and Ito, which the colour-blind tell apart) and marker of a method.

    Attributes:
        colour: of lines and marks.
        marker: one of matplotlib's.
        hollow: whether the mark is empty, as of settings that are the authors' own.
    """

    colour: str
    marker: str
    hollow: bool = False

    @property
    def mark(self) -> dict[str, Any]:
        """As arguments of ``plot``, without its line."""
        found = {"color": self.colour, "marker": self.marker}
        return {**found, "mfc": "white", "mec": self.colour} if self.hollow else found


DENSE = Look("#444444", "o")
GMOE = Look("#d55e00", "s")
EMOE = Look("#0072b2", "D")
_LEARNED = Look("#009e73", "^")
_RANDOM = Look("#cc79a7", "v")
_OTHER_NEURONS = Look("#56b4e9", "P")  # as they stand, by co-activation
_OTHER_EXPERTS = Look("#e69f00", "<")  # not the top k; crosses are published numbers
_DENSE_BESIDE = Look("#8c6d31", "p")  # single blocks, noise
_CONTROL = Look("#999999", "h")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))


def look_of(method: Method) -> Look:
    """The look of a method.

    Args:
        method: with all its settings.

    Example:
        >>> look_of(Method(title="LoRA + EMoE", kind="emoe")) == look_of(Method(title="EMoE", kind="emoe"))
        True
    """
    look = _kind(method)
    return replace(look, hollow=True) if method.as_published or method.also_train else look


def _kind(method: Method) -> Look:
    given = method.config_values()
    if method.kind == "gmoe":
        return GMOE
    if method.kind == "dense":
        return _DENSE_BESIDE if method.tune or method.noise else DENSE
    if given.get("partition") == "random":
        return _RANDOM
    if given.get("partition", "kmeans") != "kmeans" and given.get("num_experts") != 1:
        return _OTHER_NEURONS
    if method.role == CONTROL:
        return _CONTROL
    if given.get("selection", "top") != "top":
        return _OTHER_EXPERTS
    router = given.get("router", "avg_k")
    return EMOE if router == "avg_k" else _LEARNED if ROUTERS[router].learned else _CONTROL


def curves(looks: Iterable[tuple[str, Look]]) -> dict[str, dict[str, Any]]:
    """Arguments of ``plot`` for the curves of a figure, by what they are called: those of one method differ by their dashes, and every second one has empty marks.

    Args:
        looks: what each curve is called, and its method's look; of one that is drawn in several panels the first counts.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: Counter[Look] = Counter()
    for label, look in looks:
        if label not in found:
            number = seen[look]
            found[label] = {"ls": _DASHES[number % len(_DASHES)], **replace(look, hollow=number % 2 == 1).mark}
            seen[look] += 1
    return found
