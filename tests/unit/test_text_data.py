"""Test text sets in every format: kept, dropped and refused rows, labels, and tokens."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from unittest import mock

import datasets
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.harness.base import DataError
from benchmarks.harness.config.catalogue import model_spec
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.sources.vader import load_vader
from benchmarks.text import data
from benchmarks.text.data import TextSplit, load_whole_part
from benchmarks.text.definition import RunTask, Splits, TextSource
from benchmarks.text.tokenization import TokenisedRows
from tests.text_sets import TASKS, task, write_glue, write_own, write_rows, write_saved

FILES = ["parquet", "jsonl", "csv"]
NAMED = ["parquet", "saved", "hub"]  # formats that store class names
ALL = [*FILES, "saved", "hub"]


def write_file(root: Path, name: str, file: str, content: str | bytes) -> Path:
    path: Path = root / TASKS[name]["source"]["folder"] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# labels


# formats, task, stored class names, written labels, and the labels that are read or the error
LABELS: list[tuple[list[str], str, list[str] | None, list[object], list[float] | str]] = [
    # missing labels are dropped and counted, and whole floats are labels
    (ALL, "mnli", None, [2, -1, 0, None, 1], [2, 0, 1]),
    (ALL, "mnli", None, ["neutral", None, "-", "entailment", "-1", ""], [1, 0]),
    (ALL, "rte", None, [1.0, None, math.nan, 0.0, -1.0], [1, 0]),
    (["csv"], "rte", None, ["1.0", "nan", "null", "0", " "], [1, 0]),
    (ALL, "stsb", None, [4.8, -1.0, math.nan, None, 0.0, 5.0], [4.8, 0.0, 5.0]),
    # labels out of range
    (["csv", "hub"], "stsb", None, [1, 0, 7.3], r"row 3: '7\.3' is no label of task 'stsb'"),
    (["csv", "hub"], "rte", None, [1, 0, 0.5], r"row 3: '0\.5' is no label of task 'rte'"),
    # numbers are read by the stored class names
    (NAMED, "mnli", ["contradiction", "entailment", "neutral"], [0, 1, 2, -1], [2, 0, 1]),
    (["hub"], "sst2", ["positive", "negative"], [0, 1], [1, 0]),
    (
        ["hub"],
        "rte",
        ["yes", "no"],
        [0],
        "row 1: 'yes' is no label of task 'rte'; choose from entailment, not_entail",
    ),
    # numbers that are class names do not count from 0
    (["csv"], "stars", None, [3, 1.0, 2, -1], [2, 0, 1]),
    (
        ["csv"],
        "stars",
        None,
        [0, 1, 2],
        "row 1: '0' is no label of task 'sst2'; choose from 1, 2, 3$",
    ),
    (["parquet"], "stars", ["3", "1", "2"], [0, 1, 2], [2, 0, 1]),
]


@pytest.mark.parametrize(
    ("form", "name", "names", "written", "labels"),
    [(form, *case) for forms, *case in LABELS for form in forms],
)
def test_labels_are_read_dropped_and_counted_or_refused(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    name: str,
    names,
    written: list[object],
    labels,
) -> None:
    name, changes = ("sst2", {"labels": ["1.0", "2", "3"]}) if name == "stars" else (name, {})
    write_rows(root, name, list(written), form, monkeypatch, names)
    read = task(name).model_copy(update=changes)
    if isinstance(labels, str):
        with pytest.raises(DataError, match=labels):
            load_whole_part(read, "dev")
        return
    split = load_whole_part(read, "dev")
    assert (split.labels, split.dropped) == (labels, len(written) - len(labels))
    missing = ("None", "nan", "NaN", "null", "", "-", "-1", "-1.0")
    kept = [i for i, value in enumerate(written) if str(value).strip() not in missing]
    assert [texts[0] for texts in split.texts] == [f"{TASKS[name]['fields'][0]} {i}" for i in kept]


def test_numbers_are_read_by_the_class_names_beside_a_file(root: Path, monkeypatch) -> None:
    names = ("contradiction", "entailment", "neutral")  # not in the task's order
    write_rows(root, "mnli", [0, 1, 2, -1], "csv", monkeypatch)
    listed = "".join(f"          '{number}': {name}\n" for number, name in enumerate(names))
    classes = "    dtype:\n      class_label:\n        names:\n" + listed
    content = f"---\ndataset_info:\n  features:\n  - name: label\n{classes}---\n# MNLI\n"
    (root / "MNLI/README.md").write_text(content)
    split = load_whole_part(task("mnli"), "dev")
    assert (split.labels, split.dropped) == ([2, 0, 1], 1)


@pytest.mark.parametrize(
    ("name", "written", "names", "labels"),
    [
        ("yelp_polarity", [0, 1], ["1", "2"], [0, 1]),  # so named on the hub
        ("scitail", [0, 1], ["neutral", "entailment"], [1, 0]),
        ("flipkart", [0, 1, 2], ["positive", "neutral", "negative"], [1, 0, 0]),
        ("sick_entailment", [0, 1, 2], ["NEUTRAL", "CONTRADICTION", "ENTAILMENT"], [1, 2, 0]),
        ("newsqa_qnli", ["not_entailment", "entailment"], None, [1, 0]),
    ],
)
def test_saved_sets_of_glue_x_are_read_whole(
    root: Path, name: str, written, names, labels: list[float]
) -> None:
    write_saved(root, name, list(written), names=names)
    assert load_whole_part(task(name), "test").labels == labels


def test_a_saved_set_without_the_split_names_a_similar_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(root, "rte", [0, 1], "saved", monkeypatch)
    read = task("rte")
    misnamed = read.splits.model_copy(update={"dev": "validatoin"})
    with pytest.raises(
        DataError, match=r"RTE has no split 'validatoin'; did you mean 'validation'"
    ):
        load_whole_part(read.model_copy(update={"splits": misnamed}), "dev")


# texts


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_text_that_looks_like_something_else_stays_text(root: Path, form: str) -> None:
    rows = [
        ("007", 1),
        ("1e5", 0),
        ("True", 1),
        ("2020-01-01", 1),
        ("NA", 0),
        ("a\u2028b", 1),
        ('q"u,o\n', 0),
    ]
    if form == "csv":
        lines = ('1,"' + text.replace('"', '""') + f'",{label}\n' for text, label in rows)
        content = "\ufeffid,sentence,label\n" + "".join(lines)
    else:
        content = "".join(
            json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows
        )
    write_file(root, "cola", f"validation.{form}", content)
    split = load_whole_part(task("cola"), "dev")
    assert list(zip(split.texts, split.labels, strict=True)) == [
        ((text,), label) for text, label in rows
    ]


def test_rows_without_a_text_or_half_of_a_pair_are_dropped_and_counted(root: Path) -> None:
    """An empty second text is a text, as in the hub's copy of GLUE."""
    rows = [("a", "b", 1), ("c", "d", 0), ("e", None, 1), ("f", "", 1), (" ", "", 1)]
    lines = (
        json.dumps({"sentence1": first, "sentence2": second, "label": label})
        for first, second, label in rows
    )
    write_file(root, "mrpc", "validation.jsonl", "\n".join(lines))
    split = load_whole_part(task("mrpc"), "dev")
    assert (split.labels, split.dropped, split.texts[-1][1]) == ([1, 0, 1], 2, "")
    write_file(root, "sst2", "validation.csv", 'sentence,label\n"  ",1\n,0\n"\n",1\nfine,1\n')
    split = load_whole_part(task("sst2"), "dev")
    assert (split.texts, split.dropped) == ([("fine",)], 3)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "sst2",
            "validation.csv",
            "sentence;label\nfine;1\n",
            "no column 'sentence'; did you mean 'sentence;label'",
        ),
        ("sst2", "validation.csv", b"sentence,label\ncaf\xe9,0\n", "cannot be read: .*utf-8"),
        (
            "sst2",
            "validation.csv",
            "sentence,label\nfine,1\nfine, really,1\n",
            "cannot be read: .*line 3, saw 3",
        ),
        ("sst2", "validation.csv", "sentence,label\n", "has no row with text and label"),
        (
            "sst2",
            "validation.jsonl",
            '{"sentence": "a", "label": 1}\n{"sentence": \n',
            "cannot be read: JSON parse",
        ),
        ("sst2", "validation.parquet", b"PAR1 nothing", "cannot be read: "),
        (
            "rte",
            "validation.csv",
            "sentence1,sentence2,label\na,b,not_entailmnt\n",
            "row 1: .*mean 'not_entailment'",
        ),
    ],
)
def test_a_file_that_cannot_be_read_as_it_is_meant_is_refused_in_one_line(
    root: Path, name: str, file: str, content: str | bytes, message: str
) -> None:
    path = write_file(root, name, file, content)
    with pytest.raises(DataError, match=message) as caught:
        load_whole_part(task(name), "dev")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# files


