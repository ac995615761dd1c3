"""Format rows and answers for an encoder-decoder, and mix tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.training.samplers import EpochOrder
from benchmarks.multitask.definition import LearnedTask
from benchmarks.text.data import TextSplit
from benchmarks.text.tokenization import TokenisedRows


def as_text(split: TextSplit, task: LearnedTask) -> TextSplit:
    """Write the rows of a split in T5's own form: ``mnli premise: He ran. hypothesis: He moved.``

    Args:
        split: The rows of the task or of an OOD set.
        task: The learned task, for the prefix and the names of fields.
    """
    rows: list[tuple[str, ...]] = []
    for texts in split.texts:
        named = (f"{field}: {text}" for field, text in zip(task.fields, texts, strict=True))
        rows.append((" ".join((task.prefix, *named)),))
    return replace(split, texts=rows)


def answers(tokenizer: PreTrainedTokenizerBase, task: LearnedTask) -> list[list[int]]:
    """Tokenise the answers of a task, the names of its classes, each with the token that ends it.

    Raises:
        DataError: two classes are the same to the tokenizer, for example if it knows none of their letters.
    """
    assert isinstance(tokenizer.eos_token_id, int)  # noqa: S101  every encoder-decoder's tokenizer has one
    tokens = [[*tokenizer(name, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for name in task.labels]
    if len(set(map(tuple, tokens))) < len(tokens):
        raise DataError(f"task '{task.name}': the tokenizer writes two of its classes {', '.join(task.labels)} alike")
    return tokens


class LearnedRows(Dataset[dict[str, Any]]):
    """Hold rows of a task with the tokens of their answers as labels.

    Args:
        rows: The tokenised rows, with class numbers.
        answers: The tokens of each class.
    """

    def __init__(self, rows: TokenisedRows, answers: Sequence[Sequence[int]]) -> None:
        self._rows, self._answers = rows, answers
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {**row, "labels": list(self._answers[row["labels"]])}


class MixedOrder(Sampler[int]):
    """Order the concatenated rows of several tasks; the order depends only on seed and epoch.

    An epoch has at most ``most`` rows of a task, so tasks are mixed in proportion to their size up to a limit. A larger
    task uses all its rows, shuffled, before it repeats one. The rows of an epoch are shuffled together.

    Args:
        tasks: The number of tokens of each row, by task.
        most: The limit of rows of a task in an epoch; None for all.
        batch_size: The rows of a step.
        seed: The seed of the run.
        by_length: True to put rows of similar length into one batch.
    """

    def __init__(
        self, tasks: Mapping[str, list[int]], most: int | None, batch_size: int, seed: int, *, by_length: bool
    ) -> None:
        self._tasks, self._seed, self._epoch = tasks, seed, 0
        self._shares = {name: min(len(lengths), most or len(lengths)) for name, lengths in tasks.items()}
        self._batch_size, self._by_length = batch_size, by_length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, before it begins."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._shares.values())

    def __iter__(self) -> Iterator[int]:
        rows: list[int] = []
        tokens: list[int] = []
        start = 0
        for name, lengths in self._tasks.items():
            chosen = self._rows_of_epoch(name)
            rows += [start + row for row in chosen]
            tokens += [lengths[row] for row in chosen]
            start += len(lengths)
        order = EpochOrder(tokens, self._batch_size, self._seed, by_length=self._by_length)
        order.set_epoch(self._epoch)
        return (rows[index] for index in order)

    def _rows_of_epoch(self, name: str) -> list[int]:
        """Return a task's rows of this epoch, the next ones in passes over its rows; each pass is shuffled anew."""
        rows, share = len(self._tasks[name]), self._shares[name]
        first = self._epoch * share
        passes = range(first // rows, (first + share - 1) // rows + 1)
        shuffled: list[int] = []
        for number in passes:
            generator = torch.Generator().manual_seed(derive_seed("rows of", name, self._seed, number))
            shuffled += torch.randperm(rows, generator=generator).tolist()
        begin = first - passes[0] * rows
        return shuffled[begin : begin + share]
