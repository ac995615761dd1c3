"""Methods as data: settings, tunings, plugins, and the ``method`` part of a run's spec."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import Field, create_model

from benchmarks.harness.base import BENCHMARKS, ROOT, DefinitionError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.yaml import (
    KEEP_INTEGER,
    Count,
    Counts,
    ExplicitNulls,
    Key,
    Names,
    NotNegative,
    Positive,
    Rate,
    Share,
    Shares,
    Strict,
    Whole,
    optional,
    read,
    read_yaml,
    refusal,
    registered,
)
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import ConfigError, nearest_divisor

if TYPE_CHECKING:
    from torch import nn


class Tuning(NamedTuple):
    """Define a tuning: a choice of trained parameters.

    Attributes:
        parameters: The function that returns the names of the trained parameters, given the converted and adapted
            model and the ``layers`` of the method.
        needs_layers: True if a method with this tuning must give ``layers``; else the function gets ``None``.
    """

    parameters: Callable[[nn.Module, Any], Iterable[str]]
    needs_layers: bool


TUNINGS: dict[str, Tuning] = {}


def register_tuning(
    name: str, parameters: Callable[[nn.Module, Any], Iterable[str]], *, needs_layers: bool = False
) -> None:
    """Register a tuning for ``tune: name``; ``docs/adding.md`` has a complete example.

    >>> register_tuning("norms", lambda model, layers: [name for name, _ in model.named_parameters() if "norm" in name])
    >>> del TUNINGS["norms"]

    Args:
        name: The name in YAML, and of the parameter group in a run's record.
        parameters: See :class:`Tuning`.
        needs_layers: See :class:`Tuning`.
    """
    TUNINGS[name] = Tuning(parameters, needs_layers)


def needs_layers(name: str | None) -> bool:
    """Return True if a tuning requires ``layers``; False for None."""
    return name in TUNINGS and TUNINGS[name].needs_layers


def tuning_spec(name: str | None, layers: Any, also: Iterable[str] = ()) -> dict[str, Any]:
    """Make the ``tune`` part of a run's spec.

    Args:
        name: The name of the tuning; None if only adapters, head and routers are trained.
        layers: The layers of the method.
        also: Further modules to train, by the last part of their name.
    """
    if name is None or name == "blocks":  # blocks have a key of their own
        return {"blocks": layers if name else [], "also": list(also)}
    tune = {"blocks": [], "also": list(also), "tuning": name}
    return tune | ({"layers": layers} if needs_layers(name) else {})


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Return True if a parameter belongs to one of the modules with these paths."""
    return any(name.startswith(f"{module}.") for module in modules)


def _block_parameters(model: nn.Module, layers: Any) -> list[str]:
    """Return the parameters of the transformer blocks whose FFNs ``layers`` selects."""
    from emoe.architectures import find_ffns  # needs PyTorch, unlike planning

    ffns = find_ffns(model)
    blocks = [block_of(ffns[layer].name) for layer in resolve_layers(layers, len(ffns))]
    return [name for name, _ in model.named_parameters() if is_below(name, blocks)]


