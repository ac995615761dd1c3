"""Configurations: valid and invalid values, plain values, and requests for layers."""

from __future__ import annotations

from typing import Any

import pytest

import emoe
from emoe.layer_numbers import resolve_layers


def test_round_trip_through_plain_values() -> None:
    for config in (
        emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3]),
        emoe.EMoEConfig(num_experts=8, top_k=2, router="cosine", weighting="softmax"),
        emoe.GMoEConfig(layers="last:2"),
    ):
        assert emoe.config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_expert": 8}, "did you mean 'num_experts'"),
        ({"top_k": 9}, "top_k is 9; it must be at most num_experts"),
        ({"top_k": 2.0}, "whole number"),
        ({"partition": "kmean"}, "did you mean 'kmeans'"),
        ({"expert_dropout": 1.0}, "below 1.0"),
        ({"score_bias": 1}, "true or false"),
        ({"capacity_factor": 0}, "above 0, or null"),
        ({"layers": []}, "layers is"),
        ({"router": "cosine"}, "weighting is 'binary'"),
        ({"router": "cosine", "weighting": "softmax_times_k", "top_k": 1}, "at least 2"),
        ({"router": "cosine", "weighting": "softmax", "score": "up"}, "has its own scores"),
        ({"top_k": 8, "selection": "not_top"}, "no expert is left"),
        ({"gate_momentum": 0.5, "score": "inter"}, "off unless router is 'avg_k'"),
        ({"output_bias": "per_expert_whole"}, "a part of the FFN, not a copy"),
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
    gmoe = emoe.GMoEConfig()
    assert emoe.config_from_dict({**gmoe.to_dict(), "backend": "auto", "score_threshold": None}) == gmoe
    for name, value in (("score_threshold", 0.5), ("normalize_gate", True), ("value_norm_weighted", True)):
        with pytest.raises(emoe.ConfigError, match=name):
            emoe.config_from_dict({**config.to_dict(), name: value})


def test_configurations_of_another_kind_and_without_a_field_are_rejected() -> None:
    with pytest.raises(emoe.ConfigError, match="needs the field 'top_k'"):
        emoe.EMoEConfig(num_experts=8)
    with pytest.raises(emoe.ConfigError, match="did you mean 'gmoe'"):
        emoe.config_from_dict({"kind": "gmoee"})
    with pytest.raises(emoe.ConfigError, match="EMoEConfig cannot read a configuration of kind 'gmoe'"):
        emoe.EMoEConfig.from_dict(emoe.GMoEConfig().to_dict())


def test_as_published_has_the_authors_settings() -> None:
    def tutel_with(**values: Any) -> emoe.EMoEConfig:
        return emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16, **values)

    tutel = tutel_with()
    assert (tutel.capacity_factor, tutel.router_noise, tutel.aux_loss_coefficient) == (1.5, 1.0, 0.01)
    assert (tutel.output_bias, tutel.balance_loss, tutel.dropout_position) == ("per_expert", "published", "before")
    assert tutel.count_padding
    assert tutel.weighting == "binary"
    assert tutel_with(router="cosine").weighting == "softmax"
    assert tutel_with(capacity_factor=0).capacity_factor is None
    assert tutel_with(capacity_factor=-1.5).capacity_factor == 1.5
    vision = emoe.GMoEConfig.as_published("tutel", dropout_position="after")
    assert (vision.num_experts, vision.top_k, vision.dropout_position) == (6, 1, "after")
    assert emoe.EMoEConfig.as_published("llama", num_experts=64, top_k=16).score == "gate"
    assert emoe.config_from_dict(tutel.to_dict()) == tutel
    with pytest.raises(emoe.ConfigError, match="choose from tutel"):
        emoe.GMoEConfig.as_published("llama")


@pytest.mark.parametrize(
    ("request_", "count", "chosen"),
    [
        ("all", 12, list(range(12))),
        ("last:2", 12, [10, 11]),
        ("last-half:2", 12, [6, 8, 10]),
        ("last-quarter:2", 12, [9, 11]),
        ("8:12:2", 12, [8, 10]),
        ("-2:", 12, [10, 11]),
        ((8, 10), 12, [8, 10]),
        ((-1,), 12, [11]),
        ("last-half:4", 60, [30, 34, 38, 42, 46, 50, 54, 58]),
    ],
)
def test_requests(request_, count: int, chosen: list[int]) -> None:
    assert resolve_layers(request_, count) == chosen


@pytest.mark.parametrize("request_", ["last", "last:13", "last-half:0", "12:", "::0", "8-10", (12,), (1, -11)])
def test_requests_that_match_nothing_raise(request_) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
