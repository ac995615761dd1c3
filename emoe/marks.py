"""The mark in a transformers model's ``config.json`` that says which of its FFNs are experts.

The model's library writes it wherever it writes the configuration: in every checkpoint of its ``Trainer``, in
``model.save_pretrained`` and on the hub. A stock class reads the model as dense and does not mind it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.errors import CheckpointError, ConfigError, ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.weights import STOCK_CONFIG_FILE, read_object, shorten

_NAME = "emoe"


@dataclass(frozen=True)
class Mark:
    """Which of a model's ``ffns`` FFNs, numbered through, are experts, and of which configuration."""

    config: EMoEConfig | GMoEConfig
    layers: list[int]
    ffns: int | None


def mark_(model: nn.Module) -> None:
    """Note in a converted model's configuration what its experts are; one that is not of transformers has none.

    Raises:
        ConversionError: routed FFNs that are not the model's own by the row of its architecture.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return
    if not hasattr(config, _NAME):  # a copy of its own, because other models may have been built from the same object
        shared, config = config, copy.copy(config)
        for module in model.modules():
            for name in [name for name, value in vars(module).items() if value is shared]:
                setattr(module, name, config)
    layers, ffns = numbered_layers(model)
    marked = {"config": next(iter(layers.values())).config.to_dict(), "layers": sorted(layers), "ffns": ffns}
    setattr(config, _NAME, marked)


def numbered_layers(model: nn.Module) -> tuple[dict[int, RoutedActivation], int]:
    """The routed FFNs of a model by their number among all its FFNs, and how many those are.

    The numbers are the model's own, also where only a part of it was converted, for itself.

    Raises:
        ConversionError: routed FFNs that are not the model's own by the row of its architecture.
    """
    ffns, layers = find_ffns(model), routed_layers(model)
    numbers = {id(ffn.activation): ffn.index for ffn in ffns}
    strange = [layer.ffn_name for layer in layers if id(layer) not in numbers]
    if strange:
        raise ConversionError(
            f"{strange[0]} was converted in a part of the model, and the row of {type(model).__name__} has no such FFN: save that part"
        )
    return {numbers[id(layer)]: layer for layer in layers}, len(ffns)


def renew_mark_(model: nn.Module) -> None:
    """Bring the mark up to date after the settings of a model's experts changed, or remove it with the last of them."""
    layers = routed_layers(model)
    for config in _marked_configs(model):
        if layers:
            setattr(config, _NAME, {**getattr(config, _NAME), "config": layers[0].config.to_dict()})
        else:
            delattr(config, _NAME)


def _marked_configs(model: nn.Module) -> Iterator[Any]:
    found = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    return (config for config in found.values() if hasattr(config, _NAME))


def no_experts(model: nn.Module, what: str, hint: str) -> ConversionError:
    """The error for a model that should be converted and is not.

    Args:
        model: without a routed FFN.
        what: was to be done with it.
        hint: what to do instead, unless the model was saved with experts and read by its stock class.
    """
    if any(True for _ in _marked_configs(model)):
        hint = "it was saved with experts, but loaded by its stock class, which reads it as dense: load it by emoe.from_pretrained"
    return ConversionError(f"{what}: the model has no routed FFN; {hint}")


def read_mark(folder: Path) -> Mark | None:
    """The mark of a folder's ``config.json``; None where there is no such file or mark.

    Raises:
        CheckpointError: a damaged file or mark.
    """
    path = folder / STOCK_CONFIG_FILE
    if not path.exists():
        return None
    content = read_object(path).get(_NAME)
    if content is None:
        return None
    mark = mark_from(content, f"{path}, '{_NAME}'")
    if not mark.layers or mark.layers != sorted(set(mark.layers)):
        raise CheckpointError(f"{path}, '{_NAME}' is damaged: 'layers' is no ascending list of layer numbers")
    return mark


def mark_from(content: Any, where: str) -> Mark:
    """Configuration and layer numbers as a file holds them.

    Args:
        content: of the file.
        where: what the errors call it.

    Raises:
        CheckpointError: it is not of this form.
    """
    content = content if isinstance(content, dict) else {}
    config, layers, ffns = (content.get(name) for name in ("config", "layers", "ffns"))
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is damaged: 'config' is no object")
    if not isinstance(layers, list) or not all(type(index) is int for index in layers):
        raise CheckpointError(f"{where} is damaged: 'layers' is no list of layer numbers")
    if ffns is not None and type(ffns) is not int:
        raise CheckpointError(f"{where} is damaged: 'ffns' is no number")
    try:
        return Mark(config_from_dict(config), layers, ffns)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {shorten(str(error), 300)}") from error
