"""Configurations: valid and invalid values, plain values, and requests for layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

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
        ({"router": "cosine", "weighting": "softmax", "score": "up"}, "has its own scores"),
        ({"top_k": 8, "selection": "not_top"}, "no expert is left"),
        ({"balance_loss": "published", "aux_loss_coefficient": 0.1}, "router_noise is 0.0; it must be above 0"),
        ({"version": 99}, "newer release"),
    ],
)
def test_wrong_values_are_rejected(values: dict, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, **values})


def test_configurations_of_older_releases_are_read() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, selection="bottom")
    unused = {"score_threshold": None, "normalize_gate": False, "value_norm_weighted": False}
    assert emoe.config_from_dict({**config.to_dict(), **unused, "backend": "sparse", "decode_cache": True}) == config
    with pytest.raises(emoe.ConfigError, match="score_threshold"):
        emoe.config_from_dict({**config.to_dict(), "score_threshold": 0.5})


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: emoe.EMoEConfig(num_experts=8), "needs the field 'top_k'"),
        (lambda: emoe.config_from_dict({"kind": "gmoee"}), "did you mean 'gmoe'"),
        (lambda: emoe.EMoEConfig.from_dict(emoe.GMoEConfig().to_dict()), "cannot read a configuration of kind 'gmoe'"),
        (lambda: emoe.GMoEConfig.as_published("llama"), "choose from tutel"),
    ],
)
def test_wrong_kinds_and_missing_fields_are_rejected(read: Any, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        read()


def test_as_published_has_the_authors_settings() -> None:
    tutel_with = partial(emoe.EMoEConfig.as_published, "tutel", num_experts=64, top_k=16)
    tutel = tutel_with()
    assert (tutel.capacity_factor, tutel.router_noise, tutel.aux_loss_coefficient) == (1.5, 1.0, 0.01)
    assert (tutel.output_bias, tutel.balance_loss, tutel.dropout_position) == ("per_expert", "published", "before")
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


@pytest.mark.parametrize("request_", ["last", "last:13", "last-half:0", "12:", "::0", "8-10", (12,), (1, -11)])
def test_requests_that_match_nothing_raise(request_: Any) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
