"""Labels, texts and files in every form in which a text set can lie: what is kept, dropped and refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.harness.base.errors import DataError
from benchmarks.text.datasets import load_split
from tests.text_sets import TASKS, task, write_glue, write_rows

FORMS = ["parquet", "arrow", "jsonl", "csv", "saved", "hub"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "written", "labels"),
    [
        ("mnli", [2, -1, 0, None, 1], [2, 0, 1]),
        ("mnli", ["neutral", None, "-", "entailment", "-1", ""], [1, 0]),
        ("rte", [1.0, None, math.nan, 0.0, -1.0], [1, 0]),
        ("rte", ["1.0", "nan", "null", "0", " "], [1, 0]),
        ("stsb", [4.8, -1.0, math.nan, None, 0.0, 5.0], [4.8, 0.0, 5.0]),
        ("stsb", ["3", "-1", "", "NaN"], [3.0]),
    ],
)
def test_missing_labels_are_dropped_and_counted_and_whole_floats_are_labels(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str, written: list[object], labels: list[object]
) -> None:
    write_rows(root, name, written, form, monkeypatch)
    split = load_split(task(name), "dev")
    assert (split.labels, split.dropped) == (labels, len(written) - len(labels))
    assert [texts[0] for texts in split.texts] == [
        f"{TASKS[name]['fields'][0]} {i}" for i, value in enumerate(written) if _is_label(value)
    ]


def _is_label(value: object) -> bool:
    return str(value).strip() not in ("None", "nan", "NaN", "null", "", "-", "-1", "-1.0")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "wrong"), [("stsb", 7.3), ("stsb", -0.5), ("rte", 2), ("rte", 0.5)])
def test_labels_out_of_range_are_refused_in_every_form(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str, wrong: float
) -> None:
    write_rows(root, name, [1, 0, wrong], form, monkeypatch)
    number = f"line 4, row 3: '{wrong}'" if form == "csv" else rf"row 3: '{wrong}(\.0)?'"
    with pytest.raises(DataError, match=f"{number} is no label of task '{name}'"):
        load_split(task(name), "dev")


@pytest.mark.parametrize("form", ["parquet", "arrow", "saved", "hub"])
@pytest.mark.parametrize(
    ("name", "names", "written", "labels"),
    [
        ("mnli", ["contradiction", "entailment", "neutral"], [0, 1, 2, -1], [2, 0, 1]),
        ("rte", ["not_entailment", "entailment"], [0, 1], [1, 0]),
        ("sst2", ["positive", "negative"], [0, 1], [1, 0]),
        ("rte", ["0", "1"], [0, 1], [0, 1]),  # such names say no more than the numbers
        ("rte", ["1", "0"], [0, 1], [1, 0]),
    ],
)
def test_numbers_are_read_by_the_class_names_that_are_stored_beside_them(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    name: str,
    names: list[str],
    written: list[int],
    labels: list[int],
) -> None:
    write_rows(root, name, list(written), form, monkeypatch, names)
    split = load_split(task(name), "dev")
    assert (split.labels, split.dropped) == (labels, written.count(-1))


@pytest.mark.parametrize("form", ["parquet", "arrow", "saved", "hub"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["yes", "no"], "row 1: 'yes' is no label of task 'rte'; choose from entailment, not_entailment"),
        (["entailment", "neutral"], "row 2: 'neutral' is no label of task 'rte'"),
        (["1", "2"], "row 1: '1' is no label of task 'rte'"),  # not the number 1
        (["0", "1", "2"], "row 3: '2' is no label of task 'rte'"),
    ],
)
def test_stored_class_names_that_do_not_fit_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str, names: list[str], message: str
) -> None:
    write_rows(root, "rte", list(range(len(names))), form, monkeypatch, names)
    with pytest.raises(DataError, match=message):
        load_split(task("rte"), "dev")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "rte",
            "not_entailment",
            "not_entailmnt",
            r"dev\.tsv, line 3, row 2: 'not_entailmnt' is no label of task 'rte'; did you mean 'not_entailment'",
        ),
        ("sst2", "\t0", "\t2", "row 2: '2' is no label"),
        ("stsb", "0.000", "n/a", "row 2: 'n/a' is no label of task 'stsb'; it must be a number from 0 to 5$"),
        ("stsb", "0.000", "7.3", "row 2: '7.3' is no label of task 'stsb'; it must be a number from 0 to 5$"),
        ("stsb", "0.000", "inf", "row 2: 'inf' is no label"),
        ("stsb", "0.000", "0_5", "row 2: '0_5' is no label"),  # a number in Python alone
        ("rte", "sentence2", "sentense2", "has no column 'sentence2'; did you mean 'sentense2'"),
    ],
)
def test_wrong_labels_and_columns_name_file_row_and_nearest(root: Path, name, old, new, message) -> None:
    path = write_glue(root, name)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        load_split(task(name), "dev")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", ["csv", "jsonl", "own"])
def test_text_that_looks_like_a_number_stays_text(root: Path, form: str) -> None:
    folder, rows = root / "CoLA", [("007", "1"), ("1e5", "0"), ("True", "1"), ("2020-01-01", "1"), ("NA", "0")]
    folder.mkdir()
    text = {
        "csv": "sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows),
        "jsonl": "".join(json.dumps({"sentence": text, "label": int(label)}) + "\n" for text, label in rows),
        "own": "".join(f"gj04\t{label}\t\t{text}\n" for text, label in rows),
    }[form]
    (folder / ("dev.tsv" if form == "own" else f"validation.{form}")).write_text(text)
    split = load_split(task("cola"), "dev")
    assert split.texts == [(text,) for text, _ in rows]
    assert split.labels == [int(label) for _, label in rows]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "sst2",
            "validation.csv",
            b"sentence;label\nfine, really;1\n",
            r"line 1: its cells are separated by ';'; .* by ','$",
        ),
        ("sst2", "dev.tsv", b"sentence,label\nfine,1\n", r"line 1: its cells are separated by ','; .* by '\\t'$"),
        (
            "sst2",
            "validation.csv",
            b"sentence;label, gold\nfine;1\n",
            "has no column 'sentence'; did you mean 'sentence;label'",
        ),
        ("sst2", "validation.csv", b"Sentence,Label\nfine,1\n", "has no column 'sentence'; did you mean 'Sentence'"),
        ("sst2", "validation.csv", "sentence,label\nfine,1\n".encode("utf-16"), "line 1 is not UTF-8$"),
        ("yelp_polarity", "test.csv", b'"1";"Dull, really."\n', "line 1: ',' expected after"),
        ("yelp_polarity", "test.csv", b'"1";"Dull, really."\n', "separated by ';'; they must be separated by ','$"),
        ("sst2", "validation.csv", b'"sentence"\t"label"\n"fine, really"\t1\n', r"line 1: .* separated by '\\t'; they"),
        (
            "sst2",
            "validation.csv",
            b"sentence,label\nhel\rlo,1\nok,0\n",
            "line 2: a carriage return in a cell must stand",
        ),
        ("yelp_polarity", "test.csv", b"1;Dull.\n", "line 1: its cells are separated by ';'"),
        ("sst2", "validation.csv", b"", "is empty$"),
        ("sst2", "dev.tsv", b"\n\n", "is empty$"),
        ("sst2", "validation.csv", b"sentence,label\nfine, really,1\n", "line 2 has 3 cells, and the first line 2$"),
        ("sst2", "validation.csv", b'sentence,label\n"fine" film,1\n', "line 2: "),
        ("sst2", "validation.csv", b'sentence,label\nfine,1\n"dull,0\n', "line 3: unexpected end of data$"),
        ("sst2", "validation.csv", b"sentence,label\nfine,1\ncaf\xe9,0\n", "line 3 is not UTF-8$"),
        ("sst2", "dev.tsv", b"sentence\tlabel\nfine\t1\ncaf\xe9\t0\n", "line 3 is not UTF-8$"),
        ("sst2", "dev.tsv", "sentence\tlabel\nfine\t1\n".encode("utf-16"), "line 1 is not UTF-8$"),
        ("sst2", "validation.csv", b"sentence,label,label\nfine,1,0\n", "has two columns for 'label'"),
        (
            "sst2",
            "validation.jsonl",
            b'{"sentence": "a", "label": 1}\n{"sentence": \n',
            r"line 2 is not JSON \(Expecting value\)$",
        ),
        ("sst2", "validation.jsonl", b'{"sentence": "caf\xe9", "label": 1}\n', "line 1 is not UTF-8$"),
        (
            "sst2",
            "validation.jsonl",
            b'{"label": 1, "sentence": "a", "label": 0}\n',
            r"line 1 is not JSON \('label' stands twice",
        ),
        ("sst2", "validation.jsonl", b'\n["a", 1]\n', "line 2 is list, not an object$"),
        ("sst2", "validation.jsonl", b"[" * 100_000 + b"]" * 100_000, "line 1 is nested too deeply$"),
        ("sst2", "validation.jsonl", b'{"sentence": ["a"], "label": 1}\n', "row 1: a cell is list, not text$"),
        ("sst2", "validation.jsonl", b'{"sentence": "\\ud800", "label": 1}\n', "row 1: '.*' is no letter$"),
        ("sst2", "validation.jsonl", b'{"sentence": "a", "label": [1]}\n', r"row 1: '\[1\]' is no label"),
        ("sst2", "validation.jsonl", b'{"sentence": "a"}\n', "has no column 'label'; choose from sentence$"),
        ("sst2", "validation.jsonl", b"{}\n", "has no column 'sentence'$"),
        ("snli", "snli_1.0_test.jsonl", b'{"gold_label": "neutral"', "line 1 is not JSON"),
        (
            "sick_relatedness",
            "SICK.txt",
            b"pair_ID\tsentence_A\n1\ta\n",
            "has no column 'SemEval_set'; choose from pair_ID",
        ),
        (
            "flipkart",
            "test.csv",
            b"Summary,sentence,label\na,b,positive\n",
            "two columns for 'sentence': 'Summary' and 'sentence'",
        ),
        (
            "flipkart",
            "Dataset-SA.csv",
            b"Summary,Sentiment,label\na,negative,1\n",
            "two columns for 'label': 'Sentiment' and 'label'",
        ),
    ],
)
def test_a_file_that_cannot_be_read_as_it_is_meant_is_refused(root: Path, name, file, content, message) -> None:
    path = root / TASKS[name]["source"]["folder"] / file
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_split(task(name), "dev" if TASKS[name]["splits"].get("dev") else "test")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_names_of_classes_are_no_numbers_of_classes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stars from 1 to 3 are not numbered from 0: 1 is then the first class, and 0 none."""
    stars = task("sst2").model_copy(update={"labels": ["1.0", "2", "3"]})
    write_rows(root, "sst2", [3, 1.0, 2, -1], "csv", monkeypatch)
    split = load_split(stars, "dev")
    assert (split.labels, split.dropped) == ([2, 0, 1], 1)
    shutil.rmtree(root / "SST-2")
    write_rows(root, "sst2", [0, 1, 2], "csv", monkeypatch)
    with pytest.raises(DataError, match=r"row 1: '0' is no label of task 'sst2'; choose from 1, 2, 3$"):
        load_split(stars, "dev")
    shutil.rmtree(root / "SST-2")
    write_rows(root, "sst2", [0, 1, 2], "parquet", monkeypatch, ["3", "1", "2"])
    assert load_split(stars, "dev").labels == [2, 0, 1]
    shutil.rmtree(root / "SST-2")
    write_rows(root, "sst2", [0, 1, 2], "parquet", monkeypatch, ["0", "1", "2"])
    with pytest.raises(DataError, match="row 1: '0' is no label of task 'sst2'"):
        load_split(stars, "dev")


