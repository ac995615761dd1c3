"""The variants of the method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.plain_net import PlainNet, plain_net

N, S, H = 6, 4, 8


def converted(*, gated: bool = False, kind=emoe.EMoEConfig, **values) -> PlainNet:
    net = plain_net(H, N * S, gated=gated)
    fields = {"num_experts": N, "top_k": 2, "layers": [0]} | values
    emoe.convert_(net, kind(**fields), **({} if kind is emoe.GMoEConfig else {"partition": {0: torch.arange(N * S)}}))
    return net


def inputs(rows: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))


def choices(net: PlainNet, x: Tensor) -> Tensor:
    seen = []
    hook = routed_layers(net)[0].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    net(x)
    hook.remove()
    return seen[0].unflatten(-1, (N, S)).ne(0).any(-1)


def best(scores: Tensor, k: int = 2) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", ["gate", "up", "up_abs", "inter", "inter_abs"])
def test_what_an_expert_is_scored_by(score: str, gated: bool) -> None:
    if not gated and score.startswith("up"):
        with pytest.raises(emoe.ConversionError, match="not gated"):
            converted(score=score)
        return
    net, dense, x = converted(gated=gated, score=score), plain_net(H, N * S, gated=gated).layers[0], inputs()
    z = dense.inner(x)
    up = dense.up(x) if gated else None
    values = {"gate": z, "up": up, "inter": dense.act(z) * (up if gated else 1)}[score.removesuffix("_abs")]
    values = values.abs() if score.endswith("_abs") else values
    assert torch.equal(choices(net, x), best(values.unflatten(-1, (N, S)).mean(-1)))


def test_selection_rules_partition_the_experts() -> None:
    x = inputs()
    top, rest = choices(converted(), x), choices(converted(selection="not_top"), x)
    assert torch.equal(top, ~rest)
    assert torch.equal(choices(converted(selection="bottom", top_k=N - 2), x), rest)
    torch.manual_seed(0)
    assert choices(converted(selection="random"), x).sum(-1).eq(2).all()


@pytest.mark.parametrize("asked", [False, True])
def test_the_bias_shapes_the_score_if_asked(asked: bool) -> None:
    x, dense = inputs(), plain_net(H, N * S).layers[0]
    keys = dense.inner.weight.detach().unflatten(0, (N, S)).mean(1)
    bias = dense.inner.bias.detach().unflatten(0, (N, S)).mean(1)
    assert torch.equal(choices(converted(score_bias=asked), x), best(x @ keys.t() + asked * bias))


def test_a_running_gate_follows_the_keys() -> None:
    net = converted(gate_momentum=0.9)
    layer, x = routed_layers(net)[0], inputs()
    start, chosen = layer.router.gate.clone(), choices(net, x)
    with torch.no_grad():
        net.layers[0].inner.weight.neg_()
    assert torch.equal(choices(net, x), chosen)  # until it is updated
    emoe.update_gates_(net)
    torch.testing.assert_close(layer.router.gate, 0.9 * start - 0.1 * start)
    assert "layers.0.act.router.gate" in net.state_dict()
    emoe.update_gates_(converted())


# weights that sum to 1 keep 1/k of a divided bias, as in the authors' language code
@pytest.mark.parametrize(
    ("kind", "how", "kept"),
    [
        (emoe.EMoEConfig, "per_expert", 1),
        (emoe.GMoEConfig, "per_expert", 1 / 2),
        (emoe.GMoEConfig, "per_expert_whole", 1),
    ],
)
def test_biases_of_experts_start_as_the_one_bias(kind, how: str, kept: float, tmp_path) -> None:
    shared, own = (converted(kind=kind, output_bias=bias) for bias in ("shared", how))
    bias = shared.layers[0].outer.bias
    if kind is emoe.GMoEConfig:
        routed_layers(own)[0].router.load_state_dict(routed_layers(shared)[0].router.state_dict())
    torch.testing.assert_close(own(inputs()), shared(inputs()) - (1 - kept) * bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routed_layers(own)[0].mean_output_bias(), bias.detach())
    emoe.save_pretrained(own, tmp_path)
    again = emoe.from_pretrained(plain_net, tmp_path, hidden=H, width=N * S)
    torch.testing.assert_close(again(inputs()), own(inputs()))


def test_folding_back_takes_the_mean_bias_times_k() -> None:
    net = converted(output_bias="per_expert")
    before = plain_net(H, N * S).layers[0].outer.bias
    layer = routed_layers(net)[0]
    assert net.layers[0].outer.bias.eq(0).all()
    with torch.no_grad():
        layer.output_bias += torch.arange(N).unsqueeze(1)
    expected = before + (2 / N) * sum(range(N))
    emoe.to_dense_(net)
    torch.testing.assert_close(net.layers[0].outer.bias, torch.nn.Parameter(expected))
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain_net(H, N * S).named_parameters()]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_checkpoints_keep_biases_and_gates_and_load_in_the_stock_class(name: str, tmp_path) -> None:
    model, values = tiny_models.build(name), tiny_models.inputs(name)
    dense = tiny_models.output(model, values)
    emoe.convert_(
        model, emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5)
    )
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.output_bias += torch.randn_like(layer.output_bias) * 0.1
            layer.router.gate.add_(torch.randn_like(layer.router.gate) * 0.1)
    routed = tiny_models.output(model, values)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(type(model), tmp_path)
    torch.testing.assert_close(tiny_models.output(again, values), routed)
    stock = type(model).from_pretrained(tmp_path).eval()
    folded = emoe.to_dense_(model)
    torch.testing.assert_close(tiny_models.output(stock, values), tiny_models.output(folded, values))
    assert (tiny_models.output(stock, values) - dense).abs().max() > 1e-4


@pytest.mark.parametrize("position", ["before", "after"])
def test_dropout_inside_the_experts(position: str) -> None:
    net, dense, x = converted(top_k=N, expert_dropout=0.5, dropout_position=position), plain_net(H, N * S), inputs()
    torch.testing.assert_close(net(x), dense(x))
    ffn = dense.layers[0]
    torch.manual_seed(7)
    y = net.train()(x)
    torch.manual_seed(7)
    z = ffn.inner(x)
    hidden = ffn.act(F.dropout(z, 0.5)) if position == "before" else F.dropout(ffn.act(z), 0.5)
    torch.testing.assert_close(y, ffn.outer(hidden))


def test_more_and_fewer_experts_at_inference() -> None:
    net, dense, x = converted(), plain_net(H, N * S), inputs()
    emoe.set_top_k_(net, N)
    torch.testing.assert_close(net(x), dense(x))
    assert routed_layers(net)[0].config.top_k == N
    emoe.set_top_k_(net, 3)
    assert choices(net, x).sum(-1).eq(3).all()
    with pytest.raises(emoe.ConfigError, match="at most num_experts"):
        emoe.set_top_k_(net, N + 1)
    with pytest.raises(emoe.ConversionError, match="no routed FFN"):
        emoe.set_top_k_(dense, 2)


def test_drops_lose_the_expert_and_its_bias() -> None:
    net, x = converted(output_bias="per_expert", capacity_factor=0.2), inputs(60)
    full = converted(output_bias="per_expert")
    with emoe.record_routing(net) as record:
        y = net(x)
    assert record.layers[0].dropped > 0
    none = ~choices(net, x).any(-1)
    assert none.any()
    assert y[none].eq(0).all()
    kept = (choices(net, x) == choices(full, x)).all(-1)
    torch.testing.assert_close(y[kept], full(x)[kept])


def test_coactivation_groups_neurons_that_fire_together() -> None:
    net, truth = plain_net(H, N * S), torch.arange(N * S) % N
    with torch.no_grad():  # neuron j fires if input feature j % N is high
        net.layers[0].inner.weight.zero_()
        net.layers[0].inner.weight[torch.arange(N * S), truth] = torch.linspace(1.0, 2.0, N * S)
        net.layers[0].inner.bias.fill_(-3.0)
    x = torch.eye(H)[torch.randint(H, (200,), generator=torch.Generator().manual_seed(0))] * 5
    config = emoe.EMoEConfig(num_experts=N, top_k=2, layers=[0], partition="coactivation")
    partition = emoe.partition(net, config, calibration=[x[:100], {"x": x[100:]}, (x[:3],)])
    groups = truth[partition[0]].view(N, S)
    assert (groups == groups[:, :1]).all()
    for calibration, message in ((None, "needs calibration batches"), ([], "have no token")):
        with pytest.raises(emoe.ConversionError, match=message):
            emoe.convert_(net, config, calibration=calibration)
    emoe.convert_(net.train(), config, calibration=[x])
    assert net.training


def test_calibration_leaves_padding_out() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], partition="coactivation")
    mask = (torch.arange(11) < 6).long().repeat(3, 1)
    short = {"input_ids": values["input_ids"][:, :6], "attention_mask": mask[:, :6]}
    padded = emoe.partition(model, config, calibration=[{**values, "attention_mask": mask}])
    assert torch.equal(padded[1], emoe.partition(model, config, calibration=[short])[1])


def test_deep_copies_of_a_published_layer_fold_back_apart() -> None:
    net = converted(output_bias="per_expert", capacity_factor=1.5, aux_loss_coefficient=0.01)
    twin = copy.deepcopy(net)
    emoe.to_dense_(twin, restore_order=True)
    torch.testing.assert_close(twin(inputs()), plain_net(H, N * S)(inputs()))
    assert not twin._forward_pre_hooks
    assert routed_layers(net)
    assert net._forward_pre_hooks


@pytest.mark.parametrize("score", ["keys", "gate"])
def test_an_activation_that_writes_over_its_input_changes_no_choice(score: str) -> None:
    outputs = []
    for inplace in (False, True):
        net = plain_net(H, N * S)
        net.layers[0].act = torch.nn.ReLU(inplace=inplace)
        emoe.convert_(net, emoe.EMoEConfig(num_experts=N, top_k=2, layers=[0], score=score))
        outputs.append(net(inputs()))
    assert torch.equal(*outputs)


def test_other_top_k_leaves_the_folded_bias_alone(tmp_path) -> None:
    net, dense = converted(output_bias="per_expert"), plain_net(H, N * S)
    emoe.set_top_k_(net, N)
    emoe.save_pretrained(net, tmp_path)
    again = emoe.from_pretrained(plain_net, tmp_path, hidden=H, width=N * S)
    for model in (net, again):
        emoe.to_dense_(model, restore_order=True)
        torch.testing.assert_close(model.layers[0].outer.bias, dense.layers[0].outer.bias)


class Fused(torch.nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(H, 2 * N * S), torch.nn.Linear(N * S, H)
        self.act, self.order = torch.nn.Sigmoid(), order

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inner(x).chunk(2, -1)
        return self.outer(self.act(a) * b if self.order == "first" else a * self.act(b))


@pytest.mark.parametrize("order", ["first", "last"])
def test_fused_projections_name_their_activated_half(order: str) -> None:
    emoe.register_ffn("PlainNet", emoe.FFNSpec("layers", "inner", "act", "outer", fused=order))
    ffn, x = Fused(order), inputs()
    keys = ffn.inner.weight.detach().chunk(2)[order == "last"].unflatten(0, (N, S))
    net, gmoe = PlainNet(ffn), PlainNet(Fused(order))
    emoe.convert_(net, emoe.EMoEConfig(num_experts=N, top_k=2, layers=[0]), partition={0: torch.arange(N * S)})
    assert torch.equal(choices(net, x), best(x @ keys.mean(1).t()))
    dense = gmoe(x)
    emoe.convert_(gmoe, emoe.GMoEConfig(num_experts=3, top_k=2, layers=[0]))
    torch.testing.assert_close(gmoe(x), dense)


def test_empty_batches_and_casts() -> None:
    net = converted(gate_momentum=0.5)
    assert net(torch.empty(0, 3, H)).shape == (0, 3, H)
    net.bfloat16()
    assert routed_layers(net)[0].router.gate.dtype == torch.float32
    emoe.update_gates_(net)
    net(inputs().bfloat16())
