"""Check links in the user's own folders, so that everything in a set is read once."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.harness.base import DataError


def is_broken(path: Path) -> bool:
    """Return True if a path is a link to a missing target."""
    return path.is_symlink() and not path.exists()


class Links:
    """Refuse links that a set may not have; links to single files elsewhere are allowed, for content stores.

    Args:
        root: The set's folder, which may itself be a link.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._taken: dict[Path, Path] = {}  # files elsewhere, and the links to them

    def check(self, path: Path) -> None:
        """Refuse a link to nothing, to a folder, to a file of the set, or to one to which another path is a link.

        Raises:
            DataError: The link is not allowed.
        """
        if not path.is_symlink():
            return
        target = Path(os.path.realpath(path))
        inside = target.is_relative_to(self._root)
        hidden = inside and any(part.startswith(".") for part in target.relative_to(self._root).parts)
        if is_broken(path):
            what = "which is not there"
        elif Path(os.path.realpath(path.parent)).is_relative_to(target):
            what = "in which it lies itself"
        elif inside and not hidden:
            what = "which belongs to the set and would be there twice"
        elif path.is_dir():
            what = "which is no folder of the set"
        elif (other := self._taken.setdefault(target, path)) != path:
            what = f"as {other} is, and would be there twice"
        else:
            return
        raise DataError(f"{path} is a link to {target}, {what}; remove it, or put a copy in its place")
