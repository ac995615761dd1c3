"""Test MMLU's questions from a folder below the data root, and draws of questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager
from pydantic import ValidationError

from benchmarks.harness.base import DATA_ROOT, QUESTIONS, DataError, DefinitionError
from benchmarks.llama.definition import EvaluationTask
from benchmarks.llama.evaluation import load_task
from benchmarks.llama.questions import describe_mmlu, draw_by_subject
from tests.executed import finish, prepare
from tests.instruction_runs import offer_only, tiny_run, write_mmlu, write_rows

LAW = "mmlu_professional_law"


@pytest.fixture
def folder(roots: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a data root with questions and instructions, and return the folder of the questions."""
    monkeypatch.setenv("EMOE_MODEL_ROOT", str(roots / "models"))
    monkeypatch.setenv(DATA_ROOT, str(here / "data"))
    write_rows(here / "data")
    return write_mmlu(here / "data")


def task(name: str, **settings: Any) -> EvaluationTask:
    return EvaluationTask(task=name, **{"num_fewshot": 0, **settings})


def questions(folder: Path, split: str, subject: str) -> list[dict[str, Any]]:
    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["subject"] == subject]


def prompts(asked: Any, shots: int) -> list[Any]:
    asked.set_config(key="num_fewshot", value=shots)
    asked.build_all_requests(limit=None, rank=0, world_size=1)
    return [(request.doc_id, request.idx, request.args) for request in asked.instances]


@pytest.mark.parametrize("name", [LAW, f"{LAW}_continuation"])
@pytest.mark.parametrize("shots", [0, 2])
def test_the_folders_questions_are_asked_as_lm_eval_asks_those_of_the_hub(
    folder: Path, name: str, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = prompts(load_task(task(name)).tasks[name], shots)
    offer_only("mmlu", monkeypatch)
    on_hub = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(questions(folder, split, "professional_law"))
            for split in ("test", "dev")
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: on_hub)
    theirs = prompts(TaskManager().load([name])["tasks"][name], shots)
    assert ours == theirs
    assert len(ours) == 4 * 3
    (prompt, _) = ours[0][2]
    assert prompt.count("dev question") == shots
    assert "What is test question 0 of professional_law?\n" in prompt


def test_a_run_records_the_drawn_questions(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    letters, answers = "mmlu_stem", "mmlu_stem_continuation"  # 19 subjects
    asked = [task(answers), task(answers, draw=25), task(letters, draw=25)]
    metrics = finish(
        prepare(tiny_run(evaluation={"tasks": [entry.model_dump() for entry in asked]}))
    )
    assert "warning: mmlu (test): 171 rows, its makers count 14,042" in "".join(capfd.readouterr())
    every, drawn, as_letters = (metrics["tasks"][entry.title] for entry in asked)
    assert [result["questions"] for result in (every, drawn, as_letters)] == [57, 25, 25]
    assert asked[1].title == "mmlu_stem_continuation (0-shot, 25 drawn)"
    chosen = load_task(asked[1]).drawn
    assert chosen is not None
    # the drawn questions have the results that they have among all
    for name, numbers in chosen.items():
        subject = name.removeprefix("mmlu_").removesuffix("_continuation")
        for key in ("correct", "nats_per_byte"):
            wanted = [every[key][subject][number] for number in numbers]
            assert list(drawn[key][subject]) == wanted
    # the drawn questions of algebra have only answers of one byte
    assert "abstract_algebra" in drawn["nats_per_byte"]
    assert "nats_per_byte" not in as_letters["scores"]
    assert every["source"] == drawn["source"][:1]
    assert drawn["source"][0].startswith(f"{folder}, sha256 ")
    assert re.fullmatch("25 of 57 questions drawn, sha256 [0-9a-f]{16}", drawn["source"][1])
    assert as_letters["source"] == drawn["source"]
    (edited := folder / "test.jsonl").write_text(edited.read_text().replace("What", "Which"))
    assert load_task(asked[1]).sources[1] != drawn["source"][1]


def test_a_draw_has_a_share_of_every_subject_and_is_the_same_for_both_forms() -> None:
    sizes = {"mmlu_law": 1534, "mmlu_law_b": 611, "mmlu_anatomy": 100, "mmlu_virology": 2}
    drawn = draw_by_subject(sizes, 225)
    assert {name: len(numbers) for name, numbers in drawn.items()} == {
        "mmlu_anatomy": 10,
        "mmlu_law": 153,
        "mmlu_law_b": 61,
        "mmlu_virology": 1,  # at least one
    }
    for name, numbers in drawn.items():
        assert numbers == sorted(set(numbers))
        assert max(numbers) < sizes[name]
    assert drawn["mmlu_law"] != list(range(153))
    other_form = {f"{name}_continuation": size for name, size in sizes.items()}
    renamed = {f"{name}_continuation": numbers for name, numbers in drawn.items()}
    assert draw_by_subject(other_form, 225) == renamed
    larger = draw_by_subject(sizes, 900)
    assert all(
        set(numbers) < set(larger[name]) for name, numbers in drawn.items() if sizes[name] > 2
    )
    assert draw_by_subject(sizes, sum(sizes.values())) == {
        name: list(range(size)) for name, size in sorted(sizes.items())
    }


def test_a_draw_stays_the_same_so_that_records_stay_comparable() -> None:
    drawn = draw_by_subject({"mmlu_anatomy": 12, "mmlu_virology": 5}, 5)
    assert drawn == {"mmlu_anatomy": [2, 3, 7, 9], "mmlu_virology": [1]}


def test_edited_questions_get_new_tasks(folder: Path) -> None:
    name = "mmlu_anatomy"
    load_task(task(name))
    file = folder / "test.jsonl"
    file.write_text(file.read_text().replace("question 0 of anatomy", "the heart"))
    first = load_task(task(name)).tasks[name].eval_docs[0]
    assert first["question"] == " What is test the heart? "
    assert len(list(QUESTIONS.glob("mmlu-*/mmlu.yaml"))) == 2


def test_damaged_tasks_are_written_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "mmlu_anatomy"
    asked = list(load_task(task(name)).tasks[name].eval_docs)
    (written,) = QUESTIONS.glob("mmlu-*-*/")
    file = written / "anatomy_test.jsonl"
    file.write_text(file.read_text().replace("test question", "wrong question"))
    capsys.readouterr()
    assert list(load_task(task(name)).tasks[name].eval_docs) == asked
    warning = f"warning: {written} has changed since it was written; it is written again\n"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"draw": 12}, r"'draw: 12', but it takes 13 \(one for each task\) to 39 questions"),
        ({"draw": 40}, r"'draw: 40', but it takes 13 \(one for each task\) to 39 questions"),
        ({"num_fewshot": 3}, "3 shots, but 'mmlu_[a-z_]+' has 2 few-shot questions"),
    ],
)
def test_settings_that_do_not_fit_the_questions_end_a_run_before_any_work(
    folder: Path, settings: dict[str, int], problem: str
) -> None:
    group = "mmlu_humanities"
    with pytest.raises(DefinitionError, match=f"'evaluation.tasks' names '{group}' with {problem}"):
        load_task(task(group, **settings))


