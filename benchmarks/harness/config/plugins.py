"""The modules that ``methods.yaml`` names as plugins, which register routers and ways of tuning."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from benchmarks.harness.base.errors import DefinitionError, first_line
from benchmarks.harness.base.paths import BENCHMARKS, ROOT
from benchmarks.harness.config.schema import Strict, parse, read_yaml
from emoe.errors import did_you_mean

Plugins = list[Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*$")]]


class _PluginsOnly(Strict):
    plugins: Plugins


def import_plugins() -> None:
    """Import the plugins, so that this process knows what they register.

    Raises:
        DefinitionError: one of them cannot be imported; names the nearest module that exists.
    """
    file = BENCHMARKS / "methods.yaml"
    content = read_yaml(file)
    given = content.get("plugins", []) if isinstance(content, dict) else []
    # the methods are checked when the plugins are there: they may name what those register
    plugins = parse({"plugins": given}, _PluginsOnly, str(file)).plugins
    if plugins and str(ROOT) not in sys.path:  # a job may have another working directory
        sys.path.append(str(ROOT))
    for name in plugins:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            near = did_you_mean(name, _siblings(name)) if name.startswith(str(error.name)) else f": {error}"
            raise DefinitionError(f"{file}: 'plugins' names '{name}', which cannot be imported{near}") from error
        except Exception as error:  # a module may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DefinitionError(f"{file}: 'plugins' names '{name}', which cannot be imported: {reason}") from error


def _siblings(name: str) -> Iterator[str]:
    """The modules that stand where one was looked for, below the project's folder."""
    parent = name.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(ROOT / parent.replace(".", "/"))]):
        yield f"{parent}.{module.name}" if parent else module.name
