"""Reports of conversions, partitions, and models and rows that are rejected without a change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import emoe
from emoe.clustering import explained_variance_ratio
from tests import tiny_models
from tests.model_folders import assert_same
from tests.plain_net import plain_net

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: emoe.save_pretrained(model, "unused"),
        emoe.to_dense_,
        lambda model: emoe.set_top_k_(model, 2),
        emoe.for_inference_,
        lambda model: emoe.record_routing(model).__enter__(),
    ],
)
def test_dense_models_are_rejected(call: Callable[[Any], object]) -> None:
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        call(tiny_models.build("bert"))


def test_the_report_counts_active_neurons_and_added_parameters() -> None:
    report = emoe.convert_(tiny_models.build("bert"), CONFIG)
    assert report.active_neurons == pytest.approx((2 + 2 * 0.25) / 4)
    assert report.added_parameters == 0
    assert "encoder.layer.3" in str(report)
    gmoe = emoe.convert_(
        tiny_models.build("bert"), emoe.GMoEConfig(num_experts=4, top_k=2, layers=[0])
    )
    assert gmoe.active_neurons == pytest.approx((3 + 2) / 4)
    assert gmoe.added_parameters > 3 * 2 * 64 * 32


def test_partition_kinds_differ_and_are_reproducible() -> None:
    model = tiny_models.build("bert")
    orders = {}
    for kind in ("kmeans", "random", "contiguous"):
        config = dataclasses.replace(CONFIG, partition=kind)
        order = emoe.partition(model, config)
        again = emoe.partition(model, config)
        assert list(order) == [1, 3]
        assert_same(dict(again), dict(order))
        orders[kind] = order
    assert torch.equal(orders["contiguous"][1], torch.arange(64))
    assert orders["kmeans"].explained[1] > orders["random"].explained[1] + 0.05
    assert not torch.equal(orders["random"][1], orders["random"][3])
    other = emoe.partition(model, dataclasses.replace(CONFIG, partition="random", partition_seed=1))
    assert not torch.equal(other[1], orders["random"][1])


def put_norm_between(_bert: Any) -> None:
    """Register BERT's FFN with a norm between activation and out-projection."""
    (spec,) = emoe.architectures.REGISTRY["bert"]
    emoe.register_ffn("bert", dataclasses.replace(spec, between=("output.LayerNorm",)))


Change = Callable[[Any], Any]
ROW = emoe.FFNSpec("layers", "inner", "act", "outer")
ACT = "intermediate_act_fn"
LORA = LoraConfig(target_modules=["intermediate.dense"])
INT8 = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
# a change of a BERT that makes a conversion impossible, and the error's message
BROKEN: dict[str, tuple[Change, str]] = {
    "nan": (
        lambda bert: bert.down.weight[0, 0].fill_(torch.nan),
        r"layer\.3\.output\.dense\.weight",
    ),
    "quantised": (
        lambda bert: setattr(bert.up, "weight", INT8),
        r"dense\.weight is not an ordinary floating-point parameter: convert before",
    ),
    "activation": (
        lambda bert: setattr(bert.layer.intermediate, ACT, nn.PReLU()),
        "PReLU.*parameters",
    ),
    "norm": (put_norm_between, r"layer\.1\.output\.LayerNorm is LayerNorm"),
    "shared": (
        lambda bert: setattr(bert.other, "weight", bert.up.weight),
        r"layer\.1.*is shared with .*layer\.3",
    ),
    "shared bias": (
        lambda bert: setattr(bert.other, "bias", bert.up.bias),
        r"layer\.1.*dense\.bias is shared with .*layer\.3",
    ),
    "adapter": (
        lambda bert: get_peft_model(bert.model, LORA),
        r"intermediate\.dense\.weight is not an ordinary floating-point parameter",
    ),
    "converted": (lambda bert: emoe.convert_(bert.model, CONFIG), "already"),
}


