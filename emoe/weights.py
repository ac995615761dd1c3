"""Files of a model's folder, read without trust: JSON, and weights in safetensors, whole or in shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from emoe.errors import CheckpointError
from emoe.permissions import share
from emoe.unfinished import refuse_unfinished

STOCK_CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that names its kind."""
    return f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 300)}"


def shorten(text: str, length: int) -> str:
    """A text of a file's own making, cut where it would fill the screen."""
    return text if len(text) <= length else f"{text[:length]} …"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: no such file, or one that holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:  # no file, no text, no JSON
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as the umask allows."""
    save_file(tensors, path, metadata=notes)
    share(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights.

    Raises:
        CheckpointError: there are none, the folder is not finished, or an index names shards that are missing, pickled or outside the folder.
    """
    refuse_unfinished(folder)
    whole, index = (folder / name for name in WEIGHT_FILES)
    if whole.exists():
        return [whole]
    if not index.exists():
        raise CheckpointError(f"{folder} holds no {' or '.join(WEIGHT_FILES)}; other formats are not read")
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} is damaged: 'weight_map' names no shards")
    names = sorted(set(shards.values()))
    for name in names:
        shard = shorten(name, 80)
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names the shard '{shard}'; it must be a .safetensors file of the same folder"
            )
        if not os.path.isfile(folder / name):  # noqa: PTH113 -- Path.is_file raises for some names
            raise CheckpointError(f"{index} names the shard '{shard}', which {folder} does not hold")
    return [folder / name for name in names]


class Weights:
    """The tensors of a folder's weight files by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def below(self, parent: str, path: str, wanted: Collection[str]) -> dict[str, Tensor]:
        """The state of a module, by the names that it has in the model; empty where it is not all there.

        A checkpoint may call the parent otherwise: with or without the prefix of a base model, or as the model's
        library called it in the past, with the same number.

        Args:
            parent: qualified name of a layer.
            path: of the module below it.
            wanted: names of its tensors.
        """
        found = self.places(parent, path, wanted)
        return {name: self[place] for name, place in found.items()} if len(found) == len(set(wanted)) else {}

    def places(self, parent: str, path: str, wanted: Iterable[str]) -> dict[str, str]:
        """The names in the files of what :meth:`below` gives, of those tensors that are there."""
        found = {name: self._place(parent, f"{path}.{name}") for name in wanted}
        return {name: place for name, place in found.items() if place}

    def _place(self, parent: str, name: str) -> str | None:
        parents = {
            place: place.removesuffix(name).rstrip(".") for place in self._files if f".{place}".endswith(f".{name}")
        }
        near = [
            place
            for place, found in parents.items()
            if f".{found}".endswith(f".{parent}") or f".{parent}".endswith(f".{found}")
        ]
        if not near:
            numbers = re.findall(r"\d+", parent)
            near = [place for place, found in parents.items() if re.findall(r"\d+", found) == numbers]
        return near[0] if len(near) == 1 else None
