"""Score lm-eval's questions on a CPU with one forward pass per question: all choices share the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates, columns_digest

Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]


class SharedPromptLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """Replace lm-eval's model for transformers with one that computes each prompt once for all its choices.

    A row has the prompt and all choices; a choice attends to the prompt and to itself. Only positions that predict a
    choice get logits. Likelihoods equal lm-eval's up to rounding. On accelerators, and for models without support for
    such masks, lm-eval's code runs.

    Args:
        prefix: The frozen layers of the model, with output cached for all runs; None if none are frozen.
        settings: The arguments of lm-eval's ``HFLM``.
    """

    def __init__(self, *, prefix: Prefix | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._prefix = prefix

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, (_, prompt, _) in enumerate(requests):
            by_prompt.setdefault(tuple(prompt), []).append(number)
        questions = [
            _Question(prompt, [requests[i][2] for i in numbers])
            for prompt, numbers in by_prompt.items()
        ]
        shared = [question for question in questions if self._can_share_prompt(question)]
        states = self._states(shared)
        for row, question in enumerate(shared):
            given = {} if states is None else {STATES: states[row][None]}
            answers |= dict(
                zip(by_prompt[question.prompt], self._answers(question, given), strict=True)
            )
        if rest := [number for number in range(len(requests)) if number not in answers]:
            others = super()._loglikelihood_tokens(
                [requests[number] for number in rest], disable_tqdm, override_bs
            )
            answers |= dict(zip(rest, others, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _can_share_prompt(self, question: _Question) -> bool:
        """Return True if a question can share its prompt: on a CPU, with SDPA, and within the length limits."""
        config = cast(Any, self.model).config
        tokens = len(question.prompt) + max(map(len, question.choices))
        longest = min(self.max_length, getattr(config, "sliding_window", None) or self.max_length)
        return (
            self.device.type == "cpu"
            and config._attn_implementation == "sdpa"
            and tokens <= longest
        )

    def _states(self, questions: Sequence[_Question]) -> PrefixStates | None:
        """Return the frozen layers' output for the questions; None if no layer is frozen."""
        if self._prefix is None or not questions:
            return None
        sizes = [len(segment) for question in questions for segment in question.segments]
        columns = {
            "tokens": np.concatenate([question.tokens for question in questions]),
            "parts": np.asarray(sizes),
        }
        lengths = [len(question.tokens) for question in questions]
        return PrefixStates(
            self._prefix,
            columns_digest(columns),
            lengths,
            lambda rows: _inputs([questions[row] for row in rows]),
        )

    @torch.inference_mode()
    def _answers(self, question: _Question, states: dict[str, Tensor]) -> list[Answer]:
        """Return for each choice its log-likelihood, and True if it is the greedy continuation."""
        keep = len(question.tokens) - len(question.prompt) + 1
        logits = cast(Any, self.model)(
            **_inputs([question]), **states, logits_to_keep=keep, use_cache=False
        ).logits[0]
        logs = torch.log_softmax(logits.float(), dim=-1)
        answers = []
        rests = logs[1:].split([len(choice) - 1 for choice in question.choices])
        for choice, rest in zip(question.choices, rests, strict=True):
            of_choice = torch.cat(
                [logs[:1], rest]
            )  # the prompt's last token predicts each first token
            tokens = torch.tensor(choice)
            value = of_choice.gather(1, tokens[:, None]).sum()
            answers.append((float(value), bool((of_choice.argmax(dim=-1) == tokens).all())))
        return answers


@dataclass(frozen=True)
class _Question:
    """Hold the tokens of a prompt and of its choices."""

    prompt: tuple[int, ...]
    choices: list[list[int]]

    @property
    def segments(self) -> list[Sequence[int]]:
        """Return the prompt, then the choices without their last tokens, which predict nothing."""
        return [self.prompt, *(choice[:-1] for choice in self.choices)]

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of all segments."""
        return [token for segment in self.segments for token in segment]

    def mask(self) -> Tensor:
        """Return the causal mask ``[tokens, tokens]``: a token attends to the prompt and its own choice."""
        sizes = torch.tensor([len(tokens) for tokens in self.segments])
        segment = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return ((segment[:, None] == segment[None, :]) | (segment[None, :] == 0)).tril()


def _inputs(questions: Sequence[_Question]) -> dict[str, Tensor]:
    """Return the model's inputs, padded on the right with tokens that attend only to themselves."""
    count, longest = len(questions), max(len(question.tokens) for question in questions)
    tokens = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)
    for row, question in enumerate(questions):
        size = len(question.tokens)
        tokens[row, :size] = torch.tensor(question.tokens)
        mask[row, :size, :size] = question.mask()
    positions = mask.sum(-1) - 1  # every choice starts after the prompt
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask[:, None]}
