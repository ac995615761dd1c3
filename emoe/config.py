"""Configurations: frozen, made of plain values, checked when they are built."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

from emoe.errors import ConfigError, did_you_mean

Layers = str | tuple[int, ...]
Partition = Literal["kmeans", "random", "contiguous", "coactivation"]
Selection = Literal["top", "bottom", "not_top", "random"]
Score = Literal["keys", "gate", "up", "up_abs", "inter", "inter_abs"]
# scores that are linear in the FFN's input: the experts' mean weights give them before any neuron is computed
LINEAR_SCORES = ("keys", "gate", "up")
Weighting = Literal["binary", "softmax", "softmax_times_k"]
BalanceLoss = Literal["corrected", "published"]
DropoutPosition = Literal["before", "after"]
OutputBias = Literal["shared", "per_expert", "per_expert_whole"]

# bounds of numbers, under their JSON Schema names
_BOUNDS: dict[str, tuple[Callable[[Any, float], bool], str]] = {
    "minimum": (operator.ge, "of at least {}"),
    "exclusiveMinimum": (operator.gt, "above {}"),
    "maximum": (operator.le, "of at most {}"),
    "exclusiveMaximum": (operator.lt, "below {}"),
}

CONFIG_VERSION = 1

# fields of older releases; ``from_dict`` ignores them if they changed nothing
_ANY = object()
_REMOVED_FIELDS = {
    "backend": _ANY,
    "decode_cache": _ANY,
    "score_threshold": None,
    "normalize_gate": False,
    "value_norm_weighted": False,
}


@dataclass(frozen=True)
class RegisteredRouter:
    """Describe a router that a configuration can name.

    Attributes:
        learned: the router has parameters, see :class:`emoe.Router`.
        load: function that returns the router's class.
    """

    learned: bool
    load: Callable[[], type[Any]]


def _load_router(name: str) -> Callable[[], type[Any]]:
    # imported on demand: a configuration does not need PyTorch, which takes a second to import
    return lambda: getattr(importlib.import_module("emoe.routers"), name)


# emoe.register_router adds to this
ROUTERS: dict[str, RegisteredRouter] = {
    "avg_k": RegisteredRouter(False, _load_router("AvgKRouter")),
    "cosine": RegisteredRouter(True, _load_router("CosineRouter")),
    "fixed": RegisteredRouter(False, _load_router("FixedRouter")),
}

# The authors' Tutel layer with the settings of their language scripts.
_TUTEL: dict[str, Any] = {
    "capacity_factor": 1.5,
    "count_padding": True,
    "router_noise": 1.0,
    "aux_loss_coefficient": 0.01,
    "balance_loss": "published",
    "expert_dropout": 0.1,
    "dropout_position": "before",
    "output_bias": "per_expert",
}


def _number(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """Return a dataclass field for a number within bounds, which have their JSON Schema names."""
    return dataclasses.field(default=default, metadata=bounds)


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Hold the settings that EMoE and GMoE share. Use :class:`EMoEConfig` or :class:`GMoEConfig`.

    Attributes:
        num_experts: number of experts N. EMoE: N must divide the FFN's width.
        top_k: number of experts that each token uses.
        layers: FFNs to convert: ``[8, 10]``, ``"all"``, ``"last:2"`` (the last two), ``"last-half:2"``
            (every second one of the last half), ``"last-quarter:2"`` or a slice such as ``"8:12:2"``.
        capacity_factor: None for no limit. A factor c limits each expert to ``top_k * int(c * ceil(T / N))`` of a
            forward pass's T tokens. Assignments beyond the limit are dropped, starting with the least confident
            tokens (batch-prioritised routing).
        count_padding: count padding tokens towards the capacity and in the balance loss. If false, call the model
            with its ``attention_mask``.
        router_noise: standard deviation of the noise on training scores, times num_experts.
        aux_loss_coefficient: weight of the balance loss in :func:`emoe.aux_loss`.
        balance_loss: ``corrected``, or ``published`` for the authors' formula, which compares
            probabilities with scores (see :func:`emoe.routing.balance_loss`).
        expert_dropout: dropout probability on the hidden neurons of the converted FFNs.
        dropout_position: ``after`` the activation (the authors' vision code) or ``before`` it (language).
        output_bias: ``shared`` keeps the FFN's single output bias. ``per_expert`` gives each expert its own bias,
            which starts as the FFN's bias divided by the number of active experts (the authors' language code, and
            EMoE in their vision code). ``per_expert_whole`` gives each copy of a GMoE the whole bias (their vision code).
        version: version of the configuration format.
    """

    kind: ClassVar[str]
    _published: ClassVar[dict[str, dict[str, Any]]]

    num_experts: int = _number(minimum=1)
    top_k: int = _number(minimum=1)
    layers: Layers | Sequence[int] = "last-half:2"
    capacity_factor: float | None = _number(None, exclusiveMinimum=0)
    count_padding: bool = False
    router_noise: float = _number(0.0, minimum=0.0)
    aux_loss_coefficient: float = _number(0.0, minimum=0.0)
    balance_loss: BalanceLoss = "corrected"
    expert_dropout: float = _number(0.0, minimum=0.0, exclusiveMaximum=1.0)
    dropout_position: DropoutPosition = "after"
    output_bias: OutputBias = "shared"
    version: int = _number(CONFIG_VERSION, minimum=1)

    def __new__(cls, *_args: object, **values: object) -> Self:
        # checked here because the generated __init__ would raise Python's own TypeError
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for name in values:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field '{name}'{did_you_mean(name, names)}")
        for field in fields if values else ():  # copy.copy calls this without values
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"{cls.__name__} needs the field '{field.name}'")
        return super().__new__(cls)

    @classmethod
    def as_published(cls, implementation: str, **values: Any) -> Self:
        """Build a configuration with the authors' settings (Qiu, Huang, Fu 2024, released code).

        Args:
            implementation: ``"tutel"`` for their language and vision code: capacity 1.5, router noise,
                balance loss, dropout inside the experts, one output bias per expert. EMoE also has
                ``"llama"``, their block mask on gated FFNs.
            **values: other fields, and fields to override. Their vision code has ``dropout_position="after"``, and
                for GMoE ``output_bias="per_expert_whole"``. Their ``capacity_factor=0`` (no limit) becomes None;
                a negative factor, which only saves memory there, becomes positive.

        Raises:
            ConfigError: the implementation, a field or a value does not exist.
        """
        if implementation not in cls._published:
            raise ConfigError(
                f"{cls.__name__}.as_published: implementation is {implementation!r}"
                f"{did_you_mean(implementation, cls._published)}"
            )
        factor = values.get("capacity_factor")
        if isinstance(factor, int | float) and factor <= 0:
            values["capacity_factor"] = -factor or None
        return cls(**{**cls._published[implementation], **values})

    def __post_init__(self) -> None:
        self._check_fields()
        if self.top_k > self.num_experts:
            raise self._error("top_k", f"at most num_experts ({self.num_experts})")
        if self.version > CONFIG_VERSION:
            raise self._error("version", f"at most {CONFIG_VERSION}; a newer release of emoe wrote it")
        if self.balance_loss == "published" and self.aux_loss_coefficient and not self.router_noise:
            raise self._error("router_noise", "above 0 with balance_loss='published', which divides by it")
        object.__setattr__(self, "layers", self._plain_layers())

    def _plain_layers(self) -> Layers:
        if isinstance(self.layers, str):
            return self.layers
        numbers = tuple(self.layers) if isinstance(self.layers, Sequence) else ()
        if numbers and all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            return cast(tuple[int, ...], numbers)
        raise self._error(
            "layers", "a non-empty list of layer numbers, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice"
        )

    def _check_fields(self) -> None:
        hints = self._type_hints()
        for field in dataclasses.fields(self):
            hint, value = hints[field.name], getattr(self, field.name)
            kinds = set(typing.get_args(hint) or (hint,))
            if typing.get_origin(hint) is Literal:
                if value not in typing.get_args(hint):
                    near = did_you_mean(value, typing.get_args(hint))
                    raise ConfigError(f"{type(self).__name__}.{field.name} is {value!r}{near}")
            elif hint is bool and not isinstance(value, bool):
                raise self._error(field.name, "true or false")
            elif kinds <= {int, float, type(None)} and not (value is None and type(None) in kinds):
                self._check_number(field.name, kinds, field.metadata)

    @classmethod
    @functools.cache  # reading the hints takes longer than the checks
    def _type_hints(cls) -> dict[str, Any]:
        return typing.get_type_hints(cls)

    def _check_number(self, name: str, kinds: set[type], bounds: Mapping[str, float]) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole or (float in kinds and isinstance(value, float) and math.isfinite(value))
        for bound, (holds, _) in _BOUNDS.items():
            fits = fits and (bound not in bounds or holds(value, bounds[bound]))
        if not fits:
            wanted = " and ".join(_BOUNDS[bound][1].format(number) for bound, number in bounds.items())
            kind = "a number" if float in kinds else "a whole number"
            raise self._error(name, f"{kind} {wanted}".strip() + (", or null" if type(None) in kinds else ""))

    def _error(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def num_active_experts(self) -> int:
        """Return the number of experts per token: ``top_k``, or ``N - top_k`` with ``selection="not_top"``."""
        return self.top_k

    @property
    def has_routing_state(self) -> bool:
        """Check if routed layers have state beyond the dense model's: a router, running gate, copies or expert biases."""
        return self.kind == "gmoe" or self.output_bias != "shared"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, including the ``kind`` that :func:`config_from_dict` reads."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from the output of :meth:`to_dict`, also of older releases.

        Raises:
            ConfigError: a field is unknown or missing, or a value is out of range.
        """
        ignored = {name for name, default in _REMOVED_FIELDS.items() if default is _ANY or values.get(name) == default}
        given = {name: value for name, value in values.items() if name not in {"kind", *ignored}}
        version = given.get("version")
        if isinstance(version, int) and version > CONFIG_VERSION:  # checked before the unknown fields of that release
            raise ConfigError(f"{cls.__name__}.version is {version}; a newer release of emoe wrote it")
        if values.get("kind", cls.kind) != cls.kind:
            raise ConfigError(f"{cls.__name__} cannot read a configuration of kind {values['kind']!r}")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class EMoEConfig(RoutingConfig):
    """Configure EMoE: split each chosen FFN into experts by clustering its keys (the paper's method).

    The plain constructor gives the method without the confounders of the authors' code: no capacity, router noise,
    auxiliary loss or extra dropout, and one shared output bias. :meth:`as_published` gives their settings.

    >>> emoe.EMoEConfig(num_experts=64, top_k=16, layers="last:2").num_active_experts
    16
    >>> emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16).capacity_factor
    1.5
    >>> emoe.EMoEConfig(num_experts=64, top_k=16, selektion="bottom")
    Traceback (most recent call last):
    emoe.errors.ConfigError: EMoEConfig has no field 'selektion'; did you mean 'selection'?

    Attributes:
        partition: grouping of the neurons: ``kmeans`` (balanced, on L2-normalised keys), ``coactivation``
            (balanced k-means on each neuron's activations for a calibration set), ``random`` (seeded), ``contiguous``.
        partition_seed: seed of the partition.
        router: ``avg_k`` scores an expert by the mean of its keys and has no parameters. ``cosine`` is the learned
            router of EMoE-learn. ``fixed`` is set by :func:`emoe.fix_experts_`. :func:`emoe.register_router` adds others.
        selection: experts to use: the ``top`` k scores, the ``bottom`` k, all except the top k (``not_top``), or k
            at ``random``.
        score: avg-k's score of an expert. ``keys`` is the product of the input and the mean key (the paper). The others
            are means over the expert's neurons: ``gate``, the pre-activation; ``up`` and ``up_abs``, the
            up-projection of a gated FFN and its absolute value; ``inter`` and ``inter_abs``, the input of the
            out-projection and its absolute value. ``up_abs``, and the two ``inter`` on gated FFNs, compute the
            up-projection twice.
        score_bias: add the mean bias of the expert's neurons to the ``keys`` score (not in the paper).
        gate_momentum: momentum m of running mean keys. :func:`emoe.update_gates_`, called after each optimizer step,
            sets them to ``m * previous + (1 - m) * mean keys``. With 0 the mean keys always follow the weights.
        weighting: ``binary`` gives every chosen expert weight 1. ``softmax`` normalises over the chosen experts
            (published EMoE-learn: the output starts at about 1/k of the dense scale); with ``top_k=1`` it is the
            probability among all experts, since the normalised weight would be constant. ``softmax_times_k`` multiplies by k,
            which removes the change of scale.
    """

    kind: ClassVar[str] = "emoe"
    _published: ClassVar[dict[str, dict[str, Any]]] = {"tutel": _TUTEL, "llama": {"score": "gate"}}

    partition: Partition = "kmeans"
    partition_seed: int = _number(0, minimum=0, maximum=2**63 - 1)
    router: str = "avg_k"
    selection: Selection = "top"
    score: Score = "keys"
    score_bias: bool = False
    gate_momentum: float = _number(0.0, minimum=0.0, exclusiveMaximum=1.0)
    weighting: Weighting = "binary"

    @classmethod
    def as_published(cls, implementation: str, **values: Any) -> Self:
        """Build a configuration with the authors' settings, see :meth:`RoutingConfig.as_published`.

        ``router="cosine"`` also sets their ``weighting="softmax"``.
        """
        if values.get("router") == "cosine":
            values.setdefault("weighting", "softmax")
        return super().as_published(implementation, **values)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.router, str) or self.router not in ROUTERS:
            near = did_you_mean(self.router, ROUTERS)
            raise ConfigError(
                f"{type(self).__name__}.router is {self.router!r}, which is not registered (emoe.register_router){near}"
            )
        learned = ROUTERS[self.router].learned
        if self.router != "avg_k" and self.score != "keys":
            raise self._error("score", f"'keys' with router='{self.router}', which has its own scores")
        for name in ("score_bias", "gate_momentum"):
            if getattr(self, name) and (self.router != "avg_k" or self.score != "keys"):
                raise self._error(name, "off unless router is 'avg_k' and score is 'keys', whose mean keys it shapes")
        if learned and self.weighting == "binary":
            raise self._error(
                "weighting",
                f"'softmax' or 'softmax_times_k' with router='{self.router}', else the router gets no gradient",
            )
        if self.weighting == "softmax_times_k" and self.top_k == 1 < self.num_experts and learned:
            raise self._error(
                "top_k", "at least 2 with weighting='softmax_times_k': the weight of a single expert would be 1"
            )
        if self.output_bias == "per_expert_whole":
            raise self._error(
                "output_bias", "'shared' or 'per_expert': an expert of EMoE is a part of the FFN, not a copy"
            )
        if self.selection == "not_top" and self.top_k == self.num_experts:
            raise self._error("top_k", "below num_experts with selection='not_top', or no expert is left")

    @property
    def num_active_experts(self) -> int:
        return self.num_experts - self.top_k if self.selection == "not_top" else self.top_k

    @property
    def has_routing_state(self) -> bool:
        return super().has_routing_state or self.router != "avg_k" or self.gate_momentum > 0


@dataclass(frozen=True, kw_only=True)
class GMoEConfig(RoutingConfig):
    """Configure GMoE, the paper's baseline: ``num_experts`` full copies of each chosen FFN and a learned cosine router.

    Weights are normalised over the chosen experts and the output bias is shared, so the converted model equals the
    dense model until training. With ``top_k=1`` a normalised weight would be constant and the router would not learn;
    the weight is then the probability among all experts, about 1/N at first, as in the authors' layer.
    """

    kind: ClassVar[str] = "gmoe"
    _published: ClassVar[dict[str, dict[str, Any]]] = {"tutel": {**_TUTEL, "num_experts": 6, "top_k": 1}}

    router: ClassVar[str] = "cosine"

    num_experts: int = _number(6, minimum=1)
    top_k: int = _number(2, minimum=1)
    aux_loss_coefficient: float = _number(0.01, minimum=0.0)


def config_from_dict(values: Mapping[str, Any]) -> EMoEConfig | GMoEConfig:
    """Build the configuration that ``values["kind"]`` names (``emoe`` or ``gmoe``).

    Args:
        values: output of :meth:`EMoEConfig.to_dict`, or the ``config`` of an ``emoe_config.json``.

    Raises:
        ConfigError: the kind or a field does not exist, a field is missing, or a value is out of range.
    """
    kinds: dict[str, type[EMoEConfig] | type[GMoEConfig]] = {"emoe": EMoEConfig, "gmoe": GMoEConfig}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"kind is {kind!r}{did_you_mean(kind, kinds)}")
    return kinds[kind].from_dict(values)


def check_config(config: object, caller: str) -> None:
    """Raise :class:`ConfigError` if an object is not a configuration."""
    if isinstance(config, EMoEConfig | GMoEConfig):
        return
    hint = "emoe.EMoEConfig(num_experts=64, top_k=16)"
    if isinstance(config, Mapping):
        hint = "emoe.config_from_dict({'kind': 'emoe', …})" if "kind" in config else "emoe.EMoEConfig(**values)"
    elif isinstance(config, type) and issubclass(config, EMoEConfig | GMoEConfig):
        hint = f"emoe.{config.__name__}(…), an instance"
    raise ConfigError(f"{caller}: the configuration is {config!r:.100}; build it by {hint}")
