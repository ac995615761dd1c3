"""Watch over ``load_state_dict`` of a converted model: neurons in another order than its experts' would fit silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN
from emoe.config import EMoEConfig
from emoe.errors import CheckpointError
from emoe.layer import RoutedActivation, routed_layers

_SAMPLE = 64  # neurons that are looked up
_MOST = 0.9  # share of them that has to agree
_ALIKE = 0.8  # mean cosine of a neuron's key with the same neuron's after training, at least
_CERTAIN = 0.9  # cosine with another neuron, and
_UNLIKE = 0.5  # with the one in its place, by which a single neuron was moved

Order = Literal["same", "dense", "another", "unrelated"]


def guard_(model: nn.Module) -> None:
    """Let a freshly converted model, and each part of it, look at what is about to be loaded before anything is copied."""
    routed = [name for name, module in model.named_modules() if isinstance(module, RoutedActivation)]
    parts = [name.split(".") for name in routed]
    for name in sorted({".".join(names[:length]) for names in parts for length in range(len(names))}):
        model.get_submodule(name).register_load_state_dict_pre_hook(_check)


def unguard_(model: nn.Module) -> None:
    """Look no more, in a model or in one that it is a copy of."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", None) is _check:
                del hooks[key]


def _check(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse state whose neurons are known to stand in another order (:class:`CheckpointError`); nothing was copied yet."""
    names = {id(part): f"{prefix}{name}" for name, part in module.named_modules()}
    unrelated = []
    for layer in routed_layers(module):
        if not isinstance(layer.config, EMoEConfig) or id(layer.ffn.proj_in) not in names:
            continue
        keys = _incoming_keys(layer.ffn, state, names[id(layer.ffn.proj_in)])
        if keys is None:
            continue
        order = _order(keys, layer.ffn.keys().detach(), layer.permutation)
        if order == "unrelated" and _is_moved(layer) and _comes_from_dense(layer, state, names):
            order = "dense"
        if order == "dense":
            raise CheckpointError(
                f"the state dict is a dense model's: the neurons of {layer.ffn_name} stand in their first order there, not in that "
                "of the experts. Load it before emoe.convert_, or fold the experts back first (emoe.to_dense_(model, restore_order=True))"
            )
        if order == "another":
            raise CheckpointError(
                f"the state dict is of another partition: the neurons of {layer.ffn_name} stand in another order there than in "
                "this model's experts. Load it into a model that was converted with that partition (emoe.convert_(…, partition=…))"
            )
        if order == "unrelated":
            unrelated.append(layer)
    for layer in unrelated:  # other neurons altogether, so where they stood at first is not known
        layer.permutation = None


def _incoming_keys(ffn: FFN, state: Mapping[str, Any], name: str) -> Tensor | None:
    """Keys of a state dict; None where it has none, or none that can be compared."""
    present = cast(Tensor, ffn.proj_in.weight)
    incoming = state.get(f"{name}.weight", state.get(f"{name}.base_layer.weight"))
    plain = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in (present, incoming))
    if not plain or incoming.shape != present.shape or not incoming.is_floating_point():
        return None
    return ffn.keys_of(incoming.detach()).to(present.device)


def _order(incoming: Tensor, present: Tensor, permutation: Tensor | None) -> Order:
    """How the neurons of incoming keys ``[d, h]`` stand to those that are present, by which is most like which."""
    new, old = (F.normalize(keys.float(), dim=1) for keys in (incoming, present))
    count = min(len(old), _SAMPLE)
    sample = torch.arange(count, device=old.device) * len(old) // count
    likeness, nearest, mutual = _nearest(new, old, sample)
    if _share(nearest == sample) > 0.5:
        # most stand where they stood; those least like the neuron in their place are another's, or trained
        own = (new * old).sum(1)
        odd = own.topk(count, largest=False).indices
        likeness, nearest, mutual = _nearest(new, old, odd)
        strangers = mutual & (likeness > _CERTAIN) & (own[odd] < _UNLIKE)
        return "another" if int(strangers.sum()) > 1 else "same"
    if _share(mutual) < _MOST or float(likeness.mean()) < _ALIKE:
        return "unrelated"
    if permutation is not None and _share(nearest == torch.argsort(permutation).to(sample.device)[sample]) >= _MOST:
        return "dense"
    return "another"


def _nearest(new: Tensor, old: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For some new keys the cosine with the old one that is most like it, its place, and whether the two chose each other."""
    likeness, nearest = (new[rows] @ old.t()).max(1)
    return likeness, nearest, (old[nearest] @ new.t()).argmax(1) == rows


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def _is_moved(layer: RoutedActivation) -> bool:
    order = layer.permutation
    return order is None or not torch.equal(order, torch.arange(len(order)))


def _comes_from_dense(layer: RoutedActivation, state: Mapping[str, Any], names: dict[int, str]) -> bool:
    """Whether the model that gave a state dict had a plain activation in this place; safetensors do not tell."""
    modules = getattr(state, "_metadata", None) or {}
    return names[id(layer.ffn.proj_in)] in modules and f"{names[id(layer)]}.activation" not in modules
