"""The rows of a comparison: what ``methods.yaml`` says of a method, and what a benchmark and its suites set otherwise."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.planning.plugins import import_plugins
from benchmarks.harness.planning.schema import check_names, read_checked
from benchmarks.harness.planning.tunings import needs_layers
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConfigError

_NOT_CONFIG = ("title", "role", "kind", "noise", "top_k_fraction", "as_published", "tune", "also_train")

_USUAL = {"role": "method", "noise": 0.0}
# one setting in two forms
_CHOSEN = {"top_k", "top_k_fraction"}

Settings = Mapping[str, Any]


@functools.cache
def load_methods() -> dict[str, dict[str, Any]]:
    """What methods are, by ``benchmarks/methods.yaml``; the modules that it names as plugins are imported.

    Raises:
        DefinitionError: a plugin, key or value that does not exist, or settings that do not go together.
    """
    import_plugins()
    file = BENCHMARKS / "methods.yaml"
    methods: dict[str, dict[str, Any]] = read_checked(file, "methods")["methods"]
    for name, method in methods.items():
        method_config(_completed(method), 0, f"{file}: 'methods.{name}'")
    return methods


def _completed(method: Settings) -> Settings:
    """A method with some layers, N and k where it leaves them to the benchmark, to see whether the rest goes together."""
    if method["kind"] == "dense":
        return method
    found = {"num_experts": method.get("top_k", 1), "layers": "all", **method}
    if "num_experts" not in method and "top_k" not in method:
        found.pop("top_k_fraction", None)
    return found if "top_k_fraction" in found else {"top_k": 1, **found}


def resolve_methods(definition: Mapping[str, Any], methods: Mapping[str, Settings], file: str) -> dict[str, Any]:
    """A benchmark's definition with all settings of its methods, for itself and for each of its suites.

    A setting is taken from the first of these that gives it: the suite's ``methods``, the benchmark's ``methods``, ``methods.yaml``,
    the suite's ``method_defaults`` for the method's kind, the benchmark's.

    Args:
        definition: of a benchmark that compares methods.
        methods: those of ``methods.yaml``.
        file: the definition's, for messages.

    Returns:
        The definition; its ``methods`` and those of every suite have all rows with all settings.

    Raises:
        DefinitionError: a method that ``methods.yaml`` does not have, or a suite's row that the benchmark does not have.
    """
    rows = definition["methods"]
    for name, row in rows.items():
        at, known = (f"methods.{name}.method", row["method"]) if "method" in row else ("methods", name)
        check_names(f"{file}: '", at, [known], methods)
    suites = {}
    for name, suite in definition["suites"].items():
        check_names(f"{file}: 'suites.{name}", "methods", suite.get("methods", {}), rows)
        suites[name] = {**suite, "methods": _resolved(definition, methods, suite)}
    return {**definition, "methods": _resolved(definition, methods, {}), "suites": suites}


def _resolved(
    definition: Mapping[str, Any], methods: Mapping[str, Settings], suite: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """All rows as a suite has them; as the benchmark has them for an empty one."""
    found = {}
    for name, row in definition["methods"].items():
        method = methods[row.get("method", name)]
        defaults = [part.get("method_defaults", {}).get(method["kind"], {}) for part in (definition, suite)]
        own = {key: value for key, value in row.items() if key != "method"}
        found[name] = _stacked(_USUAL, *defaults, method, own, suite.get("methods", {}).get(name, {}))
    return found


def _stacked(*layers: Settings) -> dict[str, Any]:
    """Settings, of which a later layer's go before an earlier one's."""
    found: dict[str, Any] = {}
    for layer in layers:
        replaced = _CHOSEN if _CHOSEN & set(layer) else set()
        found = {key: value for key, value in found.items() if key not in replaced} | dict(layer)
    return found


def method_config(method: Mapping[str, Any], seed: int, where: str) -> dict[str, Any] | None:
    """The full configuration of an EMoE or GMoE with all its defaults, or None for a dense model.

    Args:
        method: its settings.
        seed: the run's.
        where: file and key, for messages.

    Raises:
        DefinitionError: settings that do not go together.
    """
    if "top_k_fraction" in method and "top_k" in method:
        raise DefinitionError(f"{where} sets both top_k and top_k_fraction; keep one")
    if method["kind"] == "dense":
        known = {*_NOT_CONFIG, *(("layers",) if needs_layers(method.get("tune")) else ())} - {"as_published"}
        extra = sorted(set(method) - known)
        if extra:
            raise DefinitionError(f"{where} is dense and takes no '{extra[0]}'")
        return None
    values = {key: value for key, value in method.items() if key not in _NOT_CONFIG}
    if "top_k_fraction" in method:
        share = method["top_k_fraction"] * values.get("num_experts", 1)
        if share != int(share) or share < 1:
            raise DefinitionError(
                f"{where}: top_k_fraction {method['top_k_fraction']} of {values.get('num_experts')} experts is {share:g}, not a whole number"
            )
        values["top_k"] = int(share)
    if values.get("partition_seed") == "run":
        values["partition_seed"] = seed
    config: type[EMoEConfig] | type[GMoEConfig] = EMoEConfig if method["kind"] == "emoe" else GMoEConfig
    try:
        if "as_published" in method:
            return config.as_published(method["as_published"], **values).to_dict()
        return config(**values).to_dict()
    except ConfigError as error:
        raise DefinitionError(f"{where}: {error}") from error
