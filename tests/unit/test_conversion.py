"""Conversions, partitions and what the checks of both reject."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import emoe
from emoe.layer import routed_layers
from emoe.partitioning import load_partition, partition_key, save_partition
from tests import tiny_models

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "partition", "message"),
    [
        ({"num_experts": 7}, None, "64 neurons.*7.*8"),
        ({"layers": [4]}, None, r"layers \[4\] do not exist: the model has layers 0 to 3"),
        ({"layers": "9:"}, None, "matches none of the model's layers 0 to 3"),
        ({"router": "fixed"}, None, r"emoe\.fix_experts_"),
        ({}, {1: torch.arange(64)}, "layer 3"),
        ({}, {1: torch.arange(64), 3: torch.arange(32)}, "layer 3"),
    ],
)
def test_rejected_conversions_leave_the_model_unchanged(settings, partition, message: str) -> None:
    model = tiny_models.build("bert")
    before = state(model)
    config = emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": [1, 3], **settings})
    with pytest.raises(emoe.EMoEError, match=message):
        emoe.convert_(model, config, partition=partition)
    assert unchanged(model, before)
    assert not routed_layers(model)


@pytest.mark.parametrize("call", [lambda m, path: emoe.save_pretrained(m, path), lambda m, path: emoe.to_dense_(m)])
def test_dense_models_are_rejected(call, tmp_path) -> None:
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        call(tiny_models.build("bert"), tmp_path)


def test_an_unknown_architecture_can_be_registered() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.act(self.up(x)))

    class MyOwnNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.stack:
                x = block(x)
            return x

    model = MyOwnNet()
    with pytest.raises(emoe.ConversionError, match="register_ffn"):
        emoe.convert_(model, CONFIG)
    emoe.register_ffn("MyOwnNet", emoe.FFNSpec("stack", "up", "act", "down"))
    x = torch.randn(5, 8)
    dense = model(x)
    report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=4, layers="all"))
    torch.testing.assert_close(model(x), dense)
    assert [layer.expert_size for layer in report.layers] == [4, 4]


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
        config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3], partition=kind)
        orders[kind] = emoe.partition(model, config)
        assert list(orders[kind]) == [1, 3]
        again = emoe.partition(model, config)
        assert all(torch.equal(order, again[layer]) for layer, order in orders[kind].items())
    assert torch.equal(orders["contiguous"][1], torch.arange(64))
    assert orders["kmeans"].explained[1] > orders["random"].explained[1] + 0.05
    assert not torch.equal(orders["random"][1], orders["random"][3])
    other = emoe.partition(
        model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], partition="random", partition_seed=1)
    )
    assert not torch.equal(other[1], orders["random"][1])


def test_partition_key_is_of_content_and_settings() -> None:
    model, same, other = tiny_models.build("bert"), tiny_models.build("bert"), tiny_models.build("bert", seed=1)
    assert partition_key(model, CONFIG) == partition_key(same, CONFIG) != partition_key(other, CONFIG)
    assert partition_key(model, CONFIG) != partition_key(model, emoe.EMoEConfig(num_experts=4, top_k=2, layers=[1, 3]))
    # other settings do not change the key
    assert partition_key(model, CONFIG) == partition_key(model, emoe.EMoEConfig(num_experts=8, top_k=4, layers=[1, 3]))


def test_partition_file_round_trip_and_damage(tmp_path) -> None:
    model = tiny_models.build("bert")
    partition = emoe.partition(model, CONFIG)
    path = tmp_path / "p.safetensors"
    save_partition(partition, path)
    again = load_partition(path)
    assert list(again) == [1, 3]
    assert torch.equal(again[3], partition[3])
    assert again.explained == partition.explained
    emoe.convert_(model, CONFIG, partition=again)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(emoe.CheckpointError, match="damaged"):
        load_partition(path)
    save_file({"layer.1": torch.zeros(64, dtype=torch.int64)}, path)
    with pytest.raises(emoe.CheckpointError, match=r"layer\.1"):
        load_partition(path)
    with pytest.raises(emoe.CheckpointError, match="does not exist"):
        load_partition(tmp_path / "none.safetensors")


def test_checkpoint_loads_in_another_precision(tmp_path) -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, CONFIG)
    emoe.save_pretrained(model, tmp_path)
    model = emoe.from_pretrained(type(model), tmp_path, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(routed_layers(model)) == 2
