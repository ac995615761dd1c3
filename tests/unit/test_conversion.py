"""Conversions, partitions and what the checks of both reject."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

import emoe
from emoe.layer import routed_layers
from emoe.partitioning import load_partition, partition_key, save_partition
from tests import tiny_models
from tests.model_folders import assert_same

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


@pytest.mark.parametrize(
    ("settings", "partition", "message"),
    [
        ({"num_experts": 7}, None, "64 neurons.*7.*8"),
        ({"layers": [4]}, None, r"layers \[4\] do not exist: the model has layers 0 to 3"),
        ({"router": "fixed"}, None, r"emoe\.fix_experts_"),
        ({"score": "up"}, None, "not gated"),
        ({}, {1: torch.arange(64)}, "layer 3"),
        ({}, {1: torch.arange(64), 3: torch.arange(32)}, "layer 3"),
    ],
)
def test_rejected_conversions_leave_the_model_unchanged(settings, partition, message: str) -> None:
    model, same = tiny_models.build("bert"), tiny_models.build("bert")
    config = emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": [1, 3], **settings})
    with pytest.raises(emoe.EMoEError, match=message):
        emoe.convert_(model, config, partition=partition)
    assert_same(model.state_dict(), same.state_dict())
    assert not routed_layers(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: emoe.save_pretrained(model, path),
        lambda model, path: emoe.to_dense_(model),
        lambda model, path: emoe.set_top_k_(model, 2),
        lambda model, path: emoe.set_backend_(model, "sparse"),
        lambda model, path: emoe.record_routing(model).__enter__(),
    ],
)
def test_dense_models_are_rejected(call, tmp_path) -> None:
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        call(tiny_models.build("bert"), tmp_path)


def test_report_counts_and_prints() -> None:
    model = tiny_models.build("bert")
    report = emoe.convert_(model, CONFIG)
    assert report.active_neurons == pytest.approx((2 + 2 * 0.25) / 4)
    assert report.added_parameters == 0
    assert "encoder.layer.3" in str(report)
    assert "62.5% of FFN neurons active" in str(report)
    gmoe = emoe.convert_(tiny_models.build("bert"), emoe.GMoEConfig(num_experts=4, top_k=2, layers=[0]))
    assert gmoe.active_neurons == pytest.approx((3 + 2) / 4)
    assert gmoe.added_parameters > 3 * 2 * 64 * 32


def test_partition_kinds_differ_and_are_reproducible() -> None:
    model = tiny_models.build("bert")
    orders = {}
    for kind in ("kmeans", "random", "contiguous"):
        config = dataclasses.replace(CONFIG, partition=kind)
        orders[kind], again = (emoe.partition(model, config) for _ in range(2))
        assert list(orders[kind]) == [1, 3]
        assert_same(dict(again), dict(orders[kind]))
    assert torch.equal(orders["contiguous"][1], torch.arange(64))
    assert orders["kmeans"].explained[1] > orders["random"].explained[1] + 0.05
    assert not torch.equal(orders["random"][1], orders["random"][3])
    other = emoe.partition(model, dataclasses.replace(CONFIG, partition="random", partition_seed=1))
    assert not torch.equal(other[1], orders["random"][1])


def test_partition_key_is_of_content_and_settings() -> None:
    model, same, other = tiny_models.build("bert"), tiny_models.build("bert"), tiny_models.build("bert", seed=1)
    assert partition_key(model, CONFIG) == partition_key(same, CONFIG) != partition_key(other, CONFIG)
    assert partition_key(model, CONFIG) != partition_key(model, dataclasses.replace(CONFIG, num_experts=4))
    assert partition_key(model, CONFIG) == partition_key(model, dataclasses.replace(CONFIG, top_k=4))


def test_partition_file_round_trip_and_damage(tmp_path) -> None:
    model = tiny_models.build("bert")
    partition = emoe.partition(model, CONFIG)
    path = tmp_path / "p.safetensors"
    save_partition(partition, path)
    again = load_partition(path)
    assert_same(dict(again), dict(partition))
    assert again.explained == partition.explained
    emoe.convert_(model, CONFIG, partition=again)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(emoe.CheckpointError, match="damaged"):
        load_partition(path)
    save_file({"layer.1": torch.zeros(64, dtype=torch.int64)}, path)  # no permutation
    with pytest.raises(emoe.CheckpointError, match=r"layer\.1"):
        load_partition(path)


def test_checkpoint_loads_in_another_precision(tmp_path) -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, CONFIG)
    emoe.save_pretrained(model, tmp_path)
    model = emoe.from_pretrained(type(model), tmp_path, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(routed_layers(model)) == 2
