"""Streamed conversions that are killed, meet a full disk or a changed source, and what memory they need."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

import emoe
from emoe.__main__ import cli, main
from emoe.folders import load_dense
from emoe.streaming import convert_folder, fold_folder
from emoe.unfinished import unfinished
from tests.forked import start as start_fork
from tests.model_folders import digests, loaded, save

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")


class KilledError(Exception):
    pass


def stop_after(steps: int) -> Any:
    """An ``fsync`` that ends the process's work after so many files of the model."""
    calls = iter(range(steps))

    def step(handle: int) -> None:
        # partitions are written by safetensors, and opened again to be synced
        of_model = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if of_model and next(calls, None) is None:
            raise KilledError

    return step


def test_an_unfinished_folder_is_refused_by_whoever_reads_it_and_by_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = save("llama", tmp_path / "source", shard_size="40KB"), tmp_path / "out"
    convert_folder(source, tmp_path / "whole", CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop_after(3))
        with pytest.raises(KilledError):
            convert_folder(source, out, CONFIG)
    assert len(list(out.glob("model*.safetensors"))) == 3
    for read in (
        lambda: emoe.from_pretrained(LlamaModel, out),
        lambda: fold_folder(out, tmp_path / "dense"),
        lambda: load_dense(out),
    ):
        with pytest.raises(emoe.CheckpointError, match=r"is not finished|does not exist"):
            read()
    with pytest.raises(emoe.CheckpointError, match="was begun with num_experts 8, not 4"):
        convert_folder(source, out, dataclasses.replace(CONFIG, num_experts=4))
    with pytest.raises(emoe.CheckpointError, match="was begun with source "):
        convert_folder(save("llama", tmp_path / "other"), out, CONFIG)
    with pytest.raises(emoe.CheckpointError, match='was begun with command "convert", not "to-dense"'):
        fold_folder(tmp_path / "whole", out)
    convert_folder(source, out, CONFIG)
    assert digests(out) == digests(tmp_path / "whole")
    with pytest.raises(emoe.CheckpointError, match="exists and is not empty"):
        convert_folder(source, out, CONFIG)


def test_a_source_that_changed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save("llama", tmp_path / "source", shard_size="40KB"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop_after(2))
        with pytest.raises(KilledError):
            convert_folder(source, out, CONFIG)
    shard = sorted(source.glob("*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with pytest.raises(emoe.CheckpointError, match=rf"was begun with {shard.name} "):
        convert_folder(source, out, CONFIG)


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with (
        unfinished(tmp_path / "out", {"a": 1}),
        pytest.raises(emoe.CheckpointError, match="is being written by another process"),
        unfinished(tmp_path / "out", {"a": 1}),
    ):
        pass


def convert_until(source: Path, out: Path, writes: int = 0, seconds: float = 0) -> None:
    """Convert, and be killed after so many files were written, or seconds of CPU time: other work changes neither."""
    signal.alarm(600)  # ends what would never end
    signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal nothing handles: the process is gone
    fsync, counted = os.fsync, itertools.count(1)

    def written(file: int) -> None:
        fsync(file)
        if next(counted) == writes:
            signal.raise_signal(signal.SIGPROF)

    os.fsync = written
    convert_folder(source, out, CONFIG, jobs=2)


def exit_code(work: Callable[..., None], *arguments: Any) -> int | None:
    """That of a process that does this."""
    process = start_fork(work, *arguments)
    process.join()
    return process.exitcode


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source, out = save("llama", tmp_path / "source", shard_size="20KB"), tmp_path / "out"

    def ends_well(*arguments: Any) -> bool:
        code = exit_code(convert_until, source, *arguments)
        assert code in (0, -signal.SIGPROF)
        return code == 0

    assert ends_well(tmp_path / "whole")
    wanted, moments = digests(tmp_path / "whole"), random.Random(0)
    found = set()
    for _ in range(6):
        shutil.rmtree(out, ignore_errors=True)
        for attempt in itertools.count():
            writes = moments.choice([0, 1, 2, 3, 5, 7, 9]) if attempt < 4 else 0
            seconds = moments.uniform(0.01, 0.2) if attempt < 4 and not writes else 0
            if ends_well(out, writes, seconds):
                break
            if (out / ".unfinished" / "plan.json").exists():
                found.add(len(list(out.iterdir())))
                with pytest.raises(emoe.CheckpointError):
                    loaded(out)
            elif (out / "config.json").exists():
                break  # it was killed when all was done
        assert digests(out) == wanted
    assert len(found) > 2  # it was stopped at different points


def with_little_room(words: list[str], room: int, said: Path) -> None:
    """The program, where no file may be larger."""
    sys.argv[1:] = words
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    with said.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    source, out, said = save("bert", tmp_path / "source"), tmp_path / "out", tmp_path / "said.txt"
    words = ["convert", str(source), str(out), "--num-experts", "8", "--top-k", "2", "--layers", "all"]
    assert exit_code(with_little_room, words, (source / "model.safetensors").stat().st_size // 2, said) == 1
    assert said.read_text().splitlines()[-1] == f"Error: {out / 'model.safetensors'}: File too large"
    assert "Traceback" not in said.read_text()
    assert not (out / "model.safetensors").exists()
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert not (out / ".unfinished").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("bert", tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    with pytest.raises(emoe.CheckpointError, match=r"are to be written, and the disk has 0\.0 GB left"):
        convert_folder(source, tmp_path / "out", CONFIG)


def convert_and_say_peak(source: Path, out: Path, peak: Path) -> None:
    convert_folder(source, out, CONFIG, jobs=1)
    # not ru_maxrss, in which the parent's memory at the fork counts
    peak.write_text(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Peak resident memory of the process, mapped files included."""
    peaks, sizes = [], []
    for layers in (2, 12):
        source = tmp_path / str(layers)
        config = LlamaConfig(
            vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=4
        )
        LlamaModel(config).save_pretrained(source, max_shard_size="20MB")
        sizes.append(sum(path.stat().st_size for path in source.iterdir()))
        peak = tmp_path / f"{layers}.txt"
        assert exit_code(convert_and_say_peak, source, tmp_path / f"out{layers}", peak) == 0
        peaks.append(1024 * int(peak.read_text()))
    assert sizes[1] - sizes[0] > 150e6
    assert peaks[1] - peaks[0] < 30e6
    assert peaks[1] < 2 * 20e6 + 1e9
