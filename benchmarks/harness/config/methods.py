"""The methods of a suite, and one method as a run's spec has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.method_rows import check_rows, method_config, resolve_methods
from benchmarks.harness.config.schema import Strict, check_names, parse
from benchmarks.harness.config.shared import Entry, LoRA, Method, TrainingDefinition, TrainingSettings
from benchmarks.harness.config.tunings import needs_layers, tuning_spec
from benchmarks.harness.config.variants import variant_of
from emoe.errors import nearest_divisor

VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
OF_TRAINING = ("train_share", "epochs_factor")  # settings that are no method's, but vary a row all the same
Changed = TypeVar("Changed", bound=Strict)
Settings = TypeVar("Settings", bound=TrainingSettings)


def suite_methods(benchmark: Benchmark[TrainingDefinition, Entry], suite: str) -> dict[str, Method]:
    """The benchmark's methods as the suite compares them, by name.

    Raises:
        DefinitionError: a method that ``methods.yaml`` does not have, or a suite's row that the benchmark does not have.
    """
    check_rows(benchmark.definition, str(benchmark.file))
    return resolve_methods(benchmark.definition, suite)


def with_changes(
    entries: Mapping[str, Changed], changes: Mapping[str, Mapping[str, Any]], key: str, where: str
) -> dict[str, Changed]:
    """Named entries of a benchmark's file, with a suite's own settings on top.

    Args:
        entries: of the file.
        changes: what the suite says, by the name of an entry.
        key: under which both stand.
        where: the file, and the keys before that of the suite's.

    Raises:
        DefinitionError: the suite names an entry that does not exist, or a setting that it does not have.
    """
    check_names(where, key, list(changes), entries)
    return {
        name: parse({**entry.model_dump(), **changes[name]}, type(entry), f"{where}.{key}'", key, name)
        if name in changes
        else entry
        for name, entry in entries.items()
    }


def training_settings(usual: Settings, changes: Strict, model: str, where: str) -> Settings:
    """The training settings of the runs of a model: the benchmark's, the suite's, the model's own.

    Args:
        usual: the benchmark's.
        changes: what the suite says.
        model: the model's name.
        where: the file, and the keys that lead to ``by_model``.

    Raises:
        DefinitionError: settings of a model that does not exist.
    """
    found = usual.changed(changes)
    check_names(where, "by_model", found.by_model, load_models())
    return found.changed(found.by_model[model]) if model in found.by_model else found


def method_spec(
    methods: Mapping[str, Method],
    point: Mapping[str, Any],
    seed: int,
    lora: LoRA | None,
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
    varying = VARIANT_KEYS if base.kind != "dense" else ("layers",) if needs_layers(base.tune) else ()
    varied = {key: point[key] for key in varying if key in point}
    method = base.model_copy(update=varied)
    named = f"{where}': method '{point['method']}'"
    config = method_config(method, seed, named)
    if config is not None and config.get("kind") == "emoe":
        _check_divisible(point["model"], config["num_experts"], named)
    return {
        "name": point["method"],
        "variant": variant_of({**varied, **{key: point[key] for key in OF_TRAINING if key in point}}),
        "noise": float(method.noise),
        "config": config,
        "tune": _tuned(method, lora, named),
    }


def _check_divisible(model: str, num_experts: int, where: str) -> None:
    """Check that experts are of equal size, if ``models.yaml`` has the shape of the model."""
    shape = load_models()[model].shape
    if shape and shape.neurons % num_experts:
        raise DefinitionError(
            f"{where}: num_experts is {num_experts}, but the {shape.neurons} neurons of an FFN of '{model}' cannot be split "
            f"into so many equal experts; the nearest number that can is {nearest_divisor(shape.neurons, num_experts)}"
        )


def _tuned(method: Method, lora: LoRA | None, where: str) -> dict[str, Any] | None:
    """What is trained beside adapters, head and routers; None where everything is trained."""
    if lora is None and method.tune is None:
        if method.also_train is not None:
            raise DefinitionError(f"{where} sets 'also_train', which needs training.lora or 'tune'")
        return None
    if needs_layers(method.tune) and method.layers is None:
        raise DefinitionError(f"{where} sets 'tune: {method.tune}' but no 'layers', which say where")
    return tuning_spec(method.tune, method.layers, method.also_train or ())
