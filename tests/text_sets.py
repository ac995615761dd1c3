"""Write small made-up rows with known labels, in the layouts of GLUE and GLUE-X.

Rows can also be written in every other format that text benchmarks read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.text.definition import RunTask
from tools.convert_glue_x import main as convert

TASKS = {name: task.model_dump() for name, task in load_benchmark("glue").tasks.items()}

_PARSES = "( x )\t( y )\t(R x)\t(R y)"


def _mnli_row(number: int, word: str, label: str) -> str:
    """Make a row of MNLI, whose last column is the label."""
    ids = f"{number}\t1\t{number}n"
    return f"{ids}\tfiction\t{_PARSES}\tHe ran.\tHe {word}.\tn\tn\tn\tn\tn\t{label}"


# the columns of MNLI
_MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
    "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
    "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label"
)
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
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2"
            "\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone"
            "\tA man plays.\tA man is playing.\t4.800",
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
            _MNLI_HEADER,
            _mnli_row(0, "moved", "entailment"),
            _mnli_row(1, "won", "neutral"),
            _mnli_row(2, "slept", "contradiction"),
            _mnli_row(3, "fell", "-"),
        ],
    ),
    "qnli": (
        "dev.tsv",
        [
            "index\tquestion\tsentence\tlabel",
            "0\tWhen?\tIn 1990.\tentailment",
            "1\tWhen?\tBlue.\tnot_entailment",
        ],
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
# the labels of these rows, without those of rows to drop
LABELS = {
    "cola": [1, 0],
    "sst2": [1, 0],
    "mrpc": [1, 0],
    "qqp": [1, 0],
    "stsb": [4.8, 0.0],
    "mnli": [0, 1, 2],
    "qnli": [0, 1],
    "rte": [0, 1],
}
GLUE = list(TSV)


def _pit_rows(first: str, second: str, labels: Sequence[str]) -> str:
    """Make the rows of a file of Twitter-PIT: the same pair of texts with each of the labels."""
    rows = [f"49\tShocking\t{first}\t{second}\t{label}\tIt/O/PRP\tSo/O/RB\n" for label in labels]
    return "".join(rows)


_SICK_HEADER = (
    "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score"
    "\tentailment_AB\tentailment_BA\tsentence_A_original\tsentence_B_original"
    "\tsentence_A_dataset\tsentence_B_dataset\tSemEval_set\n"
)


def _sick_row(number: int, words: str, label: str, score: str, split: str) -> str:
    """Make a row of SICK. Both labels are those of the pair "A dog ran." and "A <words>."."""
    pair = f"{number}\tA dog ran.\tA {words}.\t{label}\t{score}"
    return f"{pair}\tA_entails_B\tB_neutral_A\tA dog ran.\tA dog.\tFLICKR\tFLICKR\t{split}\n"


def _snli_row(label: str) -> str:
    """Make a row of SNLI."""
    row = {
        "pairID": "1.jpg#0r1n",
        "gold_label": label,
        "sentence1": 'He "ran".',
        "sentence2": "He won.",
    }
    return json.dumps(row) + "\n"


# GLUE-X: every file of a set in its makers' form, by its path below the set's folder
OWN_FILES: dict[str, dict[str, str]] = {
    "imdb": {
        "test/pos/0_9.txt": 'Fine "film".<br />',
        "test/pos/1_10.txt": "Good.",
        "test/neg/0_2.txt": "Dull\n film.",
    },
    "yelp_polarity": {"test.csv": '"1","Dull food, ""cold"".\\nNever again."\n"2","Fine food."\n'},
    "amazon_polarity": {"test.csv": '"2","A title","Fine, really."\n"1","Dull","Broke at once."\n'},
    "flipkart": {
        "Dataset-SA.csv": "product_name,product_price,Rate,Review,Summary,Sentiment\n"
        '"Cooler, 4 L",3999,5,super!,great cooler,positive\nCooler,3999,3,fair,it is okay,neutral\n'
        "Cooler,3999,1,,broke,negative\nCooler,3999,1,bad,,negative\nCooler,3999,4,good,nice,\n"
    },
    "twitter_pit": {
        # votes of five people: for and against
        "train.data": _pit_rows("It rains", "Rain", ["(3, 2)", "(2, 3)", "(0, 5)"]),
        "dev.data": _pit_rows("It snows", '"Snow', ["(5, 0)", "(1, 4)", "(4, 1)"]),
        # grades of an expert
        "test.data": _pit_rows("He won", "He lost", ["5", "4", "3", "2", "1", "0"]),
    },
    "sick_relatedness": {
        "SICK.txt": _SICK_HEADER
        + _sick_row(1, "dog moved", "ENTAILMENT", "4.5", "TRAIN")
        + _sick_row(2, "dog moved", "ENTAILMENT", "4.9", "TEST")
        + _sick_row(3, "cat slept", "NEUTRAL", "2.1", "TEST")
        + _sick_row(4, "dog slept", "CONTRADICTION", "3.35", "TEST")
        + _sick_row(5, "dog slept", "CONTRADICTION", "3.3", "TRIAL")
    },
    "snli": {
        "snli_1.0_test.jsonl": _snli_row("neutral")
        + _snli_row("entailment")
        + _snli_row("-")
        + _snli_row("contradiction")
    },
    "scitail": {
        "tsv_format/scitail_1.0_train.tsv": 'Rain "fell.\tIt rained.\tentails\n',
        "tsv_format/scitail_1.0_dev.tsv": "Rain fell.\tIt snowed.\tneutral\n",
        "tsv_format/scitail_1.0_test.tsv": "Water boils.\tIt is hot.\tentails\n"
        "Water boils.\tIt is blue.\tneutral\n",
    },
    "hans": {
        "heuristics_evaluation_set.txt": "gold_label\tsentence1_binary_parse"
        "\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
        "\tsentence1\tsentence2\tpairID\theuristic\tsubcase\ttemplate\n"
        f"non-entailment\t{_PARSES}\tThe man saw the dog .\tThe dog saw the man ."
        "\tex0\tlexical_overlap\tln_s\ttemp1\n"
        f"entailment\t{_PARSES}\tThe man ran and won .\tThe man ran ."
        "\tex1\tsubsequence\tse_c\ttemp2\n"
    },
}
OWN_FILES["sick_entailment"] = OWN_FILES["sick_relatedness"]

# the labels of these rows as their makers document them, in the order of reading, and the number of
# rows without a label or text
MEANING: dict[str, tuple[list[float], int]] = {
    "imdb": ([0, 1, 1], 0),
    "yelp_polarity": ([0, 1], 0),
    "amazon_polarity": ([1, 0], 0),
    "flipkart": ([1, 0, 0], 2),
    "twitter_pit": ([1, 0, 1, 0, 1, 1, 1, 0, 0, 0], 2),
    "sick_relatedness": ([4.9, 2.1, 3.35], 0),
    "sick_entailment": ([0, 1, 2], 0),
    "snli": ([1, 0, 2], 1),
    "scitail": ([0, 1, 0, 1], 0),
    "hans": ([1, 0], 0),
}


def write_glue(
    root: Path, name: str, *, train: bool = False, copies: int = 1, raw: bool = False
) -> Path:
    """Write the dev split of a GLUE task below a data root, and return its file in the raw layout.

    Args:
        root: The data root.
        name: The name of the task.
        train: True to write the same rows as the training split, too.
        copies: How often each row is written.
        raw: True not to convert the file from the layout of its makers.
    """
    file_name, lines = TSV[name]
    layout = TASKS[name]["raw_formats"][0]
    num_header_lines = 1 if layout["header"] else 0
    header = lines[:num_header_lines]
    rows = lines[num_header_lines:] * copies
    text = "\n".join([*header, *rows]) + "\n"

    folder = root / TASKS[name]["source"]["folder"]
    folder.mkdir()
    (folder / file_name).write_text(text, encoding="utf-8")
    if train:
        (folder / "train.tsv").write_text(text, encoding="utf-8")
    if not raw:
        convert(root, [name])
    return folder / file_name


def write_own(root: Path, name: str, *, raw: bool = False) -> Path:
    """Write a GLUE-X set below a data root, and return its folder.

    It is converted from the layout of its makers, unless ``raw`` is True.
    """
    folder: Path = root / TASKS[name]["source"]["folder"]
    for relative_path, text in OWN_FILES[name].items():
        file = folder / relative_path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    if not raw:
        convert(root, [name])
    return folder


def write_saved(
    root: Path, name: str, labels: list[object], names: list[str] | None = None
) -> None:
    """Write a set as `datasets` saves it: without splits, as GLUE-X hands them out.

    ``names`` are the names of the classes, which are stored beside the labels.
    """
    saved = _dataset(name, labels, names)
    saved.save_to_disk(str(root / TASKS[name]["source"]["folder"]))


def _columns(name: str, labels: list[object]) -> dict[str, list[object]]:
    """Make up the texts of a task's rows, such as ``sentence 0``, and add the labels."""
    columns: dict[str, list[object]] = {}
    for field in TASKS[name]["fields"]:
        columns[field] = [f"{field} {number}" for number in range(len(labels))]
    columns[TASKS[name]["label"]] = labels
    return columns


