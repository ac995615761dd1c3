"""Make prompts and responses from named templates."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base import DefinitionError, derive_seed
from benchmarks.llama.definition import CHAT, RANDOM, Instruction, PromptTemplate


@dataclass(frozen=True)
class Template:
    """Make the prompts and responses of rows.

    Attributes:
        name: The name of the template.
        text: The prompts; None to use the tokenizer's chat template.
        tokenizer: The model's tokenizer, with an end token.
    """

    name: str
    text: PromptTemplate | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def special_tokens(self) -> bool:
        """Return True if the tokenizer must add special tokens (Llama's ``<s>``); chat templates contain them."""
        return self.text is not None

    def prompt(self, row: Instruction) -> str:
        """Return the prompt of a row."""
        if self.text is None:
            return str(self._chat(self._messages(row), add_generation_prompt=True))
        form = self.text.with_input if row.input else self.text.without_input
        # str.format would interpret braces in the texts
        before, _, rest = form.partition("{instruction}")
        return before + row.instruction + rest.replace("{input}", row.input)

    def response(self, row: Instruction) -> str:
        """Return the response with its end token (:class:`DefinitionError` if a chat template changes the prompt)."""
        if self.text is not None:
            return f"{row.output}{self.tokenizer.eos_token}"
        prompt = self.prompt(row)
        whole = str(
            self._chat([*self._messages(row), {"role": "assistant", "content": row.output}])
        )
        if not whole.startswith(prompt):
            raise DefinitionError(
                f"data.template: the chat template of {self.tokenizer.name_or_path} changes the prompt if there is an "
                "answer; use a template of templates.yaml"
            )
        return whole[len(prompt) :]

    @property
    def end_tokens(self) -> list[int]:
        """Return the ids of the end tokens: the tokenizer's, and the chat template's if it differs."""
        response = self.response(Instruction(instruction="a", output="b"))
        tokens = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        special = [token for token in tokens if token in self.tokenizer.all_special_ids]
        return list(dict.fromkeys([int(self.tokenizer.eos_token_id), *special]))

    def as_chat_template(self) -> str:
        """Return a Jinja chat template that renders messages like :meth:`prompt` renders instructions."""
        if self.text is None:
            return str(self.tokenizer.chat_template)
        before, _, after = self.text.without_input.partition("{instruction}")
        adds_begin = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        begins = self.tokenizer.bos_token if adds_begin else ""
        return (
            f"{{{{ {begins!r} }}}}{{% for message in messages %}}{{% if message['role'] == 'user' %}}"
            f"{{{{ {before!r} + message['content'] + {after!r} }}}}"
            "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
        )

    def _messages(self, row: Instruction) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": "\n\n".join(filter(None, (row.instruction, row.input)))}
        ]

    def _chat(self, messages: list[dict[str, str]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def find_template(
    name: str,
    templates: Mapping[str, PromptTemplate],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Template:
    """Return the template of a run.

    Args:
        name: A name in ``templates``, ``chat`` for the model's own, or ``random`` for one drawn per run with the seed
            (the authors' ``moe_train.py`` draws without a seed).
        templates: The templates of the run's spec, by name.
        tokenizer: The model's tokenizer.
        seed: The seed of the run.

    Raises:
        DefinitionError: The tokenizer has no end token, or no chat template.
    """
    if name == RANDOM:
        name = random.Random(derive_seed("template", seed)).choice(sorted(templates))
    if tokenizer.eos_token is None:
        raise DefinitionError(f"the tokenizer of {tokenizer.name_or_path} has no end token")
    if name == CHAT and not tokenizer.chat_template:
        raise DefinitionError(
            f"data.template is 'chat', but {tokenizer.name_or_path} has no chat template; use one of templates.yaml"
        )
    return Template(name, templates.get(name), tokenizer)
