"""Write small made-up rows with known labels, in the layouts of GLUE and GLUE-X and every other format."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.text.definition import RunTask
from tools.convert_glue_x import main as convert

TASKS = {name: task.model_dump() for name, task in load_benchmark("glue").tasks.items()}

_PARSES = "( x )\t( y )\t(R x)\t(R y)"
_PREMISES = [("moved", "entailment"), ("won", "neutral"), ("slept", "contradiction"), ("fell", "-")]


def _entailed(premise: str, *others: str) -> list[str]:
    labels = ("entailment", "not_entailment")
    return [f"{row}\t{premise}\t{other}\t{labels[row]}" for row, other in enumerate(others)]


# the headers are those of the files that gluebenchmark.com hands out
TSV = {
    "cola": ("dev.tsv", ['gj04\t1\t\tThe dog "barked.', "gj04\t0\t*\tDog the barked."]),
    "sst2": ("dev.tsv", ["sentence\tlabel", 'a "fine film \t1', "dull \t0"]),
    "mrpc": (
        "dev.tsv",
        [
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            *('1\t10\t11\tHe "said so.\tSo he said.', "0\t12\t13\tRain.\tSun."),
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
            *(
                "7\t1\t2\tHow?\tIn what way?\t1",
                "9\t5\t6\tThis row ends early",
                "8\t3\t4\tWho?\tWhere?\t0",
            ),
        ],
    ),
    "mnli": (
        "dev_matched.tsv",
        [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
            "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
            *(
                f"{row}\t1\t{row}n\tfiction\t{_PARSES}\tHe ran.\tHe {word}.\tn\tn\tn\tn\tn\t{label}"
                for row, (word, label) in enumerate(_PREMISES)
            ),
        ],
    ),
    "qnli": (
        "dev.tsv",
        ["index\tquestion\tsentence\tlabel", *_entailed("When?", "In 1990.", "Blue.")],
    ),
    "rte": (
        "dev.tsv",
        ["index\tsentence1\tsentence2\tlabel", *_entailed("Rain fell.", "It rained.", "Snow.")],
    ),
}
LABELS = {name: [1, 0] for name in ("cola", "sst2", "mrpc", "qqp")} | {
    "stsb": [4.8, 0.0],
    "mnli": [0, 1, 2],
}
LABELS |= {"qnli": [0, 1], "rte": [0, 1]}
GLUE = list(TSV)

_PIT = "49\tShocking\t{}\t{}\t{}\tIt/O/PRP\tSo/O/RB"
_SICK = "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tentailment_AB\tentailment_BA"
_SICK += "\tsentence_A_original\tsentence_B_original\tsentence_A_dataset\tsentence_B_dataset\tSemEval_set"
_SICK_ROW = "{}\tA dog ran.\tA {}.\t{}\t{}\tA_entails_B\tB_neutral_A\tA dog ran.\tA dog.\tFLICKR\tFLICKR\t{}"

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
        "train.data": "\n".join(
            _PIT.format("It rains", "Rain", votes) for votes in ("(3, 2)", "(2, 3)", "(0, 5)")
        )
        + "\n",
        "dev.data": "\n".join(
            _PIT.format("It snows", '"Snow', votes) for votes in ("(5, 0)", "(1, 4)", "(4, 1)")
        )
        + "\n",
        "test.data": "\n".join(
            _PIT.format("He won", "He lost", grade) for grade in "54321 0".replace(" ", "")
        )
        + "\n",
    },
    "sick_relatedness": {
        "SICK.txt": "\n".join(
            [
                _SICK,
                _SICK_ROW.format(1, "dog moved", "ENTAILMENT", "4.5", "TRAIN"),
                _SICK_ROW.format(2, "dog moved", "ENTAILMENT", "4.9", "TEST"),
                _SICK_ROW.format(3, "cat slept", "NEUTRAL", "2.1", "TEST"),
                _SICK_ROW.format(4, "dog slept", "CONTRADICTION", "3.35", "TEST"),
                _SICK_ROW.format(5, "dog slept", "CONTRADICTION", "3.3", "TRIAL"),
            ]
        )
        + "\n"
    },
    "snli": {
        "snli_1.0_test.jsonl": "".join(
            json.dumps(
                {
                    "pairID": "1.jpg#0r1n",
                    "gold_label": label,
                    "sentence1": 'He "ran".',
                    "sentence2": "He won.",
                }
            )
            + "\n"
            for label in ("neutral", "entailment", "-", "contradiction")
        )
    },
    "scitail": {
        "tsv_format/scitail_1.0_train.tsv": 'Rain "fell.\tIt rained.\tentails\n',
        "tsv_format/scitail_1.0_dev.tsv": "Rain fell.\tIt snowed.\tneutral\n",
        "tsv_format/scitail_1.0_test.tsv": "Water boils.\tIt is hot.\tentails\nWater boils.\tIt is blue.\tneutral\n",
    },
    "hans": {
        "heuristics_evaluation_set.txt": "gold_label\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tpairID\theuristic\tsubcase\ttemplate\n"
        f"non-entailment\t{_PARSES}\tThe man saw the dog .\tThe dog saw the man .\tex0\tlexical_overlap\tln_s\ttemp1\n"
        f"entailment\t{_PARSES}\tThe man ran and won .\tThe man ran .\tex1\tsubsequence\tse_c\ttemp2\n"
    },
}
OWN_FILES["sick_entailment"] = OWN_FILES["sick_relatedness"]

# documented labels of these rows in reading order, and the number of rows without label (or text)
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
    """Write a GLUE task below a data root: the dev split, and the training split if asked for; return its raw dev file.

    The rows are converted from the makers' layout unless only the ``raw`` file is asked for.
    """
    file, lines = TSV[name]
    folder = root / TASKS[name]["source"]["folder"]
    folder.mkdir()
    header = lines[:1] if TASKS[name]["raw_formats"][0]["header"] else []
    rows = lines[len(header) :] * copies
    for path in (file, "train.tsv") if train else (file,):
        (folder / path).write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")
    if not raw:
        convert(root, [name])
    return folder / file


def write_own(root: Path, name: str, *, raw: bool = False) -> Path:
    """Write a GLUE-X set below a data root, converted from its makers' layout unless ``raw``; return its folder."""
    folder: Path = root / TASKS[name]["source"]["folder"]
    for path, text in OWN_FILES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    if not raw:
        convert(root, ["sick_entailment", "sick_relatedness"] if folder.name == "SICK" else [name])
    return folder


