"""The experts' settings in a transformers model's configuration, and so in its ``config.json``.

``quantization_config`` names our loader (:mod:`emoe.loader`), the experts' settings and the converted layers::

    "experts_implementation": "emoe",
    "quantization_config": {"quant_method": "emoe", "experts": {"num_experts": 64, ...}, "layers": [8, 10]}

A process that has not imported emoe must not read the checkpoint as a dense model. Transformers 5.24 only warns of an
unknown ``quant_method`` and loads on, but it refuses an unknown ``experts_implementation``.

A model has one ``quantization_config``. The experts of a quantised model are described under the key ``emoe`` instead,
as in all folders of emoe 0.1, and only :func:`emoe.from_pretrained` loads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.errors import ConversionError
from emoe.layer import RoutedActivation, routed_layers

QUANTIZATION_CONFIG = "quantization_config"
QUANT_METHOD = "emoe"
SEPARATE_KEY = "emoe"  # key in config.json for a quantised model, and in folders of emoe 0.1
IMPLEMENTATION_KEY = "experts_implementation"
NEEDS_EMOE = "emoe"  # registered by emoe.loader, so unknown without `import emoe`
NEEDS_FROM_PRETRAINED = (
    "emoe.from_pretrained"  # never registered: transformers' own loader always refuses it
)


@dataclass(frozen=True)
class Experts:
    """The configuration of a checkpoint's experts, and the numbers of its converted FFNs in ascending order."""

    config: EMoEConfig | GMoEConfig
    layers: tuple[int, ...]

    @classmethod
    def from_dict(cls, config: Any, layers: Any) -> Experts:
        """Check the values of a file.

        Raises:
            ValueError: a value has the wrong type or is out of range.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"the experts' configuration is {config!r:.80}, not an object")
        is_list = isinstance(layers, list) and len(layers) > 0
        if not is_list or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"layers is {layers!r:.80}, not a list of layer numbers")
        return cls(config_from_dict(config), tuple(sorted(set(layers))))

    @classmethod
    def from_quantization_config(cls, content: Mapping[str, Any]) -> Experts:
        """Read a ``quantization_config`` (raises :class:`ValueError`)."""
        return cls.from_dict(content.get("experts"), content.get("layers"))

    def quantization_config(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a converted model."""
        return {
            "quant_method": QUANT_METHOD,
            "experts": self.config.to_dict(),
            "layers": list(self.layers),
        }


def is_ours(quantization_config: Any) -> bool:
    """Check if a ``quantization_config`` describes experts, not a quantised model."""
    return (
        isinstance(quantization_config, Mapping)
        and quantization_config.get("quant_method") == QUANT_METHOD
    )


def describe_experts_(model: nn.Module) -> None:
    """Write the experts into a transformers model's configuration. Models without one stay as they are.

    Raises:
        ConversionError: the model's registry row lacks a routed FFN.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return
    if not _describes_experts(config):
        own_config_(model)
    layers = numbered_layers(model)
    first = next(iter(layers.values()))
    _write(model.config, Experts(first.config, tuple(sorted(layers))))


def update_description_(model: nn.Module) -> None:
    """Write changed settings into the configurations in a model, or remove them if no experts are left."""
    layers = routed_layers(model)
    for config in described_configs(model):
        if layers:
            _write(config, Experts(layers[0].config, _stored_layers(config)))
        else:
            _remove(config)


def described_configs(model: nn.Module) -> list[Any]:
    """Return the configurations in a model that describe experts: its own, and those of wrapped models."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if _describes_experts(config):
            configs[id(config)] = config
    return list(configs.values())


def numbered_layers(model: nn.Module) -> dict[int, RoutedActivation]:
    """Return the routed FFNs by their number in this model.

    The numbers count all FFNs of ``model``, even if only a part of it was converted.

    Raises:
        ConversionError: the model's registry row lacks a routed FFN.
    """
    numbers = {id(ffn.activation): ffn.index for ffn in find_ffns(model)}
    layers = routed_layers(model)
    for layer in layers:
        if id(layer) not in numbers:
            kind = type(model).__name__
            raise ConversionError(
                f"the row of {kind} lacks {layer.ffn.name}: save the converted part"
            )
    return {numbers[id(layer)]: layer for layer in layers}


def own_config_(model: nn.Module) -> None:
    """Give a transformers model a copy of its configuration, because other models may share the object."""
    shared: Any = getattr(model, "config", None)
    if not hasattr(shared, "to_diff_dict"):
        return
    own = copy.copy(shared)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is shared:
                setattr(module, name, own)


def _describes_experts(config: Any) -> bool:
    return is_ours(getattr(config, QUANTIZATION_CONFIG, None)) or hasattr(config, SEPARATE_KEY)


def _stored_layers(config: Any) -> tuple[int, ...]:
    content: Any = getattr(config, QUANTIZATION_CONFIG, None)
    if not is_ours(content):
        content = getattr(config, SEPARATE_KEY)
    return tuple(content["layers"])


def _write(config: Any, experts: Experts) -> None:
    quantization_config = getattr(config, QUANTIZATION_CONFIG, None)
    if quantization_config is None or is_ours(quantization_config):
        _remove(config)  # an older description
        setattr(config, QUANTIZATION_CONFIG, experts.quantization_config())
        setattr(config, IMPLEMENTATION_KEY, NEEDS_EMOE)
    else:
        content = {"config": experts.config.to_dict(), "layers": list(experts.layers)}
        setattr(config, SEPARATE_KEY, content)
        setattr(config, IMPLEMENTATION_KEY, NEEDS_FROM_PRETRAINED)


def _remove(config: Any) -> None:
    if is_ours(getattr(config, QUANTIZATION_CONFIG, None)):
        delattr(config, QUANTIZATION_CONFIG)
    for key in (SEPARATE_KEY, IMPLEMENTATION_KEY):
        if hasattr(config, key):
            delattr(config, key)
