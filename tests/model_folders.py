"""Folders of small models, as their libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import emoe
from emoe.files import load_stock, loader_for, save_weights
from tests.tiny_models import build


def save(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str | None = None
) -> Path:
    folder.mkdir()
    model: Any = build(name).to(dtype)
    if shard_size:
        model.save_pretrained(folder, max_shard_size=shard_size)
        assert (folder / "model.safetensors.index.json").exists()
    else:
        save_weights(model, folder)
    return folder


def loaded(folder: Path) -> nn.Module:
    return emoe.from_pretrained(loader_for(folder), folder)


def dense(folder: Path) -> nn.Module:
    return load_stock(loader_for(folder), folder).eval()


def tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    tensors_by_name = {}
    for file in sorted(folder.glob(pattern)):
        tensors_by_name.update(load_file(file))
    return tensors_by_name


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))
