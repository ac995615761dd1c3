"""Choose the colour and marker of a method from its settings, so that it looks the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.config.methods import CONTROL, Method
from emoe.config import ROUTERS


@dataclass(frozen=True)
class MethodStyle:
    """Hold the colour and marker of a method. Colours are Okabe and Ito's, which are safe for the colour-blind."""

    colour: str
    marker: str
    hollow: bool = False  # True for the authors' own settings
    dashes: Any = "-"

    @property
    def mark(self) -> dict[str, Any]:
        """Return the mark as arguments of ``plot``."""
        arguments = {"color": self.colour, "marker": self.marker}
        return {**arguments, "mfc": "white", "mec": self.colour} if self.hollow else arguments

    @property
    def line(self) -> dict[str, Any]:
        """Return the mark and the dashes as arguments of ``plot``."""
        return {"ls": self.dashes, **self.mark}


DENSE = MethodStyle("#444444", "o")
GMOE = MethodStyle("#d55e00", "s")
EMOE = MethodStyle("#0072b2", "D")
_LEARNED = MethodStyle("#009e73", "^")
_RANDOM = MethodStyle("#cc79a7", "v")
_OTHER_NEURONS = MethodStyle("#56b4e9", "P")  # contiguous, by co-activation
_OTHER_EXPERTS = MethodStyle("#e69f00", "<")  # not the top k; crosses are published numbers
_OTHER_DENSE = MethodStyle("#8c6d31", "p")  # single blocks, noise
_CONTROL = MethodStyle("#999999", "h")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))


def style_of(method: Method) -> MethodStyle:
    """Return the style of a method, the same for LoRA and full fine-tuning."""
    style = _style_of_kind(method)
    return replace(style, hollow=True) if method.as_published or method.also_train else style


def _style_of_kind(method: Method) -> MethodStyle:
    config = method.config_values()
    if method.kind == "gmoe":
        return GMOE
    if method.kind == "dense":
        return _OTHER_DENSE if method.tune or method.noise else DENSE
    if config.get("partition") == "random":
        return _RANDOM
    if config.get("partition", "kmeans") != "kmeans" and config.get("num_experts") != 1:
        return _OTHER_NEURONS
    if method.role == CONTROL:
        return _CONTROL
    if config.get("selection", "top") != "top":
        return _OTHER_EXPERTS
    router = config.get("router", "avg_k")
    return EMOE if router == "avg_k" else _LEARNED if ROUTERS[router] else _CONTROL


def distinct_styles(labelled: Iterable[tuple[str, MethodStyle]]) -> dict[str, MethodStyle]:
    """Return the styles by label. Equal styles get different dashes, and alternate hollow and filled."""
    distinct: dict[str, MethodStyle] = {}
    seen: Counter[MethodStyle] = Counter()
    for label, style in dict(labelled).items():
        number = seen[style]
        seen[style] += 1
        hollow = style.hollow != (number % 2 == 1)
        distinct[label] = replace(style, hollow=hollow, dashes=_DASHES[number % len(_DASHES)])
    return distinct