def test_a_draw_and_a_limit_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="'limit' and 'draw' exclude each other; set one"):
        task("mmlu", limit=1, draw=60)


@pytest.mark.parametrize(
    ("split", "old", "new", "problem"),
    [
        ("test", '"choices": \\["0", ', '"choices": [', "line 1: 'choices': List should have"),
        ("dev", '"answer": [0-3]', '"answer": "A"', "line 1: 'answer': Input should be a valid"),
        ("test", "^{", "", "line 1: Invalid JSON"),
        (
            "test",
            '"abstract_algebra"',
            '"abstract_algebre"',
            "line 1: MMLU has no subject 'abstract_algebre'; did you mean 'abstract_algebra'",
        ),
    ],
)
def test_damaged_questions_end_a_run_before_any_work(
    folder: Path, split: str, old: str, new: str, problem: str
) -> None:
    file = folder / f"{split}.jsonl"
    file.write_text(re.sub(old, new, file.read_text(), count=1))
    with pytest.raises(DataError, match=re.escape(f"{file}, {problem}")) as error:
        load_task(task("mmlu_continuation"))
    assert "\n" not in str(error.value)


def test_missing_questions_end_a_run_before_any_work(folder: Path) -> None:
    test, dev = (folder / f"{split}.jsonl" for split in ("test", "dev"))
    lines = test.read_text().splitlines(keepends=True)
    test.write_text("".join(line for line in lines if "virology" not in line))
    with pytest.raises(DataError, match=f"{test} has no question of the subject 'virology'"):
        load_task(task("mmlu"))
    test.write_text("\n".join(lines))  # with empty lines
    load_task(task("mmlu_anatomy"))
    dev.unlink()
    with pytest.raises(
        DataError, match=f"{folder} has no file for the split 'dev': wanted dev.jso"
    ):
        load_task(task("mmlu"))


def test_the_hubs_questions_are_counted_over_all_subjects(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(hub: str, subject: str, split: str) -> datasets.Dataset:
        asked.append((hub, subject, split))
        return datasets.Dataset.from_list([{"question": "?"}] * 5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (part,) = describe_mmlu("dev", False)
    assert (part.rows, part.note, part.labels) == (285, None, "57 subjects")
    assert part.source == "cais/mmlu@newest (not pinned)"
    assert len(set(asked)) == 57
    assert ("cais/mmlu", "anatomy", "dev") in asked
