"""Tensors of safetensors files, piece by piece: no file is ever in memory as a whole, neither to be read nor to be written."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emoe.errors import CheckpointError
from emoe.weights import one_line

_CHUNK = 1 << 24
_METADATA = {"format": "pt"}  # as the libraries of models write it
_HEADER_LENGTH = 8  # bytes that say how long the header is, and what it is padded to


@dataclass(frozen=True)
class Piece:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors calls it, ``F16``.
        shape: of the tensor.
        length: in bytes.
        chunks: gives its bytes, in parts that fit in memory.
        tensor: reads it as a whole.
    """

    dtype: str
    shape: tuple[int, ...]
    length: int
    chunks: Callable[[], Iterator[Any]]
    tensor: Callable[[], Tensor]


def stored_pieces(path: Path) -> tuple[dict[str, Piece], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and what it says of itself; no tensor is read.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as opened:  # checks the header, sizes and all
            metadata = opened.metadata()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    with path.open("rb") as file:
        return _pieces(file, lambda: path.open("rb"), read), metadata or _METADATA


def held_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Tensors in memory as pieces of a file that is to be written."""
    if not tensors:
        return {}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return _pieces(io.BytesIO(content), lambda: io.BytesIO(content), lambda name: tensors[name])


def _pieces(file: BinaryIO, reopen: Callable[[], BinaryIO], read: Callable[[str], Tensor]) -> dict[str, Piece]:
    length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
    header, start = json.loads(file.read(length)), _HEADER_LENGTH + length

    def piece(name: str, dtype: str, shape: list[int], begin: int, end: int) -> Piece:
        def chunks() -> Iterator[bytes]:
            with reopen() as source:
                source.seek(start + begin)
                for place in range(begin, end, _CHUNK):
                    yield source.read(min(_CHUNK, end - place))

        return Piece(dtype, tuple(shape), end - begin, chunks, lambda: read(name))

    found = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return {
        name: piece(name, entry["dtype"], entry["shape"], *entry["data_offsets"])
        for name, entry in sorted(found, key=lambda item: item[1]["data_offsets"])
    }


def changed_piece(piece: Piece, change: Callable[[Tensor], Tensor]) -> Piece:
    """A piece whose tensor is another one by the time that it is written.

    Args:
        piece: as it is.
        change: gives the new tensor, of the same dtype.
    """

    def tensor() -> Tensor:
        return change(piece.tensor())

    def chunks() -> Iterator[Any]:
        yield tensor().contiguous().flatten().view(torch.uint8).numpy().data

    shape = tuple(change(torch.empty(piece.shape, device="meta")).shape)
    size = piece.length // math.prod(piece.shape)
    return Piece(piece.dtype, shape, math.prod(shape) * size, chunks, tensor)


def write_pieces(
    pieces: Mapping[str, Piece],
    path: Path,
    scratch: Path,
    *,
    metadata: Mapping[str, str] = _METADATA,
    told: Callable[[int], object] = lambda _bytes: None,
) -> None:
    """Write a safetensors file, see :func:`whole_file`.

    Args:
        pieces: by name.
        path: of the file.
        scratch: a folder of the same disk, where it grows.
        metadata: what the file says of itself.
        told: called with how many bytes were written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # large numbers first, so that each stands at a multiple of its size
    ordered = sorted(pieces.items(), key=lambda item: -item[1].length // max(1, math.prod(item[1].shape)))
    place = 0
    for name, piece in ordered:
        header[name] = {
            "dtype": piece.dtype,
            "shape": piece.shape,
            "data_offsets": (place, place + piece.length),
        }
        place += piece.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_LENGTH)
    with whole_file(path, scratch) as file:
        file.write(len(text).to_bytes(_HEADER_LENGTH, "little") + text)
        for _, piece in ordered:
            for chunk in piece.chunks():
                file.write(chunk)
                told(len(chunk))


@contextmanager
def whole_file(path: Path, scratch: Path) -> Iterator[BinaryIO]:
    """A file that is there as a whole or not at all, after a power cut too. Its permissions follow the umask.

    Args:
        path: of the file.
        scratch: a folder of the same disk, where it grows.

    Raises:
        OSError: what the disk says, with the name of the file.
    """
    growing = scratch / path.name
    try:
        with growing.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    growing.replace(path)
