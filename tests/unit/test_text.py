"""Every GLUE task in its real on-disk formats (made-up sentences), and the sentiment set itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.sources.vader import load_vader
from benchmarks.text.datasets import TextSplit, load_part, load_split
from benchmarks.text.definition import TaskEntry
from tests.text_sets import GLUE, LABELS, MEANING, OWN_FILES, TASKS, task, write_glue, write_own, write_saved


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
    "notes",
    [
        "{",
        "[]",
        "null",
        '{"info": 1}',
        '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_damaged_notes_of_classes_are_named(root: Path, notes: str) -> None:
    (root / "SST-2").mkdir()
    table = pa.table({"sentence": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": notes})
    pq.write_table(table, root / "SST-2/validation.parquet")
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read: "):
        load_split(task("sst2"), "dev")


@pytest.mark.parametrize(("name", "file"), [("sst2", "dataset_dict.json"), ("snli", "state.json")])
def test_notes_of_a_saved_set_that_are_nested_too_deeply_are_named(root: Path, name: str, file: str) -> None:
    folder = root / TASKS[name]["source"]["folder"]
    folder.mkdir()
    for written in (file, "dataset_info.json"):
        (folder / written).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match=f"^{folder} cannot be read: its notes are nested too deeply$"):
        load_split(task(name), "dev" if name == "sst2" else "test")


@pytest.mark.parametrize(
    ("link", "target", "why"),
    [
        ("neg", "pos", "which belongs to the set and would be there twice"),
        ("neg", "../../elsewhere", "which is no folder of the set"),
        ("neg", "../../nowhere", "which is not there"),
        ("pos/b.txt", "0_9.txt", "which belongs to the set and would be there twice"),
        ("pos/b.txt", "../../../elsewhere/a.txt", "as .*/pos/a.txt is, and would be there twice"),
    ],
)
def test_links_in_a_folder_of_texts_are_refused_as_in_image_sets(root: Path, link: str, target: str, why: str) -> None:
    folder = write_own(root, "imdb") / "test"
    (root / "elsewhere").mkdir()
    (root / "elsewhere/a.txt").write_text("Fine.")
    (folder / "pos/a.txt").symlink_to("../../../elsewhere/a.txt")
    assert "Fine." in {text for (text,) in load_split(task("imdb"), "test").texts}
    if link == "neg":
        shutil.rmtree(folder / link)
    (folder / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"{folder / link} is a link to /.*, {why}; remove it, or put a copy in its"):
        load_split(task("imdb"), "test")


def test_a_byte_order_mark_is_no_text(root: Path) -> None:
    file = write_own(root, "imdb") / "test/pos/0_9.txt"
    before = load_split(task("imdb"), "test").texts
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_split(task("imdb"), "test").texts == before


def test_without_hub_or_folder_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="could not load 'nyu-mll/glue'") as caught:
        load_split(task("cola"), "dev")
    assert str(root / "CoLA") in str(caught.value)


def test_head_draws_rows_once_and_for_all() -> None:
    split = TextSplit([(str(i),) for i in range(100)], list(range(100)))
    assert split.head(10, "a") == split.head(10, "a") != split.head(10, "b")
    assert split.head(None, "a") is split
    assert len(split.head(500, "a")) == 100


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
        (
            "flipkart",
            ["positive", "", "negative"],
            3,
            None,
            "flipkart (test): 2 rows beside 1 dropped, its makers count 3",
        ),
        ("hans", ["entailment", ""], 2, None, "hans (test): 1 rows beside 1 dropped, its makers count 2: another"),
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
