"""A run of instruction tuning from end to end, on a tiny Llama and a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import emoe
from benchmarks.harness.base import QUESTIONS, DataError, DefinitionError
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.models.build import build_language_model
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.llama.definition import EvaluationTask, InstructionSpec
from benchmarks.llama.evaluation import load_task, summarise
from benchmarks.llama.export import export
from benchmarks.llama.pipeline import read_data
from benchmarks.llama.questions import ensure_mmlu_dev
from tests.executed import finish, killed_and_resumed, prepare
from tests.instruction_runs import ROWS, enter, tiny_run
from tests.programs import call

LETTERS, ANSWERS = "mmlu_dev_anatomy", "mmlu_dev_anatomy_continuation"
TASKS = {"tasks": [{"task": task, "num_fewshot": 0, "limit": None} for task in (LETTERS, ANSWERS)]}


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data root."""
    enter(tmp_path, monkeypatch)
    return tmp_path


def test_a_run_leaves_its_numbers() -> None:
    ensure_mmlu_dev(QUESTIONS / "mmlu_dev")
    metrics = finish(prepare(tiny_run("emoe", evaluation=TASKS)))
    assert len(metrics["curve"]) == 6  # 12 rows, 4 a step, twice
    assert metrics["curve"][-1] < metrics["curve"][0]
    assert (metrics["data"]["train"]["rows"], metrics["data"]["held_out"]["rows"]) == (12, 6)
    assert metrics["scores"]["dev"]["own"]["loss"] > 0
    task, scores = (by_task[f"{LETTERS} (0-shot)"] for by_task in (metrics["tasks"], metrics["scores"]["test"]))
    assert (task["questions"], len(task["correct"]["anatomy"])) == (5, 5)
    assert scores == {"accuracy": task["correct"]["anatomy"].count("1") / 5}
    task, scores = (by_task[f"{ANSWERS} (0-shot)"] for by_task in (metrics["tasks"], metrics["scores"]["test"]))
    nats = task["nats_per_byte"]["anatomy"]
    assert len(nats) == task["questions"] == len(task["correct"]["anatomy"]) == 5
    assert scores["nats_per_byte"] == pytest.approx(sum(nats) / 5)
    (answer,) = metrics["answers"]
    assert {row["instruction"]: row["output"] for row in ROWS}[answer["instruction"]] == answer["reference"]
    assert set(metrics["model"]["trained"]) == {"adapters"}  # no head: a language model's is not new
    assert [layer["index"] for layer in metrics["model"]["conversion"]] == [2, 3]
    assert all(sum(shares) == pytest.approx(1) for shares in metrics["routing"]["shares"].values())
    assert metrics["routing"]["active_neurons"] == pytest.approx(0.25)


@pytest.mark.parametrize(("method", "tuning"), [("dense", "full"), ("emoe", "lora")])
def test_a_killed_run_resumes_to_the_same_numbers(capfd: pytest.CaptureFixture[str], method: str, tuning: str) -> None:
    run = tiny_run(method, tuning)
    whole = finish(prepare(run, "whole"))
    assert killed_and_resumed(run, 5) == whole  # in the second epoch, after the checkpoint of step 4
    assert "resumed at step 4" in "".join(capfd.readouterr())


def test_neither_micro_batch_nor_packing_nor_checkpointing_changes_the_curve() -> None:
    size = "per_device_train_batch_size"
    settings = [{}, {size: 4}, {size: 1, "packing": True}, {"gradient_checkpointing": True}]
    first, *others = (finish(prepare(tiny_run("emoe", "full", training=training)))["curve"] for training in settings)
    assert others == [pytest.approx(first, abs=1e-4)] * 3


def test_all_experts_train_exactly_like_the_dense_model() -> None:
    every = {**tiny_run("emoe", "full").spec["method"]["config"], "top_k": 8}
    routed = tiny_run("emoe", "full", {"method": {"config": every, "name": "all_experts"}})
    dense, same = (finish(prepare(run)) for run in (tiny_run("dense", "full"), routed))
    assert same["curve"] == pytest.approx(dense["curve"], abs=1e-4)
    assert same["scores"]["dev"]["own"]["loss"] == pytest.approx(dense["scores"]["dev"]["own"]["loss"], abs=1e-4)


def test_an_untrained_model_is_only_evaluated() -> None:
    path = prepare(tiny_run("emoe", "base"))
    metrics = finish(path)
    assert (metrics["curve"], metrics["model"]["trainable_parameters"]) == ([], 0)
    assert metrics["routing"]
    with pytest.raises(DataError, match="has no weights"):
        export(path, Path("out"), "dense")


