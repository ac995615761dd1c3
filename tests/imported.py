"""Read the imports of a package."""

from __future__ import annotations

import ast

from tests.conftest import ROOT


def imports(package: str) -> set[str]:
    """Return the top-level names that a package imports anywhere."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names
