"""Where the FFNs of each architecture are: one row of data per architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from emoe.config import Layers
from emoe.errors import ConfigError, ConversionError, did_you_mean


@dataclass(frozen=True)
class FFNSpec:
    """One architecture's FFN. All paths but ``layers`` are relative to a layer.

    Attributes:
        layers: dotted path of the list of layers; matched as a suffix, so that one row serves the
            bare model, the model with a head, and a wrapped one.
        proj_in: in-projection, whose rows are the keys. ``gate_proj`` for a gated FFN.
        activation: the activation module between the projections.
        proj_out: out-projection, whose columns are the values.
        proj_up: second in-projection of a gated FFN (its output multiplies the activation's).
        transposed: weights are stored ``[in, out]`` (GPT-2's Conv1D) instead of ``[out, in]``.
        norm: a module between activation and out-projection that must be ``nn.Identity``.
    """

    layers: str
    proj_in: str
    activation: str
    proj_out: str
    proj_up: str | None = None
    transposed: bool = False
    norm: str | None = None


_BERT = FFNSpec("encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
_GATED = FFNSpec("layers", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", proj_up="mlp.up_proj")
_HF_VIT = FFNSpec("layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2")

_REGISTRY: dict[str, FFNSpec] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": FFNSpec("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2"),
    "gpt2": FFNSpec("h", "mlp.c_fc", "mlp.act", "mlp.c_proj", transposed=True),
    "vit": _HF_VIT,
    "deit": _HF_VIT,
    "dinov2": FFNSpec("encoder.layer", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    "llama": _GATED,
    # timm models have no model_type: keyed by class
    "VisionTransformer": FFNSpec("blocks", "mlp.fc1", "mlp.act", "mlp.fc2", norm="mlp.norm"),
}


def register_ffn(key: str, spec: FFNSpec) -> None:
    """Add or replace the row of an architecture.

    Args:
        key: ``model.config.model_type`` or, for models without one, the name of the model's class.
        spec: where its FFNs are.
    """
    _REGISTRY[key] = spec


def registered_ffns() -> dict[str, FFNSpec]:
    """A copy of the registry."""
    return dict(_REGISTRY)


@dataclass(frozen=True)
class FFN:
    """One located FFN. ``h`` is the model's width, ``d`` the FFN's number of neurons."""

    index: int
    name: str
    layer: nn.Module
    spec: FFNSpec

    @property
    def proj_in(self) -> nn.Module:
        return self.layer.get_submodule(self.spec.proj_in)

    @property
    def proj_up(self) -> nn.Module | None:
        return self.layer.get_submodule(self.spec.proj_up) if self.spec.proj_up else None

    @property
    def proj_out(self) -> nn.Module:
        return self.layer.get_submodule(self.spec.proj_out)

    @property
    def activation(self) -> nn.Module:
        return self.layer.get_submodule(self.spec.activation)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at ``path`` below this layer."""
        self.layer.set_submodule(path, module)

    def inputs(self) -> list[tuple[str, nn.Module]]:
        """The in-projections with their paths: one, or two for a gated FFN."""
        pairs = [(self.spec.proj_in, self.proj_in)]
        if self.spec.proj_up and self.proj_up is not None:
            pairs.append((self.spec.proj_up, self.proj_up))
        return pairs

    @property
    def neuron_dim_in(self) -> int:
        """Dimension of an in-projection's weight that counts neurons."""
        return 1 if self.spec.transposed else 0

    def keys(self) -> Tensor:
        """Key vectors, one row a neuron: ``[d, h]``, a view of the weight."""
        weight = cast(Tensor, self.proj_in.weight)
        return weight.t() if self.spec.transposed else weight

    @torch.no_grad()
    def permute_(self, permutation: Tensor) -> None:
        """Reorder the neurons in place; the dense function does not change.

        Args:
            permutation: ``[d]``; the neuron that goes to place i is ``permutation[i]``.
        """
        dim = self.neuron_dim_in
        for _, module in self.inputs():
            weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
            order = permutation.to(weight.device)
            weight.copy_(weight.index_select(dim, order))
            if bias is not None:
                bias.copy_(bias[order])
        values = cast(Tensor, self.proj_out.weight)
        values.copy_(values.index_select(1 - dim, permutation.to(values.device)))


def find_spec(model: nn.Module) -> FFNSpec:
    """The registry row of a model.

    Raises:
        ConversionError: the architecture has no row.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = [*([model_type] if model_type else []), *(cls.__name__ for cls in type(model).__mro__)]
    for name in names:
        if name in _REGISTRY:
            return _REGISTRY[name]
    raise ConversionError(
        f"no FFN row for architecture '{names[0]}'{did_you_mean(names[0], _REGISTRY)}. "
        "Add one with emoe.register_ffn(name, emoe.FFNSpec(...))"
    )


def find_ffns(model: nn.Module) -> list[FFN]:
    """All FFNs of a model, first layer first.

    Raises:
        ConversionError: unknown architecture, no or several lists of layers, or a layer without
            the modules that the row names.
    """
    spec = find_spec(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (name == spec.layers or name.endswith(f".{spec.layers}"))
        and isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    if len(found) != 1:
        where = ", ".join(name for name, _ in found) or "none"
        raise ConversionError(f"expected one list of layers '{spec.layers}' in {type(model).__name__}, found: {where}")
    prefix, layers = found[0]
    ffns = [FFN(index, f"{prefix}.{index}", layer, spec) for index, layer in enumerate(layers)]
    for ffn in ffns:
        for path in filter(None, (spec.proj_in, spec.proj_up, spec.activation, spec.proj_out)):
            try:
                ffn.layer.get_submodule(path)
            except AttributeError as error:
                raise ConversionError(f"{ffn.name} has no module '{path}' ({error})") from error
    return ffns


def resolve_layers(layers: Layers, count: int) -> list[int]:
    """Turn a request such as ``"last-half:2"`` into layer numbers.

    Args:
        layers: see :class:`emoe.EMoEConfig`.
        count: how many layers the model has.

    Raises:
        ConfigError: the text is not understood, or the request matches no layer.
    """
    if not isinstance(layers, str):
        wrong = [i for i in layers if not -count <= i < count]
        if wrong:
            raise ConfigError(f"layers {wrong} do not exist: the model has layers 0 to {count - 1}")
        chosen = sorted({i % count for i in layers})
        if len(chosen) != len(layers):
            raise ConfigError(f"layers {list(layers)} name the same layer twice")
        return chosen
    if layers == "all":
        return list(range(count))
    if match := re.fullmatch(r"last:(\d+)", layers):
        chosen = list(range(count))[-int(match[1]) :] if int(match[1]) else []
        if len(chosen) < int(match[1]):
            raise ConfigError(f"layers '{layers}' asks for more than the model's {count} layers")
    elif match := re.fullmatch(r"last-half:(\d+)", layers):
        chosen = list(range(count // 2, count, int(match[1]))) if int(match[1]) else []
    elif re.fullmatch(r"-?\d*:-?\d*(:\d*)?", layers):
        parts = [int(part) if part else None for part in layers.split(":")]
        chosen = list(range(count))[slice(*parts)] if parts[2:] != [0] else []
    else:
        raise ConfigError(
            f"layers '{layers}' is not understood; write a list, 'all', 'last:2', 'last-half:2' or a slice like '8:12:2'"
        )
    if not chosen:
        raise ConfigError(f"layers '{layers}' matches none of the model's layers 0 to {count - 1}")
    return chosen
