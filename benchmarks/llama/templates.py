"""Make prompts and responses from named templates."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base import DefinitionError, derive_seed
from benchmarks.llama.definition import CHAT, RANDOM, Instruction, PromptTemplate


@dataclass(frozen=True)
class Template:
    """A prompt template with the tokenizer of a model.

    Attributes:
        name: The name of the template.
        text: The texts with placeholders; None to use the tokenizer's chat template.
        tokenizer: The model's tokenizer, with an end token.
    """

    name: str
    text: PromptTemplate | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def special_tokens(self) -> bool:
        """Return True if the tokenizer must add special tokens (Llama's ``<s>``).

        Chat templates contain them already.
        """
        return self.text is not None

    def prompt(self, row: Instruction) -> str:
        """Return the prompt of a row: what the model reads before it responds."""
        if self.text is None:
            return self._render([_question(row)], add_generation_prompt=True)
        form = self.text.with_input if row.input else self.text.without_input
        values = {"{instruction}": row.instruction, "{input}": row.input}
        # One pass replaces all placeholders, so those inside an inserted text stay as they are.
        # str.format would also interpret other braces of the template.
        return re.sub(r"\{instruction\}|\{input\}", lambda match: values[match[0]], form)

    def response(self, row: Instruction) -> str:
        """Return the response that the model learns for a row.

        It ends with the tokenizer's end token, or with what a chat template writes after an answer.

        Raises:
            DefinitionError: The chat template writes another prompt if an answer follows.
        """
        if self.text is not None:
            return f"{row.output}{self.tokenizer.eos_token}"
        # the response is what the chat template adds to the prompt for an answer
        prompt = self.prompt(row)
        answer = {"role": "assistant", "content": row.output}
        conversation = self._render([_question(row), answer])
        if not conversation.startswith(prompt):
            raise DefinitionError(
                f"data.template: the chat template of {self.tokenizer.name_or_path} changes the "
                "prompt if there is an answer; use a template of templates.yaml"
            )
        return conversation.removeprefix(prompt)

    @property
    def end_tokens(self) -> list[int]:
        """Return the ids of the tokens that end a response.

        The first is the tokenizer's end token. Others follow if the chat template writes other
        special tokens into a response.
        """
        end_tokens = [int(self.tokenizer.eos_token_id)]
        # a short response shows which special tokens the template adds to it
        response = self.response(Instruction(instruction="a", output="b"))
        tokens = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        special_tokens = self.tokenizer.all_special_ids
        for token in tokens:
            if token in special_tokens and token not in end_tokens:
                end_tokens.append(token)
        return end_tokens

    def as_chat_template(self) -> str:
        """Return a chat template in Jinja that makes the same texts, for an exported tokenizer.

        A user's message becomes the prompt of an instruction without an input. Another message
        becomes a response.
        """
        if self.text is None:
            return str(self.tokenizer.chat_template)
        before, _, after = self.text.without_input.partition("{instruction}")
        # Jinja reads Python's quoted strings as Python does
        begin_literal = repr(self._begin_text())
        before_literal = repr(before)
        after_literal = repr(after)
        pieces = [
            "{{ " + begin_literal + " }}",
            "{% for message in messages %}",
            "{% if message['role'] == 'user' %}",
            "{{ " + before_literal + " + message['content'] + " + after_literal + " }}",
            "{% else %}",
            "{{ message['content'] + eos_token }}",
            "{% endif %}",
            "{% endfor %}",
        ]
        return "".join(pieces)

    def _begin_text(self) -> str:
        """Return the begin token (Llama's ``<s>``) if the tokenizer puts it before texts.

        The text is empty if the tokenizer does not. A tokenizer adds no token to the text of a chat
        template, so the template must write the begin token.
        """
        # an empty text has only the tokens that the tokenizer adds
        first_tokens = self.tokenizer("")["input_ids"][:1]
        if first_tokens == [self.tokenizer.bos_token_id]:
            return str(self.tokenizer.bos_token)
        return ""

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        """Render messages with the tokenizer's chat template."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return str(text)


def _question(row: Instruction) -> dict[str, str]:
    """Return a row as the user's message of a chat: the instruction, then the input, if any."""
    content = row.instruction
    if row.input:
        content = f"{content}\n\n{row.input}"
    return {"role": "user", "content": content}


def find_template(
    name: str,
    templates: Mapping[str, PromptTemplate],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Template:
    """Return the prompt template of a run, with the tokenizer.

    Args:
        name: A name in ``templates``, ``chat`` for the model's own template, or ``random`` for a
            template that is drawn with the seed of the run. (The authors' ``moe_train.py`` draws
            without a seed.)
        templates: The templates of the run's spec, by name.
        tokenizer: The model's tokenizer.
        seed: The seed of the run.

    Raises:
        DefinitionError: The tokenizer has no end token, or no chat template.
    """
    if name == RANDOM:
        generator = random.Random(derive_seed("template", seed))
        name = generator.choice(sorted(templates))
    if tokenizer.eos_token is None:
        raise DefinitionError(f"the tokenizer of {tokenizer.name_or_path} has no end token")
    if name == CHAT and not tokenizer.chat_template:
        raise DefinitionError(
            f"data.template is 'chat', but {tokenizer.name_or_path} has no chat template; "
            "use one of templates.yaml"
        )
    text = templates.get(name)  # the spec has no text for `chat`
    return Template(name, text, tokenizer)
