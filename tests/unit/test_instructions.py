"""Test instructions: reading, broken rows, prompts, and learned tokens."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import emoe
from benchmarks.harness.base import BENCHMARKS, DATA_ROOT, DataError, DefinitionError
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.config.yaml import parse, read
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.sources.packages import find_package
from benchmarks.llama.definition import (
    CHAT,
    RANDOM,
    Instruction,
    InstructionSource,
    PromptTemplate,
    TemplateFile,
)
from benchmarks.llama.encoding import (
    IGNORED,
    EncodedRow,
    EncodedRows,
    collator,
    without_prompt_logits,
)
from benchmarks.llama.evaluation import held_out_loss
from benchmarks.llama.instructions import load_instructions, parse_instructions, refuse_broken
from benchmarks.llama.templates import Template, find_template
from tests.conftest import fetched

TEMPLATES = read(BENCHMARKS / "llama/templates.yaml", TemplateFile).templates
GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
ROW = Instruction(**GOOD)


def find(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Template:
    return find_template(name, TEMPLATES, tokenizer, seed)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word and Llama's special tokens."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


LATIN = json.dumps({**GOOD, "output": "caf\u00e9"}, ensure_ascii=False).encode("latin-1")
BROKEN = [
    (b'{"instruction": "Add.", "input": ""}', "'output': Field required"),
    (b'{"instruction": "Add.", "output": "  "}', "'output': Value error, the text is empty"),
    (b'{"instruction": 7, "output": "3"}', "'instruction': Input should be a valid string"),
    (b"[]", "Input should be"),
]
BROKEN_LINES = [
    (b"{", "Invalid JSON: EOF while parsing an object"),
    (LATIN, "Invalid JSON: invalid unicode code point"),
]


@pytest.mark.parametrize(("noun", "broken"), [("row", BROKEN), ("line", [*BROKEN, *BROKEN_LINES])])
def test_broken_rows_are_named_and_the_others_are_read(
    noun: str, broken: list[tuple[bytes, str]]
) -> None:
    rows = [
        json.dumps(GOOD).encode(),
        *(row for row, _ in broken),
        json.dumps({**GOOD, "input": None}).encode(),
    ]
    content = b"\r\n".join([*rows, b""]) if noun == "line" else b"[" + b",".join(rows) + b"]"
    result = parse_instructions(codecs.BOM_UTF8 + content, "x", lines=noun == "line")
    assert [(row.position, row.input) for row in result.rows] == [
        (f"{noun} 1", "1 and 2"),
        (f"{noun} {len(rows)}", ""),
    ]
    for number, (message, (_, reason)) in enumerate(
        zip(result.broken, broken, strict=True), start=2
    ):
        assert message.startswith(f"{noun} {number}: {reason}")
    with pytest.raises(
        DataError,
        match=rf"x has {len(broken)} broken rows, the first: {noun} 2: 'output': .*: skip",
    ):
        refuse_broken(result.broken, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps([GOOD]).encode() + b"\n}",
            r"is not JSON: Extra data: line 2 column 1 .*; name it .jsonl",
        ),
        (b" [\n]\n", "is not a list of objects, or is empty"),
        (b"[" + LATIN + b"]", "is not JSON: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_damaged_list_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"x\.json {message}"):
        parse_instructions(content, "x.json", lines=False)


def test_a_set_is_read_from_the_users_file_else_the_package(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = InstructionSource(package="llamafactory-0.9.5/data/alpaca_en_demo.json")
    archive, path = fetched(find_package("llamafactory")), find_package("llamafactory").path
    with pytest.raises(DataError, match=r"python -m benchmarks fetch llamafactory-0.9.5.tar.gz"):
        load_instructions("alpaca_demo", package)
    path.parent.mkdir(parents=True)
    path.symlink_to(archive)
    loaded = load_instructions("alpaca_demo", package)
    assert (len(loaded.rows), len(loaded.broken), loaded.source) == (
        999,
        0,
        "package llamafactory 0.9.5",
    )
    monkeypatch.setenv(DATA_ROOT, str(here))
    (here / "alpaca_demo.jsonl").write_text(json.dumps(GOOD))
    assert load_instructions("alpaca_demo", package).source == str(here / "alpaca_demo.jsonl")


def test_templates_put_instruction_and_input_in_as_they_are(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = Instruction(
        instruction="Repeat {input} and {x}.", input="a {instruction} b", output="done"
    )
    plain, alpaca = (find(name, tokenizer, 0) for name in ("plain", "alpaca"))
    assert plain.prompt(row) == "Repeat {input} and {x}.\n\na {instruction} b\n\n"
    assert plain.response(row) == "done</s>"
    without = alpaca.prompt(Instruction(instruction="Add.", output="3"))
    assert without.startswith("Below is an instruction that describes a task. Write")
    assert without.endswith("### Instruction:\nAdd.\n\n### Response:")
    assert "### Input:\n1 and 2\n\n### Response:" in alpaca.prompt(ROW)


def test_a_template_may_have_the_input_before_the_instruction(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = PromptTemplate(
        with_input="{input}\n{instruction}\n", without_input="{instruction}\n{x}\n"
    )
    template = find_template("own", {"own": texts}, tokenizer, 0)
    row = Instruction(
        instruction="Repeat {input} and {instruction}.", input="an {instruction}", output="done"
    )
    assert template.prompt(row) == "an {instruction}\nRepeat {input} and {instruction}.\n"
    without_input = row.model_copy(update={"input": ""})
    assert template.prompt(without_input) == "Repeat {input} and {instruction}.\n{x}\n"


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("with_input", "{instruction}", "it needs {input} exactly once, but has it 0 times"),
        ("with_input", "{instrction}{input}", "it needs {instruction} exactly once, but .* 0 "),
        ("with_input", "{input}{instruction}{input}", "it needs {input} exactly once, .* 2 times"),
        ("without_input", "Do it.", "it needs {instruction} exactly once, but has it 0 times"),
        ("without_input", "{input}{instruction}", "it has {input}, but its rows have no input"),
    ],
)
def test_a_template_has_each_placeholder_once(form: str, text: str, message: str) -> None:
    texts = {"with_input": "{instruction}{input}", "without_input": "{instruction}", form: text}
    with pytest.raises(DefinitionError, match=rf"x\.yaml: 'templates\.own\.{form}': {message}"):
        parse({"templates": {"own": texts}}, TemplateFile, "x.yaml")


def test_a_random_template_is_drawn_by_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = [find("random", tokenizer, seed).name for seed in range(30)]
    assert drawn == [find("random", tokenizer, seed).name for seed in range(30)]
    assert set(drawn) == set(TEMPLATES)


def test_a_chat_template_makes_prompt_and_response(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = find("alpaca", tokenizer, 0)
    chatting = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    chatting.chat_template = plain.as_chat_template()
    chat = find("chat", chatting, 0)
    whole = Instruction(instruction="Add.\n\n1 and 2", output="3")
    assert chat.prompt(ROW) == plain.prompt(whole)
    assert chat.response(ROW) == plain.response(whole)
    with pytest.raises(DefinitionError, match="has no chat template; use one of templates"):
        find("chat", tokenizer, 0)
    chatting.chat_template = (
        "{% for message in messages %}{{ messages | length }}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(DefinitionError, match="changes the prompt"):
        find("chat", chatting, 0).response(ROW)


def test_only_the_response_is_learned_and_truncated_tokens_are_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [("one two three", "", "four five"), ("one two three", "four", "five six seven eight")]
    texts.append(("one " * 10_000, "", "two"))
    rows = [
        Instruction(**dict(zip(GOOD, row, strict=True)), position=f"line {i}")
        for i, row in enumerate(texts)
    ]
    encoded = EncodedRows(rows, find("plain", tokenizer, 0), 7)
    assert [(row.begin, len(row.tokens), row.cut) for row in encoded.rows] == [(3, 6, 0), (4, 7, 2)]
    assert encoded[0]["labels"] == [IGNORED] * 3 + encoded[0]["input_ids"][3:]
    assert encoded[0]["input_ids"][-1] == tokenizer.eos_token_id  # the end is learned too
    assert encoded.broken == [
        "line 2 has a prompt of 10000 tokens, so the response does not fit into 7"
    ]
    counts = {"rows": 2, "truncated_responses": 1, "truncated_tokens": 2}
    counts |= {"tokens": 13, "learned_tokens": 6, "longest": 7}
    assert encoded.summary() | counts == encoded.summary()


@pytest.mark.parametrize("name", sorted({*TEMPLATES} - {CHAT, RANDOM}))
def test_learned_tokens_are_exactly_the_response(name: str) -> None:
    """Decode the learned tokens with a real tokenizer."""
    tokenizer = load_tokenizer(ModelSpec(name="tiny-llama", config={}, tokenizer="minilm"))
    row = Instruction(
        instruction="Name two colours", input="bright ones", output="Red, and yellow!"
    )
    template = find(name, tokenizer, 0)
    encoded = EncodedRows([row], template, 200).rows[0]
    assert (
        tokenizer.decode(encoded.tokens[encoded.begin :], skip_special_tokens=True)
        == "red, and yellow!"
    )
    assert not template.prompt(row).endswith(
        " "
    )  # byte-level tokenizers put a blank and the word after it together


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**small, intermediate_size=32, use_cache=False)).eval()


TOKENS = [[3 + (7 * index + number) % 57 for index in range(4 + 3 * number)] for number in range(4)]


def test_only_logits_of_prompts_are_omitted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, Any]] = [  # the first has no learned token
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": [IGNORED] * 4 + row[4:]}
        for row in TOKENS
    ]
    plain, short = (
        collator(tokenizer)(rows),
        without_prompt_logits(collator(tokenizer), model)(rows),
    )
    whole, cut = model(**plain), model(**short)
    assert float(cut.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    assert (
        cut.logits.shape[1] == whole.logits.shape[1] - 3
    )  # the fourth token predicts the first that is learned
    assert int((short["labels"] != IGNORED).sum()) == int((plain["labels"] != IGNORED).sum())
    assert len(without_prompt_logits(collator(tokenizer), model)(rows[:1])["labels"][0]) == 1


def test_padding_is_not_counted_in_routing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", score="gate"))
    encoded = EncodedRows([], find("plain", tokenizer, 0), 10)
    encoded.rows = [EncodedRow(ROW, row, 2, 0) for row in TOKENS]
    counts = []
    for batch_size in (1, 4):
        with emoe.record_routing(model) as record:
            loss = held_out_loss(model, encoded, tokenizer, batch_size, "fp32")
        counts.append(
            (round(loss or 0, 5), [layer.loads.tolist() for layer in record.layers.values()])
        )
    assert counts[0] == counts[1]
    assert sum(counts[0][1][0]) == 2 * sum(map(len, TOKENS))