def write_saved(
    root: Path, name: str, labels: list[object], names: list[str] | None = None
) -> None:
    """Write a set as `datasets` saves it: without splits, as GLUE-X hands them out; perhaps with class names."""
    fields = {
        field: [f"{field} {i}" for i in range(len(labels))] for field in TASKS[name]["fields"]
    }
    saved = datasets.Dataset.from_dict({**fields, TASKS[name]["label"]: labels})
    if names:
        saved = saved.cast_column(TASKS[name]["label"], datasets.ClassLabel(names=names))
    saved.save_to_disk(str(root / TASKS[name]["source"]["folder"]))


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
    """Write the dev split of a task in a format under the hub's column names, class names stored beside numbers."""
    folder, split = root / TASKS[name]["source"]["folder"], TASKS[name]["splits"]["dev"]
    columns = {
        field: [f"{field} {i}" for i in range(len(labels))] for field in TASKS[name]["fields"]
    }
    columns |= {TASKS[name]["label"]: labels}
    file = folder / f"{split}.{form}"
    file.parent.mkdir()
    if form == "csv":  # as text, so that every row is written as it is given
        rows = (
            ["" if cell is None else str(cell) for cell in row]
            for row in zip(*columns.values(), strict=True)
        )
        file.write_text("\n".join(",".join(row) for row in [[*columns], *rows]) + "\n")
        return
    loaded = datasets.Dataset.from_dict(columns)
    if names:
        loaded = loaded.cast_column(TASKS[name]["label"], datasets.ClassLabel(names=names))
    if form == "saved":
        datasets.DatasetDict({split: loaded}).save_to_disk(str(folder))
    elif form == "hub":
        folder.rmdir()
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: loaded)
    elif form == "jsonl":
        loaded.to_json(file)
    else:
        pq.write_table(loaded.with_format("arrow")[:], file)
