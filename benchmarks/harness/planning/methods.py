"""The methods of a suite, and one method as a run's spec has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.schema import check, check_names
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConfigError

VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
_NOT_CONFIG = ("title", "role", "kind", "noise", "top_k_fraction", "as_published", "tune", "also_train")


def suite_methods(benchmark: Benchmark, suite: str) -> dict[str, dict[str, Any]]:
    """The benchmark's methods with the suite's own settings on top."""
    return suite_entries(benchmark, suite, "methods")


def suite_entries(benchmark: Benchmark, suite: str, key: str) -> dict[str, dict[str, Any]]:
    """The named entries of a part of a benchmark's file, with the suite's own settings on top.

    Args:
        benchmark: the benchmark.
        suite: the suite.
        key: of the part: ``methods`` or ``tunings``.

    Raises:
        DefinitionError: the suite names an entry that does not exist, or a setting that it does not have.
    """
    entries: dict[str, dict[str, Any]] = benchmark.definition[key]
    changes = benchmark.definition["suites"][suite].get(key, {})
    where = f"{benchmark.file}: 'suites.{suite}"
    check_names(where, key, list(changes), entries)
    merged = {name: {**entry, **changes.get(name, {})} for name, entry in entries.items()}
    # checked again as a whole, because a suite's settings are written outside their part
    checked = check({**benchmark.definition, key: merged}, benchmark.kind.schema, f"{where}.{key}'")
    return dict(checked[key])


def training_settings(benchmark: Benchmark, suite: str, model: str) -> dict[str, Any]:
    """The training settings of the runs of a model: the benchmark's, the suite's, the model's own."""
    found = {**benchmark.definition["training"], **benchmark.definition["suites"][suite].get("training", {})}
    by_model = found.pop("by_model", {})
    check_names(f"{benchmark.file}: 'suites.{suite}.training", "by_model", by_model, load_models())
    return copy.deepcopy(found | by_model.get(model, {}))


def method_spec(
    methods: Mapping[str, dict[str, Any]],
    point: Mapping[str, Any],
    seed: int,
    lora: Mapping[str, Any] | None,
    where: str,
) -> dict[str, Any]:
    """The ``method`` part of a run's spec.

    Args:
        methods: what :func:`suite_methods` gave.
        point: of the grid: the method's name, and perhaps its varied settings.
        seed: the run's.
        lora: ``training.lora`` of the run.
        where: file and key, for messages.

    Raises:
        DefinitionError: settings that do not go together.
    """
    base = methods[point["method"]]
    # a dense model has no experts to vary: it is one run for all variants, but for the blocks that it trains
    varying = VARIANT_KEYS if base["kind"] != "dense" else ("layers",) if "tune" in base else ()
    varied = {key: point[key] for key in varying if key in point}
    method = {**base, **varied}
    named = f"{where}': method '{point['method']}'"
    if "top_k_fraction" in method and "top_k" in method:
        raise DefinitionError(f"{named} sets both top_k and top_k_fraction; keep one")
    return {
        "name": point["method"],
        "variant": _variant(varied),
        "noise": float(method["noise"]),
        "config": _method_config(method, seed, named),
        "tune": _tuned(method, lora, named),
    }


def _tuned(method: Mapping[str, Any], lora: Mapping[str, Any] | None, where: str) -> dict[str, Any] | None:
    """What is trained beside adapters and head; None where everything is trained."""
    asked = [key for key in ("tune", "also_train") if key in method]
    if lora is None:
        if asked:
            raise DefinitionError(f"{where} sets '{asked[0]}', which needs training.lora")
        return None
    if "tune" in method and "layers" not in method:
        raise DefinitionError(f"{where} sets 'tune' but no 'layers', which name the blocks")
    return {"blocks": method["layers"] if "tune" in method else [], "also": method.get("also_train", [])}


def without_title(name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition by name; titles are for readers and do not shape numbers."""
    return {"name": name, **{key: value for key, value in definition.items() if key != "title"}}


def _variant(varied: Mapping[str, Any]) -> str:
    short = {"num_experts": "N", "top_k_fraction": "k", "layers": "L"}
    values = {
        key: "+".join(map(str, v)) if isinstance(v, list) else f"{v:g}" if isinstance(v, float) else str(v)
        for key, v in varied.items()
    }
    return "-".join(f"{short[key]}{value}" for key, value in values.items())


def _method_config(method: Mapping[str, Any], seed: int, where: str) -> dict[str, Any] | None:
    """The full configuration of an EMoE or GMoE with all its defaults, or None for a dense model."""
    if method["kind"] == "dense":
        known = {*_NOT_CONFIG, *(("layers",) if "tune" in method else ())} - {"as_published"}
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
