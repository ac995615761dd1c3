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
    """Return the commit of a data set that the package ``datasets`` loaded; None if unknown."""
    cached: Any = getattr(loaded, "cache_files", None)
    if not cached:
        return None
    files = cached
    if isinstance(cached, dict):
        # a dictionary of splits has a list of files for each split; the first one is used
        files = next(iter(cached.values()))
    if not files:
        return None
    return _commit_in(files[0]["filename"])


def cached_commit(repository: str, file: str, revision: str | None) -> str | None:
    """Return the commit of a model's file in the hub's cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    # else it is None, or an object that stands for a missing file
    if not isinstance(path, str):
        return None
    return _commit_in(path)


def hub_name(repository: str, revision: str | None, commit: str | None) -> str:
    """Return the name of a repository on the hub with the version that was read.

    The name ends with "(not pinned)" if no commit was requested, and with "(instead of <commit>)"
    if the requested commit is not the one that was read.

    Args:
        repository: The name of the repository.
        revision: The requested revision; None is the newest.
        commit: The commit that was read; None if it is unknown.
    """
    if not is_commit(revision):
        version = commit or revision or "newest"
        return f"{repository}@{version} (not pinned)"
    if commit is None or commit == revision:
        return f"{repository}@{revision}"
    # without a network, `datasets` reads the version that is in its cache
    return f"{repository}@{commit} (instead of {revision})"


def _commit_in(file: str) -> str | None:
    """Return the commit in the path of a cached file; None if there is none.

    If several parts of the path are commits, the last one is returned.
    """
    for part in reversed(Path(file).parts):
        if is_commit(part):
            return part
    return None
