"""Models, and methods on them: heads by seed, the cache of partitions."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from unittest import mock

import pytest
import torch

import emoe
from benchmarks.harness.base import MODEL_ROOT
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.models.conversion import cached_partition
from benchmarks.harness.models.loading import load_backbone, load_classifier, weights_digest
from tests import tiny_models


def test_partitions_are_cached_by_layer_and_content(tmp_path: Path) -> None:
    model = tiny_models.build("bert")
    both = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0, 1])
    with mock.patch.object(emoe, "partition", side_effect=emoe.partition) as spy:
        found = cached_partition(model, both, tmp_path)
        again = cached_partition(model, both, tmp_path)
        one = cached_partition(model, emoe.EMoEConfig(num_experts=8, top_k=4, layers=[1]), tmp_path)
        assert spy.call_count == 2
        with torch.no_grad():
            model.encoder.layer[1].intermediate.dense.weight[0, 0] += 1
        cached_partition(model, both, tmp_path)
        assert spy.call_count == 3
    expected = emoe.partition(tiny_models.build("bert"), both)
    for layer in (0, 1):
        assert torch.equal(found[layer], expected[layer])
        assert torch.equal(again[layer], expected[layer])
        assert found.explained[layer] == expected.explained[layer]
    assert list(one) == [1]


def test_damaged_partitions_are_made_again_and_shared_as_the_umask_allows(tmp_path: Path) -> None:
    model, config = tiny_models.build("bert"), emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1])
    old = os.umask(0o002)
    try:
        found = cached_partition(model, config, tmp_path)
        emoe.save_pretrained(emoe.convert_(model, config) and model, tmp_path / "model")
    finally:
        os.umask(old)
    for path in (*tmp_path.glob("*.safetensors"), *(tmp_path / "model").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o664, path
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    for damage in (b"", content[:-8], content[:-8] + content[-16:-8]):  # empty, cut off, one neuron twice
        path.unlink()  # what is open is still read from
        path.write_bytes(damage)
        assert torch.equal(cached_partition(tiny_models.build("bert"), config, tmp_path)[1], found[1])


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_the_head_of_a_model_without_a_checkpoint_is_that_of_a_loaded_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_models()[name].spec(name)
    built = [load_classifier(model, 3, seed, 0) for seed in (1, 2)]
    backbone = load_backbone(model)
    assert {weights_digest(one.base_model) for one in built} == {weights_digest(backbone)}
    head = next(key for key in built[0].state_dict() if key.startswith(("classifier.", "score.")))
    assert not torch.equal(built[0].state_dict()[head], built[1].state_dict()[head])

    backbone.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv(MODEL_ROOT, str(tmp_path))
    loaded = load_classifier({"name": "saved", "hub": "nowhere"}, 3, 2, 0)
    assert weights_digest(loaded) == weights_digest(built[1])
