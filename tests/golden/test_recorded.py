"""Compare with outputs, losses, gradients and trained weights recorded from the authors' two implementations.

Float32, CPU. ``as_published`` reproduces them to rounding; ``tests/golden/data/README.md`` describes each array.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emoe
from emoe.config import LINEAR_SCORES
from emoe.layer import routed_layers
from tests.plain_net import FFN, PlainNet

DATA = Path(__file__).parent / "data"
BACKENDS = ["masked", "sparse"]
pytestmark = pytest.mark.usefixtures("always_sparse")
# the authors' array: our parameter of the layer
ROUTER = {
    "gate_proj_weight": "act.router.proj.weight",
    "gate_proj_bias": "act.router.proj.bias",
    "gate_sim_matrix": "act.router.expert_embeddings",
    "gate_temperature": "act.router.temperature",
}
TUTEL = {
    "fc1_weight": "inner.weight",
    "fc1_bias": "inner.bias",
    "fc2_weight": "outer.weight",
    "fc2_bias_per_expert": "act.output_bias",
}
LLAMA = {
    "gate_proj_weight": "inner.weight",
    "up_proj_weight": "up.weight",
    "down_proj_weight": "outer.weight",
}


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a recording: its settings, and its tensors by name."""
    arrays = np.load(DATA / f"{name}.npz")
    meta = json.loads(str(arrays["meta"]))
    tensors = {}
    for key in arrays.files:
        if key != "meta":
            tensors[key] = torch.from_numpy(arrays[key])
    return meta, tensors


def names(implementation: str) -> list[str]:
    """Return the names of the recordings of one implementation, ``llama`` or ``tutel``."""
    found = []
    for path in sorted(DATA.glob("*.npz")):
        is_llama = path.stem.startswith("llama")
        if is_llama == (implementation == "llama"):
            found.append(path.stem)
    return found


def assert_close(actual: Tensor | None, expected: Tensor, name: str) -> None:
    """Assert that two tensors are equal up to 1e-5 of the largest element."""
    assert actual is not None, name
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        actual,
        expected.to(actual.dtype),
        rtol=1e-5,
        atol=1e-5 * scale,
        msg=lambda text: f"{name}: {text}",
    )


def tutel_net(name: str, meta: dict[str, Any], data: dict[str, Tensor], backend: str) -> PlainNet:
    """Convert a dense net as published and load the recorded weights."""
    is_gmoe = name.startswith("gmoe")
    n = meta["num_experts"]
    # a GMoE copies the FFN, EMoE splits it
    d = meta["expert_size"] if is_gmoe else meta["expert_size"] * n
    net = PlainNet(FFN(meta["hidden"], d, meta["activation"], gated=False))
    values: dict[str, Any] = {
        "num_experts": n,
        "top_k": meta["top_k"],
        "layers": [0],
        "capacity_factor": meta["capacity_factor"] or None,  # theirs is 0 without a capacity
        "router_noise": meta["gate_noise"],
        "aux_loss_coefficient": meta["aux_loss_coefficient"],
        "expert_dropout": 0.0,
    }
    if is_gmoe:
        emoe.convert_(net, emoe.GMoEConfig.as_published("tutel", **values))
    else:
        values |= {
            "partition": "contiguous",
            "router": meta["router"],
            "gate_momentum": meta["gate_momentum"],
        }
        # before the conversion, because a running gate starts with the means of these weights
        net.layers[0].inner.weight.data = data["fc1_weight"].clone()
        emoe.convert_(net, emoe.EMoEConfig.as_published("tutel", **values))

    state = {}
    for theirs, ours in (TUTEL | ROUTER).items():
        if theirs in data:
            state[f"layers.0.{ours}"] = data[theirs]
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    emoe.set_backend_(net, backend)
    return net.train(meta["training"])


def with_noise(monkeypatch: pytest.MonkeyPatch, noise: Tensor | None) -> None:
    """Let torch draw the recorded noise, one slice at each call, if there is any."""
    if noise is not None:
        draws = iter(noise)
        monkeypatch.setattr(torch, "randn_like", lambda _scores: next(draws))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in names("tutel") if "steps" not in name])
