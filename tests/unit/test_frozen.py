"""Test that a frozen prefix runs once per row, and changes no number."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.domainbed import pipeline as images
from benchmarks.harness.base import PREFIXES, DefinitionError, RunError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.method_specs import MethodSpec, check_frozen
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.models.build import build_language_model
from benchmarks.harness.models.prefix import Prefix, PrefixStates
from benchmarks.harness.models.trainable import Trainable
from benchmarks.llama import pipeline as instructions
from benchmarks.text import pipeline as texts
from tests.executed import finish, killed_at, prepare, typed
from tests.image_sets import pacs_run
from tests.instruction_runs import tiny_run
from tests.planned import paper_spec

pytestmark = pytest.mark.usefixtures("hub_here")
FROZEN = {"frozen_layers": 2}
BUILDERS = {
    texts: "build_classifier",
    images: "build_image_classifier",
    instructions: "build_language_model",
}


def text_run(method: str, model: str = "bert-base-cased", **training: Any) -> Run:
    spec = paper_spec("glue", task="rte", model=model, method=method)
    training = {**spec["training"], "epochs": 2, "batch_size": 4, "frozen_layers": 8, **training}
    return run_from_spec({**spec, "ood": [], "training": training})


def image_run(method: str) -> Run:
    spec = copy.deepcopy(pacs_run(method, **FROZEN, drop_path=0.1).spec)
    spec["hparams"]["data_augmentation"] = False
    return run_from_spec(spec)


RUNS: dict[str, tuple[Any, Callable[[], Run]]] = {
    "bert": (texts, lambda: text_run("vanilla")),
    "gpt2, EMoE": (texts, lambda: text_run("emoe", "gpt2")),
    "ViT, EMoE": (images, lambda: image_run("emoe")),
    "Llama, recomputed": (instructions, lambda: llama_run("full", gradient_checkpointing=True)),
    "Llama, adapters, packed": (instructions, lambda: llama_run("lora", packing=True)),
}


def llama_run(tuning: str, **training: Any) -> Run:
    return tiny_run("emoe", tuning, training={**FROZEN, **training})


def watched(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, *, cached: bool = True
) -> list[tuple[Trainable, dict[str, torch.Tensor]]]:
    """Record the models that a pipeline builds, with copies of their parameters; uncached rows have no prefix."""
    build, models = getattr(pipeline, BUILDERS[pipeline]), []

    def spy(*args: Any, **kwargs: Any) -> Trainable:
        built = build(*args, **kwargs)
        models.append(
            (built, {name: values.clone() for name, values in built.model.named_parameters()})
        )
        return built if cached else replace(built, prefix=None)

    monkeypatch.setattr(pipeline, BUILDERS[pipeline], spy)
    return models


def assert_close(result: Any, expected: Any) -> None:
    """Check that all numbers are the same but for rounding."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for key in expected:
            assert_close(result[key], expected[key])
    elif isinstance(expected, list):
        for pair in zip(result, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, str) and re.fullmatch(
        r"-?[0-9]+[.][0-9]+", expected
    ):  # a loss with all its digits
        assert_close(float(result), float(expected))
    else:
        assert result == (
            pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected
        )


def test_states_are_computed_again_with_another_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = text_run("vanilla")
    monkeypatch.delenv("MKL_CBWR", raising=False)
    finish(prepare(run, "first"))
    files = set(PREFIXES.glob("*.npy"))
    assert files
    finish(prepare(run, "second"))
    assert set(PREFIXES.glob("*.npy")) == files
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    finish(prepare(run, "third"))
    assert len(set(PREFIXES.glob("*.npy")) - files) == len(files)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_without_cache_and_after_a_kill(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, make = RUNS[name]
    run = make()
    with monkeypatch.context() as patch:
        built = watched(pipeline, patch)
        whole = finish(prepare(run, "cached"))
    files = {file: file.read_bytes() for file in PREFIXES.glob("*.npy")}
    with monkeypatch.context() as patch:
        plain = watched(pipeline, patch, cached=False)
        assert_close(finish(prepare(run, "plain")), whole)
    ((trainable, before),) = built
    for pair in zip(trainable.model.parameters(), plain[0][0].model.parameters(), strict=True):
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)
    _check_changes(trainable, before, run.spec["training"]["frozen_layers"])
    for file in files:
        file.unlink()
    path = prepare(run, "killed")
    with killed_at(5):
        finish(path)
    computed: list[object] = []
    output = Prefix.output
    monkeypatch.setattr(
        Prefix, "output", lambda self, inputs: computed.append(inputs) or output(self, inputs)
    )
    assert finish(path) == whole
    assert files == {file: file.read_bytes() for file in PREFIXES.glob("*.npy")}
    if pipeline is texts:  # the killed run had computed all files
        assert not computed


def _check_changes(trainable: Trainable, before: dict[str, torch.Tensor], layers: int) -> None:
    """Check that frozen parameters are unchanged, and that all others may be trained."""
    assert trainable.prefix is not None
    now = dict(trainable.model.named_parameters())
    trained = {key for key in now if now[key].requires_grad}
    frozen = {key for key in now if key.removeprefix("network.") in trainable.prefix.names}
    assert len(frozen) == len(trainable.prefix.names)
    assert {int(match[1]) for key in frozen if (match := re.search(r"\.(\d+)\.", key))} == set(
        range(layers)
    )
    changed = {key for key in now if not torch.equal(now[key], before[key])}
    assert changed
    assert changed <= trained
    assert not trained & frozen
    if trainable.adapters is None:
        assert trained | frozen == set(now)


