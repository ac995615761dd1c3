"""Rows as text from text: what an encoder-decoder reads of a row, and the answers that it may give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base.errors import DataError
from benchmarks.multitask.definition import WrittenTask
from benchmarks.text.data import TextSplit
from benchmarks.text.tokenization import TokenisedRows


def written(texts: Sequence[str], task: WrittenTask) -> str:
    """A row as the model reads it, in T5's own form: the task's prefix, then each text behind the name of its field.

    ``mnli premise: He ran. hypothesis: He moved.``
    """
    named = (f"{field}: {text}" for field, text in zip(task.fields, texts, strict=True))
    return " ".join((task.prefix, *named))


def as_text(split: TextSplit, task: WrittenTask) -> TextSplit:
    """A split with its rows as the model reads them; a set that is only evaluated on is read as a task that is learned."""
    return replace(split, texts=[(written(texts, task),) for texts in split.texts])


def answers(tokenizer: PreTrainedTokenizerBase, task: WrittenTask) -> list[list[int]]:
    """The tokens of a task's answers, which are the names of its classes, each with the token that ends it.

    Raises:
        DataError: two classes are the same to the tokenizer, as where it knows none of their letters.
    """
    assert isinstance(tokenizer.eos_token_id, int)  # noqa: S101  every encoder-decoder's tokenizer has one
    found = [[*tokenizer(name, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for name in task.labels]
    for number, answer in enumerate(found):
        if answer in found[:number]:
            first = task.labels[found.index(answer)]
            raise DataError(f"task '{task.name}': the tokenizer writes '{first}' and '{task.labels[number]}' alike")
    return found


class LearnedRows(Dataset[dict[str, Any]]):
    """Rows of a task with the tokens of their answers as labels.

    Args:
        rows: tokenised, with class numbers.
        answers: by class.
    """

    def __init__(self, rows: TokenisedRows, answers: Sequence[Sequence[int]]) -> None:
        self._rows, self._answers = rows, answers
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return {**row, "labels": list(self._answers[row["labels"]])}
