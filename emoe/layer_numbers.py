"""Which of a model's layers a request such as ``"last-half:2"`` means."""

from __future__ import annotations

import re

from emoe.config import Layers
from emoe.errors import ConfigError

_SHARES = {"half": 2, "quarter": 4}


def resolve_layers(layers: Layers, count: int) -> list[int]:
    """Turn a request such as ``"last-half:2"`` into layer numbers.

    Args:
        layers: see :class:`emoe.EMoEConfig`.
        count: how many layers the model has.

    Raises:
        ConfigError: the text is not understood, or the request matches no layer.
    """
    if not isinstance(layers, str):
        wrong = [i for i in layers if not -count <= i < count]
        if wrong:
            raise ConfigError(f"layers {wrong} do not exist: the model has layers 0 to {count - 1}")
        chosen = sorted({i % count for i in layers})
        if len(chosen) != len(layers):
            raise ConfigError(f"layers {list(layers)} name the same layer twice")
        return chosen
    if layers == "all":
        return list(range(count))
    if match := re.fullmatch(r"last:(\d+)", layers):
        chosen = list(range(count))[-int(match[1]) :] if int(match[1]) else []
        if len(chosen) < int(match[1]):
            raise ConfigError(f"layers '{layers}' asks for more than the model's {count} layers")
    elif match := re.fullmatch(rf"last-({'|'.join(_SHARES)}):(\d+)", layers):
        share, step = _SHARES[match[1]], int(match[2])
        chosen = list(range(count * (share - 1) // share, count, step)) if step else []
    elif re.fullmatch(r"-?\d*:-?\d*(:\d*)?", layers):
        parts = [int(part) if part else None for part in layers.split(":")]
        chosen = list(range(count))[slice(*parts)] if parts[2:] != [0] else []
    else:
        raise ConfigError(
            f"layers '{layers}' is not understood; write a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice like '8:12:2'"
        )
    if not chosen:
        raise ConfigError(f"layers '{layers}' matches none of the model's layers 0 to {count - 1}")
    return chosen
