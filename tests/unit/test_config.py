from __future__ import annotations

import pytest

import emoe


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
        ({"num_experts": 8, "top_k": 0}, "at least 1"),
        ({"num_experts": 8.0, "top_k": 1}, "whole number"),
        ({"num_experts": True, "top_k": 1}, "whole number"),
        ({"num_experts": 8, "top_k": 2, "partition": "kmean"}, "did you mean 'kmeans'"),
        ({"num_experts": 8, "top_k": 2, "selection": "topk"}, "did you mean 'top'"),
        ({"num_experts": 8, "top_k": 2, "expert_dropout": 1.0}, "below 1.0"),
        ({"num_experts": 8, "top_k": 2, "router_noise": -1}, "at least 0.0"),
        ({"num_experts": 8, "top_k": 2, "layers": []}, "layers is"),
        ({"num_experts": 8, "top_k": 2, "layers": lambda layer: True}, "layers is"),
        ({"num_experts": 8, "top_k": 2, "router": "cosine"}, "weighting is 'binary'"),
        ({"num_experts": 8, "top_k": 8, "selection": "not_top"}, "no expert is left"),
        ({"num_experts": 8, "top_k": 2, "version": 99}, "newer release"),
        ({"num_experts": 8, "top_k": 2, "partition_seed": "0"}, "partition_seed"),
        ({"num_experts": 8, "top_k": 2, "score_bias": 1}, "true or false"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(emoe.ConfigError, match=message):
        emoe.EMoEConfig(**values)


def test_reading_back_names_what_is_missing_or_wrong() -> None:
    with pytest.raises(emoe.ConfigError, match="needs the field 'top_k'"):
        emoe.config_from_dict({"kind": "emoe", "num_experts": 4})
    with pytest.raises(emoe.ConfigError, match="did you mean 'gmoe'"):
        emoe.config_from_dict({"kind": "gmoee"})


def test_gmoe_with_one_chosen_expert_is_refused() -> None:
    with pytest.raises(emoe.ConfigError, match="gradient to the router"):
        emoe.GMoEConfig(num_experts=6, top_k=1)
