"""The sets of GLUE-X in their makers' own files, as the hub has them, and saved."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from benchmarks.harness.base.errors import DataError
from benchmarks.text.datasets import load_split
from tests.text_sets import GLUE, MEANING, OWN_FILES, TASKS, task, write_own, write_saved


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
