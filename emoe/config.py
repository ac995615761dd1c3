"""Frozen, validated configurations of plain values, and layer requests (``last-half:2``)."""

# Without `from __future__ import annotations`: RoutingConfig checks its fields by their types, and
# with that import the types would be strings.

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from emoe.errors import ConfigError, did_you_mean

Layers = str | tuple[int, ...]
PartitionMethod = Literal["kmeans", "random", "contiguous", "coactivation"]
Selection = Literal["top", "bottom", "not_top", "random"]
Score = Literal["keys", "gate", "up", "up_abs", "inter", "inter_abs"]
# scores that are linear in the FFN's input, so the experts' mean weights suffice to compute them
LINEAR_SCORES = ("keys", "gate", "up")
Weighting = Literal["binary", "softmax", "softmax_times_k"]
BalanceLoss = Literal["corrected", "published"]

CONFIG_VERSION = 1

_LARGEST_INTEGER = 2**63 - 1  # in PyTorch

# into how many parts a request such as "last-half:2" divides the layers
_SHARES = {"half": 2, "quarter": 4}

# Fields of older releases and their defaults. ``from_dict`` ignores a field with its default.
_REMOVED_FIELDS = {
    "score_threshold": None,
    "normalize_gate": False,
    "value_norm_weighted": False,
}

# The names of all routers. The value is True if the router has parameters. emoe.register_router
# adds routers.
ROUTERS = {"avg_k": False, "cosine": True, "fixed": False}

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


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number; None for no bound.

    Attributes:
        at_least: inclusive lower bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None

    def contain(self, value: float) -> bool:
        """Check that a number is finite and within the bounds."""
        # infinity and "not a number" are floats
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.at_least is not None and value < self.at_least:
            return False
        if self.above is not None and value <= self.above:
            return False
        return self.below is None or value < self.below

    def describe(self) -> str:
        """Write the bounds in words, such as ``of at least 0 and below 1``."""
        words = []
        if self.at_least is not None:
            words.append(f"of at least {self.at_least}")
        if self.above is not None:
            words.append(f"above {self.above}")
        if self.below is not None:
            words.append(f"below {self.below}")
        return " and ".join(words)


def _number(default: Any = None, **bounds: float) -> Any:
    """Make a dataclass field for a number with these :class:`Bounds`."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


def _describe(value: object) -> str:
    """Write any value in one short line, for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write more than 4,300 digits
        return "too long to print"
    line = " ".join(text.split())
    if len(line) > 80:
        return f"{line[:77]}..."
    return line


