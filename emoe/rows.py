"""What can be wrong with a row of the registry, before any model is there to hold against it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from emoe.errors import ConversionError, did_you_mean

if TYPE_CHECKING:
    from emoe.architectures import FFNSpec

_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_LIST = re.compile(r"(\*|[\w-]+)(\.(\*|[\w-]+))*")
HALVES = ("first", "last")


def check_row(key: Any, specs: tuple[Any, ...], kind: type[FFNSpec]) -> None:
    """Refuse a row that no model can fit (:class:`ConversionError`).

    Args:
        key: that it is registered by.
        specs: that it consists of.
        kind: what each has to be.
    """
    if not isinstance(key, str) or not key:
        raise ConversionError(
            f"register_ffn: {key!r} is no key; give model.config.model_type or the name of the model's class"
        )
    where = f"register_ffn('{key}')"
    if not specs:
        raise ConversionError(f"{where} needs at least one FFNSpec")
    for spec in specs:
        if not isinstance(spec, kind):
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
