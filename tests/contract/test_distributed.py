"""Train a converted model with DDP or FSDP2 on two processes as on one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import emoe
from emoe.architectures import find_ffns
from tests import converted, forked, tiny_models

pytestmark = pytest.mark.slow

WORLD, ROWS, STEPS = 2, 4, 2


def as_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def as_fsdp(model: nn.Module) -> nn.Module:
    for ffn in find_ffns(model):
        fully_shard(model.get_submodule(ffn.name))
    fully_shard(model)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": as_ddp, "fsdp2": as_fsdp}
CLEAN = emoe.EMoEConfig(**converted.USUAL)
# state beside the weights: output biases of the experts and a running gate
WITH_STATE = emoe.EMoEConfig(**converted.USUAL, output_bias="per_expert", gate_momentum=0.5)
CASES = {
    **dict.fromkeys(
        [*tiny_models.BUILDERS, "bert, sparse", "gpt2, sparse", "llama, sparse", "phi3, sparse"],
        CLEAN,
    ),
    **dict.fromkeys(("bert, state", "gpt2, state", "bert, state, sparse"), WITH_STATE),
}
# FSDP2 wraps each architecture's blocks; DDP sees only the parameters, so one of each kind of FFN is enough
DDP = ["bert", "gpt2", "llama", "phi3", "t5", "VisionTransformer", "TransformerEncoder"]
PAIRS = [
    (name, kind)
    for name in CASES
    for kind in WRAPPERS
    if kind == "fsdp2" or name in DDP or "," in name
]


def losses(case: str, wrap: Callable[[nn.Module], nn.Module], rows: slice) -> list[float]:
    """Train a few steps on these rows of the batch. Return the loss before each step."""
    name = case.split(",")[0]
    model = wrap(
        converted.model(name, "sparse" if case.endswith("sparse") else "masked", CASES[case])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = {key: value[rows] for key, value in tiny_models.inputs(name, rows=ROWS).items()}
    before = []
    for _ in range(STEPS):
        result = tiny_models.output(model, values)
        loss = (result - torch.linspace(-1, 1, result.shape[-1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        emoe.update_gates_(model)
        before.append(float(loss.detach()))
    return before


def train_all(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    share = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    results = {}
    for name, kind in PAIRS:
        with mock.patch("emoe.sparse.module.pays_off", return_value=True):
            total = torch.tensor(losses(name, WRAPPERS[kind], share), dtype=torch.float64)
        dist.all_reduce(total)
        results[f"{name} {kind}"] = (total / WORLD).tolist()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))
    dist.barrier()  # keep the connection until both have used it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("distributed")
    processes = [forked.start(train_all, folder, rank) for rank in range(WORLD)]
    for process in processes:
        process.join(timeout=600)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return json.loads((folder / "losses.json").read_text())


@functools.cache
def losses_of_one_process(name: str) -> list[float]:
    return losses(name, lambda model: model, slice(None))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_two_processes_have_the_loss_of_one(two_processes, name: str, kind: str) -> None:
    if kind == "fsdp2" and torch.__version__ < "2.9":
        pytest.skip("FSDP2 of this torch sums gradients on gloo instead of averaging them")
    alone = losses_of_one_process(name)
    assert alone[-1] < alone[0]
    assert two_processes[f"{name} {kind}"] == pytest.approx(alone, rel=1e-4)
