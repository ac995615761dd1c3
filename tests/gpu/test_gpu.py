"""The library on an accelerator (``pytest -m gpu``). Each test also runs on the CPU, with smaller shapes."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import emoe
from emoe.sparse import ffn, kernels
from emoe.sparse.cost_model import pays_off
from emoe.sparse.ffn import sparse_ffn
from tests.converted import process_group, step
from tests.plain_net import plain_net

# cuBLAS needs this before its first call to be deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
on_every_device = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.usefixtures("always_sparse")
EXPERTS, TOP_K = 16, 4
# width, neurons, tokens
SIZES = {"cpu": (16, 128, 48), "cuda": (256, 2048, 1024)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def converted(
    device: str, backend: str = "masked", *, gated: bool = True, layers: int = 1, **settings: Any
) -> Any:
    """Convert a net of FFNs on the device; its activations are about as large as its inputs."""
    hidden, width, _ = SIZES[device]
    net = plain_net(hidden, width, gated=gated, layers=layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2 / parameter.shape[-1] ** 0.5)
    net.to(device)
    torch.manual_seed(0)
    emoe.convert_(
        net, emoe.EMoEConfig(num_experts=EXPERTS, top_k=TOP_K, layers=range(layers), **settings)
    )
    emoe.set_backend_(net, backend)
    return net


def inputs(device: str, tokens: int | None = None, seed: int = 0) -> Tensor:
    hidden, _, many = SIZES[device]
    return torch.randn(tokens or many, hidden, generator=torch.Generator().manual_seed(seed)).to(
        device
    )


def sparse_copy(net: nn.Module) -> Any:
    twin = copy.deepcopy(net)
    emoe.set_backend_(twin, "sparse")
    return twin


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check that each difference is at most this share of the tensor's norm."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (actual[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert difference <= tolerance, f"{name}: {difference}"


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", ["usual", "grouped"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [2, None])  # with two tokens most experts get none
def test_masked_sparse_and_grouped_agree(
    device: str,
    dtype: torch.dtype,
    products: str,
    gated: bool,
    tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if products == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    if (
        products == "grouped"
        and device == "cuda"
        and not kernels.can_group(inputs(device).to(dtype))
    ):
        pytest.skip("grouped_mm takes bfloat16 on compute capability 8 and later")
    x = inputs(device, tokens)
    masked = converted(device, gated=gated, weighting="softmax_times_k")
    sparse = sparse_copy(masked)
    if products != "grouped":
        monkeypatch.setattr(kernels, "can_group", lambda _: False)
    elif device == "cpu":
        monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)
        monkeypatch.setattr(kernels, "can_group", lambda _: True)
    with (
        autocast(device, dtype),
        mock.patch.object(ffn, "sparse_ffn", side_effect=sparse_ffn) as called,
        mock.patch.object(kernels, "pad_neurons", side_effect=kernels.pad_neurons) as product,
    ):
        assert_same(step(sparse, x), step(masked, x), TOLERANCE[dtype])
    assert called.called
    assert product.called == (products == "grouped")


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_a_converted_model_moves(device: str, backend: str) -> None:
    net = converted("cpu", backend, output_bias="per_expert", gated=False, gate_momentum=0.5)
    x = inputs("cpu")
    expected = step(net, x)
    moved = copy.deepcopy(net).to(device)
    assert_same(
        {name: tensor.cpu() for name, tensor in step(moved, x.to(device)).items()}, expected, 1e-4
    )
    emoe.update_gates_(moved)
    dense = emoe.to_dense_(moved, restore_order=True)
    assert all(p.device.type == device for p in dense.parameters())


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_a_compiled_model_is_the_eager_one(device: str, backend: str) -> None:
    torch.compiler.reset()
    net = converted(device, backend, weighting="softmax_times_k")
    expected = step(net, inputs(device))
    compiled = torch.compile(
        net, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True
    )
    actual = {
        name.removeprefix("_orig_mod."): tensor
        for name, tensor in step(compiled, inputs(device)).items()
    }
    assert_same(actual, expected, 1e-4)


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_sharded_by_fsdp2(device: str, backend: str, tmp_path: Path) -> None:
    net = converted(device, backend, layers=2)
    sharded, losses = copy.deepcopy(net), []
    with process_group(tmp_path, "nccl" if device == "cuda" else "gloo"):
        mesh = init_device_mesh(device, (1,))
        for layer in sharded.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (net, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss = model(inputs(device)).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)


@pytest.mark.gpu
@NO_GPU
def test_a_sparse_step_takes_less_memory_than_a_masked_one() -> None:
    peaks, masked, x = [], converted("cuda", layers=2), inputs("cuda", 4096)
    for net in (masked, sparse_copy(masked)):
        step(net, x)  # allocates gradients and workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        net(x).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 0 < peaks[1] < 0.5 * peaks[0]


@pytest.mark.gpu
@NO_GPU
def test_autocast_decides_whether_the_grouped_product_is_used() -> None:
    rows = inputs("cuda", 64).float()
    assert not pays_off(rows, expert_size=128, active=0.25)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert pays_off(rows, expert_size=128, active=0.25)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["masked", "sparse", "for_inference_"])
@pytest.mark.parametrize("tokens", [1, 9, None])
@torch.no_grad()
def test_threads_with_their_own_streams_share_a_model(
    device: str, way: str, tokens: int | None, dtype: torch.dtype
) -> None:
    masked = converted(device, layers=2).to(dtype)
    net, batches = (
        copy.deepcopy(masked),
        [inputs(device, tokens, seed).to(dtype) for seed in range(2)],
    )
    if way == "for_inference_":
        emoe.for_inference_(net)
    else:
        emoe.set_backend_(net, way)
    expected = [masked(x) for x in batches]
    if device == "cuda":
        torch.cuda.synchronize()

    @torch.no_grad()
    def serve(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
            for _ in range(20):
                assert_same(
                    {"output": net(batches[number])}, {"output": expected[number]}, TOLERANCE[dtype]
                )

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(serve, range(2)))  # raises a thread's error


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_deterministic_algorithms_repeat(device: str, backend: str, dtype: torch.dtype) -> None:
    net = converted(device, backend, router="cosine", weighting="softmax_times_k")
    torch.use_deterministic_algorithms(True)
    try:
        with autocast(device, dtype):
            first, second = (step(copy.deepcopy(net), inputs(device)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
