"""Conversions, partitions and what the checks of both reject."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from emoe.partitioning import load_partition, partition_key, save_partition
from tests import tiny_models
from tests.plain_net import plain_net

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            emoe.EMoEConfig(num_experts=7, top_k=2, layers=[1]),
            "64 neurons.*7.*8",
        ),
        (
            emoe.EMoEConfig(num_experts=8, top_k=2, layers=[4]),
            r"layers \[4\] do not exist: the model has layers 0 to 3",
        ),
        (emoe.EMoEConfig(num_experts=8, top_k=2, layers="9:"), "matches none of the model's layers 0 to 3"),
    ],
)
def test_rejected_conversions_leave_the_model_unchanged(config, message) -> None:
    model = tiny_models.build("bert")
    before = state(model)
    with pytest.raises(emoe.EMoEError, match=message):
        emoe.convert_(model, config)
    assert unchanged(model, before)
    assert not routed_layers(model)


def test_converting_twice_is_rejected() -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, CONFIG)
    before = state(model)
    for config in (CONFIG, emoe.GMoEConfig(layers=[0])):
        with pytest.raises(emoe.ConversionError, match="converted already"):
            emoe.convert_(model, config)
    assert unchanged(model, before)


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


def test_the_first_spec_that_fits_a_layer_counts() -> None:
    report = emoe.convert_(plain_net(16, 64, gated=True), emoe.EMoEConfig(num_experts=8, top_k=2, layers="all"))
    assert report.total_layers == 1  # the layer fits both rows of its class


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


def test_one_expert_with_dropout_is_the_dense_model_with_dropout() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    dense = tiny_models.output(model, values)
    config = emoe.EMoEConfig(num_experts=1, top_k=1, expert_dropout=0.5, partition="contiguous", layers="all")
    emoe.convert_(model, config)
    torch.testing.assert_close(tiny_models.output(model, values), dense)
    model.train()
    assert (tiny_models.output(model, values) - tiny_models.output(model, values)).abs().max() > 1e-3


def test_avg_k_follows_the_weights_as_they_are_trained() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    emoe.convert_(model, CONFIG)
    layer = routed_layers(model)[1]
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, result: seen.append((result != 0).detach()))
    tiny_models.output(model, values)
    with torch.no_grad():
        find_ffns(model)[3].proj_in.weight.neg_()
    tiny_models.output(model, values)
    assert not torch.equal(seen[0], seen[1])


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


def test_a_partition_that_does_not_fit_is_rejected() -> None:
    model = tiny_models.build("bert")
    before = state(model)
    with pytest.raises(emoe.ConversionError, match="layer 3"):
        emoe.convert_(model, CONFIG, partition={1: torch.arange(64)})
    with pytest.raises(emoe.ConversionError, match="layer 3"):
        emoe.convert_(model, CONFIG, partition={1: torch.arange(64), 3: torch.arange(32)})
    assert unchanged(model, before)


@pytest.fixture
def saved(tmp_path):
    model = tiny_models.build("bert")
    emoe.convert_(model, CONFIG)
    emoe.save_pretrained(model, tmp_path)
    return tmp_path, type(model)


def test_the_sidecar_of_another_model_is_rejected(saved) -> None:
    folder, cls = saved
    tiny_models.build("bert", seed=1).save_pretrained(folder)
    with pytest.raises(emoe.CheckpointError, match=r"emoe_partition\.safetensors.*encoder\.layer\.1"):
        emoe.from_pretrained(cls, folder)


def test_checkpoint_loads_in_another_precision(saved) -> None:
    folder, cls = saved
    model = emoe.from_pretrained(cls, folder, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(routed_layers(model)) == 2


def test_saving_a_dense_model_is_rejected(tmp_path) -> None:
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        emoe.save_pretrained(tiny_models.build("bert"), tmp_path)


def test_checkpoint_holds_only_the_dense_models_tensors(saved) -> None:
    folder, _ = saved
    assert set(load_file(folder / "model.safetensors")) == set(tiny_models.build("bert").state_dict())
    assert not (folder / "emoe_extra.safetensors").exists()


def test_to_dense_of_a_dense_model_is_rejected() -> None:
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        emoe.to_dense_(tiny_models.build("bert"))


def test_a_partition_that_depends_on_data_has_no_key() -> None:
    config = emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0], partition="coactivation")
    with pytest.raises(emoe.ConversionError, match="calibration"):
        partition_key(plain_net(8, 16), config)
