"""Methods on models: the cache of partitions."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

import emoe
from benchmarks.harness.methods import cached_partition
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
