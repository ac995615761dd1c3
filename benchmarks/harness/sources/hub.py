"""Determine the hub commit of a file."""

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
    """Return the commit of a model's file in the hub's cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    return _commit_in(path) if isinstance(path, str) else None


def hub_name(repository: str, revision: str | None, commit: str | None) -> str:
    """Return the name of a repository on the hub with the commit that was read.

    Args:
        repository: The name of the repository.
        revision: The requested revision; None is the newest.
        commit: The commit that was read; None if it is unknown.
    """
    if not is_commit(revision):
        return f"{repository}@{commit or revision or 'newest'} (not pinned)"
    # without a network `datasets` uses its cache
    instead = f" (instead of {revision})" if commit not in (None, revision) else ""
    return f"{repository}@{commit or revision}{instead}"


def _commit_in(file: str) -> str | None:
    """Find the commit in a cached file's path, as the name of a folder."""
    return next((part for part in reversed(Path(file).parts) if _COMMIT.fullmatch(part)), None)
