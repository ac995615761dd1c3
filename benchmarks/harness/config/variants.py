"""The variant of a run: what is varied of a method, short, as its name and the records have it, and in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# letter by setting: N experts, k as a share of them, converted layers, share of the training rows (data), times the usual epochs
_LETTERS = {"num_experts": "N", "top_k_fraction": "k", "layers": "L", "train_share": "D", "epochs_factor": "E"}
_WORDS = {"N": "N {}", "k": "k/N {}", "L": "layers {}", "D": "{:g} % of the rows", "E": "{} times the epochs"}


def variant_of(varied: Mapping[str, Any]) -> str:
    """The variant of some settings.

    >>> variant_of({"num_experts": 16, "top_k_fraction": 0.25, "layers": [3, 5]})
    'N16-k0.25-L3+5'
    """
    values = {
        key: "+".join(map(str, v)) if isinstance(v, list) else f"{v:g}" if isinstance(v, float) else str(v)
        for key, v in varied.items()
    }
    return "-".join(f"{_LETTERS[key]}{value}" for key, value in values.items())


def setting_values(variant: str) -> dict[str, str]:
    """The values of a variant by letter.

    >>> setting_values("N16-L-1")
    {'N': '16', 'L': '-1'}
    """
    return dict(re.findall(rf"(?:^|-)([{''.join(_WORDS)}])(.*?)(?=-[{''.join(_WORDS)}]|$)", variant))


def setting_text(variant: str) -> str:
    """A variant in words.

    >>> setting_text("N32-k0.5-D0.8")
    'N 32, k/N 0.5, 80 % of the rows'
    """
    values = setting_values(variant)
    return ", ".join(_WORDS[key].format(float(value) * 100 if key == "D" else value) for key, value in values.items())


def without(variant: str, usual: Collection[str]) -> str:
    """A variant without the settings that need not be said.

    >>> without("k0.5-L22", ["L22"])
    'k0.5'
    """
    return "-".join(f"{key}{value}" for key, value in setting_values(variant).items() if f"{key}{value}" not in usual)
