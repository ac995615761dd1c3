"""Compare with the authors' Tutel layer, written token by token, for random shapes and settings."""

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


def by_hand(
    layer: RoutedActivation, ffn, x: Tensor, draws: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Compute output and balance loss from the layer's description; only the weights come from the library."""
    config = layer.config
    n, k, tokens = config.num_experts, config.top_k, len(x)
    w1, b1 = ffn.inner.weight.unflatten(0, (n, -1)), ffn.inner.bias.unflatten(0, (n, -1))
    w2, b2 = ffn.outer.weight.unflatten(1, (n, -1)), layer.output_bias
    if not layer.router.learned:
        z = x @ w1.detach().mean(1).t()
    else:
        router = layer.router
        p = x @ router.proj.weight.t() + router.proj.bias
        scale = router.temperature.clamp(max=math.log(100)).exp()
        z = scale * F.normalize(p, dim=1) @ F.normalize(router.expert_embeddings, dim=0)
    noisy = z + draws * config.router_noise / n if training else z
    probabilities = noisy.softmax(1)
    slots = probabilities.topk(k, dim=1).indices
    capacity = (
        k * int(config.capacity_factor * math.ceil(tokens / n))
        if config.capacity_factor
        else math.inf
    )
    taken = [0] * n
    zero = 0 * (
        w1.sum() + b1.sum() + w2.sum() + b2.sum()
    )  # gives a gradient of zero if all is dropped
    y = [torch.zeros(H) + zero for _ in range(tokens)]
    order = sorted(range(tokens), key=lambda t: -float(probabilities[t].max()))
    for slot in range(k):
        for t in order:
            e = int(slots[t, slot])
            taken[e] += 1
            if taken[e] > capacity:
                continue
            weight = torch.ones(())
            if layer.router.learned:
                weight = probabilities[t, e]
                if k > 1:
                    weight = weight / probabilities[t, slots[t]].sum()
            y[t] = y[t] + weight * (w2[:, e] @ F.gelu(w1[e] @ x[t] + b1[e]) + b2[e])
    clean = z.softmax(1)
    limit = noisy.gather(1, slots[:, -1:])
    load = torch.special.ndtr((clean - limit) / (config.router_noise / n)).sum(0)

    def variation(v: Tensor) -> Tensor:
        return v.var() / (v.mean() ** 2 + 1e-10)

    return torch.stack(y), (variation(clean.sum(0)) + variation(load)) / 2


@settings(max_examples=120, deadline=None)
@given(settings_of, st.data())
def test_output_loss_and_gradients(given_, data) -> None:
    n, gmoe = given_["experts"], given_["router"] == "gmoe"
    net = plain_net(H, given_["size"] * (1 if gmoe else n), seed=given_["seed"])
    values = {
        "num_experts": n,
        "top_k": data.draw(st.integers(1, n)),
        "layers": [0],
        "capacity_factor": given_["factor"],
        "router_noise": given_["noise"],
        "expert_dropout": 0.0,
    }
    if gmoe:
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
    layer, ffn = routed_layers(net)[0], net.layers[0]
    x = torch.randn(given_["tokens"], H)
    draws, cotangent = torch.randn(given_["tokens"], n), torch.randn(given_["tokens"], H)
    results = []
    with mock.patch.object(torch, "randn_like", return_value=draws):
        y = net(x)
    loss = emoe.aux_loss(net) / layer.config.aux_loss_coefficient
    for output, aux in ((y, loss), by_hand(layer, ffn, x, draws, given_["training"])):
        net.zero_grad()
        ((output * cotangent).sum() + aux).backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        results.append((output.detach(), aux.detach(), grads))
    (y, loss, grads), (y_hand, loss_hand, grads_hand) = results
    torch.testing.assert_close(y, y_hand, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, loss_hand, atol=1e-5, rtol=1e-4)
    assert grads.keys() == grads_hand.keys()
    for name, grad in grads.items():
        tolerance = 1e-4 * (1 + float(grad.abs().max()))
        torch.testing.assert_close(grad, grads_hand[name], atol=tolerance, rtol=1e-3, msg=name)
