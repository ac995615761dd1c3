"""Score questions of lm-eval on a CPU with one forward pass each: choices share their prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates, columns_digest
from emoe import config_of, is_converted

# lm-eval's form: the texts of prompt and choice, the prompt's tokens, the choice's tokens
Request = tuple[tuple[str, str], list[int], list[int]]
# a choice's log-likelihood, and True if it is the greedy continuation
Answer = tuple[float, bool]
# The largest number of tokens of choices in a row. An empty prompt becomes one token that all
# requests of a task share, so without a limit a single row could have them all. The four answers of
# a question of MMLU have up to 592 tokens of SmolLM2, so no question of MMLU has several rows.
MAX_CHOICE_TOKENS = 1024


class SharedPromptLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model for lm-eval that computes the prompt of a question once for all choices.

    A row of the model's input has the prompt and all choices. If the choices have more than
    :data:`MAX_CHOICE_TOKENS` tokens, the question has several rows. A choice attends to the prompt
    and to itself. Only positions that predict a token of a choice get logits. Likelihoods equal
    lm-eval's up to rounding. lm-eval's own code answers on an accelerator, if the model does not
    support such masks, if its experts have a capacity, or if the question is too long.

    Args:
        prefix: The frozen layers of the model, whose output is kept for all runs; None if no layer
            is frozen.
        settings: The arguments of lm-eval's ``HFLM``.
    """

    def __init__(self, *, prefix: Prefix | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._prefix = prefix

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Return the answer to each request, in the order of the requests.

        lm-eval calls this method, whose arguments it defines.
        """
        grouped = _group_by_prompt(requests)
        questions = [question for question in grouped if self._can_share_prompt(question)]
        answers = self._answers_by_request(questions)

        # lm-eval's own code answers the rest
        rest = [index for index in range(len(requests)) if index not in answers]
        if rest:
            requests_of_rest = [requests[index] for index in rest]
            answers_of_rest = super()._loglikelihood_tokens(
                requests_of_rest, disable_tqdm, override_bs
            )
            for index, answer in zip(rest, answers_of_rest, strict=True):
                answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def _answers_by_request(self, questions: Sequence[_Question]) -> dict[int, Answer]:
        """Answer questions whose choices share the prompt, one question at a time.

        Returns the answer to each request, by index of the request.
        """
        answers = {}
        states = self._states(questions)
        for row, question in enumerate(questions):
            frozen_output = {}
            if states is not None:
                frozen_output[STATES] = states[row][None]  # a batch of one row
            answers_of_choices = self._answers(question, frozen_output)
            for index, answer in zip(question.request_indices, answers_of_choices, strict=True):
                answers[index] = answer
        return answers

    def _can_share_prompt(self, question: _Question) -> bool:
        """Return True if the choices of a question can share its prompt.

        This needs a CPU, SDPA, experts without a capacity, and a prompt that fits with each choice
        into the model's window.
        """
        model = cast(Any, self.model)
        config = model.config
        is_on_cpu = self.device.type == "cpu"
        # other implementations of attention take no mask for each row
        takes_mask = config._attn_implementation == "sdpa"
        window = self.max_length  # in tokens
        sliding_window = getattr(config, "sliding_window", None)
        if sliding_window:
            window = min(window, sliding_window)
        longest_choice = max(len(choice) for choice in question.choices)
        fits = len(question.prompt) + longest_choice <= window
        # with a capacity, a choice could take an expert from the tokens of another choice
        has_capacity = is_converted(model) and config_of(model).capacity_factor is not None
        return is_on_cpu and takes_mask and fits and not has_capacity

    def _states(self, questions: Sequence[_Question]) -> PrefixStates | None:
        """Return the output of the frozen layers for each question.

        The result is None if no layer is frozen, or if there are no questions.
        """
        if self._prefix is None or not questions:
            return None
        tokens_of_rows = [question.tokens for question in questions]
        sizes: list[int] = []  # the segments of all questions, one after the other
        for question in questions:
            sizes.extend(question.sizes)
        # outputs are kept on disk for other runs; the file name depends on this digest of the rows
        digest = columns_digest(
            {"tokens": np.concatenate(tokens_of_rows), "parts": np.asarray(sizes)}
        )

        def make_inputs(rows: Sequence[int]) -> dict[str, Tensor]:
            """Make the model inputs of the questions with these indices."""
            return _inputs([questions[row] for row in rows])

        lengths = [len(tokens) for tokens in tokens_of_rows]
        return PrefixStates(self._prefix, digest, lengths, make_inputs)

    @torch.inference_mode()
    def _answers(self, question: _Question, frozen_output: dict[str, Tensor]) -> list[Answer]:
        """Return for each choice its log-likelihood, and True if greedy decoding would give it.

        Args:
            question: The question.
            frozen_output: The model input that replaces the frozen layers, by name; empty if no
                layer is frozen.
        """
        # only the last token of the prompt, and the tokens after it, predict tokens of choices
        num_predicting = len(question.tokens) - len(question.prompt) + 1
        inputs = _inputs([question])
        output = cast(Any, self.model)(
            **inputs, **frozen_output, logits_to_keep=num_predicting, use_cache=False
        )
        logits = output.logits[0]  # [predicting tokens, vocabulary]
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)

        # the last token of the prompt predicts the first token of every choice
        of_prompt = log_probabilities[:1]
        # each token of a choice, except the last, predicts the next token of its choice
        predicting_by_choice = [len(choice) - 1 for choice in question.choices]
        of_choices = log_probabilities[1:].split(predicting_by_choice)
        answers = []
        for choice, of_choice in zip(question.choices, of_choices, strict=True):
            # the predictions of all tokens of the choice: [tokens of the choice, vocabulary]
            predictions = torch.cat([of_prompt, of_choice])
            tokens = torch.tensor(choice)
            log_likelihood = predictions.gather(1, tokens[:, None]).sum()
            is_greedy = (predictions.argmax(dim=-1) == tokens).all()
            answers.append((float(log_likelihood), bool(is_greedy)))
        return answers


@dataclass
class _Question:
    """A prompt with choices that share a row, as tokens.

    Attributes:
        prompt: The tokens of the prompt.
        choices: The tokens of each choice.
        request_indices: For each choice, the index of the request that asks for it.
        choice_tokens: The number of tokens of all choices.
    """

    prompt: tuple[int, ...]
    choices: list[list[int]] = field(default_factory=list)
    request_indices: list[int] = field(default_factory=list)
    choice_tokens: int = 0

    def has_room(self, choice: Sequence[int]) -> bool:
        """Return True if the row can take another choice."""
        return self.choice_tokens + len(choice) <= MAX_CHOICE_TOKENS

    def add(self, choice: list[int], request_index: int) -> None:
        """Add a choice, and the index of the request that asks for it."""
        self.choices.append(choice)
        self.request_indices.append(request_index)
        self.choice_tokens += len(choice)

    @property
    def segments(self) -> list[Sequence[int]]:
        """Return the prompt, then the choices without their last tokens, which predict nothing."""
        return [self.prompt, *(choice[:-1] for choice in self.choices)]

    @property
    def sizes(self) -> list[int]:
        """Return the number of tokens of each segment."""
        return [len(segment) for segment in self.segments]

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of all segments."""
        return list(itertools.chain.from_iterable(self.segments))

    def mask(self) -> Tensor:
        """Return the causal mask ``[tokens, tokens]``: True where the row attends to the column.

        A token attends to the prompt and to its own choice, up to itself.
        """
        sizes = torch.tensor(self.sizes)
        # [tokens]: the segment of each token; 0 is the prompt
        segment = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        is_same_segment = segment[:, None] == segment[None, :]
        is_prompt = segment[None, :] == 0
        return (is_same_segment | is_prompt).tril()


def _group_by_prompt(requests: Sequence[Request]) -> list[_Question]:
    """Collect the requests with the same prompt into one question.

    If the choices do not fit into a row, several questions have the same prompt. Questions are in
    the order of their first requests.
    """
    questions: list[_Question] = []
    latest: dict[tuple[int, ...], _Question] = {}  # the last question of each prompt
    for index, (_, prompt_tokens, choice) in enumerate(requests):
        prompt = tuple(prompt_tokens)
        question = latest.get(prompt)
        if question is None or not question.has_room(choice):
            question = _Question(prompt)
            latest[prompt] = question
            questions.append(question)
        question.add(choice, index)
    return questions


def _inputs(questions: Sequence[_Question]) -> dict[str, Tensor]:
    """Return the model inputs of some questions, one row each.

    Rows are padded on the right. Padding attends only to itself.
    """
    num_rows = len(questions)
    longest = max(len(question.tokens) for question in questions)
    input_ids = torch.zeros(num_rows, longest, dtype=torch.long)
    # with an identity matrix, each token attends to itself only: [rows, tokens, tokens]
    mask = torch.eye(longest, dtype=torch.bool).repeat(num_rows, 1, 1)
    for row, question in enumerate(questions):
        tokens = question.tokens
        size = len(tokens)
        input_ids[row, :size] = torch.tensor(tokens)
        mask[row, :size, :size] = question.mask()
    # a token's position is the number of tokens before it that it attends to, so that every
    # choice starts after the prompt
    positions = mask.sum(-1) - 1
    # the mask needs a dimension for the heads
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask[:, None]}
