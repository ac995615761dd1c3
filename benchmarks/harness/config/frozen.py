"""A frozen prefix in a plan: which methods leave it alone, as far as that is to be seen without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.base.errors import DefinitionError

KEY = "frozen_layers"


def check_frozen(training: Mapping[str, Any], method: Mapping[str, Any], where: str) -> None:
    """See that a method converts and trains nothing below the frozen layers.

    What hangs on the number of the model's layers (``last:2``, ``-1``) is checked when the model is there.

    Args:
        training: of the run's spec.
        method: of the run's spec.
        where: file and keys, for messages.

    Raises:
        DefinitionError: it does.
    """
    frozen = training.get(KEY) or 0
    named = f"{where}': method '{method['name']}'"
    for part, verb in ((method["config"] or {}, "converts"), (method["tune"] or {}, "trains")):
        for key in ("layers", "blocks"):
            lowest = _lowest(part[key]) if part.get(key) else None
            if lowest is not None:
                refuse_below(frozen, lowest, f"{named} {verb}")


def refuse_below(frozen: int, lowest: int, what: str) -> None:
    """Refuse a layer that is frozen.

    Args:
        frozen: how many are.
        lowest: the first layer that something is done to.
        what: who does what, for the message.

    Raises:
        DefinitionError: it is one of them.
    """
    if lowest < frozen:
        raise DefinitionError(
            f"{what} layer {lowest}, but training.{KEY} is {frozen}: layers 0 to {frozen - 1} stay as they are. Freeze fewer, or take layers from {frozen} on"
        )


def _lowest(layers: Any) -> int | None:
    """The first of some layers, where that does not hang on how many there are."""
    if not isinstance(layers, str):
        return None if min(layers) < 0 else int(min(layers))
    if layers == "all":
        return 0
    match = re.fullmatch(r"(\d*):-?\d*(:\d*)?", layers)
    return int(match[1] or 0) if match else None