def _dataset(name: str, labels: list[object], names: list[str] | None) -> datasets.Dataset:
    """Make a set with made-up texts, and with the names of the classes if they are given."""
    made = datasets.Dataset.from_dict(_columns(name, labels))
    if not names:
        return made
    return made.cast_column(TASKS[name]["label"], datasets.ClassLabel(names=names))


def task(name: str) -> RunTask:
    """Return a task of glue as a run has it."""
    return load_benchmark("glue").tasks[name]


def write_rows(
    root: Path,
    name: str,
    labels: list[object],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str] | None = None,
) -> None:
    """Write the dev split of a task with the column names of the hub.

    Args:
        root: The data root.
        name: The name of the task.
        labels: The labels of the rows.
        form: The format: ``csv``, ``jsonl``, ``parquet``, ``saved`` (by `datasets`) or ``hub``, for
            which nothing is written, and `datasets.load_dataset` returns the rows.
        monkeypatch: The fixture of pytest.
        names: The names of the classes, which are stored beside the labels; not for ``csv``.
    """
    folder = root / TASKS[name]["source"]["folder"]
    split = TASKS[name]["splits"]["dev"]
    if form == "hub":
        loaded = _dataset(name, labels, names)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: loaded)
        return

    folder.mkdir()
    file = folder / f"{split}.{form}"
    if form == "csv":
        # not by `datasets`, so that every label is written as it is given
        file.write_text(_csv_text(_columns(name, labels)))
    elif form == "saved":
        splits = datasets.DatasetDict({split: _dataset(name, labels, names)})
        splits.save_to_disk(str(folder))
    elif form == "jsonl":
        _dataset(name, labels, names).to_json(file)
    else:
        table = _dataset(name, labels, names).with_format("arrow")[:]
        pq.write_table(table, file)


def _csv_text(columns: dict[str, list[object]]) -> str:
    """Format columns as CSV. An unknown cell is empty."""
    lines = [",".join(columns)]
    for row in zip(*columns.values(), strict=True):
        cells = ["" if cell is None else str(cell) for cell in row]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"
