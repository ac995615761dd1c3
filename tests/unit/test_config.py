"""Configurations: valid and invalid values, plain values, and requests for layers."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy
import pytest
import torch

import emoe
from emoe.config import resolve_layers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_expert": 8}, "did you mean 'num_experts'"),
        ({"top_k": 9}, "top_k is 9; it must be at most num_experts"),
        ({"partition": "kmean"}, "did you mean 'kmeans'"),
        ({"score_bias": 1}, "true or false"),
        ({"capacity_factor": 0}, "above 0, or null"),
        ({"router": "cosine"}, "weighting is 'binary'"),
        ({"router": "cosine", "weighting": "softmax_times_k", "top_k": 1}, "at least 2"),
        (
            {
                "router": "cosine",
                "weighting": "softmax_times_k",
                "top_k": 7,
                "selection": "not_top",
            },
            "top_k is 7; it must be so that at least 2 experts are active",
        ),
        ({"router": "cosine", "weighting": "softmax", "score": "up"}, "has its own scores"),
        ({"top_k": 8, "selection": "not_top"}, "no expert is left"),
        (
            {"balance_loss": "published", "aux_loss_coefficient": 0.1},
            "router_noise is 0.0; it must be above 0",
        ),
        ({"version": 99}, "newer release"),
    ],
)
def test_wrong_values_are_rejected(values: dict, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, **values})


HUGE = 10**400
UNPRINTABLE = 10**5000  # Python writes no number of more than 4,300 digits
WHOLE_NUMBERS = ["num_experts", "top_k", "partition_seed", "version"]
NUMBERS = [*WHOLE_NUMBERS, "capacity_factor", "router_noise", "expert_dropout"]
CHOICES = ["partition", "router", "output_bias"]

# fields, and values that none of them takes
WRONG_TYPES: list[tuple[list[str], list[Any]]] = [
    (NUMBERS, [HUGE, -HUGE, UNPRINTABLE, 2**63]),
    (NUMBERS, [float("nan"), float("inf"), True, "3", b"3", [3], {}]),
    (WHOLE_NUMBERS, [2.0, None, numpy.int64(2), torch.tensor(2)]),
    (["layers"], [["3"], [], [True], [[1]], {}, None, b"\x01", memoryview(b"ab")]),
    (["layers"], [[UNPRINTABLE, "x"]]),
    (CHOICES, [UNPRINTABLE, ["kmeans"], numpy.array([1, 2]), None, b"x"]),
    (["score_bias", "count_padding"], [numpy.True_, 0, "true", UNPRINTABLE]),
]


@pytest.mark.parametrize(("names", "values"), WRONG_TYPES)
def test_values_of_wrong_types_are_one_short_line(names: list[str], values: list[Any]) -> None:
    for name, value in itertools.product(names, values):
        fields = {"num_experts": 8, "top_k": 2, name: value}
        with pytest.raises(emoe.ConfigError) as error:
            emoe.EMoEConfig(**fields)
        message = str(error.value)
        assert name in message
        assert "\n" not in message
        assert len(message) < 250
        with pytest.raises(emoe.ConfigError) as error:
            emoe.config_from_dict({"kind": "emoe", **fields})
        assert str(error.value) == message


def test_configurations_of_older_releases_are_read() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, selection="bottom")
    unused = {"score_threshold": None, "normalize_gate": False, "value_norm_weighted": False}
    assert (
        emoe.config_from_dict(
            {**config.to_dict(), **unused, "backend": "sparse", "decode_cache": True}
        )
        == config
    )
    with pytest.raises(emoe.ConfigError, match="score_threshold"):
        emoe.config_from_dict({**config.to_dict(), "score_threshold": 0.5})


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: emoe.EMoEConfig(num_experts=8), "needs the field 'top_k'"),
        (lambda: emoe.EMoEConfig(), "needs the field 'num_experts'"),
        (lambda: emoe.config_from_dict({"kind": "emoe"}), "needs the field 'num_experts'"),
        (lambda: emoe.config_from_dict({"kind": "gmoe", 3: 4}), "has no field 3"),
        (lambda: emoe.config_from_dict({"kind": UNPRINTABLE}), "kind is too long to print"),
        (lambda: emoe.config_from_dict([1]), r"not \[1\]"),
        (lambda: emoe.EMoEConfig.from_dict("x"), "cannot read 'x'"),
        (lambda: emoe.EMoEConfig.as_published(["tutel"]), "did you mean 'tutel'"),
        (lambda: emoe.config_from_dict({"kind": "gmoee"}), "did you mean 'gmoe'"),
        (
            lambda: emoe.EMoEConfig.from_dict(emoe.GMoEConfig().to_dict()),
            "cannot read a configuration of kind 'gmoe'",
        ),
        (lambda: emoe.GMoEConfig.as_published("llama"), "choose from tutel"),
    ],
)
def test_wrong_kinds_and_missing_fields_are_rejected(read: Any, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        read()


def test_as_published_has_the_authors_settings() -> None:
    tutel_with = partial(emoe.EMoEConfig.as_published, "tutel", num_experts=64, top_k=16)
    tutel = tutel_with()
    assert (tutel.capacity_factor, tutel.router_noise, tutel.aux_loss_coefficient) == (
        1.5,
        1.0,
        0.01,
    )
    assert (tutel.output_bias, tutel.balance_loss, tutel.dropout_position) == (
        "per_expert",
        "published",
        "before",
    )
    assert (tutel.weighting, tutel.count_padding) == ("binary", True)
    assert tutel_with(router="cosine").weighting == "softmax"
    vision = emoe.GMoEConfig.as_published("tutel", dropout_position="after")
    assert (vision.num_experts, vision.top_k, vision.dropout_position) == (6, 1, "after")
    assert emoe.EMoEConfig.as_published("llama", num_experts=64, top_k=16).score == "gate"


REQUESTS: dict[Any, list[int]] = {
    "all": list(range(12)),
    "last:2": [10, 11],
    "last-half:2": [6, 8, 10],
    "last-quarter:2": [9, 11],
    "8:12:2": [8, 10],
    "-2:": [10, 11],
    (8, 10): [8, 10],
    (-1,): [11],
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_of_layers(request_: Any) -> None:
    assert resolve_layers(request_, 12) == REQUESTS[request_]


NO_REQUESTS = ["last", "last:13", "last-half:0", "12:", "::0", "-:", "8-10", f"last:{'9' * 5000}"]
NO_LAYERS = [(12,), (1, -11), (UNPRINTABLE,)]


@pytest.mark.parametrize("request_", [*NO_REQUESTS, *NO_LAYERS])
def test_requests_that_match_nothing_raise(request_: Any) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
