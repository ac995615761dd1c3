"""Every GLUE task in its real on-disk formats (made-up sentences), and the sentiment set itself."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT
from benchmarks.harness.planning.definition import load_benchmark
from benchmarks.harness.sources.vader import load_vader
from benchmarks.text.datasets import TextSplit, load_part, load_split
from benchmarks.text.definition import RunTask, TaskEntry
from tests.text_sets import GLUE, LABELS, MEANING, OWN_FILES, TASKS, write_glue, write_own, write_saved

BENCHMARK = load_benchmark("glue")


def task(name: str) -> RunTask:
    return BENCHMARK.tasks[name].as_run(name)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    return tmp_path


def hub_frame(name: str) -> pd.DataFrame:
    """The same rows under the hub's column names, labels as the hub's numbers."""
    definition = TASKS[name]
    rows = {field: [f"{field} {i}" for i in range(len(LABELS[name]))] for field in definition["fields"]}
    return pd.DataFrame({**rows, "label": LABELS[name], "idx": range(len(LABELS[name]))})


def test_all_eight_tasks_are_covered() -> None:
    trained = [
        name
        for name, definition in TASKS.items()
        if definition["splits"]["train"] and "vader_sentiment" not in definition["source"]
    ]
    assert sorted(GLUE) == sorted(trained)


@pytest.mark.parametrize("name", GLUE)
def test_own_tsv(root: Path, name: str) -> None:
    write_glue(root, name)
    split = load_split(task(name), "dev")
    assert split.labels == LABELS[name]
    assert {len(texts) for texts in split.texts} == {len(TASKS[name]["fields"])}
    assert split.dropped == (1 if name in ("mnli", "qqp") else 0)


def test_quotes_are_text(root: Path) -> None:
    write_glue(root, "cola")
    assert load_split(task("cola"), "dev").texts[0] == ('The dog "barked.',)


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("form", ["parquet snapshot", "parquet", "jsonl", "csv", "save_to_disk"])
def test_hub_formats(root: Path, name: str, form: str) -> None:
    source, frame = TASKS[name]["source"], hub_frame(name)
    folder, split = root / source["folder"], TASKS[name]["splits"]["dev"]
    folder.mkdir()
    if form == "parquet snapshot":
        (folder / source["config"]).mkdir()
        frame.to_parquet(folder / source["config"] / f"{split}-00000-of-00001.parquet")
    elif form == "parquet":
        frame.to_parquet(folder / f"{split}.parquet")
    elif form == "jsonl":
        frame.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
    elif form == "csv":
        frame.to_csv(folder / f"{split}.csv", index=False)
    else:
        datasets.DatasetDict({split: datasets.Dataset.from_pandas(frame)}).save_to_disk(str(folder))
    loaded = load_split(task(name), "dev")
    assert loaded.labels == LABELS[name]
    assert loaded.texts[0] == tuple(f"{field} 0" for field in TASKS[name]["fields"])


FORMS = ["parquet", "arrow", "jsonl", "csv", "saved", "hub"]


def write_rows(
    root: Path,
    name: str,
    labels: list[object],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str] | None = None,
) -> None:
    """The dev split of a task in a form that the hub's column names have, names of classes stored beside numbers where given."""
    folder, split = root / TASKS[name]["source"]["folder"], TASKS[name]["splits"]["dev"]
    columns = {field: [f"{field} {i}" for i in range(len(labels))] for field in TASKS[name]["fields"]}
    columns |= {TASKS[name]["label"]: labels}
    if form == "csv":  # as text, so that every row is written as it is given
        lines = [
            ",".join("" if cell is None else str(cell) for cell in row) for row in zip(*columns.values(), strict=True)
        ]
        folder.mkdir()
        (folder / f"{split}.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
        return
    if form == "jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        folder.mkdir()
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    loaded = datasets.Dataset.from_dict(columns)
    if names:
        loaded = loaded.cast_column(TASKS[name]["label"], datasets.ClassLabel(names=names))
    if form == "saved":
        datasets.DatasetDict({split: loaded}).save_to_disk(str(folder))
    elif form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: loaded)
    else:
        folder.mkdir()
        table = loaded.with_format("arrow")[:]
        if form == "parquet":
            pq.write_table(table, folder / f"{split}.parquet")
        else:
            with (
                pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)


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


