"""The ``method`` section of a run's spec, and short names of varied settings."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.methods import (
    CONFIG_FIELDS,
    LoRA,
    Method,
    merge_methods,
    tuning_spec,
)
from benchmarks.harness.config.yaml import Location, NotNegative, Strict
from emoe.config import EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import ConfigError, nearest_divisor

_MANY_LAYERS = 10_000  # more than any model has, so that only the form of a request is checked
VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
TRAINING_KEYS = ("train_share", "epochs_factor")  # training settings that a variant also names
# the letter of each setting in a variant such as ``N16-k0.25``
_LETTER_OF_SETTING = {
    "num_experts": "N",
    "top_k_fraction": "k",
    "layers": "L",
    "train_share": "D",  # share of the training data
    "epochs_factor": "E",  # factor on the usual epochs
}
# the description of each setting, by its letter
_WORDS_OF_LETTER = {
    "N": "N {}",
    "k": "k/N {}",
    "L": "{}",
    "D": "{} % of the rows",
    "E": "{} times the epochs",
}

_ORDINALS = {"2": "second", "3": "third", "4": "fourth"}  # others have an ending, as in 5th


class TuneSpec(Strict):
    """What a run trains if it does not train the whole model.

    Adapters and routers are trained too, and the head unless ``head`` is false.
    """

    blocks: str | list[int]
    """The trained transformer blocks: layer numbers or a request such as `last:2`; [] for none."""
    also: list[str]
    """Further trained modules, by the last part of their name."""
    tuning: str | None = None
    """Name of a registered tuning other than `blocks`. It selects the trained parameters."""
    layers: str | list[int] | None = None
    """The layers that are passed to the tuning."""
    head: bool = True
    """Train the head."""

    @property
    def selecting_tuning(self) -> str | None:
        """Return the name of the tuning that selects parameters, such as ``blocks``; None if none.

        Without a tuning, only adapters, head, routers and the modules in ``also`` are trained.
        """
        return "blocks" if self.blocks else self.tuning

    @property
    def selected_layers(self) -> str | list[int] | None:
        """Return the layers that are passed to the tuning; None if it gets none."""
        # the tuning `blocks` has its layers in the key `blocks`; others have them in `layers`
        return self.blocks or self.layers


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
    """Write varied settings as a short name, the variant: a letter and a value for each setting.

    >>> variant_of({"num_experts": 16, "top_k_fraction": 0.25, "layers": [3, 5]})
    'N16-k0.25-L3+5'
    """
    words = []
    for key, value in varied.items():
        if isinstance(value, list):
            text = "+".join(str(item) for item in value)
        elif isinstance(value, float):
            text = f"{value:g}"  # 2.0 is written as 2
        else:
            text = str(value)
        words.append(f"{_LETTER_OF_SETTING[key]}{text}")
    return "-".join(words)


def setting_values(variant: str) -> dict[str, str]:
    """Split a variant into the value of each setting, by letter.

    >>> setting_values("N16-L-1")
    {'N': '16', 'L': '-1'}
    """
    if not variant:
        return {}
    letters = "".join(_WORDS_OF_LETTER)
    # Split at each minus sign before the letter of a setting, which `(?=...)` does not consume. A
    # value may contain other minus signs, as in "L-1".
    settings = re.split(rf"-(?=[{letters}])", variant)
    values = {}
    for setting in settings:
        letter = setting[0]
        values[letter] = setting[1:]
    return values


def setting_text(variant: str, layers: Iterable[str] = ()) -> str:
    """Describe a variant in words.

    Args:
        variant: The short name of varied settings.
        layers: The layer numbers, which replace a request such as ``last:2``; empty if they are
            unknown.

    >>> setting_text("N32-k0.5-L28::2-D0.8")
    'N 32, k/N 0.5, layers 28::2, 80 % of the rows'
    >>> setting_text("L16::4", ["16", "20", "24", "28"])
    'layers 16, 20, 24, 28'
    >>> setting_text("Llast-half:2")
    'every second layer of the last half'
    """
    words = []
    for letter, value in setting_values(variant).items():
        text = value
        if letter == "L":
            text = _layers_text(value, layers)
        elif letter == "D":
            percent = float(value) * 100
            text = f"{percent:g}"
        words.append(_WORDS_OF_LETTER[letter].format(text))
    return ", ".join(words)


def _layers_text(request: str, layers: Iterable[str]) -> str:
    """Describe the layers of a variant, such as ``layer 3``, ``layers 3, 5`` or ``all layers``.

    Args:
        request: The layers as the variant has them: ``3+5``, or a request such as ``last:2``.
        layers: The layer numbers, which replace the request; empty if they are unknown.
    """
    numbers = list(layers)
    if not numbers:
        if request.startswith(("all", "last")):
            return _request_in_words(request)
        # layer numbers such as "3+5", or a slice such as "16::4"
        numbers = request.split("+")
    # a slice has colons; a negative number counts from the last layer
    is_single_layer = len(numbers) == 1 and ":" not in numbers[0]
    if is_single_layer:
        return f"layer {numbers[0]}"
    listed = ", ".join(numbers)
    return f"layers {listed}"


def _request_in_words(request: str) -> str:
    """Describe the layers of a request, which is ``all`` or begins with ``last``.

    >>> _request_in_words("last:2")
    'last 2 layers'
    >>> _request_in_words("last-quarter:1")
    'last quarter of the layers'
    """
    if request == "all":
        return "all layers"
    # "last:2" is the last 2 layers, but "last-half:2" is every second layer of the last half
    which, number = request.split(":")
    if which == "last" and number == "1":
        return "last layer"
    if which == "last":
        return f"last {number} layers"
    share = which.replace("-", " ")  # "last half"
    if number == "1":
        return f"{share} of the layers"
    ordinal = _ORDINALS.get(number, f"{number}th")
    return f"every {ordinal} layer of the {share}"


def remove_settings(variant: str, usual: Collection[str]) -> str:
    """Remove the settings in ``usual`` from a variant.

    >>> remove_settings("k0.5-L22", ["L22"])
    'k0.5'
    """
    settings = [f"{letter}{value}" for letter, value in setting_values(variant).items()]
    unusual = [setting for setting in settings if setting not in usual]
    return "-".join(unusual)


def method_spec(
    methods: Mapping[str, Method],
    point: Mapping[str, Any],
    seed: int,
    lora: LoRA | None,
    where: Location,
) -> dict[str, Any]:
    """Make the ``method`` section of a run's spec.

    Args:
        methods: The benchmark's methods by name, each with all its settings.
        point: The point of the grid: the method's name and its varied settings, if any.
        seed: The seed of the run.
        lora: The adapters that the run trains (``training.lora``); None if it has none.
        where: The location of the grid's block, for messages.

    Raises:
        DefinitionError: Two settings exclude each other, or a setting that another one needs is
            missing.
    """
    name = point["method"]
    varied = _varied_settings(methods[name], point)
    method = merge_methods(methods[name], Method(**varied))
    # training settings do not belong to the method, but its variant names them too
    varied_training = {key: point[key] for key in TRAINING_KEYS if key in point}
    where_method = f"{where}: method '{name}'"
    return {
        "name": name,
        "variant": variant_of({**varied, **varied_training}),
        "noise": float(method.noise),
        "config": _config(method, point["model"], seed, where_method),
        "tune": _tune(method, lora, where_method),
    }


def _tune(method: Method, lora: LoRA | None, where: str) -> dict[str, Any] | None:
    """Make ``method.tune`` of a run's spec; None if the run trains all parameters.

    Args:
        method: The method with its varied settings.
        lora: The adapters that the run trains (``training.lora``); None if it has none.
        where: The file, the keys and the method, for messages.

    Raises:
        DefinitionError: ``tune: blocks`` has no layers, or ``also_train`` has no effect.
    """
    trains_all_parameters = lora is None and method.tune is None
    if trains_all_parameters:
        if method.also_train is not None:
            raise DefinitionError(f"{where} sets 'also_train', which needs training.lora or 'tune'")
        return None
    if method.tune == "blocks" and method.layers is None:
        raise DefinitionError(f"{where} sets 'tune: blocks' but no 'layers', which it needs")
    return tuning_spec(method.tune, layers=method.layers, also=method.also_train or ())


def _varied_settings(method: Method, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a grid point that change the method.

    Other settings of the point have no effect on the method.
    """
    keys: tuple[str, ...]
    if method.kind != "dense":
        keys = VARIANT_KEYS
    elif method.tune is not None:
        # in a dense model, `layers` chooses the trained parameters
        keys = ("layers",)
    else:
        # no setting changes the model, so all points share one run
        keys = ()
    return {key: point[key] for key in keys if key in point}


