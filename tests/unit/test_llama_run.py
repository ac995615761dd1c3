"""A run of instruction tuning from end to end, on a tiny Llama and a few rows; the questions of its evaluation."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import emoe
from benchmarks.harness.base import PREFIXES, QUESTIONS, DataError, DefinitionError
from benchmarks.harness.config.methods import tuning_spec
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.models.build import build_language_model
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.llama.definition import EvaluationTask
from benchmarks.llama.evaluation import load_task, nats_per_byte, summarise
from benchmarks.llama.export import export
from benchmarks.llama.pipeline import read_data
from benchmarks.llama.questions import ensure_mmlu_dev
from benchmarks.llama.shared_prompt import MAX_CHOICE_TOKENS, SharedPromptLM
from tests.executed import finish, killed_and_resumed, prepare, typed
from tests.instruction_runs import ROWS, offer_only, tiny_run
from tests.programs import call

pytestmark = pytest.mark.usefixtures("hub_here")
LETTERS, ANSWERS = "mmlu_dev_anatomy", "mmlu_dev_anatomy_continuation"
FILES = QUESTIONS / "mmlu_dev"
TASKS = {"tasks": [{"task": task, "num_fewshot": 0, "limit": None} for task in (LETTERS, ANSWERS)]}


def test_a_run_records_its_numbers() -> None:
    metrics = finish(prepare(tiny_run("emoe", evaluation=TASKS)))
    assert len(metrics["curve"]) == 6  # 12 rows, 4 a step, twice
    assert metrics["curve"][-1] < metrics["curve"][0]
    assert (metrics["data"]["train"]["rows"], metrics["data"]["held_out"]["rows"]) == (12, 6)
    assert metrics["scores"]["dev"]["own"]["loss"] > 0
    letters, answers = (metrics["tasks"][f"{name} (0-shot)"] for name in (LETTERS, ANSWERS))
    assert letters["questions"] == len(letters["correct"]["anatomy"]) == 5
    assert letters["scores"] == {"accuracy": letters["correct"]["anatomy"].count("1") / 5}
    nats = answers["nats_per_byte"]["anatomy"]
    assert len(nats) == answers["questions"] == 5
    assert answers["scores"]["nats_per_byte"] == pytest.approx(sum(nats) / 5)
    (answer,) = metrics["answers"]
    assert {row["instruction"]: row["output"] for row in ROWS}[answer["instruction"]] == answer[
        "reference"
    ]
    assert set(metrics["model"]["trained"]) == {
        "adapters"
    }  # no head: a language model's is not new
    assert [layer["index"] for layer in metrics["model"]["conversion"]] == [2, 3]
    assert all(sum(shares) == pytest.approx(1) for shares in metrics["routing"]["shares"].values())
    assert metrics["routing"]["active_neurons"] == pytest.approx(0.25)


def test_neither_micro_batch_nor_packing_nor_checkpointing_changes_the_curve() -> None:
    size = "per_device_train_batch_size"
    settings = [{}, {size: 4, "gradient_checkpointing": True}, {size: 1, "packing": True}]
    first, *others = (
        finish(prepare(tiny_run("emoe", "full", training=training)))["curve"]
        for training in settings
    )
    assert others == [pytest.approx(first, abs=1e-4)] * 2


def test_all_experts_train_exactly_like_the_dense_model() -> None:
    every = {**tiny_run("emoe", "full").spec["method"]["config"], "top_k": 8}
    routed = tiny_run("emoe", "full", {"method": {"config": every, "name": "all_experts"}})
    dense, same = (finish(prepare(run)) for run in (tiny_run("dense", "full"), routed))
    assert same["curve"] == pytest.approx(dense["curve"], abs=1e-4)
    assert same["scores"]["dev"]["own"]["loss"] == pytest.approx(
        dense["scores"]["dev"]["own"]["loss"], abs=1e-4
    )


def test_rows_that_do_not_fill_a_step_name_the_setting_that_limits_them() -> None:
    run = typed(tiny_run("dense", "full", data={"train_rows": 3}))
    limit = re.escape("(at most data.train_rows: 3) does not fill a step of 4")
    with pytest.raises(DataError, match=limit):
        read_data(run, load_tokenizer(run.model))


def test_seeds_draw_other_training_rows_and_share_the_held_out_rows() -> None:
    runs = [tiny_run("dense", "full", seed=seed) for seed in (0, 1)]
    read = [read_data(typed(run), load_tokenizer(typed(run).model)) for run in runs]
    first, other = (
        [[row.source.position for row in rows.rows] for rows in (data.train, data.held_out)]
        for data in read
    )
    assert sorted(first[0]) != sorted(other[0])
    assert first[1] == other[1]
    for train, held_out in (first, other):
        assert not set(train) & set(held_out)
        assert [len(train), len(held_out)] == [12, 6]


def test_accuracies_of_groups_are_over_questions_and_over_subjects() -> None:
    digits = {"a": "1010", "b": "1", "c": "00000"}
    result = {  # as lm-eval has it: a group of two groups, one of them without results of its own
        "results": {
            "all": {"alias": "all"},
            "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": " - first"},
            "b": {"acc,none": 1.0, "acc_norm,none": 0.0, "alias": " - second"},
            "c": {"acc,none": 0.0, "alias": "third"},
        },
        "group_subtasks": {"all": ["ab", "c"], "ab": ["a", "b"]},
        "n-samples": {name: {"effective": len(answers)} for name, answers in digits.items()},
        "samples": {  # in another order
            name: [{"doc_id": number, "acc": float(digit)} for number, digit in enumerate(answers)][
                ::-1
            ]
            for name, answers in digits.items()
        },
    }
    numbers = summarise(result)
    assert numbers["scores"] == {"accuracy": 0.3, "accuracy_macro": 0.5}
    assert numbers["questions"] == 10
    assert numbers["categories"] == {"ab": {"acc": 0.6, "questions": 5}}
    assert numbers["subjects"]["first"] == {"acc": 0.5, "questions": 4}
    assert numbers["correct"] == {"first": "1010", "second": "1", "third": "00000"}

    # a group of all tasks is no category, even if it has a task twice
    result["group_subtasks"] = {"all": ["ab", "bc"], "ab": ["a", "b"], "bc": ["b", "c"]}
    assert list(summarise(result)["categories"]) == ["ab", "bc"]


def test_unknown_tasks_end_a_run_before_any_work() -> None:
    group, wrong = (
        EvaluationTask(task=name, num_fewshot=0) for name in ("mmlu_dev", "mmlu_dev_anatomie")
    )
    load_task(group)  # which writes the questions
    with pytest.raises(
        DefinitionError,
        match="'mmlu_dev_anatomie', which lm-eval does not have; did you mean 'mmlu_d",
    ):
        load_task(wrong)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_exports_equal_the_trained_model(tuning: str) -> None:
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
    before = build_language_model(typed(tiny_run("dense", "base"))).model.state_dict()
    after = load_file("dense/model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    adapted = {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(4) for name in "qv"}
    assert changed == (adapted if tuning == "lora" else set(after))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say 1."}], tokenize=False)
    assert prompt.endswith("### Instruction:\nSay 1.\n\n### Response:\n")


def test_a_killed_run_that_trains_only_converted_blocks_resumes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tune = tuning_spec("blocks", "2::1")
    run = tiny_run("emoe", "full", {"method": {"tune": {**tune, "head": False}}})
    whole = finish(prepare(run))
    assert set(whole["model"]["trained"]) == {"blocks"}
    capfd.readouterr()
    assert killed_and_resumed(run, 5) == whole
    assert "resumed at step 4" in "".join(capfd.readouterr())


def test_the_held_out_curve_changes_no_other_number_and_a_kill_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tiny_run("emoe", "lora", training={"eval_every": 2})
    with_curve = finish(prepare(run))
    assert (
        killed_and_resumed(run, 5) == with_curve
    )  # in the second epoch, after the checkpoint of step 4
    assert "resumed at step 4" in "".join(capfd.readouterr())
    del run.spec["training"]["eval_every"]
    assert run.spec["training"]["lora"]["dropout"] > 0
    numbers = finish(prepare(run_from_spec(run.spec)))
    points = with_curve.pop("held_out_curve")
    assert {**with_curve, "run_id": ""} == {**numbers, "run_id": ""}
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    losses = [point["loss"] for point in points]
    assert losses[-1] == with_curve["scores"]["dev"]["own"]["loss"]
    assert losses[0] > losses[-1]


def prompts(manager: Any, name: str) -> list[Any]:
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(request.doc_id, request.idx, request.args) for request in task.instances]


def test_questions_are_asked_as_lm_eval_asks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_only("mmlu", monkeypatch)
    ensure_mmlu_dev()
    assert sum(len(path.read_text().splitlines()) for path in FILES.glob("*.jsonl")) == 281
    assert len(list(FILES.glob("mmlu_dev_anatomy*.yaml"))) == 2  # with letters, and with answers
    lines = (FILES / "formal_logic.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    ours = TaskManager(include_path=str(FILES), include_defaults=False)
    asked = prompts(ours, "mmlu_dev_formal_logic_continuation")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(test=rows, dev=rows)
    )
    assert asked == prompts(TaskManager(), "mmlu_formal_logic_continuation")
    assert len(asked) == 4 * len(lines)
    assert asked[0][2][0].endswith("\nAnswer:")
    assert asked[0][2][1] == f" {rows[0]['choices'][0]}"


def test_a_copied_checkout_asks_its_own_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    first.mkdir()
    monkeypatch.chdir(first)
    ensure_mmlu_dev()
    shutil.copytree(first, copy)
    edit_question(first)
    monkeypatch.chdir(copy)
    assert ANATOMY not in asked_about_anatomy()
    # written by version 0.1
    for file in FILES.glob("*.yaml"):
        file.write_text(file.read_text().replace(f": {FILES}/", f": {first / FILES}/"))
    (FILES / "sha256.json").unlink()
    assert ANATOMY not in asked_about_anatomy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("anatomy.jsonl", r"\A.*\n", ""),
        ("mmlu_dev_anatomy.yaml", r"(?s).*", "{"),
        ("mmlu_dev_stem.yaml", r"(?s).*", "{"),
        ("sha256.json", r"(?s).*", "{}"),
        ("sha256.json", r"(?s).*", ""),
    ],
)
def test_damaged_questions_are_written_again(
    name: str,
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_mmlu_dev()
    written = {file: file.read_bytes() for file in FILES.iterdir()}
    ensure_mmlu_dev()
    assert capsys.readouterr().err == ""
    damaged = FILES / name
    text = damaged.read_text()
    damaged.write_text(re.sub(old, new, text, count=1))
    assert damaged.read_text() != text
    ensure_mmlu_dev()
    assert re.fullmatch(rf"warning: {FILES}.* written again\n", capsys.readouterr().err)
    assert {file: file.read_bytes() for file in FILES.iterdir()} == written
    damaged.unlink()
    ensure_mmlu_dev()
    assert {file: file.read_bytes() for file in FILES.iterdir()} == written


ANATOMY = "Where is the heart?"


def edit_question(checkout: Path) -> None:
    file = checkout / FILES / "anatomy.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    edited = {**json.loads(first), "question": ANATOMY}
    file.write_text(json.dumps(edited) + "\n" + "".join(others))


def asked_about_anatomy() -> list[str]:
    entry = EvaluationTask(task=LETTERS, num_fewshot=0)
    task = load_task(entry).tasks[LETTERS]
    return [row["question"] for row in task.test_docs()]


def sample(number: int, choices: list[str], right: int, logs: list[float]) -> dict[str, Any]:
    asked = [("Q", f" {choice}") for choice in choices]
    return {
        "doc_id": number,
        "arguments": asked,
        "filtered_resps": [(log, False) for log in logs],
        "target": right,
    }


@pytest.mark.parametrize(
    ("questions", "nats"),
    [
        # of the right answer over its bytes, in order
        (
            [sample(1, ["5", "four"], 1, [-1.0, -2.0]), sample(0, ["né", "no"], 0, [-6.0, -1.0])],
            [2.0, 0.5],
        ),
        ([sample(0, ["yes", "no"], 1, [0.0, -math.inf])], [None]),  # diverged
        ([sample(0, ["4", "5"], 0, [-1.0, -2.0])], [1.0]),  # short, but no letters
        ([{"doc_id": 0, "acc": 1.0}], None),
        ([sample(0, ["4", "5"], 2, [-1.0, -2.0])], None),  # the target is no choice
        ([sample(0, ["4", "5"], -1, [-1.0, -2.0])], None),
    ],
)
def test_nats_are_those_of_the_right_answer(
    questions: list[dict[str, Any]], nats: list[float | None] | None
) -> None:
    assert nats_per_byte(questions) == nats


@pytest.mark.parametrize("frozen_layers", [0, 2])
def test_choices_that_share_their_prompt_are_as_likely_as_alone(frozen_layers: int) -> None:
    tokenizer = load_tokenizer(typed(tiny_run()).model)
    built = build_language_model(
        typed(tiny_run("emoe", "full", training={"frozen_layers": frozen_layers}))
    )
    model, prefix = built.model.eval(), built.prefix
    texts = [
        ("Name a colour.", " red"),
        ("Name a colour.", " a colour like blue"),
        ("One plus one is", " two"),
    ]
    texts += [
        ("One plus one is", " not three"),
        ("Name a colour.", " green or so"),
        ("Alone", " it stands here"),
    ]
    asked = [
        ((a, b), tokenizer.encode(a), tokenizer.encode(b, add_special_tokens=False))
        for a, b in texts
    ]
    assert len({len(choice) for _, _, choice in asked}) > 2
    settings = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    theirs, ours, again = (
        asked_model._loglikelihood_tokens(asked, disable_tqdm=True)
        for asked_model in (
            HFLM(**settings),
            *(SharedPromptLM(prefix=prefix, **settings) for _ in range(2)),
        )
    )
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({value for value, _ in ours}) == len(texts)
    assert again == ours  # read the frozen layers' output for the questions
    assert len(list(PREFIXES.glob("*.npy"))) == (frozen_layers > 0)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_active_parameters_count_a_fused_up_projection(model_type: str) -> None:
    run = tiny_run("emoe", "full")
    config = run.model_spec["config"] | {"model_type": model_type}  # phi3 fuses gate and up
    run = run_from_spec({**run.spec, "model": {**run.model_spec, "config": config}})
    summary = build_language_model(typed(run)).summary
    num_layers, neurons, width = (
        config[key] for key in ("num_hidden_layers", "intermediate_size", "hidden_size")
    )
    ffn_weights = num_layers * 3 * neurons * width  # gate, up and down
    inactive_weights = (1 - summary["active_neurons"]) * ffn_weights
    assert inactive_weights > 0
    assert summary["active_parameters"] == summary["parameters"] - inactive_weights


def test_choices_do_not_share_the_capacity_of_experts() -> None:
    config = {**tiny_run("emoe", "full").config, "capacity_factor": 0.5}
    run = typed(tiny_run("emoe", "full", {"method": {"config": config}}))
    model = build_language_model(run).model.eval()
    assert emoe.config_of(model).capacity_factor == 0.5
    tokenizer = load_tokenizer(run.model)
    (prompt,) = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    asked = [(("a", str(token)), [prompt], [token, token + 1]) for token in range(20, 28)]
    settings: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 1}
    theirs = HFLM(**settings)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = SharedPromptLM(**settings)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert ours == theirs


def test_many_choices_with_one_prompt_share_rows_of_limited_length() -> None:
    """An empty prompt becomes one token, so all requests of a task such as BLiMP share it."""
    run = typed(tiny_run("emoe", "full"))
    model = build_language_model(run).model.eval()
    tokenizer = load_tokenizer(run.model)
    prompt = [tokenizer.cls_token_id]
    generator = torch.Generator().manual_seed(0)
    asked = []
    for number in range(2000):
        tokens = torch.randint(1000, 2000, (2 + number % 9,), generator=generator).tolist()
        asked.append((("", str(number)), prompt, tokens))
    sizes = []

    def record(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].shape)

    settings: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 64}
    theirs = HFLM(**settings)._loglikelihood_tokens(asked, disable_tqdm=True)
    model.register_forward_pre_hook(record, with_kwargs=True)
    ours = SharedPromptLM(**settings)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert {rows for rows, _ in sizes} == {1}
    assert max(tokens for _, tokens in sizes) <= len(prompt) + MAX_CHOICE_TOKENS
    assert len(sizes) < 20  # the rows are full
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
