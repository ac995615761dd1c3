"""Where the FFNs of each architecture are: one row of data per architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from emoe.errors import ConversionError, did_you_mean
from emoe.rows import HALVES, FFNSpec, attribute_of, check_row
from emoe.tensors import carried

_BERT = FFNSpec("encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
_GATED = FFNSpec("layers", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", proj_up="mlp.up_proj")
_HF_VIT = FFNSpec("layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2")
_TORCH = FFNSpec("layers", "linear1", "activation", "linear2", between=("dropout",))
_TIMM_VIT = FFNSpec("blocks", "mlp.fc1", "mlp.act", "mlp.fc2", between=("mlp.drop1", "mlp.norm"))


def _t5(stack: str, position: int) -> list[FFNSpec]:
    """The FFN of one of T5's two stacks in its two kinds: T5 1.0's, and the gated one of T5 1.1."""
    ffn = f"layer.{position}.DenseReluDense"
    between = (f"{ffn}.dropout",)
    return [
        FFNSpec(f"{stack}.block", f"{ffn}.wi", f"{ffn}.act", f"{ffn}.wo", between=between),
        FFNSpec(f"{stack}.block", f"{ffn}.wi_0", f"{ffn}.act", f"{ffn}.wo", proj_up=f"{ffn}.wi_1", between=between),
    ]


_REGISTRY: dict[str, tuple[FFNSpec, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "electra": (_BERT,),
    "deberta-v2": (_BERT,),
    "distilbert": (FFNSpec("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2"),),
    "modernbert": (FFNSpec("layers", "mlp.Wi", "mlp.act", "mlp.Wo", fused="first", between=("mlp.drop",)),),
    "gpt2": (FFNSpec("h", "mlp.c_fc", "mlp.act", "mlp.c_proj", transposed=True),),
    "gpt_neox": (FFNSpec("layers", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),),
    "opt": (FFNSpec("decoder.layers", "fc1", "activation_fn", "fc2"),),
    "t5": (*_t5("encoder", 1), *_t5("decoder", 2)),
    "llama": (_GATED,),
    "mistral": (_GATED,),
    "qwen2": (_GATED,),
    "qwen3": (_GATED,),
    "gemma": (_GATED,),
    "gemma2": (_GATED,),
    "gemma3_text": (_GATED,),
    "phi": (FFNSpec("layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),),
    "phi3": (FFNSpec("layers", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj", fused="first"),),
    "vit": (_HF_VIT,),
    "deit": (_HF_VIT,),
    "dinov2": (FFNSpec("encoder.layer", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),),
    "clip_vision_model": (FFNSpec("encoder.layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),),
    # timm models have no model_type: keyed by class
    "VisionTransformer": (_TIMM_VIT,),
    "Beit": (_TIMM_VIT,),
    "SwinTransformer": (
        FFNSpec("layers.*.blocks", "mlp.fc1", "mlp.act", "mlp.fc2", between=("mlp.drop1", "mlp.norm")),
    ),
    # torch's own
    "TransformerEncoder": (_TORCH,),
    "TransformerDecoder": (_TORCH,),
}


def register_ffn(key: str, *specs: FFNSpec) -> None:
    """Add or replace the row of an architecture.

    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         parts = {"up": torch.nn.Linear(8, 32), "act": torch.nn.ReLU(), "down": torch.nn.Linear(32, 8)}
    ...         self.blocks = torch.nn.Sequential(torch.nn.ModuleDict(parts))
    >>> emoe.register_ffn("Net", emoe.FFNSpec("blocks", proj_in="up", activation="act", proj_out="down"))
    >>> emoe.convert_(Net(), emoe.EMoEConfig(num_experts=4, top_k=1, layers="all")).layers[0].expert_size
    8

    Args:
        key: ``model.config.model_type`` or, for models without one, the name of the model's class.
        *specs: where its FFNs are. Several for a model with several stacks of layers, or with FFNs of
            several kinds; those that the model has are taken, in this order.

    Raises:
        ConversionError: no spec, or one that no model can fit: paths that are none or the same, ``proj_up`` beside ``fused``.
    """
    check_row(key, specs)
    _REGISTRY[key] = specs


def registered_ffns() -> dict[str, tuple[FFNSpec, ...]]:
    """A copy of the registry."""
    return dict(_REGISTRY)


class FunctionActivation(nn.Module):
    """A plain function in the place of an activation module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


