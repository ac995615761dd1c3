"""Errors for users, and suggestions of valid values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class EMoEError(ValueError):
    """Base class of all errors raised by emoe."""


class ConfigError(EMoEError):
    """Raised if a field or value of a configuration is unknown or invalid."""


class ConversionError(EMoEError):
    """Raised if a model does not fit a conversion, or another operation on converted models.

    A conversion that raises it has not changed the model.
    """


class CheckpointError(EMoEError):
    """Raised if a checkpoint is missing, damaged, unsafe or of another model, or not writable.

    Also raised if a dense model's state dict is loaded into a converted model.
    """


def nearest_name(given: object, names: Sequence[str]) -> str | None:
    """Return the name that is most similar to a wrong one, or None if no name is similar."""
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(given: object, options: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` for a wrong name, to be appended to an error message.

    Without a close match, return ``"; choose from …"``. Without options, return an empty text.
    """
    names = [str(option) for option in options if str(option).strip()]
    near = nearest_name(given, names)
    if near:
        return f"; did you mean '{near}'?"
    if names:
        return f"; choose from {', '.join(names)}"
    return ""


def nearest_divisor(width: int, number: int) -> int:
    """Return the divisor of ``width`` nearest to ``number``. Of two, return the smaller one."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    # min returns the first, and so the smaller, of two divisors at the same distance
    return min(divisors, key=lambda divisor: abs(divisor - number))
