"""What a frozen prefix makes of rows: computed once, kept on disk, shared by all runs with the same prefix and rows."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness.base.files import atomic_write, write_json
from benchmarks.harness.base.locks import hold
from benchmarks.harness.base.paths import PREFIXES
from benchmarks.harness.models.prefix import STATES, Prefix

_VERSION = 1
_TOKENS_AT_ONCE = 4096
_CHECKED_AT_ONCE = 1 << 24  # bytes
Batch = Callable[[Sequence[int]], Mapping[str, Any]]


class PrefixStates:
    """The prefix's output for every row of a set: ``[tokens, width]`` each, float32.

    They are computed in large batches of rows of like length, written to ``resources/prefixes/`` and always read from there, memory-mapped,
    so that they are the same numbers whoever computed them. The file is keyed by what shapes them to the last digit: the prefix's weights
    and settings, the rows, and processor, threads and torch. Of two processes that want the same one computes, the other waits. A file that
    is damaged is made again.

    Args:
        prefix: of the model.
        rows: digest of the rows as the model reads them.
        lengths: tokens of each row as the network counts them.
        batch: makes the inputs of some rows, given by their places, padded on the right.
        folder: of the files.
    """

    def __init__(
        self, prefix: Prefix, rows: str, lengths: Sequence[int], batch: Batch, folder: Path = PREFIXES
    ) -> None:
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        key = _key(prefix, rows, lengths)
        file = folder / f"{key}.npy"
        found = _read(file, int(ends[-1]))
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder / f".{key}.lock"):
                found = _read(file, int(ends[-1]))
                if found is None:
                    _write(file, prefix, ends, lengths, batch)
                    found = _read(file, int(ends[-1]))
        assert found is not None  # noqa: S101  it was written just now
        self._values, self._ends, self._lengths = found, ends, lengths

    def __getitem__(self, row: int) -> Tensor:
        end = int(self._ends[row])
        return torch.from_numpy(np.array(self._values[end - int(self._lengths[row]) : end]))


def with_states(
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator of rows of tokens that takes their prefix states along, where they have some: padded as the rows are, or end to end."""

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if STATES not in rows[0]:
            return dict(collate(rows))
        states = [row[STATES] for row in rows]
        found = dict(collate([{name: value for name, value in row.items() if name != STATES} for row in rows]))
        count, tokens = found["input_ids"].shape
        if count != len(rows):  # packed
            found[STATES] = torch.cat(states)[None]
            return found
        padded = states[0].new_zeros(count, tokens, states[0].shape[1])
        for place, values in enumerate(states):
            padded[place, : len(values)] = values
        found[STATES] = padded
        return found

    return collated


def columns_digest(columns: Mapping[str, NDArray[Any]]) -> str:
    """Digest of columns of numbers."""
    found = hashlib.sha256()
    for name, values in sorted(columns.items()):
        found.update(f"{name} {values.dtype} {values.shape}\n".encode())
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def _key(prefix: Prefix, rows: str, lengths: Sequence[int]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    shapes = [_VERSION, prefix.digest, prefix.layers, rows, len(lengths), device, torch.get_num_threads()]
    return hashlib.sha256(json.dumps([*shapes, torch.__version__]).encode()).hexdigest()[:24]


def _read(file: Path, tokens: int) -> NDArray[np.float32] | None:
    """The values ``[tokens, width]``; None where they are not there, or not as they were written."""
    try:
        receipt = json.loads(file.with_suffix(".json").read_text())
        values: NDArray[np.float32] = np.load(file, mmap_mode="r")
    except (OSError, ValueError):
        return None
    whole = values.ndim == 2 and len(values) == tokens and _checksum(values) == receipt.get("crc32")
    return values if whole else None


def _checksum(values: NDArray[np.float32]) -> int:
    """Over all bytes, which also has the disk read them in their order."""
    found, rows = 0, max(_CHECKED_AT_ONCE // max(values[:1].nbytes, 1), 1)
    for start in range(0, len(values), rows):
        found = zlib.crc32(np.ascontiguousarray(values[start : start + rows]).data, found)
    return found


def _write(file: Path, prefix: Prefix, ends: NDArray[np.int64], lengths: Sequence[int], batch: Batch) -> None:
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    values: Any = None
    with atomic_write(file) as temporary:
        start = 0
        while start < len(order):
            # of the longest that may be among them
            count = 1
            while start + count < len(order) and lengths[order[start + count]] * (count + 1) <= _TOKENS_AT_ONCE:
                count += 1
            places = order[start : start + count]
            states = prefix.output(batch(places)).numpy()
            if values is None:
                shape = (int(ends[-1]), states.shape[2])
                values = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for place, found in zip(places, states, strict=True):
                length = int(lengths[place])
                values[ends[place] - length : ends[place]] = found[:length]
            start += count
        values.flush()
        receipt = {"crc32": _checksum(values), "rows": len(lengths), "layers": prefix.layers}
        # first the values, without which the receipt says nothing
        file.with_suffix(".json").unlink(missing_ok=True)
    write_json(file.with_suffix(".json"), receipt)