def _suggest(value: object, options: Iterable[object]) -> str:
    """Return the text of :func:`did_you_mean` for a wrong value, which may be of any type."""
    name = value if isinstance(value, str) else _describe(value)
    return did_you_mean(name, options)


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """The settings that EMoE and GMoE share. Use :class:`EMoEConfig` or :class:`GMoEConfig`.

    Attributes:
        num_experts: number of experts N. EMoE: N must divide the number of the FFN's neurons.
        top_k: number of experts that each token uses. With ``selection="not_top"``, a token uses
            all experts but these.
        layers: FFNs to convert: ``[8, 10]``, ``"all"``, ``"last:2"`` (the last two),
            ``"last-half:2"`` (every second one of the last half), ``"last-quarter:2"`` or a slice
            such as ``"8:12:2"``.
        capacity_factor: factor c of the experts' capacity, None for no limit. In a forward pass of
            T tokens, each expert takes at most ``k * int(c * ceil(T / N))`` of them. Here k is
            ``num_active_experts``. The least confident tokens lose their experts first
            (batch-prioritised routing).
        count_padding: count padding in capacity and balance loss. If false, the model needs its
            ``attention_mask``.
        router_noise: strength of the noise on training scores. Its standard deviation is
            ``router_noise / num_experts``.
        aux_loss_coefficient: weight of the balance loss in :func:`emoe.aux_loss`.
        balance_loss: ``corrected``, or ``published`` for the authors' formula
            (:func:`emoe.routing.balance_loss`).
        expert_dropout: dropout probability on the hidden neurons of the converted FFNs.
        dropout_position: ``after`` the activation (the authors' vision code) or ``before`` it
            (their language code).
        output_bias: ``shared`` keeps the FFN's single output bias. ``per_expert`` gives each expert
            its own bias. At first it is the FFN's bias divided by the number of active experts, as
            in the authors' language code, and for EMoE in their vision code. ``per_expert_whole``
            gives each copy of a GMoE the whole bias (their vision code).
        version: version of the configuration format.
    """

    kind: ClassVar[str]
    _published: ClassVar[dict[str, dict[str, Any]]]

    num_experts: int = _number(at_least=1)
    top_k: int = _number(at_least=1)
    layers: Layers | Sequence[int] = "last-half:2"
    capacity_factor: float | None = _number(None, above=0)
    count_padding: bool = False
    router_noise: float = _number(0.0, at_least=0.0)
    aux_loss_coefficient: float = _number(0.0, at_least=0.0)
    balance_loss: BalanceLoss = "corrected"
    expert_dropout: float = _number(0.0, at_least=0.0, below=1.0)
    dropout_position: Literal["before", "after"] = "after"
    output_bias: Literal["shared", "per_expert", "per_expert_whole"] = "shared"
    version: int = _number(CONFIG_VERSION, at_least=1)

    def __new__(cls, *_args: object, **values: Any) -> Self:
        # the generated __init__ would raise Python's TypeError for an unknown field
        cls._check_names(values)
        return super().__new__(cls)

    @classmethod
    def _check_names(cls, values: Mapping[str, Any]) -> None:
        """Raise :class:`ConfigError` for a field or a version that this release does not know."""
        # a newer release may have added the unknown fields
        version = values.get("version")
        if isinstance(version, int) and version > CONFIG_VERSION:
            raise ConfigError(
                f"{cls.__name__}.version is {_describe(version)}; a newer release of emoe wrote it"
            )

        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = did_you_mean(name, names)
                raise ConfigError(f"{cls.__name__} has no field {_describe(name)}{near}")

    @classmethod
    def as_published(cls, implementation: str, **values: Any) -> Self:
        """Build a configuration with the settings of the authors' released code.

        The authors are Qiu, Huang and Fu (2024). They released two implementations.

        Args:
            implementation: ``"tutel"`` or ``"llama"``. ``"tutel"`` is their code for language and
                vision: capacity 1.5, router noise, balance loss, dropout inside the experts, one
                output bias per expert. ``"llama"`` is their code for gated FFNs, only for EMoE: an
                expert's score is the mean pre-activation of its neurons (``score="gate"``).
            **values: other fields of the configuration. They override the authors' settings. For
                the vision code, pass ``dropout_position="after"``, and for its GMoE also
                ``output_bias="per_expert_whole"``. With ``router="cosine"``, the default of
                ``weighting`` is ``"softmax"``.

        Raises:
            ConfigError: the implementation, a field or a value does not exist.
        """
        if not isinstance(implementation, str) or implementation not in cls._published:
            given = _describe(implementation)
            near = _suggest(implementation, cls._published)
            raise ConfigError(f"{cls.__name__}.as_published: implementation is {given}{near}")
        router = values.get("router")
        if isinstance(router, str) and router == "cosine":
            values.setdefault("weighting", "softmax")
        fields = {**cls._published[implementation], **values}
        return cls(**fields)

    def __post_init__(self) -> None:
        # These fields must be given. Their default is None, because Python raises a TypeError for a
        # missing field without a default.
        for name in ("num_experts", "top_k"):
            if getattr(self, name) is None:
                raise ConfigError(f"{type(self).__name__} needs the field '{name}'")

        # switches, choices and numbers have one check each; layers and router have their own
        for field in dataclasses.fields(self):
            if field.type is bool:
                self._check_switch(field.name)
            elif typing.get_origin(field.type) is Literal:
                self._check_choice(field.name, typing.get_args(field.type))
            elif "bounds" in field.metadata:
                self._check_number(field)
        self._normalise_layers()

        if self.top_k > self.num_experts:
            raise self._error("top_k", f"at most num_experts ({self.num_experts})")
        divides_by_noise = self.balance_loss == "published" and self.aux_loss_coefficient > 0
        if divides_by_noise and self.router_noise == 0:
            wanted = "above 0 with balance_loss='published', which divides by it"
            raise self._error("router_noise", wanted)

    def _check_switch(self, name: str) -> None:
        """Check that a field is true or false."""
        if not isinstance(getattr(self, name), bool):
            raise self._error(name, "true or false")

    def _check_choice(self, name: str, options: tuple[str, ...]) -> None:
        """Check that a field is one of the words in ``options``."""
        value = getattr(self, name)
        if not isinstance(value, str) or value not in options:
            near = _suggest(value, options)
            raise ConfigError(f"{type(self).__name__}.{name} is {_describe(value)}{near}")

    def _check_number(self, field: dataclasses.Field[Any]) -> None:
        """Check that a field is a number within its bounds, or None if its type includes None."""
        value = getattr(self, field.name)
        bounds: Bounds = field.metadata["bounds"]
        allows_none = field.type == (float | None)
        if value is None and allows_none:
            return

        if isinstance(value, int) and value > _LARGEST_INTEGER:
            raise self._error(field.name, f"at most {_LARGEST_INTEGER}")

        if field.type is int:
            is_right_kind = isinstance(value, int)
            kind = "a whole number"
        else:
            is_right_kind = isinstance(value, int | float)
            kind = "a number"
        # Python's booleans are whole numbers too
        is_number = is_right_kind and not isinstance(value, bool)
        if not is_number or not bounds.contain(value):
            wanted = f"{kind} {bounds.describe()}"
            if allows_none:
                wanted = f"{wanted}, or null"
            raise self._error(field.name, wanted)

    def _normalise_layers(self) -> None:
        """Convert a list of ``layers`` to a tuple, after checking that it holds whole numbers.

        A string stays as it is.
        """
        # resolve_layers checks strings, because they depend on the model's number of layers
        if isinstance(self.layers, str):
            return
        wanted = "a list of layer numbers, 'all', 'last:2', 'last-half:2' or a slice"
        is_bytes = isinstance(self.layers, bytes | bytearray | memoryview)  # sequences of numbers
        is_list = isinstance(self.layers, Sequence) and not is_bytes
        if not is_list or len(self.layers) == 0:
            raise self._error("layers", wanted)
        for layer in self.layers:
            # not isinstance(), for which booleans are whole numbers
            if type(layer) is not int:
                raise self._error("layers", wanted)
        # the dataclass is frozen, so an ordinary assignment would fail
        object.__setattr__(self, "layers", tuple(self.layers))

    def _error(self, name: str, wanted: str) -> ConfigError:
        """Make the error of a field that has a wrong value."""
        value = _describe(getattr(self, name))
        return ConfigError(f"{type(self).__name__}.{name} is {value}; it must be {wanted}")

    @property
    def num_active_experts(self) -> int:
        """Number of experts per token: ``top_k``, or ``N - top_k`` with ``selection="not_top"``."""
        return self.top_k

    @property
    def has_routing_state(self) -> bool:
        """Check if routed layers have state that the dense model does not have.

        Such state is a router's parameters or buffers, copies of the FFN, or output biases of the
        experts.
        """
        return self.kind == "gmoe" or self.output_bias != "shared"

    @property
    def counts_tokens(self) -> bool:
        """Check if the experts have a capacity or a balance loss, which count a pass's tokens."""
        return self.capacity_factor is not None or self.aux_loss_coefficient > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, with the ``kind`` for :func:`config_from_dict`."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from the output of :meth:`to_dict`, also that of older releases.

        Raises:
            ConfigError: a field is unknown or missing, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            given = _describe(values)
            raise ConfigError(f"{cls.__name__} cannot read {given}: it is not a dictionary")
        kind = values.get("kind", cls.kind)
        if not isinstance(kind, str) or kind != cls.kind:
            given = _describe(kind)
            raise ConfigError(f"{cls.__name__} cannot read a configuration of kind {given}")

        fields = {}
        for name, value in values.items():
            if not isinstance(name, str):
                raise ConfigError(f"{cls.__name__} has no field {_describe(name)}")
            # "backend" and "decode_cache" are from older releases
            if name in ("kind", "backend", "decode_cache"):
                continue
            # A removed field is ignored if it has its default. The test is `is`, because False == 0
            # is true in Python, and 0 is not the default False.
            if name in _REMOVED_FIELDS and value is _REMOVED_FIELDS[name]:
                continue
            fields[name] = value
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class EMoEConfig(RoutingConfig):
    """The configuration of EMoE, which splits each chosen FFN into experts (the paper's method).

    The experts are clusters of the FFN's keys.

    The plain constructor gives the method without the confounders of the authors' code: no
    capacity, router noise, auxiliary loss or extra dropout, and one shared output bias.
    :meth:`as_published` gives their settings.

    >>> emoe.EMoEConfig(num_experts=64, top_k=16, layers="last:2").num_active_experts
    16
    >>> emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16).capacity_factor
    1.5
    >>> emoe.EMoEConfig(num_experts=64, top_k=16, selektion="bottom")
    Traceback (most recent call last):
    emoe.errors.ConfigError: EMoEConfig has no field 'selektion'; did you mean 'selection'?

    Attributes:
        partition: grouping of the neurons: ``kmeans`` (balanced, on L2-normalised keys),
            ``coactivation`` (balanced k-means on each neuron's activations for a calibration set),
            ``random`` (seeded), ``contiguous``.
        partition_seed: seed of the partition, unless it is ``contiguous``.
        router: ``avg_k`` scores an expert by the mean of its keys and has no parameters. ``cosine``
            is EMoE-learn's learned router. :func:`emoe.fix_experts_` sets ``fixed``.
            :func:`emoe.register_router` adds others.
        selection: experts that a token uses: the ``top`` k by score, the ``bottom`` k, ``random``
            k, or all but the top k (``not_top``).
        score: avg-k's score of an expert. ``keys`` is the product of the input and the mean key
            (the paper). The others are means over the expert's neurons: ``gate``, the
            pre-activation; ``up`` and ``up_abs``, the up-projection of a gated FFN and its absolute
            value; ``inter`` and ``inter_abs``, the input of the out-projection and its absolute
            value. For ``up``, ``up_abs`` and both ``inter``, the masked backend computes the
            up-projection of a gated FFN twice.
        score_bias: add the mean bias of the expert's neurons to the ``keys`` score (not in the
            paper).
        gate_momentum: momentum m of running mean keys. :func:`emoe.update_gates_`, called after
            each optimizer step, sets them to ``m * previous + (1 - m) * mean keys``. With 0 the
            mean keys always follow the weights.
        weighting: ``binary`` gives every chosen expert weight 1. ``softmax`` normalises over the
            chosen experts, as published EMoE-learn does. Then the output starts at about 1/k of the
            dense scale. With one expert in use, ``softmax`` normalises over all experts, because a
            single weight would be constant. ``softmax_times_k`` multiplies the weights by the
            number of experts in use, which removes the change of scale.
    """

    kind: ClassVar[str] = "emoe"
    _published: ClassVar[dict[str, dict[str, Any]]] = {"tutel": _TUTEL, "llama": {"score": "gate"}}

    partition: PartitionMethod = "kmeans"
    partition_seed: int = _number(0, at_least=0)
    router: str = "avg_k"
    selection: Selection = "top"
    score: Score = "keys"
    score_bias: bool = False
    gate_momentum: float = _number(0.0, at_least=0.0, below=1.0)
    weighting: Weighting = "binary"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_router()
        if self.output_bias == "per_expert_whole":
            wanted = "'shared' or 'per_expert': an expert is a part of the FFN, not a copy"
            raise self._error("output_bias", wanted)
        if self.selection == "not_top" and self.top_k == self.num_experts:
            wanted = "below num_experts with selection='not_top', or no expert is left"
            raise self._error("top_k", wanted)

    def _check_router(self) -> None:
        """Check that the router exists, and that the other fields fit it."""
        if not isinstance(self.router, str) or self.router not in ROUTERS:
            near = _suggest(self.router, ROUTERS)
            raise ConfigError(
                f"EMoEConfig.router is {_describe(self.router)}, "
                f"which no emoe.register_router call added{near}"
            )

        with_router = f"with router='{self.router}'"
        if self.router != "avg_k" and self.score != "keys":
            raise self._error("score", f"'keys' {with_router}, which has its own scores")

        # both fields change the score by mean keys, which only avg_k with the score 'keys' uses
        uses_mean_keys = self.router == "avg_k" and self.score == "keys"
        for name in ("score_bias", "gate_momentum"):
            if getattr(self, name) and not uses_mean_keys:
                raise self._error(name, "off unless router is 'avg_k' and score is 'keys'")

        # the task's loss trains a router's parameters only through the experts' weights
        has_parameters = ROUTERS[self.router]
        if has_parameters and self.weighting == "binary":
            wanted = f"'softmax' or 'softmax_times_k' {with_router}, else no gradient"
            raise self._error("weighting", wanted)
        uses_one_of_many = self.num_active_experts == 1 and self.num_experts > 1
        if has_parameters and self.weighting == "softmax_times_k" and uses_one_of_many:
            wanted = (
                "so that at least 2 experts are active with weighting='softmax_times_k', else "
                "the weight is always 1"
            )
            raise self._error("top_k", wanted)

    @property
    def num_active_experts(self) -> int:
        if self.selection == "not_top":
            return self.num_experts - self.top_k
        return self.top_k

    @property
    def has_routing_state(self) -> bool:
        has_router_state = self.router != "avg_k" or self.gate_momentum > 0
        return super().has_routing_state or has_router_state