def _check_divisor(num_experts: int, model: str, where: str) -> None:
    """Refuse a number of experts that does not divide the width of the model's FFNs.

    If models.yaml does not give the width, nothing is checked.
    """
    neurons = load_models()[model].neurons
    if neurons is None or neurons % num_experts == 0:
        return
    raise DefinitionError(
        f"{where}: num_experts is {num_experts}, but the {neurons} neurons of an FFN of "
        f"'{model}' cannot be split into equal experts; the nearest divisor is "
        f"{nearest_divisor(neurons, num_experts)}"
    )


def _check_layers(layers: str | Sequence[int], where: str) -> None:
    """Refuse an invalid request for layers, such as ``last-half`` without its number.

    Whether the model has the layers is checked when it is converted.
    """
    if not isinstance(layers, str):
        return  # numbers need no parsing
    try:
        # with so many layers, only the form of the text can be wrong
        resolve_layers(layers, _MANY_LAYERS)
    except ConfigError as error:
        raise DefinitionError(f"{where}: {error}") from None


def _config(method: Method, model: str, seed: int, where: str) -> dict[str, Any] | None:
    """Make the configuration of EMoE or GMoE with all its defaults; None for a dense model.

    Args:
        method: The method with its varied settings.
        model: The name of the model.
        seed: The seed of the run.
        where: The file, the keys and the method, for messages.

    Raises:
        DefinitionError: The settings do not fit together, or do not fit the model.
    """
    if method.kind == "dense":
        _check_dense(method, where)
        return None
    config = _experts_config(method, seed, where)
    _check_layers(config["layers"], where)
    if method.kind == "emoe":  # splits the neurons of an FFN; GMoE copies the whole FFN
        _check_divisor(config["num_experts"], model, where)
    return config


