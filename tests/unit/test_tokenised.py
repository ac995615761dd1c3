"""Tokens: cached once for each set, tokenizer and length, and equal to what the tokenizer gives."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base import TOKENS
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.text import tokenization as tokenised
from benchmarks.text.data import TextSplit
from benchmarks.text.tokenization import TokenisedRows

pytestmark = pytest.mark.usefixtures("here")
PAIRS = TextSplit([("a longer first sentence", "so it is"), ("short", "too"), ("", "empty first")], [1, 0, 1])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(load_models()["minilm"].spec("minilm"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    whole = tokenised._tokenise

    def spy(split: TextSplit, *args: object) -> object:
        made.append(len(split))
        return whole(split, *args)

    monkeypatch.setattr(tokenised, "_tokenise", spy)
    return made


def test_rows_are_what_the_tokenizer_gives(tokenizer: PreTrainedTokenizerBase) -> None:
    for _ in range(2):  # made, and from the cache
        rows = TokenisedRows(PAIRS, tokenizer, 8, by_length=False)
        for row, texts, label in zip(rows, PAIRS.texts, PAIRS.labels, strict=True):
            assert row == {**tokenizer(*texts, truncation=True, max_length=8), "labels": label}
    assert max(rows.lengths) == 8


def test_sorted_rows_keep_their_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = TokenisedRows(PAIRS, tokenizer, 32, by_length=True)
    assert rows.lengths == sorted(rows.lengths)
    plain = {tuple(row["input_ids"]): row["labels"] for row in TokenisedRows(PAIRS, tokenizer, 32, by_length=False)}
    assert [plain[tuple(row["input_ids"])] for row in rows] == rows.labels.tolist()
    assert "labels" not in TokenisedRows(PAIRS, tokenizer, 32, by_length=True, labelled=False)[0]


def test_one_set_is_tokenised_once_for_each_tokenizer_and_length(
    tokenizer: PreTrainedTokenizerBase, calls: list[int]
) -> None:
    other_labels = TextSplit(PAIRS.texts, [0, 0, 0])
    for split in (PAIRS, other_labels):
        TokenisedRows(split, tokenizer, 16, by_length=False)
        TokenisedRows(split, tokenizer, 16, by_length=True)
    assert calls == [3]
    TokenisedRows(PAIRS, tokenizer, 17, by_length=False)
    TokenisedRows(TextSplit(PAIRS.texts[:2], [1, 0]), tokenizer, 16, by_length=False)
    changed = load_tokenizer(load_models()["minilm"].spec("minilm"))
    changed.add_tokens(["longer"])
    TokenisedRows(PAIRS, changed, 16, by_length=False)
    assert calls == [3, 3, 2, 3]
    assert len(list(TOKENS.glob("*.safetensors"))) == 4
    # calls with other settings leave a fast tokenizer's own state changed; that is no other tokenizer
    tokenizer("a b c", truncation=True, max_length=3, padding="max_length")
    TokenisedRows(PAIRS, tokenizer, 16, by_length=False)
    assert len(calls) == 4


def test_a_cache_with_other_tokens_is_made_again(tokenizer: PreTrainedTokenizerBase, calls: list[int]) -> None:
    before = list(TokenisedRows(PAIRS, tokenizer, 16, by_length=False))
    (file,) = TOKENS.glob("*.safetensors")
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    columns = load_file(file)
    save_file({**columns, "input_ids": np.zeros_like(columns["input_ids"])}, file, metadata=metadata)
    assert list(TokenisedRows(PAIRS, tokenizer, 16, by_length=False)) == before
    assert calls == [3, 3]
