"""Which of a task's answers a model finds most likely: exact, without generating, and never an answer that is none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness.training.callbacks import restore_rng_and_modes
from benchmarks.text.tokenization import TokenisedRows

IGNORED = -100


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: dict[str, Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
    """``[rows, answers]``, float32: the logarithm of the probability that the model gives each answer, its end included, given the row.

    Rows are encoded once.

    Args:
        model: an encoder-decoder; in whatever mode it is.
        batch: ``input_ids`` and ``attention_mask``, where the model is.
        answers: token ids, with the token that ends them.
    """
    count, longest = len(answers), max(map(len, answers))
    padded = [[*answer, *[IGNORED] * (longest - len(answer))] for answer in answers]
    rows = len(batch["input_ids"])
    labels = torch.tensor(padded, device=batch["input_ids"].device).repeat(rows, 1)
    states = cast(Any, model).get_encoder()(**batch).last_hidden_state.repeat_interleave(count, 0)
    logits = model(
        encoder_outputs=(states,),
        attention_mask=batch["attention_mask"].repeat_interleave(count, 0),
        decoder_input_ids=cast(Any, model).prepare_decoder_input_ids_from_labels(labels),
    ).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(rows, count, longest).sum(-1)


def rank(
    model: PreTrainedModel,
    rows: TokenisedRows,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Sequence[int]],
    batch_size: int,
    precision: str,
) -> NDArray[np.float32]:
    """:func:`log_likelihoods` of all rows, in their order; the model and all random states stay as they were.

    Args:
        model: an encoder-decoder, where it is trained.
        rows: without labels.
        tokenizer: the model's.
        answers: of the task that the rows are read as.
        batch_size: rows at once.
        precision: ``bf16`` for mixed precision.
    """
    collate, found = DataCollatorWithPadding(tokenizer), []
    mixed = torch.autocast(model.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with restore_rng_and_modes(model), mixed:
        model.eval()
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[place] for place in range(start, min(start + batch_size, len(rows)))])
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            found.append(log_likelihoods(model, inputs, answers).cpu().numpy())
    return np.concatenate(found)
