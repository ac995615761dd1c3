"""Configurations: frozen, made of plain values, checked when they are built."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

from emoe.errors import ConfigError, did_you_mean
from emoe.registry import ROUTERS

Layers = str | tuple[int, ...]
Partition = Literal["kmeans", "random", "contiguous", "coactivation"]
Selection = Literal["top", "bottom", "not_top", "random"]
Score = Literal["keys", "gate", "up", "up_abs", "inter", "inter_abs"]
# linear in the FFN's input, so that mean weights give them before any neuron is computed
LINEAR_SCORES = ("keys", "gate", "up")
Weighting = Literal["binary", "softmax", "softmax_times_k"]
Backend = Literal["auto", "masked", "sparse"]
BalanceLoss = Literal["corrected", "published"]
DropoutPosition = Literal["before", "after"]
OutputBias = Literal["shared", "per_expert", "per_expert_whole"]

# of numbers, by their names in a JSON Schema
_BOUNDS: dict[str, tuple[Callable[[Any, float], bool], str]] = {
    "minimum": (operator.ge, "of at least {}"),
    "exclusiveMinimum": (operator.gt, "above {}"),
    "maximum": (operator.le, "of at most {}"),
    "exclusiveMaximum": (operator.lt, "below {}"),
}

CONFIG_VERSION = 1

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
    """A field with a number in bounds, which are named as in a JSON Schema."""
    return dataclasses.field(default=default, metadata=bounds)


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Hold what every routed FFN has in common. Use :class:`EMoEConfig` or :class:`GMoEConfig`.

    Attributes:
        num_experts: N. EMoE: must divide the FFN's width.
        top_k: experts that each token uses.
        layers: which FFNs: ``[8, 10]``, ``"all"``, ``"last:2"`` (the last two), ``"last-half:2"``
            (every second one of the last half), ``"last-quarter:2"`` or a slice such as ``"8:12:2"``.
        backend: ``masked`` is the reference: all neurons are computed and those of other experts set to zero.
            ``sparse`` computes the chosen experts only, with the same results to rounding, and goes back to
            ``masked`` in forward passes where it cannot (see :mod:`emoe.sparse.conditions`). ``auto`` takes, in each forward
            pass, the one that is expected to be faster (see :mod:`emoe.sparse.cost_model`).
        decode_cache: while decoding, keep the values by neuron too, as much memory again as the out-projections of the converted
            layers. Without, all FFNs of a token take about twice as long (see :mod:`emoe.sparse.decode`).
        score_threshold: in evaluation, use every expert whose score is at least this, and the best one
            in any case, instead of ``top_k``; None for always ``top_k``. See :func:`emoe.set_top_k_`.
        capacity_factor: None for no limit. A number c limits each expert to
            ``top_k * int(c * ceil(T / N))`` of a forward pass's T tokens; assignments beyond that are
            dropped, those of the most confident tokens last (batch-prioritised routing).
        count_padding: padding tokens take places under the capacity and count in the balance loss.
            When false they do neither: the model is then to be called with its ``attention_mask``.
        router_noise: standard deviation, times num_experts, of the noise on training scores.
        aux_loss_coefficient: weight that :func:`emoe.aux_loss` gives to the balance loss.
        balance_loss: ``corrected``, or ``published`` for the authors' formula, which compares
            probabilities with scores (see :func:`emoe.routing.balance_loss`).
        expert_dropout: dropout on the hidden neurons of the converted FFNs.
        dropout_position: ``after`` the activation (the authors' vision code) or ``before`` it (language).
        output_bias: ``shared`` keeps the FFN's one output bias. ``per_expert`` gives each expert its own,
            at first the FFN's divided by the number of experts in use, as the authors' language code does and
            for EMoE their vision code; ``per_expert_whole`` gives each copy of a GMoE the whole, as their vision code does.
        version: of the configuration's format.
    """

    kind: ClassVar[str]
    _published: ClassVar[dict[str, dict[str, Any]]]

    num_experts: int = _number(minimum=1)
    top_k: int = _number(minimum=1)
    layers: Layers | Sequence[int] = "last-half:2"
    backend: Backend = "auto"
    decode_cache: bool = True
    score_threshold: float | None = None
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
        # Checked here because the generated __init__ would only raise Python's own TypeError.
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for name in values:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field '{name}'{did_you_mean(name, names)}")
        for field in fields if values else ():  # copy.copy calls without any
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"{cls.__name__} needs the field '{field.name}'")
        return super().__new__(cls)

    @classmethod
    def as_published(cls, implementation: str, **values: Any) -> Self:
        """Take the authors' own settings (Qiu, Huang, Fu 2024, their released code) instead of the clean method's.

        Args:
            implementation: ``"tutel"``, their language and vision code: capacity 1.5, router noise,
                balance loss, dropout inside the experts, an output bias per expert. For EMoE also
                ``"llama"``, their block mask on gated FFNs.
            **values: the other fields, and those to set otherwise (their vision code has
                ``dropout_position="after"`` and for GMoE ``output_bias="per_expert_whole"``). Their
                ``capacity_factor=0``, no limit, is None here, and a negative one, which only saves memory beside
                the positive, the positive.

        Raises:
            ConfigError: an unknown implementation, field or value.
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
    @functools.cache  # reading them takes longer than the checks
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
        """Count the experts that a token uses: ``top_k``, or the others with ``selection="not_top"``."""
        return self.top_k

    @property
    def has_routing_state(self) -> bool:
        """Whether a routed layer has state that the dense model has no place for: a router's, a running gate, copies, biases of experts."""
        return self.kind == "gmoe" or self.output_bias != "shared"

    def to_dict(self) -> dict[str, Any]:
        """Give plain values only, with the ``kind`` that :func:`config_from_dict` reads back."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from what :meth:`to_dict` gave.

        Raises:
            ConfigError: an unknown field, a missing field or a value out of range.
        """
        given = {name: value for name, value in values.items() if name != "kind"}
        version = given.get("version")
        if isinstance(version, int) and version > CONFIG_VERSION:  # before its new fields are called unknown
            raise ConfigError(f"{cls.__name__}.version is {version}; a newer release of emoe wrote it")
        if values.get("kind", cls.kind) != cls.kind:
            raise ConfigError(f"{cls.__name__} cannot read a configuration of kind {values['kind']!r}")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class EMoEConfig(RoutingConfig):
    """Split each chosen FFN into experts by its own keys (the paper's method).

    The plain constructor is the method without the confounders of the authors' code: no
    capacity, no router noise, no auxiliary loss, no extra dropout, one shared output bias.
    :meth:`as_published` gives their settings.

    >>> emoe.EMoEConfig(num_experts=64, top_k=16, layers="last:2").num_active_experts
    16
    >>> emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16).capacity_factor
    1.5
    >>> emoe.EMoEConfig(num_experts=64, top_k=16, selektion="bottom")
    Traceback (most recent call last):
    emoe.errors.ConfigError: EMoEConfig has no field 'selektion'; did you mean 'selection'?

    Fields beyond those of :class:`RoutingConfig`:

    Attributes:
        partition: how neurons are grouped: ``kmeans`` (balanced, on L2-normalised keys),
            ``coactivation`` (the same on how strongly each neuron fires for the tokens of a calibration
            set), ``random`` (seeded), ``contiguous``.
        partition_seed: seed of the partition.
        router: ``avg_k`` scores an expert by the mean of its keys and has no parameters;
            ``cosine`` is the learned router of EMoE-learn; ``fixed`` is what :func:`emoe.fix_experts_` makes of a
            converted model. Others by :func:`emoe.register_router`.
        selection: which experts are used: the ``top`` k scores, the ``bottom`` k, all except the
            top k (``not_top``), or k at ``random``.
        score: what avg-k scores an expert by: ``keys``, the input's product with the mean key (the
            paper); or a mean over the expert's neurons of: ``gate``, the pre-activation; ``up`` or
            ``up_abs``, the up-projection of a gated FFN or its size; ``inter`` or ``inter_abs``, what
            goes into the out-projection or its size. ``up_abs`` and, on gated FFNs, the two ``inter``
            compute the up-projection a second time.
        score_bias: add the mean bias of the expert's neurons to the ``keys`` score (off in the paper).
        normalize_gate: the ``keys`` score takes input and mean keys at unit length.
        value_norm_weighted: the ``keys`` score weights each key in the mean by the norm of its neuron's value.
        gate_momentum: m. The mean keys become a running mean: :func:`emoe.update_gates_`, to be
            called after each optimiser step, sets them to ``m * before + (1 - m) * mean keys``. With 0
            they are exactly those of the present weights and there is nothing to call.
        weighting: ``binary`` gives every chosen expert weight 1. ``softmax`` normalises over the
            chosen ones (weights sum to 1, the published EMoE-learn, whose output starts at about
            1/k of the dense scale; with ``top_k=1``, where that would be the constant 1, the weight is the
            probability among all experts). ``softmax_times_k`` multiplies by k and removes that confounder.
    """

    kind: ClassVar[str] = "emoe"
    _published: ClassVar[dict[str, dict[str, Any]]] = {"tutel": _TUTEL, "llama": {"score": "gate"}}

    partition: Partition = "kmeans"
    partition_seed: int = _number(0, minimum=0, maximum=2**63 - 1)
    router: str = "avg_k"
    selection: Selection = "top"
    score: Score = "keys"
    score_bias: bool = False
    normalize_gate: bool = False
    value_norm_weighted: bool = False
    gate_momentum: float = _number(0.0, minimum=0.0, exclusiveMaximum=1.0)
    weighting: Weighting = "binary"

    @classmethod
    def as_published(cls, implementation: str, **values: Any) -> Self:
        """Take the authors' own settings, see :meth:`RoutingConfig.as_published`; with ``router="cosine"`` weights are normalised as theirs are."""
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
        for name in ("score_bias", "normalize_gate", "value_norm_weighted", "gate_momentum"):
            if getattr(self, name) and (self.router != "avg_k" or self.score != "keys"):
                raise self._error(name, "off unless router is 'avg_k' and score is 'keys', whose mean keys it shapes")
        if self.backend == "sparse" and self.score not in LINEAR_SCORES:
            near = " or ".join(map(repr, LINEAR_SCORES))
            raise self._error("backend", f"'masked' unless score is {near}: the others need every neuron")
        if self.score_bias and self.normalize_gate:
            raise self._error("score_bias", "false with normalize_gate=True: a bias has no unit length")
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
        if self.score_threshold is not None and self.selection != "top":
            raise self._error("score_threshold", "null unless selection is 'top'")

    @property
    def num_active_experts(self) -> int:
        return self.num_experts - self.top_k if self.selection == "not_top" else self.top_k

    @property
    def has_routing_state(self) -> bool:
        return super().has_routing_state or self.router != "avg_k" or self.gate_momentum > 0


