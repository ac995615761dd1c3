"""The variants of the method that the golden vectors do not cover."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.plain_net import PlainNet, plain_net

N, S, H = 6, 4, 8


def net_of(kind=emoe.EMoEConfig, dense: PlainNet | None = None, **values) -> PlainNet:
    net = dense or plain_net(H, N * S)
    partition = None if kind is emoe.GMoEConfig else {0: torch.arange(N * S)}
    emoe.convert_(net, kind(**{"num_experts": N, "top_k": 2, "layers": [0], **values}), partition=partition)
    return net


def inputs(rows: int = 20) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(1))


def choices(net: PlainNet, x: Tensor) -> Tensor:
    seen = []
    hook = routed_layers(net)[0].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    net(x)
    hook.remove()
    return seen[0].unflatten(-1, (N, S)).ne(0).any(-1)


def best(values: Tensor) -> Tensor:
    """Return the two experts whose neurons have the highest mean."""
    scores = values.unflatten(-1, (N, S)).mean(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(2).indices, True)


def test_scores_of_ffns_that_are_not_gated() -> None:
    x, dense = inputs(), plain_net(H, N * S).layers[0]
    z = dense.inner(x)
    assert torch.equal(choices(net_of(), x), best(z - dense.inner.bias))
    assert torch.equal(choices(net_of(score_bias=True), x), best(z))
    assert torch.equal(choices(net_of(score="gate"), x), best(z))
    assert torch.equal(choices(net_of(score="inter_abs"), x), best(dense.act(z).abs()))


def test_selection_rules_partition_the_experts() -> None:
    x = inputs()
    top, rest = choices(net_of(), x), choices(net_of(selection="not_top"), x)
    assert torch.equal(top, ~rest)
    assert torch.equal(choices(net_of(selection="bottom", top_k=N - 2), x), rest)
    assert choices(net_of(selection="random"), x).sum(-1).eq(2).all()


# weights that sum to 1 keep 1/k of a divided bias, as in the authors' language code
@pytest.mark.parametrize(
    ("kind", "how", "kept"),
    [
        (emoe.EMoEConfig, "per_expert", 1),
        (emoe.GMoEConfig, "per_expert", 1 / 2),
        (emoe.GMoEConfig, "per_expert_whole", 1),
    ],
)
def test_biases_of_experts_start_as_the_one_bias(kind, how: str, kept: float) -> None:
    shared, own = (net_of(kind, output_bias=bias) for bias in ("shared", how))
    bias = shared.layers[0].outer.bias
    if kind is emoe.GMoEConfig:
        routed_layers(own)[0].router.load_state_dict(routed_layers(shared)[0].router.state_dict())
    torch.testing.assert_close(own(inputs()), shared(inputs()) - (1 - kept) * bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routed_layers(own)[0].mean_output_bias(), bias.detach())


def test_folding_back_takes_the_mean_bias_times_the_first_k(tmp_path) -> None:
    net, dense = net_of(output_bias="per_expert"), plain_net(H, N * S)
    emoe.set_top_k_(net, N)
    with torch.no_grad():
        routed_layers(net)[0].output_bias += torch.arange(N).unsqueeze(1)
    emoe.save_pretrained(net, tmp_path)
    again = emoe.from_pretrained(plain_net, tmp_path, hidden=H, width=N * S)
    for model in (net, again):
        emoe.to_dense_(model)
        expected = dense.layers[0].outer.bias + (2 / N) * sum(range(N))
        torch.testing.assert_close(model.layers[0].outer.bias, torch.nn.Parameter(expected))
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_checkpoints_keep_biases_and_gates_and_load_in_the_stock_class(name: str, tmp_path) -> None:
    config = emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5)
    model, values = converted.model(name, config=config), tiny_models.inputs(name)
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.output_bias += torch.randn_like(layer.output_bias) * 0.1
            layer.router.gate.add_(torch.randn_like(layer.router.gate) * 0.1)
    routed = tiny_models.output(model, values)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(type(model), tmp_path)
    torch.testing.assert_close(tiny_models.output(again, values), routed)
    stock, folded = tiny_models.stock(name, tmp_path), emoe.to_dense_(model)
    torch.testing.assert_close(tiny_models.output(stock, values), tiny_models.output(folded, values))


@pytest.mark.parametrize("position", ["before", "after"])
def test_dropout_inside_the_experts(position: str) -> None:
    net, dense, x = net_of(top_k=N, expert_dropout=0.5, dropout_position=position), plain_net(H, N * S), inputs()
    torch.testing.assert_close(net(x), dense(x))
    ffn = dense.layers[0]
    torch.manual_seed(7)
    y = net.train()(x)
    torch.manual_seed(7)
    z = ffn.inner(x)
    hidden = ffn.act(F.dropout(z, 0.5)) if position == "before" else F.dropout(ffn.act(z), 0.5)
    torch.testing.assert_close(y, ffn.outer(hidden))


def test_more_and_fewer_experts_at_inference() -> None:
    net, dense, x = net_of(), plain_net(H, N * S), inputs()
    emoe.set_top_k_(net, N)
    torch.testing.assert_close(net(x), dense(x))
    emoe.set_top_k_(net, 3)
    assert choices(net, x).sum(-1).eq(3).all()
    with pytest.raises(emoe.ConfigError, match="at most num_experts"):
        emoe.set_top_k_(net, N + 1)


def test_coactivation_groups_neurons_that_fire_together() -> None:
    net, truth = plain_net(H, N * S), torch.arange(N * S) % N
    with torch.no_grad():  # neuron j fires if input feature j % N is high
        net.layers[0].inner.weight.zero_()
        net.layers[0].inner.weight[torch.arange(N * S), truth] = torch.linspace(1.0, 2.0, N * S)
        net.layers[0].inner.bias.fill_(-3.0)
    x = torch.eye(H)[torch.randint(H, (200,), generator=torch.Generator().manual_seed(0))] * 5
    config = emoe.EMoEConfig(num_experts=N, top_k=2, layers=[0], partition="coactivation")
    for batches in ([x[:100], {"x": x[100:]}, (x[:3],)], [x]):
        groups = truth[emoe.partition(net, config, calibration=batches)[0]].view(N, S)
        assert (groups == groups[:, :1]).all()
    for calibration, message in ((None, "needs calibration batches"), ([], "have no token")):
        with pytest.raises(emoe.ConversionError, match=message):
            emoe.convert_(net, config, calibration=calibration)
    emoe.convert_(net.train(), config, calibration=[x])
    assert net.training
    assert not net.layers[0].outer._forward_pre_hooks


def test_calibration_leaves_padding_out() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], partition="coactivation")
    mask = (torch.arange(11) < 6).long().repeat(3, 1)
    short = {"input_ids": values["input_ids"][:, :6], "attention_mask": mask[:, :6]}
    padded = emoe.partition(model, config, calibration=[{**values, "attention_mask": mask}])
    assert torch.equal(padded[1], emoe.partition(model, config, calibration=[short])[1])


def test_a_deep_copy_folds_back_without_its_original() -> None:
    net = net_of(output_bias="per_expert", capacity_factor=1.5, aux_loss_coefficient=0.01)
    twin = emoe.to_dense_(copy.deepcopy(net), restore_order=True)
    torch.testing.assert_close(twin(inputs()), plain_net(H, N * S)(inputs()))
    assert not twin._forward_pre_hooks
    assert net._forward_pre_hooks


@pytest.mark.parametrize("score", ["keys", "gate"])
def test_an_activation_that_writes_over_its_input_changes_no_choice(score: str) -> None:
    outputs = []
    for inplace in (False, True):
        dense = plain_net(H, N * S)
        dense.layers[0].act = torch.nn.ReLU(inplace=inplace)
        outputs.append(net_of(dense=dense, score=score)(inputs()))
    assert torch.equal(*outputs)


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
    keys, expected = ffn.inner.weight.detach().chunk(2)[order == "last"], ffn(x)
    assert torch.equal(choices(net_of(dense=PlainNet(copy.deepcopy(ffn))), x), best(x @ keys.t()))
    torch.testing.assert_close(net_of(emoe.GMoEConfig, dense=PlainNet(ffn))(x), expected)


def test_running_gates_stay_in_single_precision() -> None:
    net = net_of(gate_momentum=0.5).bfloat16()
    assert routed_layers(net)[0].router.gate.dtype == torch.float32
    emoe.update_gates_(net)
    net(inputs().bfloat16())
