"""The experts' settings in a transformers model's configuration, and so in its ``config.json``.

``quantization_config`` names our loader (:mod:`emoe.loader`), the experts' settings and the
converted layers::

    "experts_implementation": "emoe",
    "quantization_config": {
        "quant_method": "emoe",
        "experts": {"num_experts": 64, ...},
        "layers": [8, 10]
    }

A process that has not imported emoe must not read the checkpoint as a dense model. Transformers
5.24 only warns of an unknown ``quant_method`` and loads on, but it refuses an unknown
``experts_implementation``.

A model has one ``quantization_config``. The experts of a quantised model are described under the
key ``emoe`` instead, as in all folders of emoe 0.1, and only :func:`emoe.from_pretrained` loads
them.
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
# never registered: transformers' own loader always refuses it
NEEDS_FROM_PRETRAINED = "emoe.from_pretrained"


@dataclass(frozen=True)
class Experts:
    """The description of a checkpoint's experts.

    Attributes:
        config: configuration of the experts.
        layers: numbers of the converted FFNs, in ascending order.
    """

    config: EMoEConfig | GMoEConfig
    layers: tuple[int, ...]

    @classmethod
    def from_json_values(cls, config: Any, layers: Any) -> Experts:
        """Build the description from the values in a JSON file.

        Args:
            config: the fields of the configuration, with its kind.
            layers: the list of layer numbers.

        Raises:
            ValueError: a value has the wrong type or is out of range.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"the experts' configuration is {config!r:.80}, not an object")
        if not _is_list_of_numbers(layers):
            raise ValueError(f"layers is {layers!r:.80}, not a list of layer numbers")
        numbers = sorted(set(layers))
        return cls(config_from_dict(config), tuple(numbers))

    @classmethod
    def from_quantization_config(cls, content: Mapping[str, Any]) -> Experts:
        """Build the description from a ``quantization_config`` (raises :class:`ValueError`)."""
        return cls.from_json_values(content.get("experts"), content.get("layers"))

    def quantization_config(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a converted model."""
        return {
            "quant_method": QUANT_METHOD,
            "experts": self.config.to_dict(),
            "layers": list(self.layers),
        }


def _is_list_of_numbers(value: object) -> bool:
    """Check if a value is a list of layer numbers that is not empty.

    Layer numbers are integers of at least 0, and not bools.
    """
    if not isinstance(value, list) or len(value) == 0:
        return False
    for number in value:
        # not isinstance(), for which booleans are whole numbers
        is_whole_number = type(number) is int
        if not is_whole_number or number < 0:
            return False
    return True


def is_ours(quantization_config: Any) -> bool:
    """Check if a ``quantization_config`` describes emoe's experts, not a quantised model."""
    return (
        isinstance(quantization_config, Mapping)
        and quantization_config.get("quant_method") == QUANT_METHOD
    )


def describe_experts_(model: nn.Module) -> None:
    """Write a description of the model's experts into its transformers configuration.

    A model without such a configuration stays as it is. A base model inside the model, such as
    ``model.bert``, gets the same configuration object. So it also shows later changes of the base
    model's experts.

    Raises:
        ConversionError: a routed FFN is not among the FFNs that the registry names for the model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return
    # A dense model may share a configuration that describes no experts yet. Only a copy is changed.
    if not _describes_experts(config):
        copy_config_(model)
    layers = numbered_layers(model)
    # one layer's configuration stands for all: emoe.save_pretrained checks that they are the same
    first, *_ = layers.values()
    experts = Experts(first.config, tuple(sorted(layers)))
    _write_description(model.config, experts)
    _share_config_with_base_(model)


def _share_config_with_base_(model: Any) -> None:
    """Give the base model inside a transformers model, such as ``model.bert``, its configuration.

    In transformers both are one object. If only the base model was converted, they became two.
    """
    base: Any = getattr(model, "base_model", None)
    base_config = getattr(base, "config", None)
    # there is no base model, or it shares the configuration already
    if base_config is None or base_config is model.config:
        return
    # another kind of configuration has other fields
    if type(base_config) is type(model.config):
        _replace_config_(base, base_config, model.config)


def update_description_(model: nn.Module) -> None:
    """Update each transformers configuration in a model that describes experts.

    Each description gets the present settings of its experts. If the model has no experts left,
    the descriptions are removed.
    """
    has_experts = bool(routed_layers(model))
    for config in described_configs(model):
        if not has_experts:
            _remove_description(config)
            continue
        layer = _described_layer(model, config)
        experts = Experts(layer.config, _stored_layers(config))
        _write_description(config, experts)


def check_holds_described_experts(model: nn.Module, caller: str) -> None:
    """Raise :class:`ConversionError` if a configuration in a model describes experts outside it.

    An example is a single layer of a transformers model: its attention holds the configuration of
    the whole model. The message contains ``caller``.
    """
    num_held = len(routed_layers(model))
    for config in described_configs(model):
        num_described = len(_stored_layers(config))
        if num_held < num_described:
            raise ConversionError(
                f"{type(model).__name__} holds {num_held} of the {num_described} FFNs with experts "
                f"that its configuration describes: call {caller} for the whole model"
            )


def _described_layer(model: nn.Module, config: Any) -> RoutedActivation:
    """Return one of the routed FFNs that a configuration describes.

    Args:
        model: converted model. It may contain several models that were converted separately.
        config: transformers configuration in the model that describes experts.
    """
    holders_with_experts = []
    for module in model.modules():
        holds_config = vars(module).get("config") is config
        if holds_config and routed_layers(module):
            holders_with_experts.append(module)

    # `model` may be only a part of a transformers model, such as its list of layers. There, only
    # modules without experts, such as the attention, hold the configuration. Then it describes all
    # experts of the part.
    if not holders_with_experts:
        return routed_layers(model)[0]
    # A module around several models may also hold the configuration of one of them. So the
    # innermost module is used, which comes last.
    return routed_layers(holders_with_experts[-1])[0]


def described_configs(model: nn.Module) -> list[Any]:
    """Return the transformers configurations in a model that describe experts.

    A model may have several configurations, because its modules and the models that it wraps also
    have one.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if _describes_experts(config):
            # by id, because modules share the object and configurations have no hash
            configs[id(config)] = config
    return list(configs.values())


def numbered_layers(model: nn.Module) -> dict[int, RoutedActivation]:
    """Map the number of each routed FFN of a model to the FFN.

    The numbers count all FFNs of ``model``, even if only a submodule of it was converted.

    Raises:
        ConversionError: a routed FFN is not among the FFNs that the registry names for the model.
    """
    # a routed layer is the activation of its FFN
    number_of_activation = {id(ffn.activation): ffn.index for ffn in find_ffns(model)}
    numbered = {}
    for layer in routed_layers(model):
        number = number_of_activation.get(id(layer))
        if number is None:
            raise ConversionError(
                f"the row of {type(model).__name__} lacks {layer.ffn.name}: save the converted part"
            )
        numbered[number] = layer
    return numbered


def copy_config_(model: nn.Module) -> None:
    """Give a transformers model a configuration of its own: a copy.

    Other models may share the present configuration, and must not change with this model.
    """
    shared: Any = getattr(model, "config", None)
    if not hasattr(shared, "to_diff_dict"):
        return
    _replace_config_(model, shared, copy.copy(shared))


def _replace_config_(model: nn.Module, old: Any, new: Any) -> None:
    """Replace a configuration that a model and its modules share by another one."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _describes_experts(config: Any) -> bool:
    """Check if a transformers configuration describes experts.

    They are described under ``quantization_config``, or under ``emoe`` in a quantised model.
    """
    return is_ours(getattr(config, QUANTIZATION_CONFIG, None)) or hasattr(config, SEPARATE_KEY)


def _stored_layers(config: Any) -> tuple[int, ...]:
    """Return the numbers of the converted FFNs in a configuration that describes experts."""
    content: Any = getattr(config, QUANTIZATION_CONFIG, None)
    if not is_ours(content):
        content = getattr(config, SEPARATE_KEY)
    return tuple(content["layers"])


def _write_description(config: Any, experts: Experts) -> None:
    """Write a description of experts into a transformers configuration.

    The key is ``quantization_config`` or, for a quantised model, ``emoe``.
    """
    quantization_config = getattr(config, QUANTIZATION_CONFIG, None)
    is_quantised = quantization_config is not None and not is_ours(quantization_config)
    if is_quantised:
        content = {"config": experts.config.to_dict(), "layers": list(experts.layers)}
        setattr(config, SEPARATE_KEY, content)
        setattr(config, IMPLEMENTATION_KEY, NEEDS_FROM_PRETRAINED)
    else:
        _remove_description(config)  # an older description
        setattr(config, QUANTIZATION_CONFIG, experts.quantization_config())
        setattr(config, IMPLEMENTATION_KEY, NEEDS_EMOE)


def _remove_description(config: Any) -> None:
    """Remove the keys that describe experts from a transformers configuration."""
    if is_ours(getattr(config, QUANTIZATION_CONFIG, None)):
        delattr(config, QUANTIZATION_CONFIG)
    for key in (SEPARATE_KEY, IMPLEMENTATION_KEY):
        if hasattr(config, key):
            delattr(config, key)
