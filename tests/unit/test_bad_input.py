"""Models, rows and configurations that cannot be converted: one error that names the module, and nothing is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.plain_net import PlainNet, plain_net

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])
ROW = emoe.FFNSpec("layers", "inner", "act", "outer")


def put_norm_between(_bert: Any) -> None:
    row = dataclasses.replace(emoe.architectures.registered_ffns()["bert"][0], between=("output.LayerNorm",))
    emoe.register_ffn("bert", row)


# changes of a BERT, its last layer, and the layer's projections; and the module or tensor that the error names
BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nan": (lambda bert: bert.down.weight[0, 0].fill_(torch.nan), r"layer\.3\.output\.dense\.weight"),
    "infinite": (lambda bert: bert.up.bias[5].fill_(torch.inf), r"intermediate\.dense\.bias"),
    "zero keys": (lambda bert: bert.up.weight[3:5].zero_(), "2 keys are all zero, the first of neuron 3"),
    "equal keys": (lambda bert: bert.up.weight[9].copy_(bert.up.weight[3]), "neurons 3 and 9 have the same key"),
    "quantised": (lambda bert: setattr(bert.up, "weight", INT8), r"dense has a weight of torch\.int8: convert before"),
    "pruned": (lambda bert: prune.random_unstructured(bert.up, "weight", 0.5), "no plain weight"),
    "meta": (lambda bert: bert.down.to("meta"), r"output\.dense\.weight is on the meta device"),
    "inference": (lambda bert: setattr(bert.layer.output, "dense", FOR_INFERENCE), r"dense\.weight .*inference_mode"),
    "activation": (lambda bert: setattr(bert.layer.intermediate, ACT, nn.PReLU()), "PReLU.*parameters"),
    "width": (lambda bert: setattr(bert.layer.output, "dense", nn.Linear(32, 32)), "64 outputs.*32 inputs"),
    "norm": (put_norm_between, r"layer\.1\.output\.LayerNorm is LayerNorm"),
    "shared": (lambda bert: setattr(bert.other, "weight", bert.up.weight), r"layer\.1.*is shared with .*layer\.3"),
    "adapter": (lambda bert: get_peft_model(bert.model, LORA), r"intermediate\.dense has an adapter"),
}
ACT, LORA = "intermediate_act_fn", LoraConfig(target_modules=["intermediate.dense"])
with torch.inference_mode():
    FOR_INFERENCE = nn.Linear(64, 32)
INT8 = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


def broken(case: str) -> Any:
    model: Any = tiny_models.build("bert")
    layer, other = model.encoder.layer[3], model.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        up, down = layer.intermediate.dense, layer.output.dense
        BROKEN[case][0](SimpleNamespace(model=model, layer=layer, up=up, down=down, other=other))
    return model


@pytest.mark.parametrize("case", BROKEN)
def test_models_that_cannot_be_converted_are_named_and_unchanged(case: str) -> None:
    model = broken(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(emoe.ConversionError, match=BROKEN[case][1]):
        emoe.convert_(model, CONFIG)
    assert not routed_layers(model)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("partition", ["random", "contiguous"])
@pytest.mark.parametrize("case", ["zero keys", "equal keys"])
def test_zero_and_equal_keys_are_split_if_nothing_is_clustered(case: str, partition: Any) -> None:
    model, values = broken(case), tiny_models.inputs("bert")
    dense = tiny_models.output(model, values)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers=[3], partition=partition))
    torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-5)


def test_a_frozen_ffn_is_refused_by_gmoe_and_taken_by_emoe() -> None:
    model = tiny_models.build("bert").requires_grad_(False)
    with pytest.raises(emoe.ConversionError, match=r"intermediate\.dense is frozen"):
        emoe.convert_(model, emoe.GMoEConfig(layers=[1]))
    emoe.convert_(model, emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers=[1]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tiny_models.output(model, tiny_models.inputs("bert"))


def test_models_that_do_not_fit_their_row_are_named() -> None:
    with pytest.raises(emoe.ConversionError, match="register_ffn"):
        emoe.convert_(nn.Sequential(), CONFIG)
    net: Any = plain_net(4, 8, layers=2)
    net.__class__ = type("OneRow", (PlainNet,), {})
    emoe.register_ffn("OneRow", ROW)
    del net.layers[1].act
    with pytest.raises(emoe.ConversionError, match=r"layers\.1 has no module 'act'"):
        emoe.convert_(net, CONFIG)
    net.layers = None
    with pytest.raises(emoe.ConversionError, match="no list of layers 'layers'"):
        emoe.convert_(net, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ""}, "non-empty string"),
        ({"proj_out": "inner"}, "the path 'inner' occurs twice"),
        ({"between": "dropout"}, "write a tuple of paths"),
        ({"fused": "frist"}, "did you mean 'first'"),
        ({"fused": "first", "proj_up": "up"}, "leave out proj_up"),
    ],
)
def test_rows_that_no_model_can_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(emoe.ConversionError, match=message):
        emoe.register_ffn("Net", dataclasses.replace(ROW, **change))


@pytest.mark.parametrize("config", [{"num_experts": 8, "top_k": 2}, emoe.EMoEConfig])
def test_objects_that_are_not_a_configuration_are_refused(config: Any) -> None:
    for call in (emoe.convert_, emoe.partition):
        with pytest.raises(emoe.ConfigError):
            call(plain_net(4, 16), config)
    with pytest.raises(emoe.ConfigError, match="GMoE copies whole FFNs"):
        emoe.partition(plain_net(4, 16), emoe.GMoEConfig())  # type: ignore[arg-type]


def test_two_lists_of_layers_need_a_choice_or_a_star() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = plain_net(4, 8), plain_net(4, 8, seed=1)

    emoe.register_ffn("TwoTowers", ROW)
    with pytest.raises(emoe.ConversionError, match=r"several lists of layers 'layers': left\.layers, right\.layers"):
        emoe.convert_(TwoTowers(), CONFIG)
    emoe.register_ffn("TwoTowers", dataclasses.replace(ROW, layers="*.layers"))
    report = emoe.convert_(TwoTowers(), emoe.EMoEConfig(num_experts=4, top_k=4, layers="all"))
    assert [layer.name for layer in report.layers] == ["left.layers.0", "right.layers.0"]


def test_nested_tensors_are_refused_and_padding_of_torchs_encoder_is_not() -> None:
    x, padding = torch.randn(3, 9, 32), torch.arange(9).repeat(3, 1) >= torch.tensor([[9], [5], [4]])
    for nested in (True, False):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
        with torch.no_grad():
            dense = model(x, src_key_padding_mask=padding)
            emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers="all"))
            if nested:
                with pytest.raises(RuntimeError, match="enable_nested_tensor=False"):
                    model(x, src_key_padding_mask=padding)
            else:
                routed = model(x, src_key_padding_mask=padding)
                torch.testing.assert_close(routed[~padding], dense[~padding], atol=1e-5, rtol=1e-5)
