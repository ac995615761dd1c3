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
    """A data set of the tokenised rows of a split, as model inputs.

    Args:
        split: The rows.
        tokenizer: The model's tokenizer.
        max_length: The maximum number of tokens of a row.
        by_length: True to sort the rows by length, so that evaluation batches need little padding.
        labelled: True to add the labels to the model inputs. Then the model computes a loss.
        prefix: The frozen first layers of the model, whose outputs are added to the rows; None if
            no layer is frozen.

    Attributes:
        order: For each row of this data set, its index in the split.
        labels: The labels, in the order of this data set.
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
        self._labelled = labelled
        # attributes in the order of the split
        self._rows = _tokenise(split, tokenizer, max_length)
        self._lengths = np.asarray([len(row["input_ids"]) for row in self._rows], dtype=np.int32)
        self._split_labels = split.labels
        # attributes in the order of this data set, which is that of the split unless it is sorted
        self.order = np.arange(len(split))
        if by_length:
            self.order = np.argsort(self._lengths, kind="stable")
        self.labels = np.asarray(split.labels)[self.order]
        self._states: PrefixStates | None = None
        if prefix:
            self._states = self._prefix_states(prefix, DataCollatorWithPadding(tokenizer))

    @property
    def digest(self) -> str:
        """Return a digest of the tokens and labels of all rows, in the order of the split."""
        columns = self._columns()
        return columns_digest({**columns, "labels": np.asarray(self._split_labels)})

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Return the tokens of all rows joined, by model input, and the lengths of the rows."""
        columns = {}
        for name in self._rows[0]:
            columns[name] = np.concatenate([row[name] for row in self._rows])
        # joined columns do not show where a row ends
        return {**columns, "lengths": self._lengths}

    def _prefix_states(self, prefix: Prefix, collate: DataCollatorWithPadding) -> PrefixStates:
        """Return the outputs of the frozen layers for all rows.

        They are stored under a digest of the tokens, so that other runs can read them.
        """
        digest = columns_digest(self._columns())

        def batch(numbers: Sequence[int]) -> dict[str, Any]:
            return dict(collate([self._tokens(number) for number in numbers]))

        return PrefixStates(prefix, digest, self._lengths.tolist(), batch)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each row, in the order of this data set."""
        return [int(length) for length in self._lengths[self.order]]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.order[index])
        row = self._tokens(number)
        if self._states is not None:
            row[STATES] = self._states[number]
        if self._labelled:
            row["labels"] = self._split_labels[number]
        return row

    def _tokens(self, number: int) -> dict[str, Any]:
        """Return the model inputs of the row with this index in the split, as lists."""
        return {name: values.tolist() for name, values in self._rows[number].items()}


def calibration_batches(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield batches of model inputs without labels, from at most 256 rows of a split.

    A conversion runs the model on them to measure activations. The rows are the same in every run.
    """
    rows = split.sample(_CALIBRATION_ROWS, "calibration")
    encoded = TokenisedRows(rows, tokenizer, max_length, by_length=True, labelled=False)
    return batches(encoded, DataCollatorWithPadding(tokenizer), batch_size)


def batches(
    rows: TokenisedRows, collate: DataCollatorWithPadding, size: int
) -> Iterator[dict[str, Any]]:
    """Yield batches of ``size`` rows in order, as model inputs. The last batch may be smaller."""
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows))
        batch = [rows[index] for index in range(start, end)]
        yield dict(collate(batch))


def _tokenise(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, NDArray[np.int32]]]:
    """Tokenise a split. Return the model inputs of each row, without padding.

    They are arrays, which take less memory than lists.
    """
    rows: list[dict[str, NDArray[np.int32]]] = []
    for start in range(0, len(split), _ROWS_AT_ONCE):
        chunk = split.texts[start : start + _ROWS_AT_ONCE]
        # the tokenizer gets a list of first texts and, for pairs, a list of second texts
        fields = [list(texts) for texts in zip(*chunk, strict=True)]
        encoded = tokenizer(*fields, truncation=True, max_length=max_length)
        # from columns of lists to one dictionary per row
        for number in range(len(chunk)):
            row = {}
            for name, column in encoded.items():
                row[name] = np.asarray(column[number], dtype=np.int32)
            rows.append(row)
    return rows