def test_a_split_is_read_once_and_as_a_whole(root: Path) -> None:
    (root / "RTE").mkdir()
    piece = "validation-0000{}-of-00003.parquet"
    for number in (2, 0, 1):
        hub_frame("rte").to_parquet(root / "RTE" / piece.format(number))
    assert load_split(task("rte"), "dev").labels == LABELS["rte"] * 3
    (root / "RTE" / piece.format(1)).unlink()
    kept = ", ".join(piece.format(number) for number in (0, 2))
    with pytest.raises(DataError, match=f"RTE: the split 'validation' must be 3 files, and is {kept}$"):
        load_split(task("rte"), "dev")
    hub_frame("rte").to_parquet(root / "RTE/validation.parquet")
    with pytest.raises(DataError, match=f"the split 'validation' twice: validation.parquet and {piece.format(0)}; lea"):
        load_split(task("rte"), "dev")


def test_hidden_files_are_no_rows(root: Path) -> None:
    """As file managers leave them beside others (``._name``)."""
    folder = write_own(root, "imdb")
    (folder / "test/pos/._0_9.txt").write_text("Mac OS X")
    assert load_split(task("imdb"), "test").labels == MEANING["imdb"][0]
    (root / "RTE/validation").mkdir(parents=True)
    hub_frame("rte").to_parquet(root / "RTE/validation/0.parquet")
    (root / "RTE/validation/._0.parquet").write_text("Mac OS X")
    assert load_split(task("rte"), "dev").labels == LABELS["rte"]


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


@pytest.mark.parametrize("form", ["own", "jsonl"])
def test_rows_without_one_of_two_texts_are_dropped_and_counted(root: Path, form: str) -> None:
    """As in the hub's script of GLUE; a cell that is there and empty is a text."""
    if form == "own":
        path = write_glue(root, "mrpc")
        path.write_text(path.read_text() + "1\t14\t15\tThis row ends early\n1\t16\t17\tEmpty.\t\n")
    else:
        (root / "MRPC").mkdir()
        rows = [("a", "b", 1), ("c", "d", 0), ("e", None, 1), ("f", "", 1)]
        lines = (json.dumps({"sentence1": one, "sentence2": other, "label": label}) for one, other, label in rows)
        (root / "MRPC/validation.jsonl").write_text("\n".join(lines))
    split = load_split(task("mrpc"), "dev")
    assert (split.labels, split.dropped) == ([1, 0, 1], 1)
    assert split.texts[-1][1] == ""


def test_a_text_in_another_encoding_is_named(root: Path) -> None:
    file = write_own(root, "imdb") / "test/pos/0_9.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=rf"^{file} cannot be read: 'utf-8' codec"):
        load_split(task("imdb"), "test")


def test_damaged_and_missing_files_are_named(root: Path) -> None:
    (root / "RTE").mkdir()
    (root / "RTE" / "test.tsv").write_text("")
    with pytest.raises(DataError, match=r"RTE has no file for the split 'validation'.*dev\.tsv; it holds test\.tsv"):
        load_split(task("rte"), "dev")
    (root / "RTE" / "validation.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read"):
        load_split(task("rte"), "dev")


