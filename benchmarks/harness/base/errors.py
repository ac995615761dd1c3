"""Errors that a reader can act on."""

from __future__ import annotations

from emoe.errors import EMoEError


class DefinitionError(EMoEError):
    """A configuration or benchmark file that does not say what it must."""


class DataError(EMoEError):
    """Data or weights that are missing, damaged, or not what the definition says."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its explanations; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class RunError(EMoEError):
    """A run that several processes cannot or could not work on."""