@dataclass(frozen=True)
class FFN:
    """One located FFN. ``h`` is the model's width, ``d`` the FFN's number of neurons."""

    index: int
    name: str
    layer: nn.Module
    spec: FFNSpec

    @property
    def proj_in(self) -> nn.Module:
        return _submodule(self.layer, self.spec.proj_in)

    @property
    def proj_up(self) -> nn.Module | None:
        return _submodule(self.layer, self.spec.proj_up) if self.spec.proj_up else None

    @property
    def proj_out(self) -> nn.Module:
        return _submodule(self.layer, self.spec.proj_out)

    @property
    def activation(self) -> nn.Module:
        found = attribute_of(self.layer, self.spec.activation)
        return found if isinstance(found, nn.Module) else FunctionActivation(found)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at ``path`` below this layer; a :class:`FunctionActivation` as the function that it holds."""
        prefix, _, name = path.rpartition(".")
        parent = self.layer.get_submodule(prefix)
        if isinstance(module, FunctionActivation):
            delattr(parent, name)
            setattr(parent, name, module.function)
        else:
            setattr(parent, name, module)

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

    @property
    def d(self) -> int:
        """Number of neurons."""
        return self.values().shape[1] if has_plain_weight(self.proj_out) else int(cast(Any, self.proj_out).in_features)

    @property
    def h(self) -> int:
        """Width of the FFN's input."""
        return self.keys().shape[1] if has_plain_weight(self.proj_in) else int(cast(Any, self.proj_in).in_features)

    def keys(self) -> Tensor:
        """Key vectors, one row a neuron: ``[d, h]``, a view of the weight."""
        return self.keys_of(cast(Tensor, self.proj_in.weight))

    def keys_of(self, weight: Tensor) -> Tensor:
        """Key vectors ``[d, h]`` of an in-projection's weight that is stored as this one's: a view."""
        return self.activated_rows(weight.t() if self.spec.transposed else weight)

    def key_bias(self) -> Tensor | None:
        """Bias of the pre-activations ``[d]``, a view, or None."""
        bias = bias_of(self.proj_in)
        return None if bias is None else self.activated_rows(bias)

    def activated_rows(self, tensor: Tensor) -> Tensor:
        """The activated half of a fused in-projection's tensor, neurons first; another one as it is."""
        return tensor.chunk(2)[HALVES.index(self.spec.fused)] if self.spec.fused else tensor

    def values(self) -> Tensor:
        """Value vectors, one column a neuron: ``[h, d]``, a view of the weight."""
        weight = cast(Tensor, self.proj_out.weight)
        return weight.t() if self.spec.transposed else weight

    def blocks(self, num_experts: int) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
        """Views by expert: ``[N, s, h]`` weight and ``[N, s]`` bias of each in-projection (the activated one first), ``[N, s, h]`` values."""

        def split(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (num_experts, -1))

        inputs = [(self.keys(), self.key_bias())]
        if self.spec.proj_up or self.spec.fused:
            inputs.append(self._up_rows())
        split_inputs = [(split(rows), None if bias is None else split(bias)) for rows, bias in inputs]
        return split_inputs, split(self.values().t())

    def _up_rows(self) -> tuple[Tensor, Tensor | None]:
        module = self.proj_up or self.proj_in
        weight, bias = cast(Tensor, module.weight), bias_of(module)
        rows = weight.t() if self.spec.transposed else weight
        if not self.spec.fused:
            return rows, bias
        half = 1 - HALVES.index(self.spec.fused)
        return rows.chunk(2)[half], None if bias is None else bias.chunk(2)[half]

    def up(self, x: Tensor) -> Tensor:
        """Up-projection ``[..., d]`` of inputs ``[..., h]`` of a gated FFN."""
        if self.spec.fused:
            both = carried(self.proj_in(x))[0]
            return both.chunk(2, dim=-1)[1 - HALVES.index(self.spec.fused)]
        return carried(cast(nn.Module, self.proj_up)(x))[0]

    @property
    def rows_first(self) -> bool:
        """Whether a row's tokens follow each other."""
        return self.spec.rows_first and bool(getattr(getattr(self.layer, "self_attn", None), "batch_first", True))

    @property
    def gated(self) -> bool:
        return self.spec.fused is not None or self.spec.proj_up is not None

    def neuron_dims(self) -> dict[str, int]:
        """The dimension that counts neurons, of each tensor of the projections that has one, by its path below the layer."""
        dim = self.neuron_dim_in
        found = {f"{path}.{name}": at for path, _ in self.inputs() for name, at in (("weight", dim), ("bias", 0))}
        return {**found, f"{self.spec.proj_out}.weight": 1 - dim}

    def take(self, path: str, tensor: Tensor, neurons: Tensor) -> Tensor:
        """A projection's tensor with these neurons only, in this order.

        Args:
            path: of the tensor below the layer; one of :meth:`neuron_dims`.
            tensor: stored as this FFN's.
            neurons: ``[n]``; the neuron that goes to place i is ``neurons[i]``.
        """
        dim, neurons = self.neuron_dims()[path], neurons.to(tensor.device)
        if not self.spec.fused or path == f"{self.spec.proj_out}.weight":
            return tensor.index_select(dim, neurons)
        return torch.cat([half.index_select(dim, neurons) for half in self.parts(tensor, dim)], dim)

    @torch.no_grad()
    def permute_(self, permutation: Tensor) -> None:
        """Reorder the neurons in place; the dense function does not change.

        Args:
            permutation: ``[d]``; the neuron that goes to place i is ``permutation[i]``.
        """
        for path in self.neuron_dims():
            module, _, name = path.rpartition(".")
            tensor = cast("Tensor | None", getattr(_submodule(self.layer, module), name, None))
            if tensor is not None:
                tensor.copy_(self.take(path, tensor, permutation))

    def parts(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Views of an in-projection's tensor, each with one entry a neuron along ``dim``: two where it is fused."""
        return tensor.chunk(2, dim) if self.spec.fused else (tensor,)


def find_specs(model: nn.Module) -> tuple[FFNSpec, ...]:
    """The registry row of a model.

    Raises:
        ConversionError: the architecture has no row.
    """
    if hasattr(model, "get_base_model"):  # a PEFT model
        model = cast(Any, model).get_base_model()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = [*([model_type] if model_type else []), *(cls.__name__ for cls in type(model).__mro__)]
    for name in names:
        if name in _REGISTRY:
            return _REGISTRY[name]
    raise ConversionError(
        f"no FFN row for architecture '{names[0]}'{did_you_mean(names[0], _REGISTRY)}. "
        "Add one with emoe.register_ffn(name, emoe.FFNSpec(...)), or convert the part of the model that has one"
    )


def find_ffns(model: nn.Module) -> list[FFN]:
    """All FFNs of a model, first layer first, numbered through.

    Raises:
        ConversionError: unknown architecture, no or several lists of layers, or a layer without
            the modules that the row names.
    """
    specs = find_specs(model)
    found = [(spec, prefix, layer) for spec in specs for prefix, layer in _layers(model, spec)]
    if not found:
        wanted = " or ".join(sorted({f"'{spec.layers}'" for spec in specs}))
        raise ConversionError(f"{type(model).__name__} has no list of layers {wanted}")
    fitting = [(spec, name, layer) for spec, name, layer in found if not spec.missing(layer)]
    if len(specs) == 1 and len(fitting) < len(found):
        spec, name, layer = next((spec, name, layer) for spec, name, layer in found if spec.missing(layer))
        raise ConversionError(f"{name} has no module '{spec.missing(layer)}', which the row of its architecture names")
    if not fitting:
        tried = ", ".join(sorted({path for spec, _, layer in found if (path := spec.missing(layer))}))
        raise ConversionError(
            f"no layer of {type(model).__name__} has an FFN of a known kind; missing modules: {tried}"
        )
    # where several specs of a row fit one FFN, the first counts
    own = {(id(layer), spec.proj_in): spec for spec, _, layer in reversed(fitting)}
    fitting = [(spec, name, layer) for spec, name, layer in fitting if own[id(layer), spec.proj_in] is spec]
    return [FFN(index, name, layer, spec) for index, (spec, name, layer) in enumerate(fitting)]


def _layers(model: nn.Module, spec: FFNSpec) -> list[tuple[str, nn.Module]]:
    """The layers of the lists that a row names, with their qualified names."""
    pattern = re.compile(r"(.*\.)?" + re.escape(spec.layers).replace(r"\*", r"[^.]+"))
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if pattern.fullmatch(name) and isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    if len(lists) > 1 and "*" not in spec.layers:
        raise ConversionError(
            f"{type(model).__name__} has several lists of layers '{spec.layers}': {', '.join(name for name, _ in lists)}. "
            "Convert the part of the model that holds the one you mean"
        )
    return [(f"{name}.{place}", layer) for name, module in lists for place, layer in enumerate(module)]


def bias_of(module: nn.Module) -> Tensor | None:
    """A projection's bias, where it has one."""
    return cast("Tensor | None", getattr(module, "bias", None))


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a projection's weight is a matrix of numbers: not quantised or packed; sharded ones count, which can be put together."""
    weight = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    # when it is exported, a weight has no numbers but is as plain; told by its name, for its module is large
    plain = plain or type(weight).__module__ == "torch._subclasses.fake_tensor"
    return plain and weight.is_floating_point() and weight.ndim == 2  # type: ignore[union-attr]


def _submodule(layer: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below a layer, by steps that compilers can follow."""
    found = layer
    for name in path.split("."):
        found = getattr(found, name)
    return found
