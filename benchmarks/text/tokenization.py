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


class TokenisedRows(Dataset[dict[str, Any]]):
    """The tokenised rows of a split.

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
        self._rows = _tokenise(split, tokenizer, max_length)
        self._lengths = np.asarray([len(row["input_ids"]) for row in self._rows], dtype=np.int32)
        self.order = np.arange(len(split))
        if by_length:
            self.order = np.argsort(self._lengths, kind="stable")
        # labels of the model's inputs, in the order of the split
        self._labels = split.labels if labelled else None
        self.labels = np.asarray(split.labels)[self.order]
        self._states: PrefixStates | None = None
        if prefix:
            self._states = self._prefix_states(prefix, DataCollatorWithPadding(tokenizer))

    def _prefix_states(self, prefix: Prefix, collate: DataCollatorWithPadding) -> PrefixStates:
        """Return the outputs of the frozen layers, which are kept by the digest of all tokens."""
        columns = {}
        for name in self._rows[0]:
            columns[name] = np.concatenate([row[name] for row in self._rows])
        # the lengths tell where a row ends in the joined columns
        digest = columns_digest({**columns, "lengths": self._lengths})

        def batch(numbers: Sequence[int]) -> dict[str, Any]:
            return dict(collate([self._tokens(number) for number in numbers]))

        return PrefixStates(prefix, digest, self._lengths.tolist(), batch)

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
        if self._labels is not None:
            row["labels"] = self._labels[number]
        return row

    def _tokens(self, number: int) -> dict[str, Any]:
        """Return the model inputs of the row with this index in the split, as lists."""
        return {name: values.tolist() for name, values in self._rows[number].items()}


def calibration_batches(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield batches of model inputs without labels, from a sample of the rows.

    The sample is the same for every run.
    """
    # the model computes no loss, so that labels are not needed
    rows = split.sample(_CALIBRATION_ROWS, "calibration")
    encoded = TokenisedRows(rows, tokenizer, max_length, by_length=True, labelled=False)
    return batches(encoded, DataCollatorWithPadding(tokenizer), batch_size)


def batches(
    rows: TokenisedRows, collate: DataCollatorWithPadding, size: int
) -> Iterator[dict[str, Any]]:
    """Yield all rows in order, as batches of ``size`` rows of model inputs."""
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows))
        batch = [rows[index] for index in range(start, end)]
        yield dict(collate(batch))


def _tokenise(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, NDArray[np.int32]]]:
    """Return the model inputs of each row as arrays, which take less memory than lists."""
    rows: list[dict[str, NDArray[np.int32]]] = []
    for start in range(0, len(split), _ROWS_AT_ONCE):
        chunk = split.texts[start : start + _ROWS_AT_ONCE]
        # the tokenizer gets a list of first texts and, for pairs, a list of second texts
        fields = [list(texts) for texts in zip(*chunk, strict=True)]
        encoded = tokenizer(*fields, truncation=True, max_length=max_length)
        for number in range(len(chunk)):
            row = {}
            for name, column in encoded.items():
                row[name] = np.asarray(column[number], dtype=np.int32)
            rows.append(row)
    return rows
