"""Encode instructions as tokens, with labels for the tokens of responses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
    """One instruction as tokens.

    Attributes:
        source: The instruction.
        tokens: The tokens of the prompt, then those of the response.
        begin: The index of the first response token.
        cut: The number of response tokens beyond the maximum length. ``tokens`` does not have them.
    """

    source: Instruction
    tokens: list[int]
    begin: int
    cut: int


class EncodedRows(Dataset[dict[str, Any]]):
    """Instructions as tokens, with labels for training.

    Args:
        instructions: The instructions.
        template: The template of prompts and responses, with the tokenizer.
        max_length: The maximum number of tokens of a row; longer responses are cut.

    Attributes:
        rows: The usable rows.
        broken: A message for each row that is left out, because no response token fits into
            ``max_length``.

    Raises:
        NotImplementedError: The tokenizer has no offsets, which separate prompt and response.
        DefinitionError: The chat template changes the prompt if there is an answer.
    """

    def __init__(
        self, instructions: Sequence[Instruction], template: Template, max_length: int
    ) -> None:
        self.rows: list[EncodedRow] = []
        self.broken: list[str] = []
        self._states: PrefixStates | None = None
        # a token's offsets are its place in the text, so they tell where the response starts
        options = {"add_special_tokens": template.special_tokens, "return_offsets_mapping": True}
        for row in instructions:
            prompt = template.prompt(row)
            response = template.response(row)
            encoded = template.tokenizer(prompt + response, **options)
            tokens = encoded["input_ids"]
            response_start = _response_start(prompt, encoded["offset_mapping"])
            # without a response token, nothing could be learned
            if response_start >= max_length:
                self.broken.append(
                    f"{row.position} has a prompt of {response_start} tokens, "
                    f"so the response does not fit into {max_length}"
                )
                continue
            num_cut = max(len(tokens) - max_length, 0)
            self.rows.append(
                EncodedRow(
                    source=row, tokens=tokens[:max_length], begin=response_start, cut=num_cut
                )
            )

    def select(self, numbers: Sequence[int]) -> EncodedRows:
        """Return a copy that has only the rows with these indices.

        Call it before :meth:`with_prefix`: the outputs that are added there are not selected.
        """
        selected = copy.copy(self)
        selected.rows = [self.rows[number] for number in numbers]
        return selected

    def with_prefix(self, prefix: Prefix, tokenizer: PreTrainedTokenizerBase) -> EncodedRows:
        """Return a copy whose rows include the output of the frozen layers ``prefix``.

        A model that gets this output does not compute its frozen layers.
        """
        collate = collator(tokenizer)

        def make_inputs(numbers: Sequence[int]) -> dict[str, Tensor]:
            """Make the model inputs of the rows with these indices."""
            rows = [self[number] for number in numbers]
            return model_inputs(collate(rows))

        # outputs are kept on disk for other runs; the file name depends on this digest of the rows
        digest = columns_digest(self._columns())
        extended = copy.copy(self)
        extended._states = PrefixStates(prefix, digest, self.lengths, make_inputs)
        return extended

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [len(row.tokens) for row in self.rows]

    @property
    def digest(self) -> str:
        """Return a digest of all tokens, and of the places where the responses begin."""
        begins = np.asarray([row.begin for row in self.rows], dtype=np.int64)
        return columns_digest({**self._columns(), "begins": begins})

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Return the tokens of all rows joined, and the lengths of the rows."""
        return {
            "tokens": np.concatenate([row.tokens for row in self.rows]),
            "lengths": np.asarray(self.lengths),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        # the prompt is read, but has no loss
        prompt_labels = [IGNORED] * row.begin
        response_labels = row.tokens[row.begin :]
        inputs: dict[str, Any] = {
            "input_ids": row.tokens,
            "attention_mask": [1] * len(row.tokens),
            "labels": prompt_labels + response_labels,
        }
        if self._states is not None:
            inputs[STATES] = self._states[index]
        return inputs

    def summary(self) -> dict[str, Any]:
        """Count the rows, their tokens, and the responses and tokens that are cut.

        ``metrics.json`` has these counts.
        """
        lengths = self.lengths
        prompt_lengths = [row.begin for row in self.rows]
        cuts = [row.cut for row in self.rows]
        tokens = sum(lengths)
        return {
            "rows": len(self.rows),
            "tokens": tokens,
            "learned_tokens": tokens - sum(prompt_lengths),
            "longest": max(lengths, default=0),
            "truncated_responses": sum(cut > 0 for cut in cuts),
            "truncated_tokens": sum(cuts),
        }


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model inputs of a batch: everything except its labels."""
    return {name: values for name, values in batch.items() if name != "labels"}


def _response_start(prompt: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Return the index of the first response token; the number of tokens if there is none.

    Prompt and response are tokenised together, so a token may cover letters of both. Such a token
    belongs to the prompt. But it belongs to the response if it covers only blanks of the prompt.

    Args:
        prompt: The prompt, with which the tokenised text begins.
        offsets: Where each token begins and ends in the text.
    """
    for index, (start, end) in enumerate(offsets):
        reaches_response = end > len(prompt)
        covered_prompt = prompt[start:]  # empty if the token begins in the response
        if reaches_response and not covered_prompt.strip():
            return index
    return len(offsets)


def collator(tokenizer: PreTrainedTokenizerBase, *, packing: bool = False) -> Collate:
    """Return a collator that pads rows on the right, or with ``packing`` concatenates them.

    Padding is masked in attention, loss and routing records. With packing, each row's position ids
    start at 0, so that no row attends to another.
    """
    if packing:
        return collate_states(DataCollatorWithFlattening(separator_id=IGNORED))
    return collate_states(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED))


def without_prompt_logits(collate: Collate, model: nn.Module) -> Collate:
    """Return a collator whose batches request no logits of prompts, if the model can omit them.

    Prompts have no loss, and the projection to the vocabulary is a fifth of the cost of a token in
    SmolLM2-135M. Logits and labels begin at the token before the batch's first response token.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return collate

    def collated(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Collate rows, cut the labels, and add the number of kept logits."""
        batch = dict(collate(rows))
        labels = batch["labels"]  # [rows, tokens]
        # only response tokens have labels that are not ignored
        has_response_token = (labels != IGNORED).any(dim=0)  # in any row: [tokens]
        response_positions = has_response_token.nonzero()
        num_positions = labels.shape[1]
        first_position = num_positions  # behind the last token, if no row has a response token
        if len(response_positions):
            first_position = int(response_positions[0])
        # One position more, because the token before the response predicts its first token. So the
        # number is at least 1, also without a response: the value 0 would keep all logits.
        keep = num_positions - first_position + 1
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": keep}

    return collated
