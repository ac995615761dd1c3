"""The clean method for random shapes, and the variants that the golden vectors do not cover."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import emoe
from emoe.clustering import balanced_kmeans
from emoe.layer import RoutedActivation, routed_layers
from emoe.routing import balance_loss, expert_mask
from tests import tiny_models
from tests.converted import active_neurons
from tests.plain_net import FFN, PlainNet, plain_net


@st.composite
def conversions(draw: st.DrawFn) -> tuple[PlainNet, Tensor, emoe.EMoEConfig]:
    """Draw a dense net, inputs and a configuration."""
    experts, seed = draw(st.integers(1, 8)), draw(st.integers(0, 999))
    hidden, width = draw(st.integers(2, 9)), experts * draw(st.integers(1, 6))
    net = plain_net(hidden, width, gated=draw(st.booleans()), seed=seed)
    net.layers[
        0
    ].act = nn.Sigmoid()  # never zero, so that zeros mark neurons of experts that were not chosen
    partition = draw(st.sampled_from(["kmeans", "random", "contiguous"]))
    config = emoe.EMoEConfig(
        num_experts=experts, top_k=draw(st.integers(1, experts)), layers=[0], partition=partition
    )
    return net, torch.randn(draw(st.integers(1, 12)), hidden), config


@settings(max_examples=60, deadline=None)
@given(conversions())
def test_each_token_activates_k_times_d_over_n_neurons_of_the_best_experts(case) -> None:
    net, x, config = case
    emoe.convert_(net, config)
    active = active_neurons(net, x)
    used = active.any(-1)
    assert used.sum(-1).eq(config.top_k).all()
    assert torch.equal(active.all(-1), used)
    # the same as the best means of the pre-activations without bias
    means = (
        (x @ net.layers[0].inner.weight.t())
        .unflatten(-1, (config.num_experts, -1))
        .mean(-1)
        .detach()
    )
    lowest_used = means.masked_fill(~used, torch.inf).amin(-1)
    highest_unused = means.masked_fill(used, -torch.inf).amax(-1)
    assert (lowest_used >= highest_unused - 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(conversions())
def test_lower_precision_chooses_the_same_experts(case) -> None:
    net, x, config = case
    net.bfloat16()
    twin = copy.deepcopy(net).float()  # the same weights and inputs, exactly
    order = emoe.partition(net, config)
    for model in (net, twin):
        emoe.convert_(model, config, partition=order)
    x, loads = x.bfloat16(), []
    for model, inputs, autocast in (
        (net, x, False),
        (twin, x.float(), False),
        (twin, x.float(), True),
    ):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            emoe.record_routing(model) as record,
        ):
            model(inputs)
        loads.append(record.layers[0].loads.tolist())
    assert loads[0] == loads[1] == loads[2]


def test_equal_scores_go_to_the_lower_expert_in_every_run() -> None:
    net = plain_net(4, 24)
    net.layers[0].inner.weight.data[:] = 1.0
    x = torch.randint(1, 9, (5, 4)).float()  # exact sums, so exact ties
    emoe.convert_(
        net, emoe.EMoEConfig(num_experts=6, top_k=2, layers=[0]), partition={0: torch.arange(24)}
    )
    for _ in range(3):
        assert active_neurons(net, x).any(-1).nonzero()[:, 1].tolist() == [0, 1] * 5


N, S, H = 6, 4, 8
MASK = (torch.arange(8) < 5).long().repeat(4, 1)


def net_of(kind=emoe.EMoEConfig, dense: PlainNet | None = None, **values) -> PlainNet:
    net = dense or plain_net(H, N * S)
    partition = None if kind is emoe.GMoEConfig else {0: torch.arange(N * S)}
    emoe.convert_(
        net, kind(**{"num_experts": N, "top_k": 2, "layers": [0], **values}), partition=partition
    )
    return net


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (20,)), H, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count_padding", [False, True])
def test_padding_takes_no_capacity_unless_it_counts(count_padding: bool) -> None:
    net, x = net_of(capacity_factor=1.0, count_padding=count_padding), inputs(4, 8)
    x[:, 5:] = 40 * x[:, 5:]  # the most confident tokens, which would come first
    padded = net(x, attention_mask=MASK)[:, :5]
    alone = net(x[:, :5], attention_mask=MASK[:, :5])
    assert torch.equal(padded, alone) != count_padding


def test_a_capacity_beyond_all_integers_drops_no_choice() -> None:
    net = net_of(capacity_factor=1e30, count_padding=True)
    with emoe.record_routing(net) as record:
        net(inputs())
    assert record.layers[0].dropped == 0


@pytest.mark.parametrize(
    ("formula", "noise"), [("corrected", 0.0), ("corrected", 0.5), ("published", 0.5)]
)
def test_padding_does_not_count_in_the_balance_loss(formula, noise: float) -> None:
    net = net_of(aux_loss_coefficient=1.0, balance_loss=formula, router_noise=noise).train()
    x, draws, losses = inputs(4, 8), torch.randn(4, 8, N), []
    for length in (8, 5):
        with mock.patch.object(torch, "randn_like", return_value=draws[:, :length].reshape(-1, N)):
            net(x[:, :length], attention_mask=MASK[:, :length])
        losses.append(emoe.aux_loss(net))
    torch.testing.assert_close(*losses)


def test_padding_that_is_unknown_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="PlainNet was not called as a module"):
        net_of(aux_loss_coefficient=1.0).forward(inputs())


def test_balance_losses_on_several_devices_are_added() -> None:
    """The device ``meta`` stands in for a second GPU. Only the first loss can be on it."""
    net = plain_net(H, N * S, layers=2)
    config = emoe.EMoEConfig(num_experts=N, top_k=2, layers="all", aux_loss_coefficient=1.0)
    emoe.convert_(net, config)
    losses = [torch.ones((), device=device) for device in ("meta", "cpu")]
    with mock.patch.object(RoutedActivation, "aux_loss", mock.PropertyMock(side_effect=losses)):
        loss = emoe.aux_loss(net)
    assert isinstance(loss, Tensor)
    assert loss.device.type == "meta"


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_corrected_balance_loss_prefers_balance(noise: float) -> None:
    balanced, skewed = torch.eye(4).repeat(8, 1) * 4, torch.tensor([[4.0, 0, 0, 0]]).repeat(32, 1)
    losses = [
        float(balance_loss(s, s, expert_mask(s.topk(1).indices, 4), noise))
        for s in (balanced, skewed)
    ]
    assert losses[0] < 1e-3 < losses[1]


def choices(net: PlainNet, x: Tensor) -> Tensor:
    return active_neurons(net, x).any(-1)


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
def test_output_biases_of_experts_start_as_the_shared_bias(kind, how: str, kept: float) -> None:
    shared, own = (net_of(kind, output_bias=bias) for bias in ("shared", how))
    bias = shared.layers[0].outer.bias
    if kind is emoe.GMoEConfig:
        routed_layers(own)[0].router.load_state_dict(routed_layers(shared)[0].router.state_dict())
    torch.testing.assert_close(
        own(inputs()), shared(inputs()) - (1 - kept) * bias, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(routed_layers(own)[0].folded_output_bias(), bias.detach())


def test_folding_back_takes_the_mean_bias_times_the_first_k(tmp_path) -> None:
    net = net_of(output_bias="per_expert")
    emoe.set_top_k_(net, N)
    with torch.no_grad():
        routed_layers(net)[0].output_bias += torch.arange(N).unsqueeze(1)
    emoe.save_pretrained(net, tmp_path)
    expected = plain_net(H, N * S).layers[0].outer.bias + (2 / N) * sum(range(N))
    for model in (net, emoe.from_pretrained(plain_net, tmp_path, hidden=H, width=N * S)):
        torch.testing.assert_close(
            emoe.to_dense_(model).layers[0].outer.bias, torch.nn.Parameter(expected)
        )


@pytest.mark.parametrize("position", ["before", "after"])
def test_dropout_inside_the_experts(position: str) -> None:
    net, ffn, x = (
        net_of(top_k=N, expert_dropout=0.5, dropout_position=position),
        plain_net(H, N * S).layers[0],
        inputs(),
    )
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
    for calibration in (None, []):
        with pytest.raises(emoe.ConversionError, match="calibration"):
            emoe.convert_(net, config, calibration=calibration)
    permutations = emoe.partition(net, config, calibration=[x])
    with pytest.raises(emoe.ConversionError, match="a partition, or calibration to"):
        emoe.convert_(net, config, partition=permutations, calibration=[x])


def test_calibration_leaves_padding_out() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1], partition="coactivation")
    mask = (torch.arange(11) < 6).long().repeat(3, 1)
    short = {"input_ids": values["input_ids"][:, :6], "attention_mask": mask[:, :6]}
    padded = emoe.partition(model, config, calibration=[{**values, "attention_mask": mask}])
    assert torch.equal(padded[1], emoe.partition(model, config, calibration=[short])[1])


class FusedFFN(FFN):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.inner(x).chunk(2, -1)
        return self.outer(up * self.act(gate))


def test_a_fused_projection_may_activate_its_last_half() -> None:
    """Phi-3 activates the first."""
    emoe.register_ffn("PlainNet", emoe.FFNSpec("layers", "inner", "act", "outer", fused="last"))
    torch.manual_seed(0)
    ffn, x = FusedFFN(H, N * S), inputs()
    ffn.inner, ffn.act = nn.Linear(H, 2 * N * S), nn.Sigmoid()
    keys, expected = ffn.inner.weight.detach().chunk(2)[1], ffn(x)
    assert torch.equal(choices(net_of(dense=PlainNet(copy.deepcopy(ffn))), x), best(x @ keys.t()))
    torch.testing.assert_close(net_of(emoe.GMoEConfig, dense=PlainNet(ffn))(x), expected)


def test_running_gates_stay_in_single_precision() -> None:
    assert routed_layers(net_of(gate_momentum=0.5).bfloat16())[0].router.gate.dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(
    clusters=st.integers(1, 9),
    size=st.integers(1, 7),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_sizes_are_exact_and_labels_canonical(
    clusters: int, size: int, width: int, seed: int
) -> None:
    rows = torch.randn(clusters * size, width, generator=torch.Generator().manual_seed(seed))
    labels = balanced_kmeans(rows, clusters, seed=seed)
    assert torch.bincount(labels, minlength=clusters).eq(size).all()
    firsts = [int((labels == cluster).nonzero()[0]) for cluster in range(clusters)]
    assert firsts == sorted(firsts)


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(8).repeat(16)
    rows = torch.randn(8, 32, generator=generator)[truth] + 0.1 * torch.randn(
        128, 32, generator=generator
    )
    labels = balanced_kmeans(rows, 8)
    assert torch.equal(labels, truth)  # canonical numbers: by first member


def test_same_seed_same_labels_and_scale_does_not_matter() -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    first = balanced_kmeans(rows, 8, seed=5)
    assert torch.equal(first, balanced_kmeans(rows, 8, seed=5))
    assert torch.equal(first, balanced_kmeans(rows * 4.0, 8, seed=5))