@pytest.mark.parametrize(
    "notes", ["{", "[]", '{"info": 1}', '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}']
)
def test_damaged_notes_of_classes_are_named(root: Path, notes: str) -> None:
    (root / "SST-2").mkdir()
    table = pa.table({"sentence": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": notes})
    pq.write_table(table, root / "SST-2/validation.parquet")
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read: "):
        load_split(task("sst2"), "dev")


def test_without_hub_or_folder_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="could not load 'nyu-mll/glue'") as caught:
        load_split(task("cola"), "dev")
    assert str(root / "CoLA") in str(caught.value)


def test_head_draws_rows_once_and_for_all() -> None:
    split = TextSplit([(str(i),) for i in range(100)], list(range(100)))
    assert split.head(10, "a") == split.head(10, "a") != split.head(10, "b")
    assert split.head(None, "a") is split
    assert len(split.head(500, "a")) == 100


# GLUE-X


def test_fifteen_pairs_over_thirteen_sets() -> None:
    pairs = [(name, other) for name in GLUE for other in TASKS[name]["ood"]]
    assert len(pairs) == 15
    assert len({TASKS[other]["source"]["folder"] for _, other in pairs}) == 13


@pytest.mark.parametrize("name", sorted(OWN_FILES))
def test_own_files_of_glue_x(root: Path, name: str) -> None:
    write_own(root, name)
    split = load_split(task(name), "test")
    labels, dropped = MEANING[name]
    assert split.labels == labels
    assert split.dropped == dropped
    assert {len(texts) for texts in split.texts} == {len(TASKS[name]["fields"])}
    assert all(any(texts) for texts in split.texts)


def test_texts_are_read_as_they_stand(root: Path) -> None:
    for name in (
        "imdb",
        "yelp_polarity",
        "amazon_polarity",
        "flipkart",
        "snli",
        "scitail",
        "hans",
        "sick_entailment",
        "twitter_pit",
    ):
        write_own(root, name)
    first = {name: load_split(task(name), "test").texts[0] for name in sorted(OWN_FILES) if name != "sick_relatedness"}
    assert first["imdb"] == ("Dull\n film.",)
    assert first["yelp_polarity"] == ('Dull food, "cold".\\nNever again.',)
    assert first["amazon_polarity"] == ("Fine, really.",)  # without the title
    assert first["flipkart"] == ("great cooler",)
    assert first["snli"] == ('He "ran".', "He won.")
    assert first["scitail"] == ('Rain "fell.', "It rained.")
    assert first["hans"] == ("The man saw the dog .", "The dog saw the man .")
    assert first["sick_entailment"] == ("A dog ran.", "A dog moved.")
    assert first["twitter_pit"] == ("It rains", "Rain")


def test_semevals_own_file_of_sick_has_its_columns_the_other_way_round(root: Path) -> None:
    (root / "SICK").mkdir()
    (root / "SICK" / "SICK_test_annotated.txt").write_text(
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n6\tA dog.\tA cat.\t3.3\tNEUTRAL\n"
    )
    assert load_split(task("sick_relatedness"), "test").labels == [3.3]
    assert load_split(task("sick_entailment"), "test").labels == [1]


def test_snlis_text_file_says_the_same_as_its_json(root: Path) -> None:
    folder = root / "snli_1.0"
    folder.mkdir()
    header = "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1"
    rows = ['neutral\tx\ty\tx\ty\tHe "ran".\tHe won.\t1\t1n\tneutral', "-\tx\ty\tx\ty\tHe ran.\tHe swam.\t1\t1n\t"]
    (folder / "snli_1.0_test.txt").write_text("\n".join([header, *rows]) + "\n")
    split = load_split(task("snli"), "test")
    assert (split.texts, split.labels, split.dropped) == ([('He "ran".', "He won.")], [1], 1)


# the hub's numbers: what its cards say
HUB_LABELS = {
    "imdb": ([0, 1], [0, 1]),
    "yelp_polarity": ([0, 1], [0, 1]),  # named "1" and "2" there, negative and positive
    "amazon_polarity": ([0, 1], [0, 1]),
    "sick_relatedness": ([1.5, 5.0], [1.5, 5.0]),
    "sick_entailment": ([0, 1, 2], [0, 1, 2]),
    "snli": ([2, -1, 0], [2, 0]),
    "scitail": (["entailment", "neutral"], [0, 1]),
    "hans": ([0, 1], [0, 1]),
    "grammar_test": ([1, 0], [1, 0]),
    "flipkart": ([1, 0], [1, 0]),
    "twitter_pit": ([1, 0], [1, 0]),
    "newsqa_qnli": (["not_entailment", "entailment"], [1, 0]),
}


@pytest.mark.parametrize("name", sorted(HUB_LABELS))
def test_saved_sets_of_glue_x_are_read_whole(root: Path, name: str) -> None:
    written, labels = HUB_LABELS[name]
    write_saved(root, name, list(written))
    split = load_split(task(name), "test")
    assert split.labels == labels
    assert split.texts[0] == tuple(f"{field} 0" for field in TASKS[name]["fields"])


@pytest.mark.parametrize(
    ("name", "names", "labels"),
    [
        ("imdb", ["neg", "pos"], [0, 1]),
        ("imdb", ["pos", "neg"], [1, 0]),
        ("yelp_polarity", ["1", "2"], [0, 1]),  # so named on the hub
        ("hans", ["not_entailment", "entailment"], [1, 0]),
        ("scitail", ["neutral", "entailment"], [1, 0]),
        ("flipkart", ["positive", "neutral", "negative"], [1, 0, 0]),
        ("sick_entailment", ["NEUTRAL", "CONTRADICTION", "ENTAILMENT"], [1, 2, 0]),
        ("twitter_pit", ["0", "1"], [0, 1]),
    ],
)
def test_class_names_stored_in_sets_of_glue_x(root: Path, name: str, names: list[str], labels: list[int]) -> None:
    write_saved(root, name, list(range(len(names))), names=names)
    assert load_split(task(name), "test").labels == labels


@pytest.mark.parametrize("name", ["hans", "imdb", "snli"])
def test_the_split_that_the_paper_tests_on_is_read(root: Path, name: str) -> None:
    split = {"hans": "validation"}.get(name, "test")
    write_saved(root, name, [0, 1], split=split)
    assert load_split(task(name), "test").labels == [0, 1]


def test_parquet_of_the_hub_with_other_names(root: Path) -> None:
    folder = root / "SciTailV1.1" / "snli_format"
    folder.mkdir(parents=True)
    for split, label in (("train", "entailment"), ("validation", "neutral"), ("test", "entailment")):
        frame = pd.DataFrame(
            {"sentence1_parse": ["x"], "sentence1": [split], "sentence2": ["b"], "gold_label": [label]}
        )
        frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    split = load_split(task("scitail"), "test")
    assert [texts[0] for texts in split.texts] == ["train", "validation", "test"]
    assert split.labels == [0, 1, 0]


def test_a_csv_with_the_hubs_header_is_not_taken_for_the_sets_own(root: Path) -> None:
    folder = root / "yelp_review_polarity_csv"
    folder.mkdir()
    (folder / "test.csv").write_text("label,text\n1,Fine food.\n0,Dull food.\n")
    assert load_split(task("yelp_polarity"), "test").labels == [1, 0]


def test_one_saved_set_cannot_be_both_training_and_dev_split(root: Path) -> None:
    write_saved(root, "rte", [0, 1])
    with pytest.raises(DataError, match="is one saved set without splits, but 'rte' is trained on one split"):
        load_split(task("rte"), "train")


def test_a_conversion_on_the_hub_is_loaded_by_the_configuration_that_it_has(tmp_path: Path) -> None:
    """Such a branch has folders by configuration and split, and no card: `datasets` knows one configuration, the default."""
    folder = tmp_path / "conversion" / "plain_text" / "validation"
    folder.mkdir(parents=True)
    frame = pd.DataFrame({"premise": ["a"], "hypothesis": ["b"], "label": [1]})
    frame.to_parquet(folder / "0000.parquet")
    config = task("hans").source.config
    found = datasets.load_dataset(
        str(tmp_path / "conversion"), config, split="validation", cache_dir=str(tmp_path / "cache")
    )
    assert found.to_pandas()["label"].tolist() == [1]


def test_folders_of_parquet_by_split(root: Path) -> None:
    folder = root / "hans" / "validation"
    folder.mkdir(parents=True)
    pd.DataFrame({"premise": ["a"], "hypothesis": ["b"], "label": [1]}).to_parquet(folder / "0000.parquet")
    assert load_split(task("hans"), "test").labels == [1]


def test_a_folder_of_the_tasks_name_will_do(root: Path) -> None:
    write_own(root, "snli").rename(root / "snli")
    assert load_split(task("snli"), "test").labels == MEANING["snli"][0]


def test_json_forms_of_the_makers(root: Path) -> None:
    rows = [("entailment", "a"), ("neutral", "b")]
    for split in ("train", "dev", "test"):
        path = root / "SciTailV1.1" / "snli_format" / f"scitail_1.0_{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"gold_label": g, "sentence1": t, "sentence2": split}) + "\n" for g, t in rows)
        )
    assert load_split(task("scitail"), "test").labels == [0, 1] * 3
    (root / "hans").mkdir()
    line = json.dumps({"gold_label": "non-entailment", "sentence1": "a", "sentence2": "b", "heuristic": "constituent"})
    (root / "hans" / "heuristics_evaluation_set.jsonl").write_text(line + "\n")
    assert load_split(task("hans"), "test").labels == [1]


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("yelp_polarity", "test.csv", '"2"', '"3"', "'3' is no label of task 'yelp_polarity'"),
        ("yelp_polarity", "test.csv", '"2"', '"0"', "'0' is no label"),  # 0 is the hub's negative, not this file's
        ("twitter_pit", "dev.data", "(1, 4)", "(1, 5)", r"dev\.data, row 2: '\(1, 5\)' is no label"),
        ("hans", "heuristics_evaluation_set.txt", "non-entailment", "non-entailmnt", "did you mean 'non-entailment'"),
        ("sick_entailment", "SICK.txt", "entailment_label", "entailment_labl", "did you mean 'entailment_labl'"),
        ("scitail", "tsv_format/scitail_1.0_dev.tsv", "neutral", "neutrl", "did you mean 'neutral'"),
        # the third row of the file, though the first of its split
        ("sick_relatedness", "SICK.txt", "\t2.1\t", "\t0.5\t", r"SICK\.txt, line 4, row 3: '0\.5' is .* from 1 to 5$"),
        # rows of several lines, and blank lines
        ("flipkart", "Dataset-SA.csv", "it is okay,neutral", '"o\nk",nutral', r"line 3, row 2: 'nutral' is no label"),
        (
            "flipkart",
            "Dataset-SA.csv",
            "broke,negative",
            '"o\n\nk",x\n\n1,1,1,1,a,y',
            r"line 4, row 3: 'x' is no label",
        ),
        ("snli", "snli_1.0_test.jsonl", '"contradiction"', '"contradicton"', "row 4: 'contradicton' is no label"),
    ],
)
def test_wrong_labels_of_glue_x_are_named(root: Path, name, file, old, new, message) -> None:
    path = write_own(root, name) / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_split(task(name), "test")