def frame(text: str, label: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"sentence1": [text], "sentence2": ["b"], "label": [label]})


def test_a_split_is_read_once_and_as_a_whole(root: Path) -> None:
    (root / "RTE").mkdir()
    piece = "validation-0000{}-of-00003.parquet"
    for number in (2, 0, 1):
        frame(str(number)).to_parquet(root / "RTE" / piece.format(number))
    assert [texts[0] for texts in load_whole_part(task("rte"), "dev").texts] == ["0", "1", "2"]
    (root / "RTE/train").mkdir()
    frame("converted by the hub").to_parquet(root / "RTE/train/0000.parquet")
    assert load_whole_part(task("rte"), "train").texts[0][0] == "converted by the hub"
    (root / "RTE" / piece.format(1)).unlink()
    with pytest.raises(DataError, match="RTE lacks a piece of the split 'validation'"):
        load_whole_part(task("rte"), "dev")
    (root / "RTE/train/0000.parquet").rename(root / "RTE/train/0001.parquet")
    with pytest.raises(DataError, match=r"RTE/train lacks the piece 0000\.parquet"):
        load_whole_part(task("rte"), "train")


def test_local_files_need_no_network_and_copy_no_rows(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = root / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(
        socket.socket, "connect", mock.Mock(side_effect=AssertionError("a socket was opened"))
    )
    for number, form in enumerate([*FILES, "saved"]):
        folder = root / f"[{number}] *"  # no pattern
        folder.mkdir()
        monkeypatch.setenv("EMOE_DATA_ROOT", str(folder))
        write_rows(folder, "rte", [1, 0], form, monkeypatch)
        assert load_whole_part(task("rte"), "dev").labels == [1, 0]
    assert {path.suffix for path in cache.rglob("*")} == {".lock"}


def test_a_set_that_is_missing_says_where_it_belongs(root: Path) -> None:
    with pytest.raises(DataError, match=rf"could not load 'nyu-mll/glue'(.|\n)*{root / 'CoLA'}"):
        load_whole_part(task("cola"), "dev")
    spec = task("cola").spec()
    plain = {**spec, "source": {**spec["source"], "config": None}}
    with pytest.raises(DataError, match=r"could not load 'nyu-mll/glue' from the hub"):
        load_whole_part(RunTask.model_validate(plain), "dev")
    write_glue(root, "rte", raw=True)
    with pytest.raises(
        DataError,
        match=r"no file for the split 'validation'.*; `python tools/convert_glue_x\.py` converts",
    ):
        load_whole_part(task("rte"), "dev")
    write_own(root, "snli").rename(root / "snli")  # a folder of the task's name will do
    assert load_whole_part(task("snli"), "test").labels == [1, 0, 2]


@pytest.mark.parametrize(("config", "named"), [("rte", " (rte)"), (None, "")])
def test_an_error_names_the_set_of_the_hub_and_its_configuration(
    root: Path, config: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = task("rte").spec()
    source = {**spec["source"], "config": config, "revision": None}
    write_rows(root, "rte", [2], "hub", monkeypatch)
    with pytest.raises(DataError) as caught:
        load_whole_part(RunTask.model_validate({**spec, "source": source}), "dev")
    assert str(caught.value).startswith(
        f"nyu-mll/glue@newest (not pinned){named}, split validation, row 1: '2' is no label"
    )


# one csv


def test_one_csv_holds_all_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROOT", tmp_path)
    rows = [f"text {number},{number % 2}" for number in range(2000)]
    splits = {part: part for part in ("train", "dev", "test")}
    source = TextSource(csv="rows.csv").model_dump()
    read = RunTask.model_validate({**task("sst2").spec(), "source": source, "splits": splits})

    def texts(*lines: str) -> dict[str, set[tuple[str, ...]]]:
        (tmp_path / "rows.csv").write_text("\n".join(lines))
        return {part: set(load_whole_part(read, part).texts) for part in splits}

    drawn = texts("sentence,label", *rows)
    assert [len(drawn[part]) / 2000 for part in splits] == pytest.approx(
        [0.7, 0.15, 0.15], abs=0.02
    )
    other = texts(
        "label,sentence", *(",".join(row.split(",")[::-1]) for row in [*rows[1000:], "new,1"])
    )
    assert all(
        split - {("new",)} <= drawn[part] for part, split in other.items()
    )  # the text alone decides
    named = texts(
        "sentence,label,split", *(f"{row},{[*splits][i % 3]}" for i, row in enumerate(rows))
    )
    assert {len(split) for split in named.values()} == {666, 667}
    with pytest.raises(
        DataError, match=r"rows\.csv has no row of the split 'dev'; choose from train"
    ):
        texts("sentence,label,split", "a,1,train")
    with pytest.raises(
        DataError,
        match=r"rows\.csv: rows with an unknown split: 2, first 'tset'; did you mean 'test'\?$",
    ):
        texts(
            "sentence,label,split", *(f"{part} text,1,{part}" for part in splits), "a,1,tset", "b,0"
        )


def test_rows_of_a_csv_that_end_before_their_text_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROOT", tmp_path)
    complete = [f"{number % 2},text {number}" for number in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["label,text", "1", *complete]))
    # without a column `split`, the text chooses the split
    splits = Splits(train="train", dev="dev", test="test")
    read = joined_task(csv="rows.csv").model_copy(update={"splits": splits})
    parts = [load_whole_part(read, part) for part in ("train", "dev", "test")]
    assert sum(len(part) for part in parts) == 100
    assert sum(part.dropped for part in parts) == 1


def joined_task(**source: str) -> RunTask:
    """Return a task with two classes whose training split is the splits dev and test."""
    splits = {"train": "dev+test", "dev": "dev", "test": "test"}
    changes = {"source": TextSource(**source).model_dump(), "splits": splits, "fields": ["text"]}
    return RunTask.model_validate({**task("sst2").spec(), **changes})


def test_a_joined_split_of_a_csv_has_the_rows_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROOT", tmp_path)
    file = tmp_path / "rows.csv"
    file.write_text("text,label,split\na,1,test\nb,0,train\nc,0,dev\n")
    joined = load_whole_part(joined_task(csv="rows.csv"), "train")
    assert (joined.texts, joined.labels) == ([("c",), ("a",)], [0, 1])
    assert joined.source == str(file)
    file.write_text("text,label,split\na,1,test\n")
    with pytest.raises(DataError, match=r"rows\.csv has no row of the split 'dev'"):
        load_whole_part(joined_task(csv="rows.csv"), "train")


def test_a_joined_split_of_the_sentiment_set_has_the_rows_of_both(workdir: Path) -> None:
    read = joined_task(vader_sentiment="tweets")
    joined = load_whole_part(read, "train")
    dev = load_whole_part(read, "dev")
    test = load_whole_part(read, "test")
    assert joined.texts == dev.texts + test.texts
    assert joined.labels == [*dev.labels, *test.labels]
    assert joined.dropped == dev.dropped + test.dropped
    unknown = read.model_copy(update={"splits": read.splits.model_copy(update={"dev": "tests"})})
    with pytest.raises(DataError, match="no VADER split 'tests'; did you mean 'test'"):
        load_whole_part(unknown, "dev")


# splits


def test_rows_are_drawn_once_and_for_all() -> None:
    split = TextSplit([(str(i),) for i in range(100)], list(range(100)))
    assert split.sample(10, "a") == split.sample(10, "a") != split.sample(10, "b")
    assert split.sample(None, "a") is split
    assert len(split.sample(500, "a")) == 100
    train, held = split.hold_out(0.1, "cola/held out")
    assert (len(train), len(held)) == (90, 10)
    assert sorted(train.labels + held.labels) == list(range(100))
    assert (
        split.hold_out(0.1, "cola/held out") == (train, held) != split.hold_out(0.1, "rte/held out")
    )
    with pytest.raises(DataError, match="cannot be held out"):
        TextSplit([("a",)], [0], source="x").hold_out(0.1, "x")


# human ratings


@pytest.mark.parametrize(
    ("domain", "total"), [("amazon", 3708), ("movie", 10605), ("nyt", 5190), ("tweets", 4200)]
)
def test_the_real_sentiment_set(workdir: Path, domain: str, total: int) -> None:
    parts = {split: load_vader(domain, split) for split in ("train", "dev", "test")}
    sizes = {split: len(texts) for split, (texts, _, _) in parts.items()}
    assert sizes["train"] > sizes["test"] > sizes["dev"] > 400
    assert all(set(labels) == {0, 1} and all(texts) for texts, labels, _ in parts.values())
    assert sum(len(texts) + dropped for texts, _, dropped in parts.values()) == total
    # the files are UTF-8: read as Latin-1, "clichés" was "clichÃ©s" in 133 rows
    assert not any("Ã" in text for texts, _, _ in parts.values() for text in texts)


PAIRS = TextSplit(
    [("a longer first sentence", "so it is"), ("short", "too"), ("", "empty first")], [1, 0, 1]
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(model_spec("minilm"))


def test_rows_are_what_the_tokenizer_gives(here: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = TokenisedRows(PAIRS, tokenizer, 8, by_length=False)
    for row, texts, label in zip(rows, PAIRS.texts, PAIRS.labels, strict=True):
        assert row == {**tokenizer(*texts, truncation=True, max_length=8), "labels": label}
    assert max(rows.lengths) == 8


def test_sorted_rows_keep_their_labels(here: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = TokenisedRows(PAIRS, tokenizer, 32, by_length=True)
    assert rows.lengths == sorted(rows.lengths)
    plain = {
        tuple(row["input_ids"]): row["labels"]
        for row in TokenisedRows(PAIRS, tokenizer, 32, by_length=False)
    }
    assert [plain[tuple(row["input_ids"])] for row in rows] == rows.labels.tolist()
    assert "labels" not in TokenisedRows(PAIRS, tokenizer, 32, by_length=True, labelled=False)[0]
