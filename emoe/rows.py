"""Rows of the registry: where an architecture's FFNs are, and what can be wrong with that before any model is there."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from emoe.errors import ConversionError, did_you_mean

_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_LIST = re.compile(r"(\*|[\w-]+)(\.(\*|[\w-]+))*")
HALVES = ("first", "last")


@dataclass(frozen=True)
class FFNSpec:
    """Say where one architecture's FFNs are. All paths but ``layers`` are relative to a layer.

    Attributes:
        layers: dotted path of the list of layers; matched as a suffix, so that one row serves the
            bare model, the model with a head, and a wrapped one. ``*`` stands for any one name
            (``stages.*.blocks``): then all lists that match are taken, in the model's order.
        proj_in: in-projection, whose rows are the keys. ``gate_proj`` for a gated FFN.
        activation: the activation between the projections: a module, or an attribute of the instance that holds a
            function (a method cannot be replaced).
        proj_out: out-projection, whose columns are the values.
        proj_up: second in-projection of a gated FFN (its output multiplies the activation's).
        fused: the in-projection of a gated FFN holds both halves; says where the activated one, whose rows
            are the keys, stands: ``"first"`` or ``"last"``.
        transposed: weights are stored ``[in, out]`` (GPT-2's Conv1D) instead of ``[out, in]``.
        between: modules between activation and out-projection. Each must be a dropout or an ``nn.Identity``.
        rows_first: a layer is called with ``[rows, tokens, h]``. False for ``[tokens, rows, h]`` (XLNet), so that padding and labels
            are told apart rightly; torch's own ``batch_first`` is read from the layer.
    """

    layers: str
    proj_in: str
    activation: str
    proj_out: str
    proj_up: str | None = None
    fused: Literal["first", "last"] | None = None
    transposed: bool = False
    between: tuple[str, ...] = ()
    rows_first: bool = True

    def missing(self, layer: nn.Module) -> str | None:
        """Find the first path of this row that a layer does not have, or None."""
        for path in filter(None, (self.proj_in, self.proj_up, self.proj_out, self.activation)):
            found = attribute_of(layer, path)
            if not isinstance(found, nn.Module) and not (path == self.activation and _is_own(layer, path)):
                return path
        return None


def check_row(key: Any, specs: tuple[Any, ...]) -> None:
    """Refuse a row that no model can fit (:class:`ConversionError`).

    Args:
        key: that it is registered by.
        specs: that it consists of.
    """
    if not isinstance(key, str) or not key:
        raise ConversionError(
            f"register_ffn: {key!r} is no key; give model.config.model_type or the name of the model's class"
        )
    where = f"register_ffn('{key}')"
    if not specs:
        raise ConversionError(f"{where} needs at least one FFNSpec")
    for spec in specs:
        if not isinstance(spec, FFNSpec):
            raise ConversionError(
                f"{where} takes emoe.FFNSpec(layers=…, proj_in=…, activation=…, proj_out=…), not {spec!r}"
            )
        _check_spec(spec, where)
    if len(set(specs)) < len(specs):
        raise ConversionError(f"{where} has the same FFNSpec twice")


def _check_spec(spec: FFNSpec, where: str) -> None:
    if not isinstance(spec.layers, str) or not _LIST.fullmatch(spec.layers):
        raise ConversionError(
            f"{where}: layers is {spec.layers!r}; write the dotted path of a list of layers, as 'encoder.layer' or 'stages.*.blocks'"
        )
    if not isinstance(spec.between, tuple):
        raise ConversionError(f"{where}: between is {spec.between!r}; write a tuple of paths, as ('dropout',)")
    named = {name: getattr(spec, name) for name in ("proj_in", "activation", "proj_out")}
    named |= {} if spec.proj_up is None else {"proj_up": spec.proj_up}
    named |= {f"between[{place}]": path for place, path in enumerate(spec.between)}
    taken: dict[str, str] = {}
    for name, path in named.items():
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ConversionError(
                f"{where}: {name} is {path!r}; write a dotted path below one layer, as 'mlp.fc1', without the layer's number"
            )
        if path in taken:
            raise ConversionError(f"{where}: {name} and {taken[path]} are both '{path}'")
        taken[path] = name
    if spec.fused is not None and spec.fused not in HALVES:
        raise ConversionError(f"{where}: fused is {spec.fused!r}{did_you_mean(spec.fused, HALVES)}")
    if spec.fused is not None and spec.proj_up is not None:
        raise ConversionError(f"{where}: fused means that proj_in holds both halves, so there is no proj_up beside it")
    if not isinstance(spec.transposed, bool):
        raise ConversionError(f"{where}: transposed is {spec.transposed!r}; write True or False")


def _is_own(layer: nn.Module, path: str) -> bool:
    """Whether a callable at a path is an attribute of the instance, which can be replaced, and no method."""
    prefix, _, name = path.rpartition(".")
    parent = attribute_of(layer, prefix) if prefix else layer
    return callable(getattr(parent, "__dict__", {}).get(name))


def attribute_of(layer: nn.Module, path: str) -> Any:
    """What stands at a dotted path below a layer, or None."""
    try:
        return operator.attrgetter(path)(layer)
    except AttributeError:
        return None