def assert_rejected(model: nn.Module, message: str, config: Any = CONFIG, **options: Any) -> None:
    """Assert that a conversion raises a one-line error, and that the model stays as it is."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(emoe.EMoEError, match=message) as error:
        emoe.convert_(model, config, **options)
    assert "\n" not in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("case", BROKEN)
def test_models_that_cannot_be_converted_are_named_and_unchanged(case: str) -> None:
    model: Any = tiny_models.build("bert")
    layer = model.encoder.layer[3]
    parts = SimpleNamespace(
        model=model,
        layer=layer,
        up=layer.intermediate.dense,
        down=layer.output.dense,
        other=model.encoder.layer[1].intermediate.dense,
    )
    change, message = BROKEN[case]
    with torch.no_grad():
        change(parts)
    assert_rejected(model, message)


@pytest.mark.parametrize(
    ("config", "partition", "message"),
    [
        (dataclasses.replace(CONFIG, num_experts=7), None, "64 neurons.*7.*8"),
        (
            dataclasses.replace(CONFIG, layers=[4]),
            None,
            r"layers \[4\] do not exist: the model has layers 0 to 3",
        ),
        (dataclasses.replace(CONFIG, score="up"), None, "not gated"),
        (CONFIG, {1: torch.arange(64)}, "layer 3"),
        (CONFIG, {1: torch.arange(64), 3: torch.arange(32)}, "layer 3"),
        (emoe.GMoEConfig(layers=[1]), None, r"intermediate\.dense is frozen"),
    ],
)
def test_configurations_that_do_not_fit_the_model_are_named(
    config: Any, partition: Any, message: str
) -> None:
    assert_rejected(
        tiny_models.build("bert").requires_grad_(False), message, config, partition=partition
    )


def build_chunked() -> Any:
    """Build a BERT that calls each FFN several times in a pass, with one token of each row."""
    config = tiny_models.build("bert").config
    config.chunk_size_feed_forward = 1
    return type(tiny_models.build("bert"))(config)


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("counting", [{"capacity_factor": 1.0}, {"aux_loss_coefficient": 0.1}])
def test_experts_that_count_tokens_need_all_of_them_in_one_call(
    counting: dict[str, float], count_padding: bool, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, count_padding=count_padding, **counting)
    message = "tokens in chunks.*build it with chunk_size_feed_forward=0"
    assert_rejected(build_chunked(), message, config)
    whole = tiny_models.build("bert")
    emoe.convert_(whole, config)
    whole.save_pretrained(tmp_path)
    for load in (whole.from_pretrained, partial(emoe.from_pretrained, type(whole))):
        with pytest.raises(emoe.EMoEError, match=message):
            load(tmp_path, chunk_size_feed_forward=4)


def test_chunks_of_tokens_are_refused_in_a_calibration_and_else_change_nothing() -> None:
    calibration = [tiny_models.inputs("bert")]
    config = dataclasses.replace(CONFIG, partition="coactivation")
    assert_rejected(build_chunked(), "tokens in chunks", config, calibration=calibration)
    models = [build_chunked(), tiny_models.build("bert")]
    models[0].load_state_dict(models[1].state_dict())
    for model in models:
        emoe.convert_(model.eval(), CONFIG)
    outputs = [tiny_models.output(model, calibration[0]) for model in models]
    torch.testing.assert_close(*outputs)


def test_a_partition_of_equal_neurons_explains_nothing() -> None:
    labels = torch.arange(12) % 3
    for seed in range(20):  # rounding differs from draw to draw
        key = torch.randn(13, generator=torch.Generator().manual_seed(seed))
        assert explained_variance_ratio(key.expand(12, 13), labels, 3) == 0


def test_pruned_and_equal_neurons_are_split_too() -> None:
    model: Any = tiny_models.build("bert")
    with torch.no_grad():
        weight = model.encoder.layer[3].intermediate.dense.weight
        weight[3:5].zero_()
        weight[9:40] = weight[9].clone()
    emoe.convert_(model, CONFIG)


def test_models_and_rows_that_do_not_fit_are_named() -> None:
    assert_rejected(nn.Sequential(), "register_ffn")
    emoe.register_ffn("PlainNet", ROW)
    net: Any = plain_net(4, 8)
    del net.layers[0].act
    assert_rejected(net, r"layers\.0 has no module 'act'")
    net.layers = None
    assert_rejected(net, "no list of layers 'layers'")
    for change in ({"between": "dropout"}, {"fused": "frist"}):
        with pytest.raises(emoe.ConversionError, match="register_ffn"):
            emoe.register_ffn("Net", dataclasses.replace(ROW, **change))
    with pytest.raises(emoe.ConversionError, match="'Net' needs at least one FFNSpec"):
        emoe.register_ffn("Net")


def test_two_lists_of_layers_need_a_choice_or_a_star() -> None:
    towers = nn.ModuleDict({"left": plain_net(4, 8), "right": plain_net(4, 8, seed=1)})
    emoe.register_ffn("ModuleDict", ROW)
    assert_rejected(towers, r"several lists of layers 'layers': left\.layers, right\.layers")
    emoe.register_ffn("ModuleDict", dataclasses.replace(ROW, layers="*.layers"))
    report = emoe.convert_(towers, emoe.EMoEConfig(num_experts=4, top_k=4, layers="all"))
    assert [layer.name for layer in report.layers] == ["left.layers.0", "right.layers.0"]


def test_nested_tensors_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers="all"))
    # two rows of five tokens and four of padding
    is_padding = torch.arange(9).repeat(2, 1) >= 5
    with torch.no_grad(), pytest.raises(RuntimeError, match="enable_nested_tensor=False"):
        model(torch.randn(2, 9, 32), src_key_padding_mask=is_padding)
