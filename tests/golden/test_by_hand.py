"""Compare with the authors' Tutel layer, written token by token, for random shapes and settings.

In the shapes, N is the number of experts, s their size, T the number of tokens and H the width.
"""

from __future__ import annotations

import math
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import emoe
from emoe.layer import RoutedActivation, routed_layers
from tests.plain_net import plain_net

H = 6
settings_of = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "experts": st.integers(2, 8),
        "size": st.integers(1, 4),
        "router": st.sampled_from(["avg_k", "cosine", "gmoe"]),
        "factor": st.sampled_from([None, 0.5, 1.0, 1.5]),
        "noise": st.sampled_from([0.5, 1.0]),
        "training": st.booleans(),
        "seed": st.integers(0, 9999),
    }
)


def scores_by_hand(layer: RoutedActivation, ffn, x: Tensor) -> Tensor:
    """Compute the router's scores ``[T, N]``, without noise."""
    router = layer.router
    if not router.learned:
        keys = ffn.inner.weight.unflatten(0, (layer.config.num_experts, -1))  # [N, s, H]
        return x @ keys.detach().mean(1).t()
    projected = x @ router.proj.weight.t() + router.proj.bias
    scale = router.temperature.clamp(max=math.log(100)).exp()
    return scale * F.normalize(projected, dim=1) @ F.normalize(router.expert_embeddings, dim=0)


def output_by_hand(layer: RoutedActivation, ffn, x: Tensor, probabilities: Tensor) -> Tensor:
    """Compute the output ``[T, H]``: the experts of each token that have capacity left, summed."""
    config = layer.config
    n = config.num_experts
    k = config.top_k
    num_tokens = len(x)
    w1 = ffn.inner.weight.unflatten(0, (n, -1))  # [N, s, H]
    b1 = ffn.inner.bias.unflatten(0, (n, -1))  # [N, s]
    w2 = ffn.outer.weight.unflatten(1, (n, -1))  # [H, N, s]
    b2 = layer.output_bias  # [N, H]
    choices = probabilities.topk(k, dim=1).indices  # [T, k]
    capacity = math.inf
    if config.capacity_factor:
        capacity = k * int(config.capacity_factor * math.ceil(num_tokens / n))

    # adding 0 times the weights gives them a gradient of zero if all tokens are dropped
    zero = 0 * (w1.sum() + b1.sum() + w2.sum() + b2.sum())
    y = [torch.zeros(H) + zero for _ in range(num_tokens)]
    # all first choices take capacity before the second ones, surest tokens first
    taken = [0] * n
    order = sorted(range(num_tokens), key=lambda t: -float(probabilities[t].max()))
    for choice in range(k):
        for t in order:
            e = int(choices[t, choice])
            taken[e] += 1
            if taken[e] > capacity:
                continue
            weight = torch.ones(())
            if layer.router.learned:
                weight = probabilities[t, e]
                if k > 1:
                    weight = weight / probabilities[t, choices[t]].sum()
            hidden = F.gelu(w1[e] @ x[t] + b1[e])
            y[t] = y[t] + weight * (w2[:, e] @ hidden + b2[e])
    return torch.stack(y)


def balance_loss_by_hand(scores: Tensor, noisy: Tensor, k: int, noise_std: float) -> Tensor:
    """Compute the authors' balance loss from the scores ``[T, N]`` without and with noise.

    It is the variation over the experts of their probabilities and of their load.
    """

    def variation(per_expert: Tensor) -> Tensor:
        return per_expert.var() / (per_expert.mean() ** 2 + 1e-10)

    clean = scores.softmax(1)
    last_choice = noisy.softmax(1).topk(k, dim=1).indices[:, -1:]
    limit = noisy.gather(1, last_choice)
    load = torch.special.ndtr((clean - limit) / noise_std).sum(0)
    return (variation(clean.sum(0)) + variation(load)) / 2


def by_hand(
    layer: RoutedActivation, ffn, x: Tensor, draws: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Compute output and balance loss. Only the weights come from the library."""
    config = layer.config
    noise_std = config.router_noise / config.num_experts
    scores = scores_by_hand(layer, ffn, x)
    noisy = scores
    if training:
        noisy = scores + draws * config.router_noise / config.num_experts
    output = output_by_hand(layer, ffn, x, noisy.softmax(1))
    loss = balance_loss_by_hand(scores, noisy, config.top_k, noise_std)
    return output, loss


def gradients(net, y: Tensor, loss: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Return the gradients of ``(y * cotangent).sum() + loss`` by parameter name."""
    net.zero_grad()
    ((y * cotangent).sum() + loss).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@settings(max_examples=120, deadline=None)
@given(settings_of, st.data())
def test_output_loss_and_gradients(given_, data) -> None:
    n = given_["experts"]
    is_gmoe = given_["router"] == "gmoe"
    # a GMoE copies the FFN, EMoE splits it
    d = given_["size"] if is_gmoe else given_["size"] * n
    net = plain_net(H, d, seed=given_["seed"])
    values = {
        "num_experts": n,
        "top_k": data.draw(st.integers(1, n)),
        "layers": [0],
        "capacity_factor": given_["factor"],
        "router_noise": given_["noise"],
        "expert_dropout": 0.0,
    }
    if is_gmoe:
        emoe.convert_(net, emoe.GMoEConfig.as_published("tutel", **values))
    else:
        config = emoe.EMoEConfig.as_published(
            "tutel", partition="random", router=given_["router"], **values
        )
        emoe.convert_(net, config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    net.train(given_["training"])
    (layer,) = routed_layers(net)
    x = torch.randn(given_["tokens"], H)
    draws = torch.randn(given_["tokens"], n)
    cotangent = torch.randn(given_["tokens"], H)
    with mock.patch.object(torch, "randn_like", return_value=draws):
        y = net(x)
    loss = emoe.aux_loss(net) / layer.config.aux_loss_coefficient
    y_hand, loss_hand = by_hand(layer, net.layers[0], x, draws, given_["training"])
    grads = gradients(net, y, loss, cotangent)
    grads_hand = gradients(net, y_hand, loss_hand, cotangent)
    torch.testing.assert_close(y, y_hand, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, loss_hand, atol=1e-5, rtol=1e-4)
    assert grads.keys() == grads_hand.keys()
    for name, grad in grads.items():
        tolerance = 1e-4 * (1 + float(grad.abs().max()))
        torch.testing.assert_close(grad, grads_hand[name], atol=tolerance, rtol=1e-3, msg=name)
