"""Measure the likelihood of right answers in nats per byte, for tasks whose choices are answers and not letters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NATS = "nats_per_byte"


def nats_per_byte(samples: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """Return minus the logarithm of the right answer's probability over its bytes, which varies at chance accuracy too.

    Args:
        samples: The samples of one task of lm-eval.

    Returns:
        A number per question in order, None if it is not finite. None instead of the list if the questions do not offer
        several answers to one prompt, or offer letters. A blank before the answer does not count, as in ``acc_bytes``.
    """
    in_order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    if not all(_is_choice(sample) for sample in in_order):
        return None
    if all(_bytes(answer) == 1 for sample in in_order for _, answer in sample["arguments"]):
        return None
    return [_nats(sample) for sample in in_order]


def _is_choice(sample: Mapping[str, Any]) -> bool:
    """Return True if a sample is one prompt with several answers, one of them right."""
    asked, right = sample.get("arguments", ()), sample.get("target")
    if type(right) is not int or len(asked) < 2 or any(len(pair) != 2 for pair in asked):
        return False
    return len({prompt for prompt, _ in asked}) == 1 and _bytes(asked[right][1]) > 0


def _nats(sample: Mapping[str, Any]) -> float | None:
    right = sample["target"]
    value = -float(sample["filtered_resps"][right][0]) / _bytes(sample["arguments"][right][1])
    return round(value, 6) if math.isfinite(value) else None


def _bytes(answer: str) -> int:
    return len(answer.strip().encode())
