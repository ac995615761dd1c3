"""lm-eval's model for transformers, on a CPU: choices of one question share their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates, columns_digest

Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]


class SharedPromptLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """Answers all choices of a question in one pass: the prompt, then each choice, which sees the prompt and itself.

    A processor gains nothing from batches of several questions, so a row is one question, and only positions that predict a choice get
    logits. Likelihoods are lm-eval's but for rounding. Where there is an accelerator, or a model that takes no such mask, they are computed by
    lm-eval's own code.

    Args:
        prefix: the model's frozen layers, where it has some; what they make of the questions is computed once for all runs.
        settings: lm-eval's own.
    """

    def __init__(self, *, prefix: Prefix | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._prefix = prefix

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        found: dict[int, Answer] = {}
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, request in enumerate(requests):
            by_prompt.setdefault(tuple(request[1]), []).append(place)
        questions = [_Question(prompt, [requests[i][2] for i in places]) for prompt, places in by_prompt.items()]
        shared = [question for question in questions if self._fits(question.longest)]
        states = self._states(shared)
        for place, question in enumerate(shared):
            answers = self._answers(question, {} if states is None else {STATES: states[place][None]})
            found |= dict(zip(by_prompt[question.prompt], answers, strict=True))
        rest = [place for place in range(len(requests)) if place not in found]
        if rest:
            others = super()._loglikelihood_tokens([requests[place] for place in rest], disable_tqdm, override_bs)
            found |= dict(zip(rest, others, strict=True))
        return [found[place] for place in range(len(requests))]

    def _fits(self, tokens: int) -> bool:
        """Whether a prompt with its longest choice can be read under one mask."""
        config = cast(Any, self.model).config
        longest = min(self.max_length, getattr(config, "sliding_window", None) or self.max_length)
        return self.device.type == "cpu" and config._attn_implementation == "sdpa" and tokens <= longest

    def _states(self, questions: Sequence[_Question]) -> PrefixStates | None:
        """What the frozen layers make of the questions; None where no layer is frozen."""
        if self._prefix is None or not questions:
            return None
        parts = [len(part) for question in questions for part in (question.prompt, *question.read)]
        columns = {"tokens": np.concatenate([question.tokens for question in questions]), "parts": np.asarray(parts)}
        lengths = [len(question.tokens) for question in questions]
        return PrefixStates(
            self._prefix, columns_digest(columns), lengths, lambda places: _inputs([questions[i] for i in places])
        )

    @torch.inference_mode()
    def _answers(self, question: _Question, states: dict[str, Tensor]) -> list[Answer]:
        """Log-likelihood of each choice after the prompt, and whether it is the greedy one."""
        keep = len(question.tokens) - len(question.prompt) + 1
        logits = cast(Any, self.model)(**_inputs([question]), **states, logits_to_keep=keep, use_cache=False).logits[0]
        logs = torch.log_softmax(logits.float(), dim=-1)
        found, start = [], 1
        for choice in question.choices:
            end = start + len(choice) - 1
            mine = torch.cat([logs[:1], logs[start:end]])  # the prompt's last token predicts every choice's first
            wanted = torch.tensor(choice)
            value = mine.gather(1, wanted[:, None]).sum()
            found.append((float(value), bool((mine.argmax(dim=-1) == wanted).all())))
            start = end
        return found


class _Question(NamedTuple):
    prompt: tuple[int, ...]
    choices: list[list[int]]

    @property
    def read(self) -> list[list[int]]:
        """The choices without their last tokens, of which nothing is asked."""
        return [choice[:-1] for choice in self.choices]

    @property
    def tokens(self) -> list[int]:
        """The prompt, then each choice."""
        return [*self.prompt, *(token for choice in self.read for token in choice)]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest choice."""
        return len(self.prompt) + max(map(len, self.choices))

    def part(self) -> Tensor:
        """Of each token, ``[tokens]``: 0 in the prompt, the number of its choice from 1 on."""
        counts = [len(self.prompt), *map(len, self.read)]
        return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

    def mask(self) -> Tensor:
        """What each token sees, ``[tokens, tokens]``: the prompt, and what came before in its own choice."""
        part = self.part()
        return ((part[:, None] == part[None, :]) | (part[None, :] == 0)).tril()

    def positions(self) -> Tensor:
        """Positions as if every choice came right after the prompt, ``[tokens]``."""
        after = [torch.arange(len(self.prompt), len(self.prompt) + len(choice)) for choice in self.read]
        return torch.cat([torch.arange(len(self.prompt)), *after])


def _inputs(questions: Sequence[_Question]) -> dict[str, Tensor]:
    """What the model is called with, padded on the right by tokens that see themselves and are seen by nobody else."""
    count, longest = len(questions), max(len(question.tokens) for question in questions)
    tokens, positions = (torch.zeros(count, longest, dtype=torch.long) for _ in range(2))
    mask = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)
    for place, question in enumerate(questions):
        size = len(question.tokens)
        tokens[place, :size], positions[place, :size] = torch.tensor(question.tokens), question.positions()
        mask[place, :size, :size] = question.mask()
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask[:, None]}