@dataclass(frozen=True, kw_only=True)
class GMoEConfig(RoutingConfig):
    """The configuration of GMoE, the paper's baseline.

    Each chosen FFN becomes ``num_experts`` full copies of itself, with a learned cosine router.

    By default the output bias is shared, and weights are normalised over the chosen experts. Then
    the converted model computes the same as the dense model until training.

    ``top_k=1`` is different. A weight normalised over one expert would always be 1, and the router
    would not learn. So the weight is the probability among all experts, about 1/N at first, as in
    the authors' layer.
    """

    kind: ClassVar[str] = "gmoe"
    _published: ClassVar[dict[str, dict[str, Any]]] = {
        "tutel": {**_TUTEL, "num_experts": 6, "top_k": 1}
    }
    router: ClassVar[str] = "cosine"
    selection: ClassVar[Selection] = "top"
    score: ClassVar[Score] = "keys"
    weighting: ClassVar[Weighting] = "softmax"

    num_experts: int = _number(6, at_least=1)
    top_k: int = _number(2, at_least=1)
    aux_loss_coefficient: float = _number(0.01, at_least=0.0)


def config_from_dict(values: Mapping[str, Any]) -> EMoEConfig | GMoEConfig:
    """Build the configuration that ``values["kind"]`` names (``emoe`` or ``gmoe``).

    Args:
        values: output of ``to_dict`` of either class, or the ``config`` of an ``emoe_config.json``.

    Raises:
        ConfigError: the kind or a field does not exist, a field is missing, or a value is out of
            range.
    """
    classes: dict[str, type[EMoEConfig] | type[GMoEConfig]] = {
        "emoe": EMoEConfig,
        "gmoe": GMoEConfig,
    }
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration is a dictionary, not {_describe(values)}")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in classes:
        near = _suggest(kind, classes)
        raise ConfigError(f"kind is {_describe(kind)}{near}")
    config_class = classes[kind]
    return config_class.from_dict(values)