def bert(**config: Any) -> nn.Module:
    small = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**small, num_hidden_layers=3, **config))


def test_the_digest_covers_frozen_weights_and_settings() -> None:
    models = [bert(), bert(), bert(layer_norm_eps=1e-3), bert()]
    with torch.no_grad():
        models[1].bert.encoder.layer[2].output.dense.bias[0] += 1  # above the frozen layers
        models[3].bert.encoder.layer[1].output.dense.bias[0] += 1
    digests = [Prefix(model, model, 2).digest for model in models]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_states_are_the_same_before_and_after_accelerate_wraps_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All runs share them, and those of some rows are computed after the training has begun."""
    model = bert(num_labels=3).eval()
    prefix = Prefix(model, model, 2)
    prefix.freeze_()
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    before = prefix.output(inputs)
    logits = model(**inputs).logits
    # a process keeps the precision of its first accelerator
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare(model)
    assert torch.equal(prefix.output(inputs), before)
    with accelerator.autocast():
        assert torch.equal(prefix.output(inputs), before)
    # the model itself still computes in bfloat16
    assert not torch.equal(model(**inputs).logits, logits)


def test_damaged_states_are_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bert().eval()
    prefix = Prefix(model, model, 2)
    prefix.freeze_()
    lengths = [3, 5]

    def open_states() -> list[torch.Tensor]:
        states = PrefixStates(prefix, "rows", lengths, batch, tmp_path)
        return [states[row] for row in range(2)]

    def batch(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(12).view(2, 6)[list(rows)]}

    expected = open_states()
    (file,) = tmp_path.glob("*.npy")
    content = file.read_bytes()
    assert capsys.readouterr().err == ""
    damages = {
        "empty": b"",
        "cut off": content[:-4],
        "longer": content + b"\0",
        "another type": content.replace(b"<f4", b"<i4"),
        "another byte order": content.replace(b"<f4", b">f4"),
        "other tokens": npy(np.zeros((7, 32), np.float32)),
        "one dimension": npy(np.zeros(8 * 32, np.float32)),
        "transposed": npy(np.zeros((8, 32), np.float32, order="F")),
        "a pickle": pickle.dumps(np.zeros((8, 32), np.float32)),
        "objects": npy(np.zeros((8, 32), object)),
    }
    for name, damage in damages.items():
        file.write_bytes(damage)
        for result, states in zip(open_states(), expected, strict=True):
            assert torch.equal(result, states), name
        warning = capsys.readouterr().err
        assert re.fullmatch(rf"warning: {file} is damaged: .*; it is computed again\n", warning), (
            name
        )
        assert file.read_bytes() == content, name


def test_disk_space_is_reserved_before_states_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without space, writing to the mapped file would end the process with a bus error."""
    model = bert().eval()
    prefix = Prefix(model, model, 2)
    prefix.freeze_()
    lengths = [6, 400]  # two batches
    monkeypatch.setattr("benchmarks.harness.models.prefix._TOKENS_AT_ONCE", 400)
    sizes: list[tuple[int, int]] = []  # of the written file, and its space on the disk

    def batch(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        for file in tmp_path.glob(".*.npy.*"):
            status = file.stat()
            sizes.append((status.st_size, 512 * status.st_blocks))
        (row,) = rows
        return {"input_ids": torch.ones(1, lengths[row], dtype=torch.long)}

    PrefixStates(prefix, "rows", lengths, batch, tmp_path)
    ((size, space),) = sizes
    assert size > sum(lengths) * 32 * 4
    assert space >= size

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/\w+\.npy'$"):
        PrefixStates(prefix, "other rows", lengths, batch, tmp_path)
    left = [path.suffix for path in set(tmp_path.iterdir()) - before]
    assert left in ([], [".lock"])


def npy(values: NDArray[Any]) -> bytes:
    """Return the content of NumPy's file of an array."""
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def test_frozen_layers_that_cannot_be_are_refused() -> None:
    for layers in ([2, 4], [3]):
        for method in (
            {"config": {"layers": layers}},
            {"config": None, "tune": {"blocks": layers, "also": []}},
        ):
            typed_method = MethodSpec(name="mine", variant="", **method)
            arguments = (3, typed_method, "b.yaml: 'grid[0]")
            if layers == [3]:
                check_frozen(*arguments)
                continue
            with pytest.raises(
                DefinitionError, match=r"method 'mine' \w+ layer 2, .*is 3.*from 3 on"
            ):
                check_frozen(*arguments)
    model = bert()
    with pytest.raises(DefinitionError, match="frozen_layers is 4, but the model has 3 layers"):
        Prefix(model, model, 4)
    run = tiny_run("emoe", "full", training=FROZEN)
    with pytest.raises(RunError, match="frozen_layers needs a single process"):
        load_benchmark("llama").check_processes(run.spec, 2, "ddp")
    run.spec["method"]["config"]["layers"] = "last:3"  # of four, which planning does not know
    with pytest.raises(DefinitionError, match=r"method 'emoe' converts layer 1, .*is 2"):
        build_language_model(typed(run))
