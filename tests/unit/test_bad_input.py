"""Models and folders that cannot be converted or read: one clear error, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

import emoe
from emoe.layer import RoutedActivation, routed_layers
from tests import tiny_models
from tests.plain_net import FFN, PlainNet, plain_net

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1, 3])


def edit(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    """A tiny BERT with its last layer changed."""

    def build() -> nn.Module:
        model = tiny_models.build("bert")
        with torch.no_grad():
            change(model.encoder.layer[3])
        return model

    return build


def nan_weight(layer: Any) -> None:
    layer.output.dense.weight[0, 0] = float("nan")


def infinite_bias(layer: Any) -> None:
    layer.intermediate.dense.bias[5] = float("inf")


def zero_rows(layer: Any) -> None:
    layer.intermediate.dense.weight[[3, 9]] = 0


def equal_rows(layer: Any) -> None:
    layer.intermediate.dense.weight[9] = layer.intermediate.dense.weight[3]


def quantised(layer: Any) -> None:
    layer.intermediate.dense.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


class Subclass(torch.Tensor):
    """Stands for sharded and quantised weights, which are tensors of other classes."""


def no_matrix(layer: Any) -> None:
    layer.output.dense.weight = nn.Parameter(torch.randn(32, 64, 1))


def pruned(layer: Any) -> None:
    prune.random_unstructured(layer.intermediate.dense, "weight", 0.5)


def sharded(layer: Any) -> None:
    weight = layer.output.dense.weight
    layer.output.dense.weight = nn.Parameter(weight.detach().as_subclass(Subclass))


def on_meta(layer: Any) -> None:
    layer.output.dense.to("meta")


def made_for_inference(layer: Any) -> None:
    with torch.inference_mode():
        layer.output.dense = nn.Linear(64, 32)


def with_parameters(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.PReLU()


def of_other_width(layer: Any) -> None:
    layer.output.dense = nn.Linear(32, 32)


def shared_weight() -> nn.Module:
    model = tiny_models.build("bert")
    model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[3].intermediate.dense.weight
    return model


def norm_inside() -> nn.Module:
    model = tiny_models.build("VisionTransformer")
    model.blocks[3].mlp.norm = nn.LayerNorm(192)
    return model


def adapted() -> nn.Module:
    return get_peft_model(tiny_models.build("bert"), LoraConfig(target_modules=["intermediate.dense"]))


BROKEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nan": (edit(nan_weight), r"encoder\.layer\.3\.output\.dense\.weight holds values that are not finite"),
    "infinite bias": (edit(infinite_bias), r"encoder\.layer\.3\.intermediate\.dense\.bias holds values that are not"),
    "zero rows": (edit(zero_rows), r"keys of neurons 3, 9 are all zero .* partition='random'"),
    "equal rows": (edit(equal_rows), r"neurons 3 and 9 have the same key; use partition='random'"),
    "quantised": (
        edit(quantised),
        r"intermediate\.dense \(Linear\) has a weight of torch\.int8: convert before quantising",
    ),
    "no matrix": (edit(no_matrix), r"output\.dense \(Linear\) has a weight of 3 dimensions"),
    "pruned": (edit(pruned), r"intermediate\.dense \(Linear\) has no plain weight: convert before"),
    "sharded": (
        edit(sharded),
        r"output\.dense \(Linear\) has a weight of Subclass: convert before quantising, sharding",
    ),
    "meta": (edit(on_meta), r"output\.dense\.weight is on the meta device: load the weights"),
    "inference": (
        edit(made_for_inference),
        r"output\.dense\.weight is frozen: it was made under torch\.inference_mode",
    ),
    "activation": (edit(with_parameters), r"intermediate_act_fn \(PReLU\) has parameters of its own"),
    "width": (edit(of_other_width), r"intermediate\.dense has 64 outputs where output\.dense has 32 inputs.*fused"),
    "shared": (shared_weight, r"layer\.1\.intermediate\.dense\.weight is shared with encoder\.layer\.3\.intermediate"),
    "norm": (norm_inside, r"blocks\.3\.mlp\.norm is LayerNorm: a norm between"),
    "adapter": (adapted, r"intermediate\.dense carries an adapter: convert first, or merge it"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_models_that_cannot_be_converted(what: str) -> None:
    build, message = BROKEN[what]
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(emoe.ConversionError, match=message):
        emoe.convert_(model, CONFIG)
    assert not routed_layers(model)
    assert not any(isinstance(module, RoutedActivation) for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("partition", ["random", "contiguous"])
@pytest.mark.parametrize("change", [zero_rows, equal_rows])
def test_zero_and_equal_keys_are_split_where_nothing_is_clustered(change, partition) -> None:
    model, values = edit(change)(), tiny_models.inputs("bert")
    dense = tiny_models.output(model, values)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers=[3], partition=partition))
    torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-5)


def test_a_frozen_ffn_is_refused_by_gmoe_and_taken_by_emoe() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    model.requires_grad_(False)
    with pytest.raises(emoe.ConversionError, match=r"intermediate\.dense is frozen: GMoE's copies would never differ"):
        emoe.convert_(model, emoe.GMoEConfig(layers=[1]))
    assert not routed_layers(model)
    emoe.convert_(model, emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers=[1]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tiny_models.output(model, values)


def test_an_empty_ffn_is_refused() -> None:
    net = PlainNet(FFN(4, 1))
    net.layers[0].inner, net.layers[0].outer = nn.Linear(4, 0), nn.Linear(0, 4)
    with pytest.raises(emoe.ConversionError, match=r"layers\.0\.outer has no neurons"):
        emoe.convert_(net, emoe.EMoEConfig(num_experts=1, top_k=1, layers=[0]))


def test_modules_that_a_row_names_and_the_model_lacks() -> None:
    net = plain_net(4, 8, layers=2)
    del net.layers[1].act
    with pytest.raises(
        emoe.ConversionError, match="no layer of PlainNet has an FFN of a known kind; missing modules: inner"
    ):
        emoe.convert_(PlainNet(*[nn.Identity()]), CONFIG)  # type: ignore[arg-type]
    emoe.register_ffn("OneRow", emoe.FFNSpec("layers", "inner", "act", "outer"))
    one_row = type("OneRow", (PlainNet,), {})(*net.layers)
    with pytest.raises(emoe.ConversionError, match=r"layers\.1 has no module 'act', which the row"):
        emoe.convert_(one_row, CONFIG)
    one_row.layers = None
    with pytest.raises(emoe.ConversionError, match="OneRow has no list of layers 'layers'"):
        emoe.convert_(one_row, CONFIG)
    with pytest.raises(emoe.ConversionError, match="at least one FFNSpec"):
        emoe.register_ffn("OneRow")


ROW = {"layers": "layers", "proj_in": "inner", "activation": "act", "proj_out": "outer"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ""}, r"layers is ''; write the dotted path of a list"),
        ({"layers": "a..b"}, r"layers is 'a\.\.b'"),
        ({"layers": "a*.b"}, r"layers is 'a\*\.b'"),
        ({"layers": ["a", "b"]}, r"layers is \['a', 'b'\]"),
        ({"proj_in": ".inner"}, r"proj_in is '\.inner'; write a dotted path below one layer"),
        ({"proj_in": "*.inner"}, r"proj_in is '\*\.inner'"),
        ({"activation": None}, "activation is None"),
        ({"proj_out": nn.Linear(2, 2)}, "proj_out is Linear"),
        ({"proj_out": "inner"}, "proj_out and proj_in are both 'inner'"),
        ({"between": "dropout"}, r"between is 'dropout'; write a tuple of paths"),
        ({"between": ["dropout"]}, r"between is \['dropout'\]; write a tuple of paths"),
        ({"between": ("act",)}, r"between\[0\] and activation are both 'act'"),
        ({"fused": "frist"}, r"fused is 'frist'; did you mean 'first'"),
        ({"fused": "first", "proj_up": "up"}, "fused means that proj_in holds both halves, so there is no proj_up"),
        ({"transposed": 1}, "transposed is 1; write True or False"),
    ],
)
def test_rows_that_no_model_can_fit_are_refused_when_they_are_registered(change: dict[str, Any], message: str) -> None:
    with pytest.raises(emoe.ConversionError, match=rf"register_ffn\('Net'\): {message}"):
        emoe.register_ffn("Net", emoe.FFNSpec(**{**ROW, **change}))


def test_what_is_no_row_is_refused() -> None:
    row = emoe.FFNSpec(**ROW)
    for key, specs, message in (
        ("", (row,), "'' is no key"),
        (nn.Linear, (row,), "is no key; give model.config.model_type or the name"),
        ("Net", (ROW,), r"takes emoe\.FFNSpec"),
        ("Net", (row, row), "the same FFNSpec twice"),
    ):
        with pytest.raises(emoe.ConversionError, match=message):
            emoe.register_ffn(key, *specs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"num_experts": 8, "top_k": 2}, r"build it by emoe\.EMoEConfig\(\*\*values\)"),
        ({"kind": "emoe", "num_experts": 8}, r"build it by emoe\.config_from_dict"),
        (emoe.EMoEConfig, r"build it by emoe\.EMoEConfig\(…\), an instance"),
        (None, r"the configuration is None; build it by emoe\.EMoEConfig\(num_experts"),
    ],
)
def test_what_is_no_configuration_is_refused(config: Any, hint: str) -> None:
    for call in (emoe.convert_, emoe.partition):
        with pytest.raises(emoe.ConfigError, match=hint):
            call(plain_net(4, 16), config)
    with pytest.raises(emoe.ConfigError, match="GMoE copies whole FFNs"):
        emoe.partition(plain_net(4, 16), emoe.GMoEConfig())  # type: ignore[arg-type]
    with pytest.raises(emoe.ConversionError, match="the partition is a list"):
        emoe.convert_(plain_net(4, 16), emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0]), partition=[[0]])  # type: ignore[arg-type]


def test_two_lists_of_layers_need_a_choice_or_a_star() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = plain_net(4, 8), plain_net(4, 8, seed=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.right(self.left(x))

    emoe.register_ffn("TwoTowers", emoe.FFNSpec("layers", "inner", "act", "outer"))
    with pytest.raises(emoe.ConversionError, match=r"several lists of layers 'layers': left\.layers, right\.layers"):
        emoe.convert_(TwoTowers(), CONFIG)
    emoe.register_ffn("TwoTowers", emoe.FFNSpec("*.layers", "inner", "act", "outer"))
    model, x = TwoTowers(), torch.randn(3, 4)
    dense = model(x)
    report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=4, layers="all"))
    assert [layer.name for layer in report.layers] == ["left.layers.0", "right.layers.0"]
    torch.testing.assert_close(model(x), dense)


def test_an_adapter_hides_the_keys_from_scores_that_need_them() -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], value_norm_weighted=True))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["intermediate.dense"]))
    with pytest.raises(emoe.ConversionError, match=r"layer\.1\.intermediate\.dense carries an adapter"):
        wrapped(**tiny_models.inputs("bert"))


def test_nested_tensors_are_refused_and_padding_of_torchs_encoder_is_not() -> None:
    def stack(**options: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, **options).eval()

    x, padding = torch.randn(3, 9, 32), torch.arange(9).repeat(3, 1) >= torch.tensor([[9], [5], [4]])
    config = emoe.EMoEConfig(num_experts=8, top_k=8, layers="all")
    with torch.no_grad():
        model = stack()
        emoe.convert_(model, config)
        with pytest.raises(RuntimeError, match="enable_nested_tensor=False"):
            model(x, src_key_padding_mask=padding)
        model = stack(enable_nested_tensor=False)
        dense = model(x, src_key_padding_mask=padding)
        emoe.convert_(model, config)
        routed = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(routed[~padding], dense[~padding], atol=1e-5, rtol=1e-5)
