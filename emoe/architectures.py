"""The location of the FFNs in each architecture: one row of data per architecture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from emoe.errors import ConversionError, did_you_mean

HALVES = ("first", "last")


@dataclass(frozen=True)
class FFNSpec:
    """Locate the FFNs of one architecture. All paths except ``layers`` are relative to a layer.

    Attributes:
        layers: dotted path of the list of layers, matched as a suffix: one row serves the bare model, the model with
            a head, and a wrapped model. ``*`` stands for any one name (``stages.*.blocks``); then all lists that
            match are used, in the model's order.
        proj_in: path of the in-projection, whose rows are the keys. ``gate_proj`` for a gated FFN.
        activation: path of the activation: a module, or an attribute of the instance that holds a function.
        proj_out: path of the out-projection, whose columns are the values.
        proj_up: path of the second in-projection of a gated FFN. Its output multiplies the activation's.
        fused: activated half, whose rows are the keys, if ``proj_in`` holds both halves of a gated FFN.
        transposed: weights are stored ``[in, out]`` (GPT-2's Conv1D) instead of ``[out, in]``.
        between: paths of the modules between activation and out-projection, each a dropout or an ``nn.Identity``.
    """

    layers: str
    proj_in: str
    activation: str
    proj_out: str
    proj_up: str | None = None
    fused: Literal["first", "last"] | None = None
    transposed: bool = False
    between: tuple[str, ...] = ()

    def paths(self) -> list[str]:
        """Return the paths of all modules of the FFN."""
        inputs = [self.proj_in, self.proj_up] if self.proj_up else [self.proj_in]
        return [*inputs, self.proj_out, self.activation, *self.between]

    def missing_path(self, layer: nn.Module) -> str | None:
        """Return the first path that a layer does not have, or None."""
        for path in self.paths():
            prefix, _, name = path.rpartition(".")
            try:
                parent = layer.get_submodule(prefix)
            except AttributeError:
                return path
            is_function = path == self.activation and callable(
                vars(parent).get(name)
            )  # a method cannot be replaced
            if not isinstance(getattr(parent, name, None), nn.Module) and not is_function:
                return path
        return None


def _t5_specs(stack: str, position: int) -> list[FFNSpec]:
    """Return the two kinds of FFN in one of T5's stacks: T5 1.0's, and the gated FFN of T5 1.1."""
    ffn = f"layer.{position}.DenseReluDense"
    plain = FFNSpec(
        f"{stack}.block", f"{ffn}.wi", f"{ffn}.act", f"{ffn}.wo", between=(f"{ffn}.dropout",)
    )
    return [plain, replace(plain, proj_in=f"{ffn}.wi_0", proj_up=f"{ffn}.wi_1")]


_BERT = FFNSpec(
    "encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"
)
_GATED = FFNSpec("layers", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", proj_up="mlp.up_proj")
_MLP = FFNSpec("layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2")
_TORCH = FFNSpec("layers", "linear1", "activation", "linear2", between=("dropout",))
_TIMM = FFNSpec("blocks", "mlp.fc1", "mlp.act", "mlp.fc2", between=("mlp.drop1", "mlp.norm"))

REGISTRY: dict[str, tuple[FFNSpec, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), (_BERT,)),
    "distilbert": (FFNSpec("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2"),),
    "modernbert": (
        FFNSpec("layers", "mlp.Wi", "mlp.act", "mlp.Wo", fused="first", between=("mlp.drop",)),
    ),
    "gpt2": (FFNSpec("h", "mlp.c_fc", "mlp.act", "mlp.c_proj", transposed=True),),
    "gpt_neox": (FFNSpec("layers", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),),
    "opt": (FFNSpec("decoder.layers", "fc1", "activation_fn", "fc2"),),
    "t5": (*_t5_specs("encoder", 1), *_t5_specs("decoder", 2)),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (_GATED,)
    ),
    "phi3": (
        FFNSpec("layers", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj", fused="first"),
    ),
    **dict.fromkeys(("phi", "vit", "deit"), (_MLP,)),
    "dinov2": (replace(_MLP, layers="encoder.layer"),),
    "clip_vision_model": (replace(_MLP, layers="encoder.layers"),),
    # timm's models and torch's own have no model_type: keyed by class
    **dict.fromkeys(("VisionTransformer", "Beit"), (_TIMM,)),
    "SwinTransformer": (replace(_TIMM, layers="layers.*.blocks"),),
    **dict.fromkeys(("TransformerEncoder", "TransformerDecoder"), (_TORCH,)),
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
        key: ``model.config.model_type`` or, for models without a ``model_type``, the name of the model's class.
        *specs: locations of its FFNs, one per stack of layers or kind of FFN. Those that exist in the model are used,
            in this order.

    Raises:
        ConversionError: ``between`` or ``fused`` of a spec is invalid.
    """
    for spec in specs:
        if not isinstance(spec.between, tuple) or spec.fused not in (None, *HALVES):
            raise ConversionError(
                f"register_ffn: between must be a tuple, fused None, 'first' or 'last': {spec}"
            )
    REGISTRY[key] = specs


@dataclass(frozen=True, eq=False)
class FFN:
    """Locate one FFN of a model. ``h`` is the model's width, ``d`` the number of neurons.

    Attributes:
        index: number of the FFN in the model.
        name: qualified name of the FFN's layer.
        spec: row of the architecture.
        parents: parent module of each path's last attribute, by path. Excludes the layer, so that copying an FFN
            does not copy the attention.
        rows_first: the layer takes ``[rows, tokens, h]``. False for PyTorch's own layers with ``batch_first=False``.
    """

    index: int
    name: str
    spec: FFNSpec
    parents: dict[str, nn.Module]
    rows_first: bool

    def module(self, path: str) -> nn.Module:
        """Return the module at a path of the spec."""
        return cast(nn.Module, getattr(self.parents[path], path.rpartition(".")[2]))

    @property
    def proj_in(self) -> nn.Module:
        """The in-projection."""
        return self.module(self.spec.proj_in)

    @property
    def proj_up(self) -> nn.Module | None:
        """The up-projection, None if there is no separate one."""
        return self.module(self.spec.proj_up) if self.spec.proj_up else None

    @property
    def proj_out(self) -> nn.Module:
        """The out-projection."""
        return self.module(self.spec.proj_out)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation, a module or a function."""
        return self.module(self.spec.activation)

    def replace(self, path: str, module: Callable[[Tensor], Tensor]) -> None:
        """Put a module, or the activation's function, at a path."""
        parent, name = self.parents[path], path.rpartition(".")[2]
        if not isinstance(module, nn.Module):
            delattr(parent, name)  # setattr rejects a function for a module
        setattr(parent, name, module)

    def in_projections(self) -> list[tuple[str, nn.Module]]:
        """Return the in-projection and, if it is a separate module, the up-projection, with their paths."""
        return [
            (path, self.module(path)) for path in (self.spec.proj_in, self.spec.proj_up) if path
        ]

    def projections(self) -> list[tuple[str, nn.Module]]:
        """Return the in-projections and the out-projection with their paths."""
        return [*self.in_projections(), (self.spec.proj_out, self.proj_out)]

    def between(self) -> list[tuple[str, nn.Module]]:
        """Return the modules between activation and out-projection with their paths."""
        return [(path, self.module(path)) for path in self.spec.between]

    @property
    def d(self) -> int:
        """Number of neurons."""
        return (
            self.values().shape[1]
            if has_plain_weight(self.proj_out)
            else int(cast(Any, self.proj_out).in_features)
        )

    @property
    def h(self) -> int:
        """Width of the FFN's input."""
        return (
            self.keys().shape[1]
            if has_plain_weight(self.proj_in)
            else int(cast(Any, self.proj_in).in_features)
        )

    @property
    def gated(self) -> bool:
        """True if an up-projection multiplies the activation."""
        return self.spec.fused is not None or self.spec.proj_up is not None

    def keys(self) -> Tensor:
        """View the in-projection's weight as key vectors ``[d, h]``, one row per neuron."""
        return self.keys_of(weight_of(self.proj_in))

    def keys_of(self, weight: Tensor) -> Tensor:
        """View an in-projection weight as key vectors ``[d, h]``."""
        return self.activated_rows(self._as_out_in(weight))

    def key_bias(self) -> Tensor | None:
        """Return the bias of the pre-activations ``[d]`` as a view, or None."""
        bias = bias_of(self.proj_in)
        return None if bias is None else self.activated_rows(bias)

    def activated_rows(self, tensor: Tensor) -> Tensor:
        """Return the activated half of a tensor whose rows are neurons; the whole tensor if it is not fused."""
        return tensor.chunk(2)[HALVES.index(self.spec.fused)] if self.spec.fused else tensor

    def _up_half(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the up-projection's half of a tensor whose rows are neurons; the whole tensor if it is not fused."""
        return (
            tensor.chunk(2, dim)[1 - HALVES.index(self.spec.fused)] if self.spec.fused else tensor
        )

    def values(self) -> Tensor:
        """View the out-projection's weight as value vectors ``[h, d]``, one column per neuron."""
        return self._as_out_in(weight_of(self.proj_out))

    def _as_out_in(self, weight: Tensor) -> Tensor:
        """View a weight as ``[out, in]``, transposed if the spec stores ``[in, out]``."""
        return weight.t() if self.spec.transposed else weight

    def blocks(self, num_experts: int) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
        """Return views of the weights by expert: in-projections, and values ``[N, s, h]``.

        Each in-projection (the activated one, then the up-projection of a gated FFN) has a weight ``[N, s, h]`` and a
        bias ``[N, s]`` or None.
        """

        def split(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (num_experts, -1))

        bias = self.key_bias()
        inputs = [(split(self.keys()), None if bias is None else split(bias))]
        if self.gated:
            up = self.proj_up or self.proj_in
            weight, bias = self._as_out_in(weight_of(up)), bias_of(up)
            inputs.append(
                (split(self._up_half(weight)), None if bias is None else split(self._up_half(bias)))
            )
        return inputs, split(self.values().t())

    def up(self, x: Tensor) -> Tensor:
        """Compute the up-projection ``[..., d]`` of inputs ``[..., h]`` of a gated FFN."""
        projection = self.proj_up or self.proj_in
        projection = getattr(projection, "projection", projection)  # unwrap the sparse backend
        return self._up_half(projection(x), -1)

    def neuron_dims(self) -> dict[str, int]:
        """Return the dimension that counts neurons for each projection tensor that has one, by path."""
        dim = 1 if self.spec.transposed else 0
        dims = {f"{self.spec.proj_out}.weight": 1 - dim}
        for path, _ in self.in_projections():
            dims |= {f"{path}.weight": dim, f"{path}.bias": 0}
        return dims

    def take(self, path: str, tensor: Tensor, neurons: Tensor) -> Tensor:
        """Select neurons ``[n]`` of the tensor at a path of :meth:`neuron_dims`; ``neurons[i]`` becomes neuron i."""
        dim, neurons = self.neuron_dims()[path], neurons.to(tensor.device)
        if not self.spec.fused or path == f"{self.spec.proj_out}.weight":
            return tensor.index_select(dim, neurons)
        return torch.cat([half.index_select(dim, neurons) for half in tensor.chunk(2, dim)], dim)

    @torch.no_grad()
    def permute_(self, permutation: Tensor) -> None:
        """Reorder the neurons in place; ``permutation[i]`` becomes neuron i. The outputs do not change."""
        for path in self.neuron_dims():
            module, _, name = path.rpartition(".")
            tensor = cast("Tensor | None", getattr(self.module(module), name, None))
            if tensor is not None:
                tensor.copy_(self.take(path, tensor, permutation))


def find_specs(model: nn.Module) -> tuple[FFNSpec, ...]:
    """Return the registry row of a model; raise :class:`ConversionError` if there is none."""
    if hasattr(model, "get_base_model"):  # a PEFT model
        model = cast(Any, model).get_base_model()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = [name for name in (model_type, *(cls.__name__ for cls in type(model).__mro__)) if name]
    for name in names:
        if name in REGISTRY:
            return REGISTRY[name]
    way_out = "Add one with emoe.register_ffn(name, emoe.FFNSpec(...)), or convert the submodule that has one"
    raise ConversionError(
        f"no FFN row for architecture '{names[0]}'{did_you_mean(names[0], REGISTRY)}. {way_out}"
    )


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find all FFNs of a model, numbered from the first layer.

    Raises:
        ConversionError: the architecture is unknown, or the model has no such list of layers or modules.
    """
    specs = find_specs(model)
    layers = [(spec, name, layer) for spec in specs for name, layer in _layers(model, spec)]
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no list of layers '{specs[0].layers}'")
    ffns: dict[tuple[int, str], FFN] = {}
    missing = []
    for spec, name, layer in layers:
        if path := spec.missing_path(layer):
            missing.append(f"{name} has no module '{path}'")
            continue
        parents = {path: layer.get_submodule(path.rpartition(".")[0]) for path in spec.paths()}
        batch_first = bool(getattr(getattr(layer, "self_attn", None), "batch_first", True))
        ffn = FFN(len(ffns), name, spec, parents, batch_first)
        ffns.setdefault(
            (id(layer), spec.proj_in), ffn
        )  # the first of several specs for the same FFN wins
    if missing and (len(specs) == 1 or not ffns):
        raise ConversionError(f"{missing[0]}, which the row of its architecture names")
    return list(ffns.values())


def _layers(model: nn.Module, spec: FFNSpec) -> list[tuple[str, nn.Module]]:
    """Return the layers in the module lists that ``spec.layers`` matches, with their qualified names."""
    pattern = re.compile(r"(.*\.)?" + re.escape(spec.layers).replace(r"\*", r"[^.]+"))
    kinds = nn.ModuleList | nn.Sequential
    lists = {
        name: m
        for name, m in model.named_modules()
        if pattern.fullmatch(name) and isinstance(m, kinds)
    }
    if len(lists) > 1 and "*" not in spec.layers:
        name = f"{type(model).__name__} has several lists of layers '{spec.layers}'"
        raise ConversionError(
            f"{name}: {', '.join(lists)}; convert the submodule that holds the intended one"
        )
    return [
        (f"{name}.{number}", layer)
        for name, layers in lists.items()
        for number, layer in enumerate(layers)
    ]


def weight_of(module: nn.Module) -> Tensor:
    """Return a projection's weight."""
    weight: Any = module.weight
    # the modules of torch.ao.quantization return it from a method
    return weight() if inspect.ismethod(weight) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a projection's bias, None if it has none."""
    bias: Any = getattr(module, "bias", None)
    return bias() if inspect.ismethod(bias) else bias


def is_plain_tensor(weight: Any) -> bool:
    """Check if a weight is an ordinary tensor: not sharded, quantised or on the meta device."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


def has_plain_weight(module: nn.Module) -> bool:
    """Check if a weight is a floating-point matrix: not quantised or packed. Sharded weights count as plain."""
    weight = getattr(module, "weight", None)
    # torch.export traces with fake tensors; compared by name because their module is slow to import
    is_fake = type(weight).__module__ == "torch._subclasses.fake_tensor"
    is_plain = is_fake or type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    return is_plain and weight.is_floating_point() and weight.ndim == 2  # type: ignore[union-attr]
