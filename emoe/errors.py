"""The errors that users meet, and the nearest valid values that go into them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EMoEError(ValueError):
    """Tell that something was refused on purpose; the base of the errors below, and a :class:`ValueError`."""


class ConfigError(EMoEError):
    """Tell of a configuration field or value that does not exist or is out of range."""


class ConversionError(EMoEError):
    """Tell of a model that cannot be converted as asked; the model is unchanged."""


class CheckpointError(EMoEError):
    """Tell of a checkpoint folder that is missing, damaged, or does not match its weights."""


def did_you_mean(given: object, options: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` or, without a near match, ``"; choose from …"``; nothing where there is nothing to choose."""
    names = [str(option) for option in options if str(option).strip()]
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(names)}" if names else ""


def nearest_divisor(width: int, number: int) -> int:
    """The divisor of ``width`` that is nearest to ``number``, the smaller of two.

    >>> nearest_divisor(64, 24)
    16
    """
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - number))
