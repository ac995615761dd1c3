"""Encode instructions as tokens, with labels for the tokens of responses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from benchmarks.harness.models.prefix import (
    STATES,
    Prefix,
    PrefixStates,
    collate_states,
    columns_digest,
)
from benchmarks.llama.definition import Instruction
from benchmarks.llama.templates import Template

IGNORED = -100
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class EncodedRow:
    """Hold an instruction, its prompt and response tokens, the response's first index, and the number of cut tokens."""

    source: Instruction
    tokens: list[int]
    begin: int
    cut: int


class EncodedRows(Dataset[dict[str, Any]]):
    """Encode instructions for training.

    Attributes:
        rows: The usable rows.
        broken: Messages on rows whose prompt fills the maximum length.

    Raises:
        NotImplementedError: The tokenizer has no offsets, which separate prompt and response.
        DefinitionError: The chat template changes the prompt.
    """

    def __init__(
        self, instructions: Sequence[Instruction], template: Template, max_length: int
    ) -> None:
        self.rows: list[EncodedRow] = []
        self.broken: list[str] = []
        self._states: PrefixStates | None = None
        options = {"add_special_tokens": template.special_tokens, "return_offsets_mapping": True}
        for row in instructions:
            prompt = template.prompt(row)
            encoded = template.tokenizer(prompt + template.response(row), **options)
            tokens, begin = encoded["input_ids"], _response_start(prompt, encoded["offset_mapping"])
            if begin < max_length:
                self.rows.append(
                    EncodedRow(row, tokens[:max_length], begin, max(len(tokens) - max_length, 0))
                )
            else:
                reason = f"has a prompt of {begin} tokens, so the response does not fit into {max_length}"
                self.broken.append(f"{row.position} {reason}")

    def select(self, numbers: Sequence[int]) -> EncodedRows:
        """Return the usable rows with these indices."""
        rows = copy.copy(self)
        rows.rows = [self.rows[i] for i in numbers]
        return rows

    def with_prefix(self, prefix: Prefix, tokenizer: PreTrainedTokenizerBase) -> EncodedRows:
        """Return a copy whose rows include the output of the frozen layers."""
        collate, lengths = collator(tokenizer), [len(row.tokens) for row in self.rows]

        def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
            return model_inputs(collate([self[i] for i in numbers]))

        columns = {
            "tokens": np.concatenate([row.tokens for row in self.rows]),
            "lengths": np.asarray(lengths),
        }
        rows = copy.copy(self)
        rows._states = PrefixStates(prefix, columns_digest(columns), lengths, batch)
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        labels = [IGNORED] * row.begin + row.tokens[row.begin :]
        inputs = {
            "input_ids": row.tokens,
            "attention_mask": [1] * len(row.tokens),
            "labels": labels,
        }
        return inputs if self._states is None else {**inputs, STATES: self._states[index]}

    def summary(self) -> dict[str, Any]:
        """Return the counts of rows and tokens for ``metrics.json``."""
        return {
            "rows": len(self.rows),
            "tokens": sum(len(row.tokens) for row in self.rows),
            "learned_tokens": sum(len(row.tokens) - row.begin for row in self.rows),
            "longest": max((len(row.tokens) for row in self.rows), default=0),
            "truncated_responses": sum(row.cut > 0 for row in self.rows),
            "truncated_tokens": sum(row.cut for row in self.rows),
        }


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a batch, without labels."""
    return {name: values for name, values in batch.items() if name != "labels"}


def _response_start(prompt: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Return the index of the first response token, if prompt and response are tokenised together.

    A token that starts in the prompt belongs to the prompt, unless it covers only blanks there.
    """
    for index, (start, end) in enumerate(offsets):
        if end > len(prompt) and not prompt[start:].strip():
            return index
    return len(offsets)


def collator(tokenizer: PreTrainedTokenizerBase, *, packing: bool = False) -> Collate:
    """Return a collator that pads rows on the right, or with ``packing`` concatenates them.

    Padding is masked in attention, loss and routing records. Position ids of packed rows restart, which separates their
    attention.
    """
    if packing:
        return collate_states(DataCollatorWithFlattening(separator_id=IGNORED))
    return collate_states(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED))


def without_prompt_logits(collate: Collate, model: nn.Module) -> Collate:
    """Return a collator whose batches request logits only from the first response token on, if the model can.

    Prompts have no loss, and the projection to the vocabulary is a fifth of a token's cost in SmolLM2-135M.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return collate

    def collated(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(collate(rows))
        labels = batch["labels"]
        learned = (labels != IGNORED).any(dim=0).nonzero()
        keep = (
            labels.shape[1] - int(learned[0]) + 1 if len(learned) else 1
        )  # logits predict the next token
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": keep}

    return collated
