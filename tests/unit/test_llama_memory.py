"""Memory and disk of instruction tuning are counted before weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.models.memory import Memory, memory
from benchmarks.llama.definition import InstructionSpec
from benchmarks.llama.memory_estimate import check_memory, estimate_memory
from tests.executed import finish, prepare
from tests.instruction_runs import enter, tiny_run


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data root."""
    enter(tmp_path, monkeypatch)
    return tmp_path


def test_memory_and_disk_are_counted_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = {"name": "llama", "config": LLAMA2_7B}
    sizes = {"data": {"max_length": 512}, "training": {"per_device_train_batch_size": 1}}
    full = InstructionSpec.model_validate(tiny_run("dense", "full", {"model": llama, **sizes}).spec)
    lora = InstructionSpec.model_validate(
        tiny_run("dense", "lora", {"model": {**llama, "weights": "bf16"}, **sizes}).spec
    )
    parameters, adapters = 6_738_415_616, 4_194_304  # r = 8 on q and v of 32 layers
    estimate = estimate_memory(full)
    assert (estimate.weights, estimate.gradients, estimate.optimiser) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert estimate.disk == 2 * 12 * parameters + 4 * parameters
    assert estimate_memory(lora).weights == 4 * (parameters + adapters)  # a CPU computes in float32

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e12))
    there_is(monkeypatch, total=60e9, free=50e9)
    (warning,) = check_memory(estimate_memory(full), Path())
    assert "at least 107.9 GB of memory (weights 27.0 GB, gradients 27.0 GB, optimiser 53.9 GB, " in warning
    assert ", and 50.0 GB are free. A smaller per_device_train_batch_size" in warning
    assert check_memory(estimate_memory(lora), Path()) == []
    there_is(monkeypatch, total=20e9, free=20e9)
    with pytest.raises(DataError, match=r"the weights alone are 27.0 GB, and there are 20.0 GB in all\. A smaller"):
        check_memory(estimate_memory(lora), Path())
    there_is(monkeypatch, total=20e9, free=20e9, swap=10e9)
    assert len(check_memory(estimate_memory(lora), Path())) == 2  # training and evaluation
    there_is(monkeypatch, total=60e9, free=50e9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(DataError, match=r"needs 0.1 GB of disk .* has 0.0 GB free"):
        check_memory(estimate_memory(lora), Path())


def there_is(monkeypatch: pytest.MonkeyPatch, *, total: float, free: float, swap: float = 0.0) -> None:
    """So much memory, whatever the machine has."""
    monkeypatch.setattr("benchmarks.llama.memory_estimate.memory", lambda: Memory(total, free))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=swap))


def test_too_little_memory_is_said_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    there_is(monkeypatch, total=1e9, free=1e3)
    assert finish(prepare(tiny_run("dense", "base")))["scores"]["dev"]
    assert "warning: the run needs at least 0.0 GB of memory" in capfd.readouterr().err


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_the_memory(version: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    own, above = tmp_path / "sys/fs/cgroup", tmp_path / "sys/fs/cgroup"
    limit, usage, cache = "memory.max", "memory.current", "inactive_file"
    if version == 1:
        own, above = own / "memory", above / "memory"
        limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    own /= "job/step"
    own.mkdir(parents=True)
    lines = ["4:cpu,memory:/job/step", "0::/"] if version == 1 else ["0::/job/step"]
    (tmp_path / "proc/self/cgroup").write_text("\n".join(lines))
    (own / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    (own / usage).write_text("300\n")
    (own / "memory.stat").write_text(f"{cache} 0\n")
    host = psutil.virtual_memory().total
    assert memory(tmp_path).total == host
    for place, allowed, used in ((own.parent, 9_000, 5_000), (above, 8_000, 1_000)):
        (place / limit).write_text(f"{allowed}\n")
        (place / usage).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\n{cache} 2000\n")
    assert memory(tmp_path) == Memory(8_000, 6_000)
    assert memory(tmp_path / "no") == Memory(host, pytest.approx(psutil.virtual_memory().available, rel=0.2))


def test_memory_of_gpus_is_counted_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = {"name": "llama", "config": LLAMA2_7B, "weights": "bf16"}
    sizes = {"data": {"max_length": 512}, "training": {"per_device_train_batch_size": 1}}
    full = InstructionSpec.model_validate(tiny_run("dense", "full", {"model": llama, **sizes}).spec)
    lora = InstructionSpec.model_validate(tiny_run("dense", "lora", {"model": llama, **sizes}).spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(30e9), int(80e9)))
    there_is(monkeypatch, total=50e9, free=40e9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e12))
    assert estimate_memory(lora).weights == 2 * 6_738_415_616 + 4 * 4_194_304
    assert check_memory(estimate_memory(lora), Path()) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    (warning, *_) = check_memory(estimate_memory(full), Path())  # each has all of it
    assert re.search(r"at least 863.\d GB of memory .*, 107.9 GB on each GPU, and 30.0 GB are free", warning)
    (warning,) = check_memory(estimate_memory(lora), Path())
    assert re.match(r"the weights take 107.\d GB of this machine's memory while they are loaded, and 40.0 GB", warning)
    monkeypatch.setenv("EMOE_PARALLEL", "fsdp")
    assert check_memory(estimate_memory(full), Path()) == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(10e9), int(12e9)))
    with pytest.raises(
        DataError, match=r"evaluated by one process, .* the weights alone are 27.0 GB, and there are 12"
    ):
        check_memory(estimate_memory(full), Path())


LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