def block_of(ffn: str) -> str:
    """Return the path of an FFN's block: the FFN's path up to its last number."""
    parts = ffn.split(".")
    last = max(number for number, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


register_tuning("blocks", _block_parameters, needs_layers=True)
# letter by setting: N experts, k / N, converted layers, share of the training rows (data), factor on the usual
# epochs
_LETTERS = {"num_experts": "N", "top_k_fraction": "k", "layers": "L", "train_share": "D", "epochs_factor": "E"}
_WORDS = {"N": "N {}", "k": "k/N {}", "L": "{}", "D": "{:g} % of the rows", "E": "{} times the epochs"}


def variant_of(varied: Mapping[str, Any]) -> str:
    """Name the variant of some settings.

    >>> variant_of({"num_experts": 16, "top_k_fraction": 0.25, "layers": [3, 5]})
    'N16-k0.25-L3+5'
    """
    values = {
        key: "+".join(map(str, v)) if isinstance(v, list) else f"{v:g}" if isinstance(v, float) else str(v)
        for key, v in varied.items()
    }
    return "-".join(f"{_LETTERS[key]}{value}" for key, value in values.items())


def setting_values(variant: str) -> dict[str, str]:
    """Return the values of a variant by letter.

    >>> setting_values("N16-L-1")
    {'N': '16', 'L': '-1'}
    """
    return dict(re.findall(rf"(?:^|-)([{''.join(_WORDS)}])(.*?)(?=-[{''.join(_WORDS)}]|$)", variant))


def setting_text(variant: str, layers: Iterable[str] = ()) -> str:
    """Describe a variant in words, with the numbers of its layers if they are known.

    >>> setting_text("N32-k0.5-L28::2-D0.8")
    'N 32, k/N 0.5, layer 28 on, every 2nd, 80 % of the rows'
    >>> setting_text("L16::4", ["16", "20", "24", "28"])
    'layers 16, 20, 24, 28'
    """
    read = {"D": lambda value: float(value) * 100, "L": lambda value: _layers_text("+".join(layers) or value)}
    return ", ".join(_WORDS[key].format(read.get(key, str)(value)) for key, value in setting_values(variant).items())


def _layers_text(layers: str) -> str:
    """Describe the layers of a variant in words.

    >>> [_layers_text(layers) for layers in ("5", "3+5", "8:12:2", "last-half:4", "all")]
    ['layer 5', 'layers 3, 5', 'layers 8, 10', 'last half of the layers, every 4th', 'all layers']
    """
    if bounds := re.fullmatch(r"(\d+):(\d+):?(\d*)", layers):
        layers = "+".join(map(str, range(int(bounds[1]), int(bounds[2]), int(bounds[3] or 1))))
    start, _, step = layers.rpartition(":")
    every = {"1": "", "2": ", every 2nd", "3": ", every 3rd"}.get(step, f", every {step}th")
    if start.endswith(":"):
        return f"layer {start.rstrip(':')} on{every}"
    if start.startswith("last-"):
        return f"{start.replace('-', ' ')} of the layers{every}"
    if layers == "all":
        return "all layers"
    return f"layer{'s' if '+' in layers or start else ''} {layers.replace('+', ', ')}"


def remove_settings(variant: str, usual: Collection[str]) -> str:
    """Remove the usual settings from a variant.

    >>> remove_settings("k0.5-L22", ["L22"])
    'k0.5'
    """
    return "-".join(f"{key}{value}" for key, value in setting_values(variant).items() if f"{key}{value}" not in usual)


def check_frozen(training: Mapping[str, Any], method: Mapping[str, Any], where: str, count: int | None = None) -> None:
    """Check that a method converts and trains nothing below the frozen layers.

    Args:
        training: The training settings of the run's spec.
        method: The method of the run's spec.
        where: The file and the keys, for messages.
        count: The number of layers of the model. Without it, requests that depend on it (``last:2``) are not checked.

    Raises:
        DefinitionError: The method uses a frozen layer.
    """
    frozen = training.get("frozen_layers") or 0
    for settings, verb in ((method["config"] or {}, "converts"), (method["tune"] or {}, "trains")):
        for layers in filter(None, (settings.get("layers"), settings.get("blocks"))):
            if count is not None:
                layers = resolve_layers(layers, count)
            if isinstance(layers, list) and 0 <= min(layers) < frozen:
                raise DefinitionError(
                    f"{where}: method '{method['name']}' {verb} layer {min(layers)}, but training.frozen_layers is "
                    f"{frozen}. Freeze fewer, or take layers from {frozen} on"
                )


Layers = str | Annotated[list[int], Field(min_length=1)]
CONTROL, ABLATION = "control", "ablation"
Role = Literal["baseline", "method", "control", "ablation"]
Kind = Literal["dense", "emoe", "gmoe"]


def _config_fields() -> dict[str, Any]:
    """Return the fields of EMoEConfig and GMoEConfig with their types and bounds, all of them optional."""
    bounds = {"minimum": "ge", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
    fields: dict[str, Any] = {}
    for config in (EMoEConfig, GMoEConfig):
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            limits = Field(**{bounds[key]: limit for key, limit in field.metadata.items()})
            fields[field.name] = (Annotated[hints[field.name], limits, KEEP_INTEGER] | None, None)
    del fields["version"]
    return fields


CONFIG_FIELDS = _config_fields()
_ConfigFields: Any = create_model("_ConfigFields", __base__=ExplicitNulls, **CONFIG_FIELDS)


class Method(_ConfigFields):  # type: ignore[misc]
    """A method, or some of its settings: methods.yaml defines it; a benchmark, a suite and a grid may change it.

    Each of these files gives some keys, also those of :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`.
    :func:`merge_methods` merges them; the result has a title and a kind.
    """

    method: str | None = None
    """Name in methods.yaml, if the row has another name."""
    title: str = optional()
    """Label in tables and figures."""
    kind: Kind = optional()
    """The model that is built: the dense one, EMoE, or GMoE."""
    role: Role = "method"
    """Purpose of the row. An ablation is shown only in the tables of `ablations`, with one row per setting."""
    noise: NotNegative = 0.0
    """Intensity of noisy tuning; 0 for none."""
    tune: Annotated[str, registered(TUNINGS)] | None = None
    """A registered tuning. It selects the trained parameters besides adapters (with training.lora), head and
    routers, instead of all parameters. `blocks` selects the transformer blocks whose FFNs `layers` names."""
    also_train: Names | None = None
    """With LoRA or `tune`: further modules to train, by the last part of their name (the authors' pooler and ln_f)."""
    as_published: Literal["tutel", "llama"] | None = None
    """Take the authors' own settings (of their Tutel layer, or of their Llama block mask) for every field that is not
    given."""
    top_k_fraction: Share | None = None
    """top_k as a share of num_experts."""
    layers: Layers | None = None
    """FFNs to convert: a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice."""
    partition_seed: Whole | Literal["run"] | None = None
    """Seed of the partition; `run` takes the run's own seed."""
    router: Annotated[str, registered(ROUTERS)] | None = None
    """A registered router. `avg_k` scores an expert by the mean of its keys, `cosine` is EMoE-learn's."""

    def model_post_init(self, _context: Any, /) -> None:
        if self.top_k is not None and self.top_k_fraction is not None:
            raise refusal("it has both top_k and top_k_fraction; keep one")

    def config_values(self) -> dict[str, Any]:
        """Return the configuration's fields that are set; ``partition_seed`` may be ``run``."""
        return {name: value for name, value in self.given().items() if name in CONFIG_FIELDS}


class LoRA(Strict):
    """Low-rank adapters, by peft."""

    rank: Count
    """r, the rank."""
    alpha: Positive
    """The scale is alpha / rank."""
    dropout: Rate
    """Dropout before an adapter."""
    targets: Annotated[dict[str, Names], Field(min_length=1)]
    """Names of the adapted layers, by the model's type."""
    base_lr_ratio: Positive = 0.1
    """Learning rate of the other trained parameters, as a share of the learning rate of adapters and head."""


class VariantAxes(Strict):
    """A block of a grid: a product of lists. Lists of method settings become part of the method's variant."""

    model: Names
    """Names in models.yaml."""
    method: Names
    """Names of methods."""
    num_experts: Counts | None = optional()
    """Values of num_experts to try."""
    top_k_fraction: Shares | None = optional()
    """Values of top_k_fraction to try."""
    layers: Annotated[list[Layers], Field(min_length=1)] | None = optional()
    """Values of layers to try."""


def import_plugins() -> None:
    """Import the plugins of ``methods.yaml``, which register routers and tunings in this process."""
    file = BENCHMARKS / "methods.yaml"
    content = read_yaml(file)
    # the file is checked later, because methods may use the plugins' names
    plugins = content.get("plugins") if isinstance(content, dict) else None
    if plugins and str(ROOT) not in sys.path:  # a job may have another working directory
        sys.path.append(str(ROOT))
    for name in plugins if isinstance(plugins, list) else ():
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            raise DefinitionError(f"{file}: 'plugins' names '{name}', which cannot be imported: {error!r}") from error


_TOP_K = {"top_k", "top_k_fraction"}  # two forms of one setting: each replaces the other


class MethodFile(Strict):
    """The definitions of methods; a method is data, not code."""

    plugins: list[str] = Field([])
    """Python modules that register routers (emoe.register_router) or tunings (register_tuning); every process of the
    suite imports them.
    """
    methods: dict[Key, Method]
    """The methods, by name."""


@functools.cache
def load_methods() -> dict[str, Method]:
    """Load the methods of ``benchmarks/methods.yaml``, after its plugins are imported."""
    import_plugins()
    file = BENCHMARKS / "methods.yaml"
    methods = read(file, MethodFile).methods
    for name, method in methods.items():
        if missing := [key for key in ("title", "kind") if key not in method.model_fields_set]:
            raise DefinitionError(f"{file}: 'methods.{name}' needs the key '{missing[0]}'")
    return methods


def merge_methods(*layers: Method) -> Method:
    """Merge the given settings of some layers; a later layer overrides an earlier one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        settings = layer.given()
        replaced = _TOP_K if _TOP_K & set(settings) else set()
        merged = {key: value for key, value in merged.items() if key not in replaced} | settings
    merged.pop("method", None)
    return Method(**merged)


VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
TRAINING_KEYS = ("train_share", "epochs_factor")  # training settings that also vary a row


def method_spec(
    methods: Mapping[str, Method], point: Mapping[str, Any], seed: int, lora: LoRA | None, where: str
) -> dict[str, Any]:
    """Make the ``method`` part of a run's spec.

    Args:
        methods: The methods from :func:`.benchmark.resolve_methods`.
        point: The point of the grid: the method's name, and perhaps its varied settings.
        seed: The seed of the run.
        lora: ``training.lora`` of the run.
        where: The file and the key, for messages.

    Raises:
        DefinitionError: Settings do not go together.
    """
    base = methods[point["method"]]
    # all variants share one dense run, unless the variant changes its trained blocks
    varying = VARIANT_KEYS if base.kind != "dense" else ("layers",) if needs_layers(base.tune) else ()
    varied = {key: point[key] for key in varying if key in point}
    method = merge_methods(base, Method(**varied))
    named = f"{where}': method '{point['method']}'"
    config = _config(method, seed, named)
    shape = load_models()[point["model"]].shape
    if shape and config and config["kind"] == "emoe" and shape.neurons % config["num_experts"]:
        raise DefinitionError(
            f"{named}: num_experts is {config['num_experts']}, but the {shape.neurons} neurons of an FFN of "
            f"'{point['model']}' cannot be split into equal experts; the nearest divisor is "
            f"{nearest_divisor(shape.neurons, config['num_experts'])}"
        )
    if needs_layers(method.tune) and method.layers is None:
        raise DefinitionError(f"{named} sets 'tune: {method.tune}' but no 'layers', which it needs")
    trains_all = lora is None and method.tune is None
    if trains_all and method.also_train is not None:
        raise DefinitionError(f"{named} sets 'also_train', which needs training.lora or 'tune'")
    return {
        "name": point["method"],
        "variant": variant_of({**varied, **{key: point[key] for key in TRAINING_KEYS if key in point}}),
        "noise": float(method.noise),
        "config": config,
        "tune": None if trains_all else tuning_spec(method.tune, method.layers, method.also_train or ()),
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
    config: type[EMoEConfig] | type[GMoEConfig] = EMoEConfig if method.kind == "emoe" else GMoEConfig
    try:
        if method.as_published:
            return config.as_published(method.as_published, **values).to_dict()
        return config(**values).to_dict()
    except (ConfigError, TypeError) as error:  # TypeError: a field without a default is missing
        raise DefinitionError(f"{where}: {error}") from error
