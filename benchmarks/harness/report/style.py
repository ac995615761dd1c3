"""Colours and markers of methods.

They depend only on the settings of a method, so all figures show the method alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.config.methods import CONTROL, Method
from emoe.config import ROUTERS


@dataclass(frozen=True)
class MethodStyle:
    """The colour, marker and dashes of a method.

    Most colours are those of Okabe and Ito, which the colour-blind can distinguish.

    Attributes:
        colour: The colour as hex digits.
        marker: The marker, as matplotlib names it.
        hollow: True for a marker without filling.
        dashes: The line style, as matplotlib's ``ls``.
    """

    colour: str
    marker: str
    hollow: bool = False
    dashes: Any = "-"

    @property
    def mark(self) -> dict[str, Any]:
        """Return colour and marker as arguments of ``plot``."""
        if self.hollow:
            return {
                "color": self.colour,
                "marker": self.marker,
                "mfc": "white",
                "mec": self.colour,
            }
        return {"color": self.colour, "marker": self.marker}

    @property
    def line(self) -> dict[str, Any]:
        """Return colour, marker and dashes as arguments of ``plot``."""
        return {"ls": self.dashes, **self.mark}


DENSE = MethodStyle("#444444", "o")
GMOE = MethodStyle("#d55e00", "s")
EMOE = MethodStyle("#0072b2", "D")
_LEARNED = MethodStyle("#009e73", "^")
_RANDOM = MethodStyle("#cc79a7", "v")
_OTHER_NEURONS = MethodStyle("#56b4e9", "P")  # experts of contiguous or co-activated neurons
_OTHER_EXPERTS = MethodStyle("#e69f00", "<")  # experts that are not the top k
_OTHER_DENSE = MethodStyle("#8c6d31", "p")  # dense models that tune only blocks, or with noise
_CONTROL = MethodStyle("#999999", "h")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))


def style_of(method: Method) -> MethodStyle:
    """Return the style of a method, the same for LoRA and full fine-tuning."""
    # A hollow marker shows that a method has the authors' own settings. Of the LoRA methods, only
    # theirs also train parameters outside the adapters and blocks (``also_train``).
    is_authors_setting = bool(method.as_published or method.also_train)
    return replace(_filled_style(method), hollow=is_authors_setting)


def _filled_style(method: Method) -> MethodStyle:
    """Return the style of a method with a filled marker.

    GMoE and dense models have their own styles. All others are EMoE. Their settings are checked one
    after the other, and the first that differs from the default decides.
    """
    if method.kind == "gmoe":
        return GMOE
    if method.kind == "dense":
        if method.tune or method.noise:
            return _OTHER_DENSE
        return DENSE

    # the settings of an EMoE; those that are left out have their defaults
    config = method.config_values()
    partition = config.get("partition", "kmeans")
    if partition == "random":
        return _RANDOM
    # a single expert has all neurons, whatever the partition
    if partition != "kmeans" and config.get("num_experts") != 1:
        return _OTHER_NEURONS
    if method.role == CONTROL:
        return _CONTROL
    if config.get("selection", "top") != "top":
        return _OTHER_EXPERTS

    router = config.get("router", "avg_k")
    if router == "avg_k":
        return EMOE
    has_parameters = ROUTERS[router]
    if has_parameters:
        return _LEARNED
    return _CONTROL


def distinct_styles(labelled: Iterable[tuple[str, MethodStyle]]) -> dict[str, MethodStyle]:
    """Return the styles by label, changed so that lines can be told apart.

    Up to six labels with equal styles get different dashes, and alternate between hollow and filled
    markers.
    """
    styles_by_label = dict(labelled)
    distinct: dict[str, MethodStyle] = {}
    seen: Counter[MethodStyle] = Counter()
    for label, style in styles_by_label.items():
        num_earlier = seen[style]  # earlier labels with an equal style
        seen[style] += 1
        hollow = style.hollow
        is_every_second = num_earlier % 2 == 1
        if is_every_second:
            hollow = not hollow
        dashes = _DASHES[num_earlier % len(_DASHES)]
        distinct[label] = replace(style, hollow=hollow, dashes=dashes)
    return distinct