def _check_dense(method: Method, where: str) -> None:
    """Refuse settings of experts in a dense method, because they have no effect."""
    settings_of_experts = {*CONFIG_FIELDS, "as_published", "top_k_fraction"}
    if method.tune is not None:  # the tuning chooses the trained parameters by `layers`
        settings_of_experts.remove("layers")
    unused = [name for name in method.given() if name in settings_of_experts]
    if unused:
        raise DefinitionError(f"{where} is dense and takes no '{min(unused)}'")


def _experts_config(method: Method, seed: int, where: str) -> dict[str, Any]:
    """Make the configuration of EMoE or GMoE with all its defaults."""
    values = method.config_values()
    if method.top_k_fraction is not None:
        values["top_k"] = _top_k(method.top_k_fraction, values.get("num_experts"), where)
    if values.get("partition_seed") == "run":
        values["partition_seed"] = seed

    config_type: type[EMoEConfig] | type[GMoEConfig]
    config_type = EMoEConfig if method.kind == "emoe" else GMoEConfig
    try:
        if method.as_published:
            return config_type.as_published(method.as_published, **values).to_dict()
        return config_type(**values).to_dict()
    except (ConfigError, TypeError) as error:  # TypeError: a field without a default is missing
        raise DefinitionError(f"{where}: {error}") from error


def _top_k(fraction: float, num_experts: int | None, where: str) -> int:
    """Return the number of experts that ``top_k_fraction`` stands for.

    Refuse a fraction that does not give a whole number of experts, or gives less than one.

    Args:
        fraction: The value of ``top_k_fraction``.
        num_experts: The number of experts; None if no file sets it.
        where: The file, the keys and the method, for messages.
    """
    if num_experts is None:
        raise DefinitionError(f"{where} sets 'top_k_fraction' but no 'num_experts', which it needs")
    product = fraction * num_experts
    top_k = round(product)
    # allow for rounding: 0.28 * 25 is 7.000000000000001
    if top_k < 1 or not math.isclose(product, top_k):
        raise DefinitionError(
            f"{where}: top_k_fraction {fraction} of the experts is {product:g} experts"
        )
    return top_k


def check_frozen(
    num_frozen: int | None,
    method: MethodSpec,
    where: Location | str,
    num_layers: int | None = None,
) -> None:
    """Check that a method neither converts nor trains a frozen layer.

    Args:
        num_frozen: The number of frozen layers; None for none.
        method: The ``method`` section of the run's spec.
        where: The location of the settings, or words that name the model, for messages.
        num_layers: The number of layers of the model; None if it is unknown. A request such as
            ``last:2`` depends on this number, and is not checked without it.

    Raises:
        DefinitionError: The method uses a frozen layer.
    """
    if not num_frozen:
        return
    layers_by_verb: dict[str, str | list[int] | None] = {}
    if method.config is not None:
        layers_by_verb["converts"] = method.config.get("layers")
    if method.tune is not None:
        layers_by_verb["trains"] = method.tune.selected_layers
    for verb, request in layers_by_verb.items():
        lowest = _lowest_layer(request, num_layers)
        if lowest is not None and lowest < num_frozen:
            raise DefinitionError(
                f"{where}: method '{method.name}' {verb} layer {lowest}, "
                f"but training.frozen_layers is {num_frozen}. "
                f"Freeze fewer, or take layers from {num_frozen} on"
            )


def _lowest_layer(request: str | list[int] | None, num_layers: int | None) -> int | None:
    """Return the lowest requested layer.

    Return None if no layer is requested, or if the request depends on an unknown number of
    layers.
    """
    if not request:
        return None
    if num_layers is not None:
        return min(resolve_layers(request, num_layers))
    # the number of layers is unknown, so text and negative numbers cannot be resolved
    if isinstance(request, str) or min(request) < 0:
        return None
    return min(request)
