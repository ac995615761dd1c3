"""The rows of a comparison: what ``methods.yaml`` says of a method, and what a benchmark and its suites set otherwise."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.plugins import Plugins, import_plugins
from benchmarks.harness.config.schema import Key, Strict, check_names, read
from benchmarks.harness.config.shared import Method, MethodsDefinition, MethodSettings, TrainingSuite
from benchmarks.harness.config.tunings import needs_layers
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConfigError

# one setting in two forms
_CHOSEN = {"top_k", "top_k_fraction"}


class MethodFile(Strict):
    """What methods are; a method is data, not code."""

    plugins: Plugins = Field([])
    """Python modules that register routers (emoe.register_router) or tunings (register_tuning); every process of the suite imports them."""
    methods: dict[Key, Method]
    """The methods, by name."""


@functools.cache
def load_methods() -> dict[str, Method]:
    """What methods are, by ``benchmarks/methods.yaml``; the modules that it names as plugins are imported.

    Raises:
        DefinitionError: A plugin, key or value does not exist.
    """
    import_plugins()
    return read(BENCHMARKS / "methods.yaml", MethodFile).methods


def check_rows(definition: MethodsDefinition, file: str) -> None:
    """See that there are the methods that a benchmark compares, and the rows that its suites change.

    Raises:
        DefinitionError: a method that ``methods.yaml`` does not have, or a suite's row that the benchmark does not have.
    """
    for name, row in definition.methods.items():
        at, known = (f"methods.{name}.method", row.method) if row.method else ("methods", name)
        check_names(f"{file}: '", at, [known], load_methods())
    for name, suite in definition.suites.items():
        if isinstance(suite, TrainingSuite):
            check_names(f"{file}: 'suites.{name}", "methods", suite.methods, definition.methods)


def resolve_methods(definition: MethodsDefinition, suite: str | None = None) -> dict[str, Method]:
    """A benchmark's methods with all their settings, for itself or for one of its suites.

    A setting is taken from the first of these that gives it: the suite's ``methods``, the benchmark's ``methods``, ``methods.yaml``,
    the suite's ``method_defaults`` for the method's kind, the benchmark's.
    """
    part = definition.suites[suite] if suite else None
    found = {}
    for name, row in definition.methods.items():
        method = load_methods()[row.method or name]
        layers = [getattr(definition.method_defaults, method.kind)]
        own = MethodSettings()
        if isinstance(part, TrainingSuite):
            layers.append(getattr(part.method_defaults, method.kind))
            own = part.methods.get(name, own)
        settings = [layer.given() for layer in (*layers, method, row, own)]
        found[name] = Method(**{key: value for key, value in _stacked(*settings).items() if key != "method"})
    return found


def _stacked(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, of which a later layer's go before an earlier one's."""
    found: dict[str, Any] = {}
    for layer in layers:
        replaced = _CHOSEN if _CHOSEN & set(layer) else set()
        found = {key: value for key, value in found.items() if key not in replaced} | dict(layer)
    return found


def method_config(method: Method, seed: int, where: str) -> dict[str, Any] | None:
    """The full configuration of an EMoE or GMoE with all its defaults, or None for a dense model.

    Args:
        method: its settings.
        seed: the run's.
        where: file and key, for messages.

    Raises:
        DefinitionError: settings that do not go together.
    """
    values = method.config_values()
    if method.top_k_fraction is not None and "top_k" in values:
        raise DefinitionError(f"{where} sets both top_k and top_k_fraction; keep one")
    if method.kind == "dense":
        known = {"also_train", "kind", "noise", "role", "title", "top_k_fraction", "tune"}
        extra = sorted(set(method.given()) - known - ({"layers"} if needs_layers(method.tune) else set()))
        if extra:
            raise DefinitionError(f"{where} is dense and takes no '{extra[0]}'")
        return None
    if method.top_k_fraction is not None:
        share = method.top_k_fraction * values.get("num_experts", 1)
        if share != int(share) or share < 1:
            raise DefinitionError(
                f"{where}: top_k_fraction {method.top_k_fraction} of {values.get('num_experts')} experts is {share:g}, not a whole number"
            )
        values["top_k"] = int(share)
    if values.get("partition_seed") == "run":
        values["partition_seed"] = seed
    config: type[EMoEConfig] | type[GMoEConfig] = EMoEConfig if method.kind == "emoe" else GMoEConfig
    try:
        if method.as_published:
            return config.as_published(method.as_published, **values).to_dict()
        return config(**values).to_dict()
    except ConfigError as error:
        raise DefinitionError(f"{where}: {error}") from error
