"""Name the commit of the hub that something was read from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Return True if a revision is a commit, not a branch."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def commit_of(loaded: Any) -> str | None:
    """Return the commit of a set that ``datasets`` loaded from the hub; None if it is unknown."""
    files = getattr(loaded, "cache_files", None) or []
    first = next(iter(files.values()), []) if isinstance(files, dict) else files
    return _commit_in(first[0]["filename"]) if first else None


def cached_commit(repository: str, file: str, revision: str | None) -> str | None:
    """Return the commit of a model's file in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    return _commit_in(found) if isinstance(found, str) else None


def hub_name(place: str, revision: str | None, commit: str | None) -> str:
    """Write a place on the hub with the commit that was read, for the record.

    Args:
        place: The repository.
        revision: The revision that was asked for; None is the newest.
        commit: The commit that was read; None if it is unknown.
    """
    if not is_commit(revision):
        return f"{place}@{commit or revision or 'newest'} (not pinned)"
    # without a network `datasets` takes what it has
    other = f" (instead of {revision})" if commit not in (None, revision) else ""
    return f"{place}@{commit or revision}{other}"


def _commit_in(file: str) -> str | None:
    """Find the commit in a cached file's path, where a folder has its name."""
    return next((part for part in reversed(Path(file).parts) if _COMMIT.fullmatch(part)), None)
