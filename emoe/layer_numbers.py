"""Layer requests such as ``"last-half:2"``."""

from __future__ import annotations

import re

from emoe.config import Layers
from emoe.errors import ConfigError

_SHARES = {"half": 2, "quarter": 4}


def resolve_layers(layers: Layers, count: int) -> list[int]:
    """Convert a request such as ``"last-half:2"`` into layer numbers.

    Args:
        layers: the request (see :class:`emoe.EMoEConfig`).
        count: number of layers of the model.

    Raises:
        ConfigError: the request is invalid or matches no layer.
    """
    if not isinstance(layers, str):
        missing = [i for i in layers if not -count <= i < count]
        if missing:
            raise ConfigError(f"layers {missing} do not exist: the model has layers 0 to {count - 1}")
        numbers = sorted({i % count for i in layers})
        if len(numbers) != len(layers):
            raise ConfigError(f"layers {list(layers)} name the same layer twice")
        return numbers
    if layers == "all":
        return list(range(count))
    if match := re.fullmatch(r"last:(\d+)", layers):
        if int(match[1]) > count:
            raise ConfigError(f"layers '{layers}' asks for more than the model's {count} layers")
        numbers = list(range(count - int(match[1]), count))
    elif match := re.fullmatch(rf"last-({'|'.join(_SHARES)}):(\d+)", layers):
        share, step = _SHARES[match[1]], int(match[2])
        numbers = list(range(count * (share - 1) // share, count, step)) if step else []
    elif re.fullmatch(r"-?\d*:-?\d*(:\d*)?", layers):
        bounds = [int(bound) if bound else None for bound in layers.split(":")]
        numbers = list(range(count))[slice(*bounds)] if bounds[2:] != [0] else []
    else:
        raise ConfigError(
            f"layers '{layers}' is invalid; write a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice "
            "like '8:12:2'"
        )
    if not numbers:
        raise ConfigError(f"layers '{layers}' matches none of the model's layers 0 to {count - 1}")
    return numbers
