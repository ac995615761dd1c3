"""Measure the likelihood of right answers in nats per byte, for tasks whose choices are answers and not letters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NATS = "nats_per_byte"


def nats_per_byte(samples: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """Return the negative log-likelihood of each right answer, divided by its bytes.

    It differs between models even if their accuracy is at chance.

    Args:
        samples: The samples of one task of lm-eval.

    Returns:
        A number per question in order (None if it is not finite). None instead of the list if questions do not have
        several answers to one prompt, or if answers are letters. As in ``acc_bytes``, surrounding blanks do not count.
    """
    in_order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    if not all(_is_choice(sample) for sample in in_order):
        return None
    if all(_bytes(answer) == 1 for sample in in_order for _, answer in sample["arguments"]):
        return None
    nats = []
    for sample in in_order:
        right = sample["target"]
        value = -float(sample["filtered_resps"][right][0]) / _bytes(sample["arguments"][right][1])
        nats.append(round(value, 6) if math.isfinite(value) else None)
    return nats


def _is_choice(sample: Mapping[str, Any]) -> bool:
    """Return True if a sample has one prompt and several answers, with one marked as right."""
    asked, right = sample.get("arguments", ()), sample.get("target")
    if type(right) is not int or len(asked) < 2 or any(len(pair) != 2 for pair in asked):
        return False
    return len({prompt for prompt, _ in asked}) == 1 and _bytes(asked[right][1]) > 0


def _bytes(answer: str) -> int:
    return len(answer.strip().encode())
