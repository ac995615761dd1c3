"""Every GLUE task in its real on-disk formats (made-up sentences), and the sentiment set itself."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd
import pytest

from benchmarks.harness.definition import load_benchmark
from benchmarks.harness.packages import DataError
from benchmarks.harness.paths import DATA_ROOT
from benchmarks.harness.rated import load_rated
from benchmarks.harness.text import TextSplit, load_split

TASKS = load_benchmark("glue").tasks

# the headers are those of the files that gluebenchmark.com hands out
TSV = {
    "cola": ("dev.tsv", ['gj04\t1\t\tThe dog "barked.', "gj04\t0\t*\tDog the barked."]),
    "sst2": ("dev.tsv", ["sentence\tlabel", 'a "fine film \t1', "dull \t0"]),
    "mrpc": (
        "dev.tsv",
        [
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '1\t10\t11\tHe "said so.\tSo he said.',
            "0\t12\t13\tRain.\tSun.",
        ],
    ),
    "stsb": (
        "dev.tsv",
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\tA man plays.\tA man is playing.\t4.800",
            "1\tmain-captions\tMSRvid\t2012test\t4\tnone\tnone\tA cat.\tA train.\t0.000",
        ],
    ),
    "qqp": (
        "dev.tsv",
        [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "7\t1\t2\tHow?\tIn what way?\t1",
            "9\t5\t6\tThis row ends early",
            "8\t3\t4\tWho?\tWhere?\t0",
        ],
    ),
    "mnli": (
        "dev_matched.tsv",
        [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
            "\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
            "0\t1\t1n\tfiction\t( x )\t( y )\t(R x)\t(R y)\tHe ran.\tHe moved.\te\te\te\te\te\tentailment",
            "1\t1\t2n\tfiction\t( x )\t( y )\t(R x)\t(R y)\tHe ran.\tHe won.\tn\tn\tn\tn\tn\tneutral",
            "2\t1\t3n\tfiction\t( x )\t( y )\t(R x)\t(R y)\tHe ran.\tHe slept.\tc\tc\tc\tc\tc\tcontradiction",
            "3\t1\t4n\tfiction\t( x )\t( y )\t(R x)\t(R y)\tHe ran.\tPerhaps.\te\tn\tc\te\tn\t-",
        ],
    ),
    "qnli": (
        "dev.tsv",
        ["index\tquestion\tsentence\tlabel", "0\tWhen?\tIn 1990.\tentailment", "1\tWhen?\tBlue.\tnot_entailment"],
    ),
    "rte": (
        "dev.tsv",
        [
            "index\tsentence1\tsentence2\tlabel",
            "0\tRain fell.\tIt rained.\tentailment",
            "1\tRain fell.\tSnow.\tnot_entailment",
        ],
    ),
}
LABELS = {
    "cola": [1, 0],
    "sst2": [1, 0],
    "mrpc": [1, 0],
    "stsb": [4.8, 0.0],
    "qqp": [1, 0],
    "mnli": [0, 1, 2],
    "qnli": [0, 1],
    "rte": [0, 1],
}
GLUE = list(TSV)


def task(name: str) -> dict:
    return {"name": name, **TASKS[name]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    return tmp_path


def write_tsv(root: Path, name: str) -> Path:
    file, lines = TSV[name]
    folder = root / TASKS[name]["source"]["folder"]
    folder.mkdir()
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / file


def hub_frame(name: str) -> pd.DataFrame:
    """The same rows under the hub's column names, labels as the hub's numbers."""
    definition = TASKS[name]
    rows = {field: [f"{field} {i}" for i in range(len(LABELS[name]))] for field in definition["fields"]}
    return pd.DataFrame({**rows, "label": LABELS[name], "idx": range(len(LABELS[name]))})


def test_all_eight_tasks_are_covered() -> None:
    assert sorted(GLUE) == sorted(name for name, definition in TASKS.items() if "hub" in definition["source"])


@pytest.mark.parametrize("name", GLUE)
def test_own_tsv(root: Path, name: str) -> None:
    write_tsv(root, name)
    split = load_split(task(name), "dev")
    assert split.labels == LABELS[name]
    assert {len(texts) for texts in split.texts} == {len(TASKS[name]["fields"])}
    assert split.dropped == (1 if name in ("mnli", "qqp") else 0)


def test_quotes_are_text(root: Path) -> None:
    write_tsv(root, "cola")
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


def test_rows_without_a_gold_label_are_dropped_and_counted(root: Path) -> None:
    (root / "MNLI").mkdir()
    frame = hub_frame("mnli")
    frame.loc[1, "label"] = -1
    frame.to_parquet(root / "MNLI" / "validation_matched.parquet")
    split = load_split(task("mnli"), "dev")
    assert (split.labels, split.dropped) == ([0, 2], 1)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "rte",
            "not_entailment",
            "not_entailmnt",
            "row 2: 'not_entailmnt' is no label of task 'rte'; did you mean 'not_entailment'",
        ),
        ("sst2", "\t0", "\t2", "row 2: '2' is no label"),
        ("stsb", "0.000", "n/a", "row 2: 'n/a' is no label of task 'stsb'"),
        ("rte", "sentence2", "sentense2", "has no column 'sentence2' for 'sentence2'; did you mean 'sentense2'"),
    ],
)
def test_wrong_labels_and_columns_name_file_row_and_nearest(root: Path, name, old, new, message) -> None:
    path = write_tsv(root, name)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message) as caught:
        load_split(task(name), "dev")
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files_are_named(root: Path) -> None:
    (root / "RTE").mkdir()
    (root / "RTE" / "test.tsv").write_text("")
    with pytest.raises(DataError, match=r"RTE has no file for the split 'validation'.*dev\.tsv; it holds test\.tsv"):
        load_split(task("rte"), "dev")
    (root / "RTE" / "validation.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read"):
        load_split(task("rte"), "dev")


def test_without_hub_or_folder_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="could not load 'nyu-mll/glue'") as caught:
        load_split(task("cola"), "dev")
    assert str(root / "CoLA") in str(caught.value)


def test_head_draws_rows_once_and_for_all() -> None:
    split = TextSplit([(str(i),) for i in range(100)], list(range(100)))
    assert split.head(10, "a") == split.head(10, "a") != split.head(10, "b")
    assert split.head(None, "a") is split
    assert len(split.head(500, "a")) == 100


@pytest.mark.parametrize("domain", ["amazon", "movie", "nyt", "tweets"])
def test_the_real_sentiment_set(archive: Path, domain: str) -> None:
    parts = {split: load_rated(domain, split, archive) for split in ("train", "dev", "test")}
    sizes = {split: len(texts) for split, (texts, _, _) in parts.items()}
    assert sizes["train"] > sizes["test"] > sizes["dev"] > 400
    for texts, labels, _ in parts.values():
        assert set(labels) == {0, 1}
        assert all(texts)
    total = {"amazon": 3708, "movie": 10605, "nyt": 5190, "tweets": 4200}[domain]
    assert sum(len(texts) + dropped for texts, _, dropped in parts.values()) == total
    assert load_rated(domain, "train", archive) == parts["train"]


def test_sentiment_errors(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'tweets'"):
        load_rated("tweet", "train", archive)
    with pytest.raises(DataError, match="python -m benchmarks fetch"):
        load_rated("tweets", "train", tmp_path / "none.tar.gz")
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged or another version: sha256"):
        load_rated("tweets", "train", damaged)
