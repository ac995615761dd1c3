"""The ``method`` part of a run's spec, and names of its varied settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import LoRA, Method, merge_methods, tuning_spec
from benchmarks.harness.config.yaml import NotNegative, Strict
from emoe.config import EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import ConfigError, nearest_divisor

VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
TRAINING_KEYS = ("train_share", "epochs_factor")  # training settings that also vary a row
# letter by setting: N experts, k / N, converted layers, share of the training rows (data), factor on the usual epochs
_LETTERS = {
    "num_experts": "N",
    "top_k_fraction": "k",
    "layers": "L",
    "train_share": "D",
    "epochs_factor": "E",
}
_WORDS = {
    "N": "N {}",
    "k": "k/N {}",
    "L": "{}",
    "D": "{} % of the rows",
    "E": "{} times the epochs",
}


class TuneSpec(Strict):
    """The parameters that a run trains besides adapters, head and routers, instead of all parameters."""

    blocks: str | list[int]
    """The trained transformer blocks: layer numbers or a request such as `last:2`; an empty list for none."""
    also: list[str]
    """Further trained modules, by the last part of their name."""
    tuning: str | None = None
    """A registered tuning other than `blocks`."""
    layers: str | list[int] | None = None
    """The layers that the tuning is called with."""
    head: bool = True
    """Train the head."""


class MethodSpec(Strict):
    """The ``method`` section of a run's spec."""

    name: str
    """Name of the method; empty for a measurement."""
    variant: str
    """Short name of the method's varied settings."""
    noise: NotNegative = 0.0
    """Intensity of noisy tuning; 0 for none."""
    config: dict[str, Any] | None
    """The full configuration of EMoE or GMoE as plain values; null for a dense model."""
    tune: TuneSpec | None = None
    """The trained parameters; null if all parameters are trained."""


def variant_of(varied: Mapping[str, Any]) -> str:
    """Name the variant of some settings.

    >>> variant_of({"num_experts": 16, "top_k_fraction": 0.25, "layers": [3, 5]})
    'N16-k0.25-L3+5'
    """
    values = {
        key: "+".join(map(str, v))
        if isinstance(v, list)
        else f"{v:g}"
        if isinstance(v, float)
        else str(v)
        for key, v in varied.items()
    }
    return "-".join(f"{_LETTERS[key]}{value}" for key, value in values.items())


def setting_values(variant: str) -> dict[str, str]:
    """Return the values of a variant by letter.

    >>> setting_values("N16-L-1")
    {'N': '16', 'L': '-1'}
    """
    return dict(
        re.findall(rf"(?:^|-)([{''.join(_WORDS)}])(.*?)(?=-[{''.join(_WORDS)}]|$)", variant)
    )


def setting_text(variant: str, layers: Iterable[str] = ()) -> str:
    """Describe a variant in words, with its layer numbers if they are known.

    >>> setting_text("N32-k0.5-L28::2-D0.8")
    'N 32, k/N 0.5, layers 28::2, 80 % of the rows'
    >>> setting_text("L16::4", ["16", "20", "24", "28"])
    'layers 16, 20, 24, 28'
    """
    values = setting_values(variant)
    if "L" in values:
        chosen = ", ".join(layers) or values["L"].replace("+", ", ")
        values["L"] = f"layer {chosen}" if chosen.isdigit() else f"layers {chosen}"
    if "D" in values:
        values["D"] = f"{float(values['D']) * 100:g}"
    return ", ".join(_WORDS[key].format(value) for key, value in values.items())


def remove_settings(variant: str, usual: Collection[str]) -> str:
    """Remove the usual settings from a variant.

    >>> remove_settings("k0.5-L22", ["L22"])
    'k0.5'
    """
    return "-".join(
        f"{key}{value}"
        for key, value in setting_values(variant).items()
        if f"{key}{value}" not in usual
    )