def test_sets_that_only_exist_by_hand_say_so(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"'flipkart' is not on the hub and not in .*flipkart; `python -m benchmarks data --check`"
    ):
        load_split(task("flipkart"), "test")


def test_a_folder_without_one_of_its_labels_is_refused(root: Path) -> None:
    folder = write_own(root, "imdb")
    (folder / "test/neg/0_2.txt").unlink()
    with pytest.raises(DataError, match=r"test/neg holds no \.txt file"):
        load_split(task("imdb"), "test")


# parts of a split


def test_a_held_out_share_is_the_same_for_everyone_and_never_trained_on() -> None:
    split = TextSplit([(str(i),) for i in range(100)], list(range(100)))
    train, held = split.divided(0.1, "cola/held out")
    assert (len(train), len(held)) == (90, 10)
    assert sorted(train.labels + held.labels) == list(range(100))
    assert split.divided(0.1, "cola/held out") == (train, held) != split.divided(0.1, "rte/held out")
    with pytest.raises(DataError, match="cannot be held out"):
        TextSplit([("a",)], [0], source="x").divided(0.1, "x")


@pytest.mark.parametrize(
    ("name", "written", "rows", "published", "note"),
    [
        ("imdb", [0, 1], 2, None, None),
        ("imdb", [0, 1], 3, None, "imdb (test): 2 rows, its makers count 3: another version, or not all of it"),
        (
            "snli",
            [0, 1, -1],
            3,
            3,
            "snli (test): 2 rows are scored, not 3 as by the authors' script: it keeps the rows without",
        ),
        ("snli", [0, 1, -1], 4, 3, "snli (test): 3 rows, its makers count 4"),
        (
            "scitail",
            ["entails"] * 3,
            3,
            2,
            "scitail (test): 3 rows are scored, not 2 as by GLUE-X's result files: their reader",
        ),
        ("scitail", ["entails"] * 2, 3, 2, None),  # GLUE-X's own copy
        ("flipkart", ["positive", "", "negative"], 2, None, None),  # counted without those that nobody can score
    ],
)
def test_other_numbers_of_rows_than_known_are_told(
    root: Path, name: str, written: list[object], rows: int, published: int | None, note: str | None
) -> None:
    write_saved(root, name, written)
    known = {**TASKS[name], "rows": {"test": rows}}
    if published:
        known["published_rows"] = {**TASKS[name]["published_rows"], "rows": published}
    said: list[str] = []
    load_part(task(name), "test", 1, {name: TaskEntry.model_validate(known)}, said.append)
    assert [line[: len(f"warning: {note}")] for line in said] == ([f"warning: {note}"] if note else [])


