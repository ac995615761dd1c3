"""Tokenise splits, and batch their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates, columns_digest
from benchmarks.text.data import TextSplit

_ROWS_AT_ONCE = 10_000
_CALIBRATION_ROWS = 256
_LENGTHS = "lengths"


class TokenisedRows(Dataset[dict[str, Any]]):
    """Hold tokenised rows in flat arrays, which take little memory.

    Args:
        split: The rows.
        tokenizer: The model's tokenizer.
        max_length: The maximum number of tokens of a row.
        by_length: True sorts by length, so that evaluation batches need little padding.
        labelled: True includes the labels in the model's inputs, which then computes a loss.
        prefix: The model's frozen first layers, whose outputs are added to the rows.

    Attributes:
        order: The index in the split of each row.
        labels: The labels in the order of the rows.
    """

    def __init__(
        self,
        split: TextSplit,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        by_length: bool,
        labelled: bool = True,
        prefix: Prefix | None = None,
    ) -> None:
        columns = _tokenise(split, tokenizer, max_length)
        lengths = columns.pop(_LENGTHS)
        self._columns, self._lengths, self._ends = columns, lengths, np.cumsum(lengths)
        self.order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(lengths))
        self._labels = split.labels if labelled else None
        self.labels = np.asarray(split.labels)[self.order]
        self._states: PrefixStates | None = None
        if prefix:
            collate = DataCollatorWithPadding(tokenizer)

            def batch(rows: Sequence[int]) -> dict[str, Any]:
                return dict(collate([self._tokens(row) for row in rows]))

            digest = columns_digest({**columns, _LENGTHS: lengths})
            self._states = PrefixStates(prefix, digest, lengths.tolist(), batch)

    @property
    def lengths(self) -> list[int]:
        """Return the token count of each row."""
        return [int(length) for length in self._lengths[self.order]]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.order[index])
        row = self._tokens(number)
        if self._states is not None:
            row[STATES] = self._states[number]
        return row if self._labels is None else {**row, "labels": self._labels[number]}

    def _tokens(self, row: int) -> dict[str, Any]:
        end = int(self._ends[row])
        start = end - int(self._lengths[row])
        return {name: column[start:end].tolist() for name, column in self._columns.items()}


def calibration_batches(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield batches of model inputs without labels, from a sample of rows that is the same for every run."""
    rows = split.sample(_CALIBRATION_ROWS, "calibration")
    encoded = TokenisedRows(rows, tokenizer, max_length, by_length=True, labelled=False)
    return batches(encoded, DataCollatorWithPadding(tokenizer), batch_size)


def batches(rows: TokenisedRows, collate: DataCollatorWithPadding, size: int) -> Iterator[dict[str, Any]]:
    """Yield all rows in order, as batches of ``size`` rows of model inputs."""
    for start in range(0, len(rows), size):
        yield dict(collate([rows[index] for index in range(start, min(start + size, len(rows)))]))


def _tokenise(split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, NDArray[np.int32]]:
    """Return the concatenated tokens of all rows by column, and the lengths of the rows."""
    parts: dict[str, list[NDArray[np.int32]]] = {}
    for start in range(0, len(split), _ROWS_AT_ONCE):
        columns = [list(column) for column in zip(*split.texts[start : start + _ROWS_AT_ONCE], strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        for name in encoded:
            rows = [np.asarray(row, dtype=np.int32) for row in encoded[name]]
            parts.setdefault(name, []).append(np.concatenate(rows))
        lengths = np.asarray([len(row) for row in encoded["input_ids"]], dtype=np.int32)
        parts.setdefault(_LENGTHS, []).append(lengths)
    return {name: np.concatenate(columns) for name, columns in parts.items()}
