"""Convert and read the makers' files of GLUE and GLUE-X: labels, texts, pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.base import ROOT
from benchmarks.text.data import load_whole_part
from tests.text_sets import GLUE, LABELS, MEANING, OWN_FILES, TASKS, task, write_glue, write_own
from tools.convert_glue_x import main as convert


@pytest.mark.parametrize("name", [*GLUE, *sorted(OWN_FILES)])
def test_makers_files_keep_their_labels(root: Path, name: str) -> None:
    if name in GLUE:
        write_glue(root, name)
        split, expected = (
            load_whole_part(task(name), "dev"),
            (LABELS[name], int(name in ("mnli", "qqp"))),
        )
    else:
        write_own(root, name)
        split, expected = load_whole_part(task(name), "test"), MEANING[name]
    assert (split.labels, split.dropped) == expected
    assert {len(texts) for texts in split.texts} == {len(TASKS[name]["fields"])}
    assert all(any(texts) for texts in split.texts)


def test_texts_are_read_unchanged(root: Path) -> None:
    expected = {
        "imdb": ("Dull\n film.",),
        "yelp_polarity": ('Dull food, "cold".\\nNever again.',),
        "amazon_polarity": ("Fine, really.",),  # without the title
        "flipkart": ("great cooler",),
        "snli": ('He "ran".', "He won."),
        "scitail": ('Rain "fell.', "It rained."),
        "hans": ("The man saw the dog .", "The dog saw the man ."),
        "sick_entailment": ("A dog ran.", "A dog moved."),
        "twitter_pit": ("It rains", "Rain"),
    }
    for name in expected:
        write_own(root, name)
    assert {name: load_whole_part(task(name), "test").texts[0] for name in expected} == expected
    file = write_glue(root, "cola", raw=True)
    file.write_bytes(
        b'\xef\xbb\xbfgj04\t1\t\ta "b\rc\r\n\ngj04\t0\t*\td\n'
    )  # quotation marks, a carriage return
    convert(root, ["cola"])
    assert load_whole_part(task("cola"), "dev").texts == [('a "b\rc',), ("d",)]


@pytest.mark.parametrize(
    ("name", "files", "labels"),
    [
        (
            "sick_entailment",
            {
                "SICK_test_annotated.txt": "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
                "6\tA dog.\tA cat.\t3.3\tNEUTRAL\n"
            },
            [1],
        ),
        (
            "sick_entailment",  # a copy without the first line
            {"SICK_test_annotated.txt": "6\tA dog.\tA cat.\t3.3\tNEUTRAL\r\n"},
            [1],
        ),
        (
            "snli",
            {"snli_1.0_test.txt": "gold_label\tsentence1\tsentence2\nneutral\ta\tb\n-\ta\tb\n"},
            [1],
        ),
        (
            "twitter_pit",
            {
                f"{split}.tsv": "Sent_1\tSent_2\tLabel\na\tb\t1\nc\td\t0\n"
                for split in ("train", "dev", "test")
            },
            [1, 0] * 3,
        ),
    ],
)
def test_other_layouts_of_the_makers(
    root: Path, name: str, files: dict[str, str], labels: list[int]
) -> None:
    for path, text in files.items():
        file = root / TASKS[name]["source"]["folder"] / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    convert(root, [name])
    assert load_whole_part(task(name), "test").labels == labels
    if name == "sick_entailment":
        assert load_whole_part(task("sick_relatedness"), "test").labels == [3.3]


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        (
            "yelp_polarity",
            "test.csv",
            '"2"',
            '"0"',
            r"row 2: '0' is no label",
        ),  # 0 is the hub's negative
        (
            "twitter_pit",
            "dev.data",
            "(1, 4)",
            "(1, 5)",
            r"dev\.data, row 2: '\(1, 5\)' is no label",
        ),
        (
            "sick_entailment",
            "SICK.txt",
            "entailment_label",
            "entailment_labl",
            "no column 'entailment_label'; it has",
        ),
        (
            "snli",
            "snli_1.0_test.jsonl",
            '"entailment"',
            "",
            r"snli_1\.0_test\.jsonl cannot be read",
        ),
        (
            "snli",
            "snli_1.0_test.jsonl",
            '"entailment"',
            '["entailment"]',
            r"snli_1\.0_test\.jsonl cannot be read",
        ),
        ("imdb", "test/neg/0_2.txt", None, None, r"test/neg holds no \.txt file"),
    ],
)
def test_files_that_are_not_as_described_are_named(
    root: Path, name: str, file: str, old, new, message: str
) -> None:
    path = write_own(root, name, raw=True) / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit, match=message):
        convert(root, [name])


def test_a_file_without_rows_is_named(root: Path) -> None:
    write_glue(root, "cola", raw=True).write_text("")
    with pytest.raises(SystemExit, match="has no rows of the split 'validation'"):
        convert(root, ["cola"])


def test_one_wrong_file_does_not_stop_the_others(root: Path) -> None:
    broken = write_own(root, "snli", raw=True) / "snli_1.0_test.jsonl"
    broken.write_text("[1]\n")
    texts = write_own(root, "imdb", raw=True) / "test/neg"
    (texts / "0_2.txt").unlink()
    split = write_own(root, "twitter_pit", raw=True) / "train.data"  # the second of three splits
    split.write_text("49\tShocking\tIt snows\tSnow\t(1, 5)\n")
    write_own(root, "hans", raw=True)  # the last set of tasks.yaml
    write_own(root, "yelp_polarity", raw=True)
    converted = subprocess.run(
        [sys.executable, ROOT / "tools/convert_glue_x.py", root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert converted.returncode == 1
    lines = converted.stderr.splitlines()
    assert len(lines) == 3
    assert f"{texts} holds no .txt file" in lines
    assert f"{broken}, row 1 is not a JSON object" in lines
    assert any(line.startswith(f"{split}, row 1: '(1, 5)' is no label") for line in lines)
    for name in ("hans", "yelp_polarity"):
        assert load_whole_part(task(name), "test").labels == MEANING[name][0]
    assert not (broken.parent / "test.jsonl").exists()
    assert sorted(path.name for path in split.parent.glob("*.jsonl")) == [
        "test.jsonl",
        "validation.jsonl",
    ]


def test_a_file_that_cannot_be_written_does_not_stop_the_others(root: Path) -> None:
    folder = write_own(root, "hans", raw=True)
    (folder / "validation.tmp").mkdir()  # in the way of the temporary file
    write_own(root, "yelp_polarity", raw=True)
    with pytest.raises(SystemExit) as error:
        convert(root, ["hans", "yelp_polarity"])
    assert error.value.code == f"{folder / 'validation.jsonl'} cannot be written: Is a directory"
    assert load_whole_part(task("yelp_polarity"), "test").labels == MEANING["yelp_polarity"][0]


def test_sick_is_written_with_both_labels_or_not_at_all(root: Path) -> None:
    """A misspelt column is a header that is refused, and no row of a copy without header."""
    folder = root / TASKS["sick_entailment"]["source"]["folder"]
    folder.mkdir()
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgement\n"
    (folder / "SICK_test_annotated.txt").write_text(header + "6\ta\tb\t3.3\tNEUTRAL\n")
    with pytest.raises(SystemExit, match="no column 'entailment_judgment'; it has"):
        convert(root, [])
    assert not (folder / "test.jsonl").exists()


def test_of_several_unknown_names_the_first_is_named(root: Path) -> None:
    # in a set of names, another one would come first in some processes
    unknown = [f"unknown_{number}" for number in range(30)]
    with pytest.raises(SystemExit, match="has no task 'unknown_0'; choose from "):
        convert(root, ["hans", *unknown])


@pytest.mark.parametrize("name", ["sick_entailment", "sick_relatedness"])
def test_naming_one_task_of_sick_keeps_the_label_of_the_other(root: Path, name: str) -> None:
    write_own(root, name, raw=True)
    convert(root, [name])
    for task_name in ("sick_entailment", "sick_relatedness"):
        assert load_whole_part(task(task_name), "test").labels == MEANING[task_name][0]
