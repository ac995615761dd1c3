"""The location of the FFNs in each architecture: one row of data per architecture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from emoe.errors import ConversionError, did_you_mean


@dataclass(frozen=True)
class FFNSpec:
    """The location of the FFNs in one architecture.

    All paths except ``layers`` are relative to a layer.

    Attributes:
        layers: dotted path of the list of layers. Names of modules must end with it, so one spec
            serves the bare model, the model with a head, and a wrapped model. ``*`` stands for any
            one name. With a ``*``, as in ``stages.*.blocks``, all lists that match are used, in the
            model's order.
        proj_in: path of the in-projection, whose rows are the keys. In a gated FFN, it is the
            projection that is activated (``gate_proj``).
        activation: path of the activation: a module, or an attribute of the instance that holds a
            function.
        proj_out: path of the out-projection, whose columns are the values.
        proj_up: path of the second in-projection of a gated FFN. Its output multiplies the
            activation's.
        fused: set if ``proj_in`` holds both in-projections of a gated FFN. Then it names the half
            that is activated, ``first`` or ``last``. The rows of this half are the keys.
        transposed: true if weights are stored as ``[in, out]`` (GPT-2's Conv1D) instead of
            ``[out, in]``.
        between: paths of the modules between activation and out-projection, each a dropout or an
            ``nn.Identity``.
    """

    layers: str
    proj_in: str
    activation: str
    proj_out: str
    proj_up: str | None = None
    fused: Literal["first", "last"] | None = None
    transposed: bool = False
    between: tuple[str, ...] = ()

    def in_paths(self) -> list[str]:
        """Return the paths of the in-projection and, if it is separate, the up-projection."""
        if self.proj_up:
            return [self.proj_in, self.proj_up]
        return [self.proj_in]

    def paths(self) -> list[str]:
        """Return the paths of all modules of the FFN."""
        return [*self.in_paths(), self.proj_out, self.activation, *self.between]

    def missing_path(self, layer: nn.Module) -> str | None:
        """Return the first path of this spec that a layer does not have, or None."""
        for path in self.paths():
            parent_path, _, name = path.rpartition(".")
            try:
                parent = layer.get_submodule(parent_path)
            except AttributeError:
                return path
            is_module = isinstance(getattr(parent, name, None), nn.Module)
            # The activation may also be a function. vars() finds it only if it is an attribute of
            # the instance: a conversion can replace such a function, but not a method of the class.
            is_function = path == self.activation and callable(vars(parent).get(name))
            if not is_module and not is_function:
                return path
        return None


def attribute_name(path: str) -> str:
    """Return the last name of a dotted path, which is an attribute of the parent module."""
    _, _, name = path.rpartition(".")
    return name


def _t5_specs(stack: str, position: int) -> list[FFNSpec]:
    """Return two specs of T5's FFNs: the plain FFN of T5 1.0, and the gated FFN of T5 1.1.

    ``stack`` is ``encoder`` or ``decoder``. ``position`` is the FFN's number among the sublayers of
    its block.
    """
    ffn = f"layer.{position}.DenseReluDense"
    plain = FFNSpec(
        layers=f"{stack}.block",
        proj_in=f"{ffn}.wi",
        activation=f"{ffn}.act",
        proj_out=f"{ffn}.wo",
        between=(f"{ffn}.dropout",),
    )
    gated = replace(plain, proj_in=f"{ffn}.wi_0", proj_up=f"{ffn}.wi_1")
    return [plain, gated]


# Positional arguments: layers, in-projection, activation, out-projection.
_BERT = FFNSpec(
    "encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"
)
_GATED = FFNSpec("layers", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", proj_up="mlp.up_proj")
_MLP = FFNSpec("layers", "mlp.fc1", "mlp.activation_fn", "mlp.fc2")
_TORCH = FFNSpec("layers", "linear1", "activation", "linear2", between=("dropout",))
_TIMM = FFNSpec("blocks", "mlp.fc1", "mlp.act", "mlp.fc2", between=("mlp.drop1", "mlp.norm"))

REGISTRY: dict[str, tuple[FFNSpec, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "electra": (_BERT,),
    "deberta-v2": (_BERT,),
    "distilbert": (FFNSpec("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2"),),
    "modernbert": (
        FFNSpec("layers", "mlp.Wi", "mlp.act", "mlp.Wo", fused="first", between=("mlp.drop",)),
    ),
    "gpt2": (FFNSpec("h", "mlp.c_fc", "mlp.act", "mlp.c_proj", transposed=True),),
    "gpt_neox": (FFNSpec("layers", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),),
    "opt": (FFNSpec("decoder.layers", "fc1", "activation_fn", "fc2"),),
    "t5": (*_t5_specs("encoder", 1), *_t5_specs("decoder", 2)),
    "llama": (_GATED,),
    "mistral": (_GATED,),
    "qwen2": (_GATED,),
    "qwen3": (_GATED,),
    "gemma": (_GATED,),
    "gemma2": (_GATED,),
    "gemma3_text": (_GATED,),
    "phi3": (
        FFNSpec("layers", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj", fused="first"),
    ),
    "phi": (_MLP,),
    "vit": (_MLP,),
    "deit": (_MLP,),
    "dinov2": (replace(_MLP, layers="encoder.layer"),),
    "clip_vision_model": (replace(_MLP, layers="encoder.layers"),),
    # models of timm and PyTorch have no model_type, so the key is the name of the class
    "VisionTransformer": (_TIMM,),
    "Beit": (_TIMM,),
    "SwinTransformer": (replace(_TIMM, layers="layers.*.blocks"),),
    "TransformerEncoder": (_TORCH,),
    "TransformerDecoder": (_TORCH,),
}


def register_ffn(key: str, *specs: FFNSpec) -> None:
    """Register where the models of an architecture have their FFNs.

    An earlier entry of the same key is replaced.

    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         up = torch.nn.Linear(8, 32)
    ...         down = torch.nn.Linear(32, 8)
    ...         ffn = torch.nn.ModuleDict({"up": up, "act": torch.nn.ReLU(), "down": down})
    ...         self.blocks = torch.nn.Sequential(ffn)
    >>> spec = emoe.FFNSpec("blocks", proj_in="up", activation="act", proj_out="down")
    >>> emoe.register_ffn("Net", spec)
    >>> config = emoe.EMoEConfig(num_experts=4, top_k=1, layers="all")
    >>> emoe.convert_(Net(), config).layers[0].expert_size
    8

    Args:
        key: ``model.config.model_type`` or, for models without a ``model_type``, the name of the
            model's class.
        *specs: locations of the FFNs, one spec for each list of layers or type of FFN. The FFNs are
            numbered in this order. If the model has FFNs of only some specs, the others are
            skipped.

    Raises:
        ConversionError: there is no spec, or ``between`` or ``fused`` of a spec is invalid.
    """
    if not specs:
        raise ConversionError(f"register_ffn: '{key}' needs at least one FFNSpec")
    for spec in specs:
        if not isinstance(spec.between, tuple) or spec.fused not in (None, "first", "last"):
            raise ConversionError(
                f"register_ffn: between must be a tuple, fused None, 'first' or 'last': {spec}"
            )
    REGISTRY[key] = specs


class FusedHalves(NamedTuple):
    """The two halves of a tensor of a fused in-projection.

    Attributes:
        activated: the half that belongs to the activated in-projection.
        up: the half that belongs to the up-projection.
    """

    activated: Tensor
    up: Tensor


class InBlocks(NamedTuple):
    """An in-projection or up-projection, split into one block of neurons for each expert.

    ``N`` is the number of experts, ``s`` the number of neurons of an expert.

    Attributes:
        weight: view of the weight ``[N, s, h]``.
        bias: view of the bias ``[N, s]``, None if the projection has none.
    """

    weight: Tensor
    bias: Tensor | None


class Blocks(NamedTuple):
    """The weights of an FFN, split into one block of neurons for each expert.

    ``N`` is the number of experts, ``s`` the number of neurons of an expert.

    Attributes:
        activated: the in-projection whose outputs are activated.
        up: the up-projection, None if the FFN is not gated.
        values: view of the out-projection's weight ``[N, s, h]``, one row for each neuron.
    """

    activated: InBlocks
    up: InBlocks | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN of a model: its modules, and views of its weights by neuron.

    ``h`` is the model's width, ``d`` the number of neurons.

    Attributes:
        index: number of the FFN in the model.
        name: qualified name of the FFN's layer.
        spec: location of the FFN's modules in its layer.
        parents: parent of each module of the FFN, by the module's path in the spec. The layer
            itself is kept only if it is such a parent. Otherwise a deep copy of an FFN would also
            copy the layer's attention.
        rows_first: true if the layer takes ``[rows, tokens, h]``. False if it takes
            ``[tokens, rows, h]``, as PyTorch's own layers with ``batch_first=False``.
    """

    index: int
    name: str
    spec: FFNSpec
    parents: dict[str, nn.Module]
    rows_first: bool

    def module(self, path: str) -> nn.Module:
        """Return the module at a path of the spec."""
        return cast(nn.Module, getattr(self.parents[path], attribute_name(path)))

    @property
    def proj_in(self) -> nn.Module:
        """The in-projection."""
        return self.module(self.spec.proj_in)

    @property
    def proj_up(self) -> nn.Module | None:
        """The up-projection. None if the FFN is not gated, or if the in-projection holds it."""
        if not self.spec.proj_up:
            return None
        return self.module(self.spec.proj_up)

    @property
    def proj_out(self) -> nn.Module:
        """The out-projection."""
        return self.module(self.spec.proj_out)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation, a module or a function."""
        return self.module(self.spec.activation)

    def replace(self, path: str, module: Callable[[Tensor], Tensor]) -> None:
        """Put a module at a path of the spec, or a function at the activation's path."""
        parent = self.parents[path]
        name = attribute_name(path)
        if not isinstance(module, nn.Module):
            delattr(parent, name)  # setattr rejects a function for a module
        setattr(parent, name, module)

    def in_projections(self) -> list[tuple[str, nn.Module]]:
        """Return the path and module of the in-projection, then those of the up-projection.

        The up-projection is left out if it is not a separate module.
        """
        return [(path, self.module(path)) for path in self.spec.in_paths()]

    def projections(self) -> list[tuple[str, nn.Module]]:
        """Return the path and module of each in-projection and of the out-projection."""
        return [*self.in_projections(), (self.spec.proj_out, self.proj_out)]

    def between(self) -> list[tuple[str, nn.Module]]:
        """Return the path and module of each module between activation and out-projection."""
        return [(path, self.module(path)) for path in self.spec.between]

    @property
    def d(self) -> int:
        """Number of neurons."""
        if has_float_matrix(self.proj_out):
            return self.values().shape[1]
        # a quantised or packed weight has another shape than the matrix
        return int(cast(Any, self.proj_out).in_features)

    @property
    def h(self) -> int:
        """Width of the FFN's input."""
        if has_float_matrix(self.proj_in):
            return self.keys().shape[1]
        return int(cast(Any, self.proj_in).in_features)

    @property
    def gated(self) -> bool:
        """True if an up-projection multiplies the activation."""
        return self.spec.fused is not None or self.spec.proj_up is not None

    def keys(self) -> Tensor:
        """View the in-projection's weight as key vectors ``[d, h]``, one row per neuron."""
        return self.keys_of(weight_of(self.proj_in))

    def keys_of(self, weight: Tensor) -> Tensor:
        """View an in-projection weight as key vectors ``[d, h]``."""
        return self._activated_half(self._in_linear_layout(weight))

    def key_bias(self) -> Tensor | None:
        """Return the bias of the pre-activations ``[d]`` as a view, or None."""
        bias = bias_of(self.proj_in)
        if bias is None:
            return None
        return self._activated_half(bias)

    def split_fused(self, tensor: Tensor, dim: int = 0) -> FusedHalves:
        """Split a tensor of a fused in-projection, whose dimension ``dim`` runs over neurons."""
        first, last = tensor.chunk(2, dim)
        if self.spec.fused == "first":
            return FusedHalves(activated=first, up=last)
        return FusedHalves(activated=last, up=first)

    def _activated_half(self, tensor: Tensor) -> Tensor:
        """Return the activated half of a tensor whose rows are neurons.

        If the in-projection is not fused, return the whole tensor.
        """
        if self.spec.fused is None:
            return tensor
        return self.split_fused(tensor).activated

    def _up_projection_half(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the up-projection's half of a tensor whose dimension ``dim`` runs over neurons.

        If the in-projection is not fused, return the whole tensor.
        """
        if self.spec.fused is None:
            return tensor
        return self.split_fused(tensor, dim).up

    def values(self) -> Tensor:
        """View the out-projection's weight as value vectors ``[h, d]``, one column per neuron."""
        return self._in_linear_layout(weight_of(self.proj_out))

    def _in_linear_layout(self, weight: Tensor) -> Tensor:
        """View a projection's weight as ``[out, in]``, the layout of ``nn.Linear``."""
        return weight.t() if self.spec.transposed else weight

    def blocks(self, num_experts: int) -> Blocks:
        """Return views of the weights, split into equal blocks of neurons, one for each expert."""
        activated = _in_blocks(self.keys(), self.key_bias(), num_experts)
        up = None
        if self.gated:
            up = _in_blocks(self._up_weight(), self._up_bias(), num_experts)
        value_rows = self.values().t()  # [d, h], one row per neuron
        return Blocks(activated=activated, up=up, values=_by_expert(value_rows, num_experts))

    def up_module(self) -> nn.Module:
        """Return the module that computes the up-projection of a gated FFN.

        A fused in-projection computes the up-projection too, and is returned.
        """
        if self.proj_up is None:
            return self.proj_in
        return self.proj_up

    def _up_weight(self) -> Tensor:
        """View the up-projection's weight as ``[d, h]``, one row per neuron."""
        weight = weight_of(self.up_module())
        return self._up_projection_half(self._in_linear_layout(weight))

    def _up_bias(self) -> Tensor | None:
        """Return the up-projection's bias ``[d]`` as a view, or None."""
        bias = bias_of(self.up_module())
        if bias is None:
            return None
        return self._up_projection_half(bias)

    def up(self, x: Tensor) -> Tensor:
        """Compute the up-projection ``[..., d]`` of inputs ``[..., h]`` of a gated FFN."""
        module = self.up_module()
        projection = getattr(module, "projection", module)  # unwrap the sparse backend
        return self._up_projection_half(projection(x), dim=-1)

    def neuron_dims(self) -> dict[str, int]:
        """Map the path of each weight and bias to its dimension that runs over neurons.

        The out-projection's bias has no such dimension and is left out.
        """
        # a weight is [out, in], or [in, out] if it is transposed
        out_dim = 1 if self.spec.transposed else 0
        in_dim = 1 - out_dim
        dims = {f"{self.spec.proj_out}.weight": in_dim}
        for path in self.spec.in_paths():
            dims[f"{path}.weight"] = out_dim
            dims[f"{path}.bias"] = 0
        return dims

    def take(self, path: str, tensor: Tensor, neurons: Tensor) -> Tensor:
        """Return a projection's tensor with only the chosen neurons, in a new order.

        Args:
            path: path of the tensor, a key of :meth:`neuron_dims`.
            tensor: the FFN's tensor at this path.
            neurons: numbers ``[n]`` of the chosen neurons. Neuron ``neurons[i]`` becomes neuron i.
                A number may occur several times.
        """
        dim = self.neuron_dims()[path]
        indices = neurons.to(tensor.device)
        is_in_projection = path != f"{self.spec.proj_out}.weight"
        if is_in_projection and self.spec.fused is not None:
            # each neuron has a row in both halves, so choose in each half by itself
            halves = [half.index_select(dim, indices) for half in tensor.chunk(2, dim)]
            return torch.cat(halves, dim)
        return tensor.index_select(dim, indices)

    @torch.no_grad()
    def permute_(self, permutation: Tensor) -> None:
        """Reorder the neurons in place; ``permutation[i]`` becomes neuron i.

        The FFN still computes the same outputs.
        """
        for path in self.neuron_dims():
            module_path, _, name = path.rpartition(".")
            # a projection may have no bias
            tensor = cast("Tensor | None", getattr(self.module(module_path), name, None))
            if tensor is not None:
                tensor.copy_(self.take(path, tensor, permutation))


def _in_blocks(weight: Tensor, bias: Tensor | None, num_experts: int) -> InBlocks:
    """View a weight ``[d, h]`` and its bias ``[d]`` (or None) by expert."""
    bias_by_expert = None
    if bias is not None:
        bias_by_expert = _by_expert(bias, num_experts)
    return InBlocks(weight=_by_expert(weight, num_experts), bias=bias_by_expert)


def _by_expert(rows: Tensor, num_experts: int) -> Tensor:
    """View a tensor with a row for each neuron ``[d, ...]`` as ``[N, s, ...]``."""
    return rows.unflatten(0, (num_experts, -1))


def is_registered(model: nn.Module) -> bool:
    """Check if a model's architecture is in the registry."""
    return any(name in REGISTRY for name in _names_of_architecture(model))


def _names_of_architecture(model: nn.Module) -> list[str]:
    """Return the names that a model's architecture may have in the registry.

    They are the ``model_type``, if the model has one, its class, and the classes it derives from.
    """
    if hasattr(model, "get_base_model"):  # a PEFT model
        model = cast(Any, model).get_base_model()
    names = [cls.__name__ for cls in type(model).__mro__]
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type:
        names.insert(0, model_type)
    return names


def find_specs(model: nn.Module) -> tuple[FFNSpec, ...]:
    """Return the locations of a model's FFNs from the registry.

    Raises:
        ConversionError: the model's architecture is not in the registry.
    """
    names = _names_of_architecture(model)
    for name in names:
        if name in REGISTRY:
            return REGISTRY[name]
    suggestion = did_you_mean(names[0], REGISTRY)
    raise ConversionError(
        f"no FFN row for architecture '{names[0]}': "
        "add one with emoe.register_ffn(name, emoe.FFNSpec(...)), "
        f"or convert a submodule whose architecture has one{suggestion}"
    )


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find all FFNs of a model.

    They are numbered from 0 in the order of the layers. If the architecture has several specs, the
    FFNs of the first spec come first: T5's encoder before its decoder.

    Raises:
        ConversionError: the architecture is not in the registry, or the model lacks a list of
            layers or a module that the registry names.
    """
    specs = find_specs(model)
    candidates = []
    for spec in specs:
        for name, layer in _find_layers(model, spec):
            candidates.append((spec, name, layer))
    if not candidates:
        raise ConversionError(f"{type(model).__name__} has no list of layers '{specs[0].layers}'")

    ffns: dict[tuple[int, str], FFN] = {}
    mismatches = []
    for spec, name, layer in candidates:
        missing_path = spec.missing_path(layer)
        if missing_path is not None:
            mismatches.append(f"{name} has no module '{missing_path}'")
            continue
        # The in-projection is a part of the key, because a layer may have two FFNs. If several
        # specs match the same FFN, the first one is used.
        key = (id(layer), spec.proj_in)
        if key not in ffns:
            ffns[key] = _locate_ffn(index=len(ffns), name=name, layer=layer, spec=spec)

    # one of several specs may be for FFNs that this model does not have
    is_mismatch_allowed = len(specs) > 1 and len(ffns) > 0
    if mismatches and not is_mismatch_allowed:
        raise ConversionError(f"{mismatches[0]}, which the row of its architecture names")
    return list(ffns.values())


def _find_layers(model: nn.Module, spec: FFNSpec) -> list[tuple[str, nn.Module]]:
    """Return a model's layers and their qualified names.

    The layers are the elements of the module lists whose names end in ``spec.layers``, in which
    ``*`` stands for any one name.

    Raises:
        ConversionError: several lists match, although ``spec.layers`` has no ``*``.
    """
    # "stages.*.blocks" becomes the regular expression `(.*\.)?stages\.[^.]+\.blocks`, which matches
    # stages.0.blocks and model.stages.1.blocks
    any_prefix = r"(.*\.)?"
    any_name = r"[^.]+"
    parts_around_stars = [re.escape(part) for part in spec.layers.split("*")]
    path_pattern = any_name.join(parts_around_stars)
    pattern = re.compile(any_prefix + path_pattern)

    lists = {}
    for name, module in model.named_modules():
        if pattern.fullmatch(name) and isinstance(module, nn.ModuleList | nn.Sequential):
            lists[name] = module
    if len(lists) > 1 and "*" not in spec.layers:
        raise ConversionError(
            f"{type(model).__name__} has several lists of layers '{spec.layers}': "
            f"{', '.join(lists)}; convert the submodule that holds the intended one"
        )

    layers = []
    for list_name, module_list in lists.items():
        for number, layer in enumerate(module_list):
            layers.append((f"{list_name}.{number}", layer))
    return layers


def _locate_ffn(index: int, name: str, layer: nn.Module, spec: FFNSpec) -> FFN:
    """Return the FFN of a layer that has all modules of a spec."""
    parents = {}
    for path in spec.paths():
        parent_path, _, _ = path.rpartition(".")
        parents[path] = layer.get_submodule(parent_path)
    # PyTorch's own layers take [tokens, rows, h] if their attention has batch_first=False
    attention = getattr(layer, "self_attn", None)
    rows_first = bool(getattr(attention, "batch_first", True))
    return FFN(index=index, name=name, spec=spec, parents=parents, rows_first=rows_first)


def weight_of(module: nn.Module) -> Tensor:
    """Return a projection's weight."""
    weight: Any = module.weight
    # in modules of torch.ao.quantization, `weight` is a method that returns the tensor
    if inspect.ismethod(weight):
        return weight()
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a projection's bias, None if it has none."""
    bias: Any = getattr(module, "bias", None)
    if inspect.ismethod(bias):
        return bias()
    return bias


def is_local_tensor(weight: Any) -> bool:
    """Check if a weight is an ordinary tensor whose values this process holds.

    False for a sharded weight, a quantised weight of another class, or one on the meta device.
    """
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


def has_float_matrix(module: nn.Module) -> bool:
    """Check if a module's weight is a floating-point matrix, not quantised or packed.

    The weight may be sharded, or on the meta device.
    """
    weight: Any = getattr(module, "weight", None)
    is_ordinary = type(weight) in (Tensor, nn.Parameter)
    # torch.export traces with fake tensors. Importing their class for isinstance() would be slow.
    is_fake = type(weight).__module__ == "torch._subclasses.fake_tensor"
    is_sharded = hasattr(weight, "full_tensor")
    if not (is_ordinary or is_fake or is_sharded):
        return False
    return weight.is_floating_point() and weight.ndim == 2
