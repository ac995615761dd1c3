"""The methods of a suite, and one method as a run's spec has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import Benchmark
from benchmarks.harness.planning.method_rows import method_config
from benchmarks.harness.planning.schema import check, check_names
from benchmarks.harness.planning.tunings import needs_layers, tuning_spec

VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")


def suite_methods(benchmark: Benchmark, suite: str) -> dict[str, dict[str, Any]]:
    """The benchmark's methods as the suite compares them, by name."""
    found: dict[str, dict[str, Any]] = benchmark.definition["suites"][suite]["methods"]
    return found


def suite_entries(benchmark: Benchmark, suite: str, key: str) -> dict[str, dict[str, Any]]:
    """The named entries of a part of a benchmark's file, with the suite's own settings on top.

    Args:
        benchmark: the benchmark.
        suite: the suite.
        key: of the part, such as ``tunings``.

    Raises:
        DefinitionError: the suite names an entry that does not exist, or a setting that it does not have.
    """
    entries: dict[str, dict[str, Any]] = benchmark.definition[key]
    changes = benchmark.definition["suites"][suite].get(key, {})
    where = f"{benchmark.file}: 'suites.{suite}"
    check_names(where, key, list(changes), entries)
    merged = {name: {**entry, **changes.get(name, {})} for name, entry in entries.items()}
    # checked again, because a suite's settings are written outside their part; methods are resolved and not as in the file any more
    rest = {**benchmark.definition, "methods": {name: {} for name in suite_methods(benchmark, suite)}, "suites": {}}
    checked = check({**rest, key: merged}, benchmark.kind.schema, f"{where}.{key}'")
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
    varying = VARIANT_KEYS if base["kind"] != "dense" else ("layers",) if needs_layers(base.get("tune")) else ()
    varied = {key: point[key] for key in varying if key in point}
    method = {**base, **varied}
    named = f"{where}': method '{point['method']}'"
    return {
        "name": point["method"],
        "variant": _variant(varied),
        "noise": float(method["noise"]),
        "config": method_config(method, seed, named),
        "tune": _tuned(method, lora, named),
    }


def _tuned(method: Mapping[str, Any], lora: Mapping[str, Any] | None, where: str) -> dict[str, Any] | None:
    """What is trained beside adapters, head and routers; None where everything is trained."""
    tune = method.get("tune")
    if lora is None and tune is None:
        if "also_train" in method:
            raise DefinitionError(f"{where} sets 'also_train', which needs training.lora or 'tune'")
        return None
    if needs_layers(tune) and "layers" not in method:
        raise DefinitionError(f"{where} sets 'tune: {tune}' but no 'layers', which say where")
    return tuning_spec(tune, method.get("layers"), method.get("also_train", ()))


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