def resolve_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Convert a request such as ``"last-half:2"`` into layer numbers in ascending order.

    Args:
        layers: the request: a text such as ``"all"`` or ``"8:12:2"``, or numbers of layers.
        count: number of layers of the model.

    Raises:
        ConfigError: the request is invalid or matches no layer.
    """
    if not isinstance(layers, str):
        return _numbered_layers(layers, count)
    numbers = _requested_layers(layers, count)
    if not numbers:
        valid = f"layers 0 to {count - 1}"
        raise ConfigError(f"layers '{layers}' matches none of the model's {valid}")
    return numbers


def _numbered_layers(layers: Sequence[int], count: int) -> list[int]:
    """Return listed layer numbers in ascending order. Negative ones count from the last layer.

    Raises:
        ConfigError: a layer does not exist or is listed twice.
    """
    valid_numbers = range(-count, count)
    missing = [number for number in layers if number not in valid_numbers]
    if missing:
        valid = f"the model has layers 0 to {count - 1}"
        raise ConfigError(f"layers {_describe(missing)} do not exist: {valid}")
    # -1 and count - 1 are the same layer
    numbers = {number % count for number in layers}
    if len(numbers) < len(layers):
        raise ConfigError(f"layers {_describe(list(layers))} name the same layer twice")
    return sorted(numbers)


def _requested_layers(request: str, count: int) -> list[int]:
    """Return the numbers of the layers that a request such as ``"last:2"`` means.

    The list may be empty.

    Raises:
        ConfigError: the request is invalid, or asks for more last layers than the model has.
    """
    every_layer = list(range(count))
    if request == "all":
        return every_layer

    # the last layers, as in "last:2"; at most nine digits, because int() rejects very long numbers
    last = re.fullmatch(r"last:(\d{1,9})", request)
    if last:
        number = int(last[1])
        if number > count:
            raise ConfigError(f"layers '{request}' asks for more than the model's {count} layers")
        return every_layer[count - number :]

    # every n-th layer of the last half or quarter, as in "last-half:2"
    last_share = re.fullmatch(r"last-(?P<share>half|quarter):(?P<step>\d{1,9})", request)
    if last_share:
        num_parts = _SHARES[last_share["share"]]
        start_of_last_part = count * (num_parts - 1) // num_parts
        step = int(last_share["step"])
        # no layer matches, and the caller raises the error
        if step == 0:
            return []
        return every_layer[start_of_last_part::step]

    # a slice as in Python, such as "8:12:2", "-4:" or ":6"; its step cannot be negative
    slice_pattern = r"(?P<start>-?\d{1,9})?:(?P<stop>-?\d{1,9})?(?::(?P<step>\d{1,9})?)?"
    bounds = re.fullmatch(slice_pattern, request)
    if bounds:
        start = int(bounds["start"]) if bounds["start"] else None
        stop = int(bounds["stop"]) if bounds["stop"] else None
        step = int(bounds["step"]) if bounds["step"] else 1
        # no layer matches, and the caller raises the error
        if step == 0:
            return []
        return every_layer[start:stop:step]

    valid = "a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice like '8:12:2'"
    raise ConfigError(f"layers {_describe(request)} is invalid; write {valid}")
