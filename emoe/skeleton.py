"""A model without its weights, which are put into one FFN at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.checks import projections
from emoe.stock import load_stock, quiet, save_weights
from emoe.weights import STOCK_CONFIG_FILE, WEIGHT_FILES, read_tensors


def load_skeleton(loader: Any, folder: Path) -> nn.Module:
    """The model of a folder on the meta device, with every weight of the dtype that it would be loaded in.

    Args:
        loader: what loads the folder, see :func:`emoe.folders.loader_for`.
        folder: of the model.

    Raises:
        CheckpointError: the folder does not hold the whole of such a model.
    """
    with quiet(bars=False):
        if hasattr(loader, "from_pretrained"):
            return load_stock(loader, folder, device_map="meta")
        with torch.device("meta"):
            return load_stock(loader, folder, pretrained=False)


def tensor_paths(ffn: FFN) -> list[str]:
    """The tensors of an FFN's projections, by their paths below the layer."""
    return [f"{path}.{name}" for path, module in projections(ffn) for name, _ in _parameters(module)]


def stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What the model's own library calls tensors in files, where it may keep names of older releases.

    Args:
        model: with or without weights.
        names: of its tensors.

    Returns:
        Name in the model to name in a file; without those that a file does not hold as they are.
    """
    wanted = list(names)
    marks = {name: torch.tensor([place], dtype=torch.int32) for place, name in enumerate(wanted)}
    with TemporaryDirectory() as folder, quiet(bars=False):  # asked by saving a number in the place of each
        save_weights(model, Path(folder), marks)
        found = read_tensors(Path(folder) / WEIGHT_FILES[0])
    return {wanted[int(mark)]: name for name, mark in found.items() if mark.shape == (1,)}


def settings_files(model: nn.Module) -> dict[str, bytes]:
    """What the model's own library writes beside the weights, by name: ``config.json`` and the like, which is the last."""
    with TemporaryDirectory() as folder, quiet(bars=False):
        save_weights(model, Path(folder), {next(iter(model.state_dict())): torch.zeros(1)})
        files = [path for path in sorted(Path(folder).iterdir()) if path.name not in WEIGHT_FILES]
        files.sort(key=lambda path: path.name == STOCK_CONFIG_FILE)
        return {path.name: path.read_bytes() for path in files}


@contextmanager
def weights_in_place(ffn: FFN, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Have an FFN's projections hold their weights for as long as the block lasts.

    Args:
        ffn: of a skeleton.
        read: gives a tensor by its path below the layer.
    """
    for path, module in projections(ffn):
        for name, weight in _parameters(module):
            values = read(f"{path}.{name}").to(weight.dtype, copy=True)
            module._parameters[name] = nn.Parameter(values, weight.requires_grad)
    try:
        yield
    finally:
        for _, module in projections(ffn):
            for name, weight in _parameters(module):
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))
