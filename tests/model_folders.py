"""Folders of small models, as their libraries save them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emoe
from emoe.folders import loader_for
from emoe.stock import save_weights
from tests.tiny_models import build


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str | None = None) -> Path:
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


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
