"""Configurations: valid and invalid values, plain values, and requests for layers."""

from __future__ import annotations

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
        ({"num_expert": 8, "top_k": 2}, "did you mean 'num_experts'"),
        ({"num_experts": 8, "top_k": 9}, "top_k is 9; it must be at most num_experts"),
        ({"num_experts": 8.0, "top_k": 1}, "whole number"),
        ({"num_experts": 8, "top_k": 2, "backend": "sparse"}, "no field 'backend'"),
        ({"num_experts": 8, "top_k": 2, "partition": "kmean"}, "did you mean 'kmeans'"),
        ({"num_experts": 8, "top_k": 2, "expert_dropout": 1.0}, "below 1.0"),
        ({"num_experts": 8, "top_k": 2, "layers": []}, "layers is"),
        ({"num_experts": 8, "top_k": 2, "router": "cosine"}, "weighting is 'binary'"),
        ({"num_experts": 8, "top_k": 8, "selection": "not_top"}, "no expert is left"),
        ({"num_experts": 8, "top_k": 2, "version": 99}, "newer release"),
        ({"num_experts": 8, "top_k": 2, "score_bias": 1}, "true or false"),
        ({"num_experts": 8}, "needs the field 'top_k'"),
        ({"num_experts": 8, "top_k": 2, "capacity_factor": 0}, "above 0, or null"),
        ({"num_experts": 8, "top_k": 2, "gate_momentum": 0.5, "score": "inter"}, "off unless router is 'avg_k'"),
        (
            {"num_experts": 8, "top_k": 2, "score": "up", "router": "cosine", "weighting": "softmax"},
            "has its own scores",
        ),
        ({"num_experts": 8, "top_k": 1, "router": "cosine", "weighting": "softmax_times_k"}, "at least 2"),
        ({"num_experts": 8, "top_k": 2, "output_bias": "per_expert_whole"}, "a part of the FFN, not a copy"),
        (
            {"num_experts": 8, "top_k": 2, "balance_loss": "published", "aux_loss_coefficient": 0.1},
            "router_noise is 0.0; it must be above 0",
        ),
    ],
)
def test_wrong_values_are_rejected(values: dict, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        emoe.EMoEConfig(**values)


def test_configurations_of_older_releases_are_read() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, selection="bottom")
    unused = {"score_threshold": None, "normalize_gate": False, "value_norm_weighted": False}
    assert emoe.config_from_dict({**config.to_dict(), **unused, "backend": "sparse", "decode_cache": True}) == config
    gmoe = emoe.GMoEConfig()
    assert emoe.config_from_dict({**gmoe.to_dict(), "backend": "auto", "score_threshold": None}) == gmoe
    for name, value in (("score_threshold", 0.5), ("normalize_gate", True), ("value_norm_weighted", True)):
        with pytest.raises(emoe.ConfigError, match=name):
            emoe.config_from_dict({**config.to_dict(), name: value})


def test_reading_back_names_the_wrong_field() -> None:
    with pytest.raises(emoe.ConfigError, match="did you mean 'gmoe'"):
        emoe.config_from_dict({"kind": "gmoee"})
    with pytest.raises(emoe.ConfigError, match="EMoEConfig cannot read a configuration of kind 'gmoe'"):
        emoe.EMoEConfig.from_dict(emoe.GMoEConfig().to_dict())


def test_as_published_has_the_authors_settings() -> None:
    tutel = emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16)
    assert (tutel.capacity_factor, tutel.router_noise, tutel.aux_loss_coefficient) == (1.5, 1.0, 0.01)
    assert (tutel.output_bias, tutel.balance_loss, tutel.dropout_position) == ("per_expert", "published", "before")
    assert tutel.count_padding
    assert tutel.weighting == "binary"
    assert emoe.EMoEConfig.as_published("tutel", num_experts=64, top_k=16, router="cosine").weighting == "softmax"
    assert emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, capacity_factor=0).capacity_factor is None
    assert emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, capacity_factor=-1.5).capacity_factor == 1.5
    vision = emoe.GMoEConfig.as_published("tutel", dropout_position="after")
    assert (vision.num_experts, vision.top_k, vision.dropout_position) == (6, 1, "after")
    assert emoe.EMoEConfig.as_published("llama", num_experts=64, top_k=16).score == "gate"
    assert emoe.config_from_dict(tutel.to_dict()) == tutel
    with pytest.raises(emoe.ConfigError, match="did you mean 'tutel'"):
        emoe.EMoEConfig.as_published("tutle", num_experts=8, top_k=2)
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
        ("last-half:4", 32, [16, 20, 24, 28]),
        ("last-half:4", 60, [30, 34, 38, 42, 46, 50, 54, 58]),
    ],
)
def test_requests(request_, count: int, chosen: list[int]) -> None:
    assert resolve_layers(request_, count) == chosen


@pytest.mark.parametrize("request_", ["last", "last:13", "last-half:0", "12:", "::0", "8-10", (12,), (1, -11)])
def test_requests_that_match_nothing_raise(request_) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
