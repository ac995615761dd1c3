"""lm-eval's model for transformers, on a CPU: choices of one question share their prompt, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]


class SharedPromptLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """Answers all choices of a question in one pass: the prompt, then each choice, which sees the prompt and itself.

    A processor gains nothing from batches of several questions, so a row is one question, and only positions that predict a choice get
    logits. Likelihoods are lm-eval's but for rounding. Where there is an accelerator, or a model that takes no such mask, they are computed by
    lm-eval's own code.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        found: dict[int, Answer] = {}
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, request in enumerate(requests):
            by_prompt.setdefault(tuple(request[1]), []).append(place)
        for prompt, places in by_prompt.items():
            choices = [requests[place][2] for place in places]
            if self._fits(len(prompt) + max(map(len, choices))):
                found |= dict(zip(places, self._answers(list(prompt), choices), strict=True))
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

    @torch.inference_mode()
    def _answers(self, prompt: list[int], choices: Sequence[list[int]]) -> list[Answer]:
        """Log-likelihood of each choice after the prompt, and whether it is the greedy one."""
        read = [choice[:-1] for choice in choices]  # of its last token nothing is asked
        tokens = torch.tensor([prompt + [token for choice in read for token in choice]])
        logits = cast(Any, self.model)(
            input_ids=tokens,
            attention_mask=_mask(len(prompt), [len(choice) for choice in read]),
            position_ids=_positions(len(prompt), [len(choice) for choice in read]),
            logits_to_keep=tokens.shape[1] - len(prompt) + 1,
            use_cache=False,
        ).logits[0]
        logs = torch.log_softmax(logits.float(), dim=-1)
        found, start = [], 1
        for choice in choices:
            end = start + len(choice) - 1
            mine = torch.cat([logs[:1], logs[start:end]])  # the prompt's last token predicts every choice's first
            wanted = torch.tensor(choice)
            value = mine.gather(1, wanted[:, None]).sum()
            found.append((float(value), bool((mine.argmax(dim=-1) == wanted).all())))
            start = end
        return found


def _mask(prompt: int, choices: Sequence[int]) -> Tensor:
    """What each token sees, ``(1, 1, tokens, tokens)``: the prompt, and what came before in its own choice."""
    part = torch.repeat_interleave(torch.arange(len(choices) + 1), torch.tensor([prompt, *choices]))
    own = (part[:, None] == part[None, :]) | (part[None, :] == 0)
    return own.tril()[None, None]


def _positions(prompt: int, choices: Sequence[int]) -> Tensor:
    """Positions as if every choice came right after the prompt, ``(1, tokens)``."""
    after = [torch.arange(prompt, prompt + count) for count in choices]
    return torch.cat([torch.arange(prompt), *after])[None]