@pytest.mark.parametrize(
    ("name", "file", "content", "texts"),
    [
        ("sst2", "dev.tsv", "sentence\tlabel\nhel\rlo\t1\nok\t0\n", [("hel\rlo",), ("ok",)]),
        ("sst2", "dev.tsv", "sentence\tlabel\r\nhel\rlo\t1\r\n\r\nok\t0\r\n", [("hel\rlo",), ("ok",)]),
        ("cola", "dev.tsv", "gj04\t1\t\thel\rlo world\ngj04\t0\t*\tok\n", [("hel\rlo world",), ("ok",)]),
        ("sst2", "validation.csv", 'sentence,label\r\n"hel\rlo",1\r\nok,0\r\n', [("hel\rlo",), ("ok",)]),
    ],
)
def test_a_lone_carriage_return_is_a_sign_of_the_text(root: Path, name: str, file: str, content: str, texts) -> None:
    path = root / TASKS[name]["source"]["folder"] / file
    path.parent.mkdir()
    path.write_bytes(content.encode())
    split = load_split(task(name), "dev")
    assert (split.texts, split.labels, split.dropped) == (texts, [1, 0], 0)


@pytest.mark.parametrize("file", ["dev.tsv", "validation.csv"])
def test_lines_that_end_in_carriage_returns_alone_are_named(root: Path, file: str) -> None:
    between = "\t" if file == "dev.tsv" else ","
    (root / "SST-2").mkdir()
    (root / "SST-2" / file).write_bytes(f"sentence{between}label\rfine{between}1\r".encode())
    with pytest.raises(DataError, match=f"{file} ends its lines with carriage returns alone"):
        load_split(task("sst2"), "dev")


def test_texts_of_blanks_alone_are_dropped_and_counted(root: Path) -> None:
    (root / "SST-2").mkdir()
    (root / "SST-2/validation.csv").write_text('sentence,label\n"  ",1\n,0\n"\n",1\nfine,1\n')
    split = load_split(task("sst2"), "dev")
    assert (split.texts, split.dropped) == ([("fine",)], 3)
    (root / "MRPC").mkdir()
    (root / "MRPC/validation.csv").write_text('sentence1,sentence2,label\n" ",,1\n" ",half,1\n')
    split = load_split(task("mrpc"), "dev")
    assert (split.texts, split.dropped) == ([(" ", "half")], 1)