def method_spec(
    methods: Mapping[str, Method],
    point: Mapping[str, Any],
    seed: int,
    lora: LoRA | None,
    where: str,
) -> dict[str, Any]:
    """Make the ``method`` part of a run's spec.

    Args:
        methods: The methods from :func:`.benchmark.resolve_methods`.
        point: The point of the grid: the method's name and its varied settings, if any.
        seed: The seed of the run.
        lora: ``training.lora`` of the run.
        where: The file and the key, for messages.

    Raises:
        DefinitionError: Settings exclude each other.
    """
    base = methods[point["method"]]
    # all variants share one dense run, unless the variant changes its trained blocks
    varying = VARIANT_KEYS if base.kind != "dense" else ("layers",) if base.tune else ()
    varied = {key: point[key] for key in varying if key in point}
    method = merge_methods(base, Method(**varied))
    named = f"{where}': method '{point['method']}'"
    config = _config(method, seed, named)
    neurons = load_models()[point["model"]].neurons
    if neurons and config and config["kind"] == "emoe" and neurons % config["num_experts"]:
        raise DefinitionError(
            f"{named}: num_experts is {config['num_experts']}, but the {neurons} neurons of an FFN of "
            f"'{point['model']}' cannot be split into equal experts; the nearest divisor is "
            f"{nearest_divisor(neurons, config['num_experts'])}"
        )
    if method.tune == "blocks" and method.layers is None:
        raise DefinitionError(f"{named} sets 'tune: blocks' but no 'layers', which it needs")
    trains_all = lora is None and method.tune is None
    if trains_all and method.also_train is not None:
        raise DefinitionError(f"{named} sets 'also_train', which needs training.lora or 'tune'")
    return {
        "name": point["method"],
        "variant": variant_of(
            {**varied, **{key: point[key] for key in TRAINING_KEYS if key in point}}
        ),
        "noise": float(method.noise),
        "config": config,
        "tune": None
        if trains_all
        else tuning_spec(method.tune, method.layers, method.also_train or ()),
    }


def _config(method: Method, seed: int, where: str) -> dict[str, Any] | None:
    """Make the full configuration of an EMoE or GMoE with all its defaults; None for a dense model."""
    values = method.config_values()
    if method.kind == "dense":
        if extra := sorted(values.keys() - {"layers"}):
            raise DefinitionError(f"{where} is dense and takes no '{extra[0]}'")
        return None
    if method.top_k_fraction is not None:
        share = method.top_k_fraction * values.get("num_experts", 1)
        if share != int(share) or share < 1:
            raise DefinitionError(
                f"{where}: top_k_fraction {method.top_k_fraction} of the experts is {share:g} experts"
            )
        values["top_k"] = int(share)
    if values.get("partition_seed") == "run":
        values["partition_seed"] = seed
    config: type[EMoEConfig] | type[GMoEConfig] = (
        EMoEConfig if method.kind == "emoe" else GMoEConfig
    )
    try:
        if method.as_published:
            return config.as_published(method.as_published, **values).to_dict()
        return config(**values).to_dict()
    except (ConfigError, TypeError) as error:  # TypeError: a field without a default is missing
        raise DefinitionError(f"{where}: {error}") from error


def check_frozen(
    frozen: int | None, method: MethodSpec, where: str, count: int | None = None
) -> None:
    """Check that a method converts and trains nothing below the frozen layers.

    Args:
        frozen: The number of frozen layers; None for none.
        method: The method of the run's spec.
        where: The file and the keys, for messages.
        count: The number of layers of the model. Without it, requests that depend on it (``last:2``) are not checked.

    Raises:
        DefinitionError: The method uses a frozen layer.
    """
    if not frozen:
        return
    used_layers: list[tuple[str, Any]] = []
    if method.config is not None:
        used_layers.append(("converts", method.config.get("layers")))
    if method.tune is not None:
        used_layers.append(("trains", method.tune.layers))
        used_layers.append(("trains", method.tune.blocks))
    for verb, request in used_layers:
        if not request:
            continue
        layers = request if count is None else resolve_layers(request, count)
        # without a count, a word such as ``all`` and numbers from the end are unknown
        if isinstance(layers, list) and 0 <= min(layers) < frozen:
            raise DefinitionError(
                f"{where}: method '{method.name}' {verb} layer {min(layers)}, "
                f"but training.frozen_layers is {frozen}. "
                f"Freeze fewer, or take layers from {frozen} on"
            )