@dataclass(frozen=True, kw_only=True)
class GMoEConfig(RoutingConfig):
    """Replace each chosen FFN by ``num_experts`` full copies and a learned cosine router (paper's baseline).

    Weights are normalised over the chosen experts and the output bias is shared, so that the
    converted model equals the dense one until the copies are trained apart. With ``top_k=1`` a
    normalised weight would be the constant 1 and the router would learn nothing; the weight is then the
    probability among all experts, at first about 1/N, as in the authors' layer. Fields are those of
    :class:`RoutingConfig`.
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
        values: what :meth:`EMoEConfig.to_dict` gave, or the ``config`` of an ``emoe_config.json``.

    Raises:
        ConfigError: no such kind, an unknown or missing field, or a value out of range.
    """
    kinds: dict[str, type[EMoEConfig] | type[GMoEConfig]] = {"emoe": EMoEConfig, "gmoe": GMoEConfig}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"kind is {kind!r}{did_you_mean(kind, kinds)}")
    return kinds[kind].from_dict(values)


def check_config(config: object, what: str) -> None:
    """Refuse something else in the place of a configuration (:class:`ConfigError`)."""
    if isinstance(config, EMoEConfig | GMoEConfig):
        return
    hint = "emoe.EMoEConfig(num_experts=64, top_k=16)"
    if isinstance(config, Mapping):
        hint = "emoe.config_from_dict({'kind': 'emoe', …})" if "kind" in config else "emoe.EMoEConfig(**values)"
    elif isinstance(config, type) and issubclass(config, EMoEConfig | GMoEConfig):
        hint = f"emoe.{config.__name__}(…), an instance"
    raise ConfigError(f"{what}: the configuration is {config!r:.100}; build it by {hint}")