def test_tutel_layer_output_loss_and_all_gradients(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, data = load(name)
    net = tutel_net(name, meta, data, backend)
    with_noise(monkeypatch, data.get("router_noise"))
    x = data["x"].clone().requires_grad_()
    y = net(x)
    loss: Any = emoe.aux_loss(net)
    assert_close(y, data["y"], "y")
    assert_close(loss / meta["aux_loss_coefficient"], data["l_aux"], "l_aux")
    ((y * data["grad_y"]).sum() + loss).backward()
    assert_close(x.grad, data["grad_x"], "x")
    for theirs, ours in (TUTEL | ROUTER).items():
        if f"grad_{theirs}" in data:
            parameter = net.get_parameter(f"layers.0.{ours}")
            assert_close(parameter.grad, data[f"grad_{theirs}"], theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in names("tutel") if "steps" in name])
def test_tutel_layer_after_optimiser_steps(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, data = load(name)
    net = tutel_net(name, meta, data, backend)
    with_noise(monkeypatch, data.get("router_noise"))
    optimizer = torch.optim.SGD(net.parameters(), lr=meta["sgd_lr"])
    for step in range(meta["steps"]):
        y = net(data["steps_x"][step])
        loss = emoe.aux_loss(net)
        l_aux = loss / meta["aux_loss_coefficient"]
        assert_close(y, data["steps_y"][step], f"y of step {step}")
        assert_close(l_aux, data["steps_l_aux"][step], f"l_aux of step {step}")
        optimizer.zero_grad()
        task_loss = (y - data["steps_target"][step]).square().mean()
        (task_loss + loss).backward()
        optimizer.step()
        emoe.update_gates_(net)
    for theirs, ours in TUTEL.items():
        parameter = net.get_parameter(f"layers.0.{ours}")
        assert_close(parameter.detach(), data[f"final_{theirs}"], theirs)
    if "final_gate_weight" in data:
        router = routed_layers(net)[0].router
        gate = router.mean_keys() if router.gate is None else router.gate
        assert_close(gate, data["final_gate_weight"], "gate")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", names("llama"))
def test_llama_block_mask(name: str, backend: str) -> None:
    meta, data = load(name)
    if backend == "sparse" and meta["select"] not in LINEAR_SCORES:
        pytest.skip("this score needs every neuron")
    ffn = FFN(meta["hidden"], meta["intermediate"], meta["activation"], gated=True)
    ffn.load_state_dict({ours: data[theirs] for theirs, ours in LLAMA.items()})
    net = PlainNet(ffn)
    config = emoe.EMoEConfig.as_published(
        "llama",
        num_experts=meta["num_experts"],
        top_k=meta["top_k"],
        score=meta["select"],
        layers=[0],
        partition="contiguous",
    )
    emoe.convert_(net, config)
    emoe.set_backend_(net, backend)
    x = data["x"].clone().requires_grad_()
    y = net(x)
    assert_close(y, data["y"], "y")
    (y * data["grad_y"]).sum().backward()
    assert_close(x.grad, data["grad_x"], "x")
    for theirs, ours in LLAMA.items():
        parameter = net.get_parameter(f"layers.0.{ours}")
        assert_close(parameter.grad, data[f"grad_{theirs}"], theirs)


def test_the_clean_method_is_theirs_without_capacity_noise_and_loss() -> None:
    """A shared output bias equals identical output biases of the experts."""
    meta, data = load("emoe_eval_dropless")
    d = meta["num_experts"] * meta["expert_size"]
    net = PlainNet(FFN(meta["hidden"], d, meta["activation"], gated=False))
    shared = ("fc1_weight", "fc1_bias", "fc2_weight")
    state = {f"layers.0.{TUTEL[theirs]}": data[theirs] for theirs in shared}
    state["layers.0.outer.bias"] = data["fc2_bias_per_expert"][0] * meta["top_k"]
    net.load_state_dict(state)
    config = emoe.EMoEConfig(
        num_experts=meta["num_experts"], top_k=meta["top_k"], layers=[0], partition="contiguous"
    )
    emoe.convert_(net, config)
    y = net(data["x"])
    assert_close(y, data["y"], "y")
    (y * data["grad_y"]).sum().backward()
    for theirs in shared:
        parameter = net.get_parameter(f"layers.0.{TUTEL[theirs]}")
        assert_close(parameter.grad, data[f"grad_{theirs}"], theirs)