def test_numbers_of_rows_are_those_of_the_sources() -> None:
    of = {name: TASKS[name]["rows"].get("test") for name in OWN_FILES} | {
        "newsqa": TASKS["newsqa_qnli"]["rows"]["test"]
    }
    assert of == {
        "imdb": 25_000,
        "yelp_polarity": 38_000,
        "amazon_polarity": 400_000,
        "flipkart": 205_041,
        "twitter_pit": 18_762,
        "sick_relatedness": 4_906,
        "sick_entailment": 4_906,
        "snli": 10_000,
        "scitail": 27_026,
        "hans": 30_000,
        "newsqa": 119_525,
    }
    published = {name: known["published_rows"]["rows"] for name, known in TASKS.items() if "published_rows" in known}
    assert published == {"twitter_pit": 16_777, "snli": 10_000, "scitail": 26_527}
    assert all("published_rows" not in task(name).model_dump() for name in published)  # no part of a run


def test_without_a_test_split_the_dev_split_is_reported(root: Path) -> None:
    write_glue(root, "rte")
    assert load_part(task("rte"), "test", None) == load_part(task("rte"), "dev", None)


@pytest.mark.parametrize("domain", ["amazon", "movie", "nyt", "tweets"])
def test_the_real_sentiment_set(archive: Path, domain: str) -> None:
    parts = {split: load_vader(domain, split, archive) for split in ("train", "dev", "test")}
    sizes = {split: len(texts) for split, (texts, _, _) in parts.items()}
    assert sizes["train"] > sizes["test"] > sizes["dev"] > 400
    for texts, labels, _ in parts.values():
        assert set(labels) == {0, 1}
        assert all(texts)
    total = {"amazon": 3708, "movie": 10605, "nyt": 5190, "tweets": 4200}[domain]
    assert sum(len(texts) + dropped for texts, _, dropped in parts.values()) == total
    assert load_vader(domain, "train", archive) == parts["train"]


def test_sentiment_errors(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'tweets'"):
        load_vader("tweet", "train", archive)
    with pytest.raises(DataError, match="python -m benchmarks fetch"):
        load_vader("tweets", "train", tmp_path / "none.tar.gz")
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged or another version: sha256"):
        load_vader("tweets", "train", damaged)
