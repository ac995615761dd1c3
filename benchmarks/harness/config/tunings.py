"""The ways of tuning that YAML may name: which parameters are trained beside adapters, head and routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness.base.errors import DefinitionError
from emoe.layer_numbers import resolve_layers

if TYPE_CHECKING:
    from torch import nn

Parameters = Callable[["nn.Module", Any], Iterable[str]]


@dataclass(frozen=True)
class Tuning:
    """One way of tuning.

    Attributes:
        parameters: gives the names of the parameters of a model that are trained; it is called with the model, converted and
            with its adapters, and the ``layers`` of the method.
        needs_layers: whether a method that is tuned so must give ``layers``; else ``None`` is what the function gets.
    """

    parameters: Parameters
    needs_layers: bool


TUNINGS: dict[str, Tuning] = {}


def register_tuning(name: str, parameters: Parameters, *, needs_layers: bool = False) -> None:
    """Add a way of tuning, so that ``tune: name`` takes it (``docs/adding.md`` has a whole one).

    >>> register_tuning("norms", lambda model, layers: [name for name, _ in model.named_parameters() if "norm" in name])
    >>> del TUNINGS["norms"]

    Args:
        name: in YAML, and of the group of parameters in a run's record.
        parameters: see :class:`Tuning`.
        needs_layers: see :class:`Tuning`.

    Raises:
        DefinitionError: no name, or no function.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise DefinitionError(f"register_tuning: {name!r} is no name; write one like 'my_tuning'")
    if not callable(parameters):
        raise DefinitionError(f"register_tuning('{name}'): {parameters!r} is no function of a model and layers")
    TUNINGS[name] = Tuning(parameters, needs_layers)


def needs_layers(name: str | None) -> bool:
    """Whether a way of tuning must be told layers; False for None, which names no way."""
    return name in TUNINGS and TUNINGS[name].needs_layers


def tuning_spec(name: str | None, layers: Any, also: Iterable[str] = ()) -> dict[str, Any]:
    """The ``tune`` part of a run's spec.

    Args:
        name: of the way of tuning; None where only adapters, head and routers are trained.
        layers: what it is told, where it needs layers.
        also: further modules to train, by the last part of their name.
    """
    if name is None or name == "blocks":  # which has a key of its own
        return {"blocks": layers if name else [], "also": list(also)}
    found = {"blocks": [], "also": list(also), "tuning": name}
    return found | ({"layers": layers} if needs_layers(name) else {})


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is of one of the modules, which are given by their paths."""
    return any(name.startswith(f"{module}.") for module in modules)


def _block_parameters(model: nn.Module, layers: Any) -> list[str]:
    """The transformer blocks whose FFNs are named."""
    from emoe.architectures import find_ffns  # needs PyTorch, and ways of tuning are named where nothing is trained

    ffns = find_ffns(model)
    blocks = [block_of(ffns[layer].name) for layer in resolve_layers(layers, len(ffns))]
    return [name for name, _ in model.named_parameters() if is_below(name, blocks)]


def block_of(ffn: str) -> str:
    """The path of the block of an FFN: its own up to the last number."""
    parts = ffn.split(".")
    last = max(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


register_tuning("blocks", _block_parameters, needs_layers=True)
