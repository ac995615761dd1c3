"""Names of classes in the files that the hub keeps beside a set's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.base.errors import DataError
from benchmarks.text.datasets import load_split
from tests.text_sets import task, write_rows

NAMES = ("contradiction", "entailment", "neutral")  # not in the task's order
FEATURES = {"label": {"names": list(NAMES), "_type": "ClassLabel"}}
README = "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n" + "".join(
    f"          '{number}': {name}\n" for number, name in enumerate(NAMES)
)
BESIDE = {
    "README.md": f"{README}---\n# SNLI\n",
    "dataset_info.json": json.dumps({"features": FEATURES}),
    "dataset_infos.json": json.dumps({"other": {"features": {}}, "plain_text": {"features": FEATURES}}),
}


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl", "csv"])
@pytest.mark.parametrize("beside", BESIDE)
def test_numbers_are_read_by_the_class_names_in_the_hubs_files_beside_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, form: str, beside: str
) -> None:
    write_rows(root, "mnli", [0, 1, 2, -1], form, monkeypatch)
    (root / "MNLI" / beside).write_text(BESIDE[beside])
    split = load_split(task("mnli"), "dev")
    assert (split.labels, split.dropped) == ([2, 0, 1], 1)


def test_class_names_beside_a_file_are_those_of_the_sets_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(root, "rte", [0, 1], "parquet", monkeypatch)
    names = {"rte": ["not_entailment", "entailment"], "qnli": ["entailment", "not_entailment"]}
    infos = {config: {"features": {"label": {"names": found}}} for config, found in names.items()}
    (root / "RTE/dataset_infos.json").write_text(json.dumps(infos))
    (root / "RTE/README.md").write_text("# A set without front matter\n---\nand a line.\n")
    assert load_split(task("rte"), "dev").labels == [1, 0]
    (root / "RTE/dataset_infos.json").write_text(json.dumps({"wnli": infos["rte"], "qnli": infos["qnli"]}))
    with pytest.raises(
        DataError, match=r"dataset_infos.json calls the classes of 'label' entailment, not_entailment, and"
    ):
        load_split(task("rte"), "dev")


@pytest.mark.parametrize(
    ("stored", "beside", "content", "message"),
    [
        (NAMES, "README.md", BESIDE["README.md"], None),
        (
            NAMES[::-1],
            "README.md",
            BESIDE["README.md"],
            "README.md calls the classes of 'label' contradiction, entailment, neutral, and .*parquet neutral, entailment, contradiction; correct one",
        ),
        (None, "README.md", f"{README} : [\n---\n", "README.md cannot be read: "),
        (None, "dataset_info.json", "[" * 100_000 + "]" * 100_000, "dataset_info.json cannot be read: .*too deeply$"),
    ],
)
def test_class_names_beside_a_file_that_do_not_fit_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, stored, beside: str, content: str, message: str | None
) -> None:
    write_rows(root, "mnli", [0, 1, 2], "parquet", monkeypatch, stored and list(stored))
    (root / "MNLI" / beside).write_text(content)
    if message is None:
        assert load_split(task("mnli"), "dev").labels == [2, 0, 1]
        return
    with pytest.raises(DataError, match=message) as caught:
        load_split(task("mnli"), "dev")
    assert "\n" not in str(caught.value)


def test_numbers_that_may_be_names_beside_the_file_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stars from 1 to 3: is a CSV's 1 the first class, or the second?"""
    stars = task("sst2").model_copy(update={"labels": ["1", "2", "3"]})
    write_rows(root, "sst2", [1, 2], "csv", monkeypatch)
    info = {"features": {"label": {"names": ["1", "2", "3"], "_type": "ClassLabel"}}}
    (root / "SST-2/dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        DataError, match=r"dataset_info\.json calls the classes of 'label' 1, 2, 3: is a number in .*csv one"
    ):
        load_split(stars, "dev")


@pytest.mark.parametrize("front", ["- a list", "just words", "# nothing"])
def test_lines_before_the_text_of_a_readme_need_not_be_notes(
    root: Path, front: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(root, "sst2", [1, 0], "parquet", monkeypatch)
    (root / "SST-2/README.md").write_text(f"---\n{front}\n---\n# A set\n")
    assert load_split(task("sst2"), "dev").labels == [1, 0]