def test_held_out_rows_are_the_same_for_all_seeds_and_never_learned() -> None:
    def places(seed: int) -> tuple[list[str], list[str]]:
        run = tiny_run("dense", "full", seed=seed)
        data = read_data(InstructionSpec.model_validate(run.spec), load_tokenizer(run.spec["model"]))
        train, held_out = ([row.source.place for row in rows.rows] for rows in (data.train, data.held_out))
        return train, held_out

    assert places(0) == places(1)
    train, held_out = places(0)
    assert not set(train) & set(held_out)
    assert (len(train), len(held_out)) == (12, 6)


def samples(digits: str) -> list[dict[str, Any]]:
    """Return lm-eval's samples in another order."""
    return [{"doc_id": number, "acc": float(digit)} for number, digit in enumerate(digits)][::-1]


def test_accuracies_of_groups_are_over_questions_and_over_subjects() -> None:
    numbers = summarise(
        {  # as lm-eval has it: a group of two groups, one of them without results of its own
            "results": {
                "all": {"alias": "all"},
                "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": " - first"},
                "b": {"acc,none": 1.0, "acc_norm,none": 0.0, "alias": " - second"},
                "c": {"acc,none": 0.0, "alias": "third"},
            },
            "group_subtasks": {"all": ["ab", "c"], "ab": ["a", "b"]},
            "n-samples": {"a": {"effective": 4}, "b": {"effective": 1}, "c": {"effective": 5}},
            "samples": {"a": samples("1010"), "b": samples("1"), "c": samples("00000")},
        }
    )
    assert numbers["scores"] == {"accuracy": 0.3, "accuracy_macro": 0.5}
    assert numbers["questions"] == 10
    assert numbers["categories"] == {"ab": {"acc": 0.6, "questions": 5}}
    assert numbers["subjects"]["first"] == {"acc": 0.5, "questions": 4}
    assert numbers["correct"] == {"first": "1010", "second": "1", "third": "00000"}


def test_unknown_tasks_end_a_run_before_any_work() -> None:
    group, wrong = (EvaluationTask(task=name, num_fewshot=0) for name in ("mmlu_dev", "mmlu_dev_anatomie"))
    load_task(group)  # which writes the questions
    with pytest.raises(
        DefinitionError, match="'mmlu_dev_anatomie', which lm-eval does not have; did you mean 'mmlu_dev_ana"
    ):
        load_task(wrong)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_exports_are_what_was_trained(tuning: str) -> None:
    path = prepare(tiny_run("emoe", tuning, training={"keep_weights": True}))
    finish(path)
    assert export(path, Path("dense"), "dense").startswith("LlamaForCausalLM, dense")
    output = call("export", str(path), "--output", "experts", "--form", "emoe")
    assert "wrote experts: LlamaForCausalLM, experts in layers 2, 3" in output
    dense = AutoModelForCausalLM.from_pretrained("dense")
    experts: Any = emoe.from_pretrained(AutoModelForCausalLM, "experts")
    tokenizer = AutoTokenizer.from_pretrained("dense")
    inputs = tokenizer("Say the number 7.", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        routed, whole = experts(**inputs).logits, dense(**inputs).logits
        assert not torch.allclose(routed, whole, atol=1e-3)
        emoe.to_dense_(experts, restore_order=True)
        assert torch.allclose(experts(**inputs).logits, whole, atol=1e-5)
    # stock weights in their old order, so that only what was trained differs from the pre-trained model
    before = build_language_model(tiny_run("dense", "base").spec).model.state_dict()
    after = load_file("dense/model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    adapted = {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(4) for name in "qv"}
    assert changed == (adapted if tuning == "lora" else set(after))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say 1."}], tokenize=False)
    assert prompt.endswith("### Instruction:\nSay 1.\n\n### Response:\n")


def test_the_held_out_curve_changes_no_other_number() -> None:
    with_curve = finish(prepare(tiny_run("emoe", "lora", training={"eval_every": 2})))
    plain = tiny_run("emoe", "lora")
    del plain.spec["training"]["eval_every"]
    assert plain.spec["training"]["lora"]["dropout"] > 0
    numbers = finish(prepare(run_from_spec(plain.spec)))
    points = with_curve.pop("held_out_curve")
    assert {**with_curve, "run_id": ""} == {**numbers, "run_id": ""}
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    losses = [point["loss"] for point in points]
    assert losses[-1] == with_curve["scores"]["dev"]["own"]["loss"]
    assert losses[0] > losses[-1]
