"""A frozen prefix: embeddings and first layers of a network, whose output for a row never changes."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.frozen import refuse_below
from benchmarks.harness.config.tunings import block_of, is_below
from emoe.architectures import find_ffns
from emoe.layer_numbers import resolve_layers
from emoe.partitioning import tensor_digest

STATES = "prefix_states"  # the argument by which a model is handed the output of its prefix

_LLAMA, _BERT, _VIT = ("embed_tokens",), ("embeddings",), ("embeddings",)
# modules and parameters before the layers, beside the list of them; timm's models go by their class
_BEFORE: dict[str, tuple[str, ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": (*_BERT, "embeddings_project"),
    "gpt2": ("wte", "wpe", "drop"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "VisionTransformer": ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre"),
}


class Prefix:
    """The embeddings and the first layers of a network: without gradient, dropout and stochastic depth.

    A model that is called with ``prefix_states`` ``[rows, tokens, width]`` goes on from there: its frozen layers give back what it was
    handed. Called without them it runs as a whole. Modules, and names of parameters, are those of the whole model in both cases.

    Args:
        model: what is called: the network, or what holds it.
        network: a classifier or language model that is not yet converted or adapted.
        layers: how many layers are frozen.

    Attributes:
        names: of the frozen parameters, in the network.
        layers: how many layers are frozen.
        seconds: time spent on :meth:`output` so far.

    Raises:
        DefinitionError: the architecture is not known here, or has fewer layers.
    """

    def __init__(self, model: nn.Module, network: nn.Module, layers: int) -> None:
        ffns = find_ffns(network)
        paths = _frozen_paths(network, layers)
        self.names = _below(network, paths)
        self.layers, self._model, self._network, self._count = layers, model, network, len(ffns)
        self._blocks = [network.get_submodule(block_of(ffn.name)) for ffn in ffns[:layers]]
        modules = dict(network.named_modules())
        self._modules = [modules[path] for path in paths if path in modules]
        self._described = _described(network, self._modules)
        self._states: Tensor | None = None
        self.seconds = 0.0

    def check(self, method: Mapping[str, Any]) -> None:
        """See that a method leaves the prefix alone.

        Args:
            method: the ``method`` part of a run's spec.

        Raises:
            DefinitionError: it converts or trains one of the frozen layers.
        """
        named = f"the method '{method['name']}'"
        config, tune = method["config"], method["tune"]
        if config is not None:
            refuse_below(self.layers, resolve_layers(config["layers"], self._count)[0], f"{named} converts")
        if tune is not None and (trained := tune["blocks"] or tune.get("layers")):
            refuse_below(self.layers, resolve_layers(trained, self._count)[0], f"{named} trains")

    def freeze_(self) -> None:
        """Take the prefix out of training, for good: no gradient, and evaluation mode whatever the rest of the model is in."""
        for name in self.names:
            self._network.get_parameter(name).requires_grad_(False)
        for module in self._modules:
            module.eval()
            for part in module.modules():
                cast(Any, part).train = partial(_stay, part)
        for block in self._blocks:
            cast(Any, block).forward = partial(self._replay, block)
        self._model.register_forward_pre_hook(self._take, with_kwargs=True)
        self._model.register_forward_hook(self._forget, always_call=True)

    @functools.cached_property
    def digest(self) -> str:
        """What, beside a row, shapes the prefix's output: architecture, settings and weights."""
        found = hashlib.sha256(self._described.encode())
        for name, tensor in sorted(self._network.state_dict().items()):
            if name in self.names:
                found.update(f"{name}:{tensor_digest(tensor)}".encode())
        return found.hexdigest()

    @torch.inference_mode()
    def output(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the last frozen layer makes of a batch: ``[rows, tokens, width]``, float32, on the CPU.

        Args:
            inputs: that the model is called with.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(device)
        handle, started = self._blocks[-1].register_forward_hook(_stop), time.perf_counter()
        try:
            self._model(**{name: value.to(device) for name, value in inputs.items()})
        except _Reached as reached:
            return reached.states.float().cpu()
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started
        raise RuntimeError(f"{type(self._network).__name__} does not call its layers one after the other")

    def _take(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._states = kwargs.get(STATES)
        return args, {name: value for name, value in kwargs.items() if name != STATES}

    def _forget(self, *_call: object) -> None:
        self._states = None

    def _replay(self, block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._states is None:
            return type(block).forward(block, states, *args, **kwargs)
        return self._states.to(states.dtype)


class _Reached(Exception):  # noqa: N818  no error: ends a pass of which nothing more is wanted
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(_module: nn.Module, _args: object, output: Tensor) -> None:
    raise _Reached(output)


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    return module


def has_prefix(network: nn.Module) -> bool:
    """Whether it is known that a network's layers get nothing of those below but what the one before them puts out."""
    return _kind(network) in _BEFORE


def _below(network: nn.Module, paths: Collection[str]) -> frozenset[str]:
    return frozenset(name for name, _ in network.named_parameters() if name in paths or is_below(name, paths))


def _frozen_paths(network: nn.Module, layers: int) -> list[str]:
    """Paths of what is frozen: modules, and parameters that stand by themselves."""
    kind = _kind(network)
    if kind not in _BEFORE:
        raise DefinitionError(
            f"training.frozen_layers is {layers}, but nobody has said what stands before the layers of '{kind}'; this is known of {', '.join(_BEFORE)}"
        )
    ffns = find_ffns(network)
    if layers > len(ffns):
        raise DefinitionError(f"training.frozen_layers is {layers}, but the model has {len(ffns)} layers")
    around = block_of(ffns[0].name).removesuffix("0").removesuffix(f"{ffns[0].spec.layers}.")
    blocks = [block_of(ffn.name) for ffn in ffns[:layers]]
    return [*(f"{around}{name}" for name in _BEFORE[kind]), *blocks]


def _kind(network: nn.Module) -> str:
    return str(getattr(getattr(network, "config", None), "model_type", type(network).__name__))


def _described(network: nn.Module, modules: Collection[nn.Module]) -> str:
    """What shapes a prefix's function beside its weights; a change that would not matter only computes it again."""
    config = getattr(network, "config", None)
    settings = {} if config is None else {**config.to_dict(), "_name_or_path": ""}
    text = json.dumps(settings, sort_keys=True, default=str)
    return "\n".join([type(network).__name__, text, *map(repr, modules)])
