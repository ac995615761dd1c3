"""Every GLUE task in its real on-disk formats (made-up sentences), and the sentiment set itself."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from benchmarks.harness.definition import load_benchmark
from benchmarks.harness.packages import DataError
from benchmarks.harness.paths import DATA_ROOT
from benchmarks.harness.rated import load_rated
from benchmarks.harness.text import TextSplit, load_part, load_split
from tests.text_sets import GLUE, LABELS, MEANING, OWN_FILES, TASKS, write_glue, write_own, write_saved

BENCHMARK = load_benchmark("glue")


def task(name: str) -> dict:
    return BENCHMARK.task_spec(name)


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
        if definition["splits"]["train"] and "rated" not in definition["source"]
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
    path = write_glue(root, name)
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
    config = task("hans")["source"]["config"]
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


def test_without_a_test_split_the_dev_split_is_reported(root: Path) -> None:
    write_glue(root, "rte")
    assert load_part(task("rte"), "test", None) == load_part(task("rte"), "dev", None)


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
