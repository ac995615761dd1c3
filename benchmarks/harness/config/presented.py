"""What a ``presentation`` module can show, read from its text: to import it takes PyTorch and matplotlib, and runs are made before it is asked."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path

from benchmarks.harness.base.errors import DefinitionError
from emoe.errors import did_you_mean

_CODE = Path(__file__).parents[2]
# the place of tables among the arguments of what makes a presentation; figures are the next
_MAKERS = {("benchmarks.harness.report.presentation", "make"): 1, ("benchmarks.text.presentation", "shown"): 2}


def check_module(file: Path) -> None:
    """Check that a presentation can be read, has ``present``, and imports what there is.

    Raises:
        DefinitionError: names the file and the line.
    """
    tree = _parse(file)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assigned = [
        str(getattr(target, "id", "")) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
    ]
    if "present" not in [*functions, *assigned, *_imported(tree)]:
        raise DefinitionError(f"{file} has no function 'present'{did_you_mean('present', functions)}")
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in (found for found in named if not getattr(node, "level", 0) and not _exists(found)):
                raise DefinitionError(f"{file}, line {node.lineno}: there is no module '{name}'")


def names_shown(file: Path) -> Mapping[str, Collection[str]]:
    """The names that a presentation knows, by the definition's key: ``tables``, ``figures``, ``set_tables``, ``set_figures``.

    They are those of the mappings that its ``present`` gives to ``make`` or ``shown``; a key is left out where these are made in other ways.
    """
    tree, found = _parse(file), dict[str, Collection[str]]()
    makers = {
        name: place
        for (module, name), place in _MAKERS.items()
        if name in _imported(tree, module) or file == file_of(module)
    }
    for call in ast.walk(tree):
        place = makers.get(call.func.id) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
        if place is None or not isinstance(call, ast.Call):
            continue
        prefix = "set_" if any(keyword.arg == "part" for keyword in call.keywords) else ""
        for key, argument in zip(("tables", "figures"), call.args[place : place + 2], strict=False):
            names = _keys(argument, tree)
            if names is not None:
                found[f"{prefix}{key}"] = names
    return found


def _parse(file: Path) -> ast.Module:
    return _parsed(file, file.stat().st_mtime_ns)


@functools.cache
def _parsed(file: Path, _changed: int) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise DefinitionError(f"{file}{line}: {getattr(error, 'msg', error)}") from error


def _imported(tree: ast.Module, module: str | None = None) -> list[str]:
    """The names that a module imports from others, or from one."""
    froms = [node for node in tree.body if isinstance(node, ast.ImportFrom) and module in (None, node.module)]
    return [alias.asname or alias.name for node in froms for alias in node.names]


def _exists(module: str) -> bool:
    top, *below = module.split(".")
    if top != _CODE.name:
        return importlib.util.find_spec(top) is not None
    return file_of(module).is_file() or _CODE.joinpath(*below).is_dir()


def file_of(module: str) -> Path:
    """The file of a module of the suite's own code."""
    return _CODE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _keys(value: ast.expr | None, tree: ast.Module) -> list[str] | None:
    """The keys of a mapping that is written there or has its name there, also in a module of ours; None where nobody can say."""
    if isinstance(value, ast.Dict):
        keys = [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
        return keys if len(keys) == len(value.keys) else None
    if not isinstance(value, ast.Name):
        return None
    made: list[list[str] | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Attribute) and _is_named(node.value, value.id):
            return None  # what is done to it there?
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(_is_named(target, value.id) for target in targets):
                made.append(None if isinstance(node, ast.AugAssign) else _keys(node.value, tree))
        elif isinstance(node, ast.ImportFrom) and node.module and value.id in [alias.name for alias in node.names]:
            file = file_of(node.module)
            made.append(_keys(value, _parse(file)) if file.is_file() else None)
    return made[0] if len(made) == 1 else None


def _is_named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
