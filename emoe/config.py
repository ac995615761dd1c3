"""Configurations: frozen, made of plain values, checked when they are built."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

from emoe.errors import ConfigError, did_you_mean

Layers = str | tuple[int, ...]
Partition = Literal["kmeans", "random", "contiguous"]
Router = Literal["avg_k", "cosine"]
Selection = Literal["top", "bottom", "not_top", "random"]
Weighting = Literal["binary", "softmax", "softmax_times_k"]
Backend = Literal["auto", "masked"]

CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """What every routed FFN has in common. Use :class:`EMoEConfig` or :class:`GMoEConfig`."""

    kind: ClassVar[str]

    num_experts: int
    top_k: int
    layers: Layers | Sequence[int] = "last-half:2"
    backend: Backend = "auto"
    router_noise: float = 0.0
    aux_loss_coefficient: float = 0.0
    expert_dropout: float = 0.0
    version: int = CONFIG_VERSION

    def __new__(cls, *_args: object, **values: object) -> Self:
        # Checked here because the generated __init__ would only raise Python's own TypeError.
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field '{name}'{did_you_mean(name, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("num_experts", "top_k", "version"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._error(name, "a whole number of at least 1")
        if self.top_k > self.num_experts:
            raise self._error("top_k", f"at most num_experts ({self.num_experts})")
        if self.version > CONFIG_VERSION:
            raise self._error("version", f"at most {CONFIG_VERSION}; a newer release of emoe wrote it")
        for name in ("router_noise", "aux_loss_coefficient"):
            self._check_number(name, low=0.0)
        self._check_number("expert_dropout", low=0.0, below=1.0)
        object.__setattr__(self, "layers", self._plain_layers())

    def _plain_layers(self) -> Layers:
        if isinstance(self.layers, str):
            return self.layers
        numbers = tuple(self.layers) if isinstance(self.layers, Sequence) else ()
        if numbers and all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            return cast(tuple[int, ...], numbers)
        raise self._error("layers", "a non-empty list of layer numbers, 'all', 'last:2', 'last-half:2' or a slice")

    def _check_choices(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if typing.get_origin(hints[field.name]) is Literal:
                options = typing.get_args(hints[field.name])
                value = getattr(self, field.name)
                if value not in options:
                    raise ConfigError(f"{type(self).__name__}.{field.name} is {value!r}{did_you_mean(value, options)}")

    def _check_number(self, name: str, *, low: float, below: float = float("inf")) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < below:
            bound = f"a number of at least {low}" + (f" and below {below}" if below < float("inf") else "")
            raise self._error(name, bound)

    def _error(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {wanted}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, with the ``kind`` that :func:`config_from_dict` reads back."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown field, a missing field or a value out of range.
        """
        given = {name: value for name, value in values.items() if name != "kind"}
        if values.get("kind", cls.kind) != cls.kind:
            raise ConfigError(f"{cls.__name__} cannot read a configuration of kind {values['kind']!r}")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise ConfigError(f"{cls.__name__} needs the field '{field.name}'")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class EMoEConfig(RoutingConfig):
    """Split each chosen FFN into experts by its own keys (the paper's method).

    The plain constructor is the method without the confounders of the authors' code: no
    capacity, no router noise, no auxiliary loss, no extra dropout, one shared output bias.

    Attributes:
        num_experts: N. Must divide the FFN's width.
        top_k: experts that each token uses.
        layers: which FFNs: ``[8, 10]``, ``"all"``, ``"last:2"`` (the last two), ``"last-half:2"``
            (every second one of the latter half) or a slice such as ``"8:12:2"``.
        partition: how neurons are grouped: ``kmeans`` (balanced, on L2-normalised keys),
            ``random`` (seeded), ``contiguous``.
        partition_seed: seed of the partition.
        router: ``avg_k`` scores an expert by the mean of its keys and has no parameters;
            ``cosine`` is the learned router of EMoE-learn.
        selection: which experts are used: the ``top`` k scores, the ``bottom`` k, all except the
            top k (``not_top``), or k at ``random``.
        score_bias: add the mean bias of the expert's neurons to its avg-k score (off in the paper).
        weighting: ``binary`` gives every chosen expert weight 1. ``softmax`` normalises over the
            chosen ones (weights sum to 1, the published EMoE-learn, whose output starts at about
            1/k of the dense scale); ``softmax_times_k`` multiplies by k and removes that confounder.
        backend: ``masked`` is the reference; ``auto`` picks the best available.
        router_noise: standard deviation, times num_experts, of the noise on training scores.
        aux_loss_coefficient: weight that :func:`emoe.aux_loss` gives to the balance loss.
        expert_dropout: dropout on the hidden activation of the converted FFNs, after the activation.
    """

    kind: ClassVar[str] = "emoe"

    partition: Partition = "kmeans"
    partition_seed: int = 0
    router: Router = "avg_k"
    selection: Selection = "top"
    score_bias: bool = False
    weighting: Weighting = "binary"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.partition_seed, bool) or not isinstance(self.partition_seed, int):
            raise self._error("partition_seed", "a whole number")
        if not isinstance(self.score_bias, bool):
            raise self._error("score_bias", "true or false")
        if self.score_bias and self.router != "avg_k":
            raise self._error("score_bias", "false with router='cosine', which does not score by keys")
        if self.router == "cosine" and self.weighting == "binary":
            raise self._error(
                "weighting", "'softmax' or 'softmax_times_k' with router='cosine', else the router gets no gradient"
            )
        if self.selection == "not_top" and self.top_k == self.num_experts:
            raise self._error("top_k", "below num_experts with selection='not_top', or no expert is left")


@dataclass(frozen=True, kw_only=True)
class GMoEConfig(RoutingConfig):
    """Replace each chosen FFN by ``num_experts`` full copies and a learned cosine router (paper's baseline).

    Weights are normalised over the chosen experts and the output bias is shared, so that the
    converted model equals the dense one until the copies are trained apart. ``top_k=1`` is
    refused: a normalised single weight is the constant 1 and the router would learn nothing.
    Fields are those of :class:`EMoEConfig`.
    """

    kind: ClassVar[str] = "gmoe"

    num_experts: int = 6
    top_k: int = 2
    aux_loss_coefficient: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.num_experts > 1:
            raise self._error("top_k", "at least 2, so that the normalised weights carry a gradient to the router")


def config_from_dict(values: Mapping[str, Any]) -> EMoEConfig | GMoEConfig:
    """Build the configuration that ``values["kind"]`` names (``emoe`` or ``gmoe``)."""
    kinds: dict[str, type[EMoEConfig] | type[GMoEConfig]] = {"emoe": EMoEConfig, "gmoe": GMoEConfig}
    kind = values.get("kind")
    if kind not in kinds:
        raise ConfigError(f"kind is {kind!r}{did_you_mean(kind, kinds)}")
    return kinds[kind].from_dict(values)
