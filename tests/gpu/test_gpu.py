"""The library on an accelerator: ``pytest -m gpu`` where there is one. Each test also runs on the CPU, with smaller shapes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from emoe.sparse.decode import decode_ffn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import emoe
from emoe.sparse import grouped, kernels, path
from emoe.sparse.ffn import sparse_ffn
from tests.plain_net import plain_net

# what cuBLAS wants to be told before its first call, or it refuses to be deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CUDA = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no accelerator")]),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
EXPERTS, TOP_K = 16, 4
# width, neurons, tokens
SIZES = {"cpu": (16, 128, 48), "cuda": (256, 2048, 1024)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def converted(device: str, backend: str = "masked", *, gated: bool = True, layers: int = 1, **settings: Any) -> Any:
    """A net of FFNs, converted where it is, whose activations keep the size of its inputs."""
    hidden, width, _ = SIZES[device]
    net = plain_net(hidden, width, gated=gated, layers=layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2 / parameter.shape[-1] ** 0.5)
    net.to(device)
    torch.manual_seed(0)
    config = emoe.EMoEConfig(num_experts=EXPERTS, top_k=TOP_K, layers=range(layers), backend=backend, **settings)
    emoe.convert_(net, config)
    return net


def twins(net: nn.Module, *backends: str) -> list[Any]:
    """Copies that differ in their backend alone."""
    found = [copy.deepcopy(net) for _ in backends]
    for twin, backend in zip(found, backends, strict=True):
        emoe.set_backend_(twin, backend)
    return found


def inputs(device: str, tokens: int | None = None, seed: int = 0) -> Tensor:
    hidden, _, many = SIZES[device]
    return torch.randn(tokens or many, hidden, generator=torch.Generator().manual_seed(seed)).to(device)


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one training step, by name."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {"output": y.detach(), "input": x.grad} | {name: p.grad for name, p in net.named_parameters()}  # type: ignore[dict-item]


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor differs by at most this share of its length."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        apart = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert apart <= tolerance, f"{name}: {apart}"


def spy_on(module: Any, name: str, function: Callable[..., Any]) -> Any:
    return mock.patch.object(module, name, side_effect=function)


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def takes_grouped(x: Tensor) -> bool:
    return x.dtype != torch.float64 and not x.shape[-1] % 8


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", ["usual", "grouped"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [2, None])  # of two tokens most experts get none
def test_masked_sparse_and_grouped_agree(
    device: str, dtype: torch.dtype, products: str, gated: bool, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    if products == "grouped" and device == "cuda" and not grouped.is_usable(inputs(device).to(dtype)):
        pytest.skip("grouped_mm takes bfloat16 on compute capability 8 and later")
    x = inputs(device, tokens)
    masked, sparse = twins(converted(device, gated=gated, weighting="softmax_times_k"), "masked", "sparse")
    if products != "grouped":
        monkeypatch.setattr(grouped, "is_usable", lambda _: False)
    elif device == "cpu":
        monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)
        monkeypatch.setattr(grouped, "is_usable", takes_grouped)
    with autocast(device, dtype), emoe.record_routing(masked) as one, emoe.record_routing(sparse) as other:
        expected = step(masked, x)
        with spy_on(path, "sparse_ffn", sparse_ffn) as taken, spy_on(grouped, "outer_mm", grouped.outer_mm) as product:
            found = step(sparse, x)
    assert taken.called
    assert product.called == (products == "grouped")
    agree(found, expected, TOLERANCE[dtype])
    assert torch.equal(one.layers[0].loads, other.layers[0].loads)
    assert other.layers[0].tokens == len(x)


@on_every_device
def test_half_precision(device: str) -> None:
    net, x = converted(device), inputs(device).half()
    single = step(net, x.float())
    masked, sparse = (step(twin, x) for twin in twins(net.half(), "masked", "sparse"))
    assert sparse["output"].dtype == torch.float16
    agree(sparse, masked, TOLERANCE[torch.float16])
    agree(masked, single, 0.1)  # rounded keys may choose other experts for a few tokens


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_a_converted_model_moves(device: str, backend: str) -> None:
    net = converted("cpu", backend, output_bias="per_expert", gated=False, gate_momentum=0.5)
    x = inputs("cpu")
    expected = step(net, x)
    moved = copy.deepcopy(net).to(device)
    agree({name: tensor.cpu() for name, tensor in step(moved, x.to(device)).items()}, expected, 1e-4)
    emoe.update_gates_(moved)
    dense = emoe.to_dense_(moved, restore_order=True)
    assert all(p.device.type == device for p in dense.parameters())


@on_every_device
def test_a_compiled_model_is_the_eager_one(device: str) -> None:
    torch.compiler.reset()
    net = converted(device, "sparse", weighting="softmax_times_k")
    expected = step(net, inputs(device))
    compiled = torch.compile(net, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in step(compiled, inputs(device)).items()}
    agree(found, expected, 1e-4)


@pytest.fixture
def one_process(device: str, tmp_path: Path) -> Iterator[None]:
    """A process group of one, whose device is the test's."""
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
@pytest.mark.usefixtures("one_process")
def test_sharded_by_fsdp2(device: str, backend: str) -> None:
    net = converted(device, backend, layers=2)
    sharded, losses = copy.deepcopy(net), []
    mesh = init_device_mesh(device, (1,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (net, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with spy_on(path, "sparse_ffn", sparse_ffn) as taken:
                loss = model(inputs(device)).square().mean()
            assert taken.called == (backend == "sparse")
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)


@on_every_device
@pytest.mark.parametrize("decode_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decoding_is_the_masked_path(device: str, dtype: torch.dtype, decode_cache: bool) -> None:
    net = converted(device, decode_cache=decode_cache).to(dtype)
    masked, sparse = twins(net, "masked", "sparse")
    for seed in range(3):
        x = inputs(device, 1, seed).to(dtype)
        with spy_on(path, "decode_ffn", decode_ffn) as taken:
            agree({"output": sparse(x)}, {"output": masked(x)}, TOLERANCE[dtype])
        assert taken.called


@on_every_device
@pytest.mark.parametrize("decode_cache", [True, False])
@torch.no_grad()
def test_decoding_reads_the_chosen_experts_and_nothing_else(device: str, decode_cache: bool) -> None:
    # a learned router, whose scores do not hang on the experts' weights
    net = converted(device, decode_cache=decode_cache, router="cosine", weighting="softmax_times_k")
    masked, sparse = twins(net, "masked", "sparse")
    x = inputs(device, 1)
    expected = {"output": masked(x)}
    with emoe.record_routing(sparse) as record:
        agree({"output": sparse(x)}, expected, 1e-4)
    left_out = (record.layers[0].loads == 0).repeat_interleave(SIZES[device][1] // EXPERTS).to(device)
    assert int(left_out.sum()) == (EXPERTS - TOP_K) * SIZES[device][1] // EXPERTS
    for net in (masked, sparse):
        ffn = net.layers[0]
        ffn.inner.weight[left_out] = torch.nan
        ffn.up.weight[left_out] = torch.nan
        ffn.outer.weight[:, left_out] = torch.nan
    assert masked(x).isnan().any()
    agree({"output": sparse(x)}, expected, 1e-4)


def peak_bytes(device: str, run: Callable[[], object], folder: Path) -> int:
    """The most memory that tensors took at a time, beyond what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    taken, most = 0, 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        taken += event["args"]["Bytes"]
        most = max(most, taken)
    return most


@on_every_device
def test_a_sparse_step_takes_less_memory_than_a_masked_one(device: str, tmp_path: Path) -> None:
    peaks = []
    for net in twins(converted(device, layers=2), "masked", "sparse"):
        step(net, inputs(device))  # gradients and workspaces are there from now on
        peaks.append(peak_bytes(device, lambda net=net: net(inputs(device, 4096)).sum().backward(), tmp_path))
    assert 0 < peaks[1] < 0.5 * peaks[0]


@on_every_device
@pytest.mark.parametrize("backend", ["masked", "sparse"])
@pytest.mark.parametrize("tokens", [1, None])
def test_threads_with_streams_of_their_own_share_a_model(device: str, backend: str, tokens: int | None) -> None:
    net = converted(device, backend, layers=2)
    batches = [inputs(device, tokens, seed) for seed in range(2)]
    with torch.no_grad():
        # what decoding keeps is laid out here, before the streams part
        expected = [net(x) for x in batches]
        if device == "cuda":
            torch.cuda.synchronize()

    def serve(place: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
        with torch.no_grad(), stream:
            for _ in range(50):
                agree({"output": net(batches[place])}, {"output": expected[place]}, 1e-4)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(serve, range(2)))  # raises what a thread raised


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["masked", "sparse"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_give_the_same_twice(device: str, backend: str, dtype: torch.dtype) -> None:
    net = converted(device, backend, router="cosine", weighting="softmax_times_k")
    with autocast(device, dtype):
        first, second = (step(copy.deepcopy(net), inputs(device)) for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("device", DEVICES[1:])
def test_on_an_accelerator_auto_is_the_mask(device: str) -> None:
    net = converted(device, "auto")
    with spy_on(path, "sparse_ffn", sparse_ffn) as taken, spy_on(path, "decode_ffn", decode_ffn) as decoded:
        net(inputs(device, 4096))
        with torch.no_grad():
            net(inputs(device, 1))
    assert not taken.called
    assert not decoded.called
