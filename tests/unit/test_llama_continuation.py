"""MMLU-dev as continuations: lm-eval's own prompts, and how likely the right answers are."""

from __future__ import annotations

import json
import math
from typing import Any

import datasets
import pytest

from benchmarks.harness.base import PREFIXES, QUESTIONS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.models.build import build_language_model
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.llama.evaluation import nats_per_byte
from benchmarks.llama.outcomes import InstructionOutcomes
from benchmarks.llama.presentation import tests as paired_tests
from benchmarks.llama.questions import ensure_mmlu_dev
from tests.fake_runs import write_runs
from tests.instruction_runs import offer_only, tiny_run
from tests.planned import plan

pytestmark = pytest.mark.usefixtures("here")
TASK = {"task": "mmlu_dev_continuation", "num_fewshot": 0, "limit": 1}
FILES = QUESTIONS / "mmlu_dev"


def prompts(manager: Any, name: str) -> list[Any]:
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(request.doc_id, request.idx, request.args) for request in task.instances]


def test_questions_are_asked_as_lm_eval_asks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    offer_only("mmlu", monkeypatch)
    ensure_mmlu_dev(FILES)
    assert sum(len(path.read_text().splitlines()) for path in FILES.glob("*.jsonl")) == 281
    assert len(list(FILES.glob("mmlu_dev_anatomy*.yaml"))) == 2  # with letters, and with answers
    lines = (FILES / "formal_logic.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    ours = TaskManager(include_path=str(FILES), include_defaults=False)
    asked = prompts(ours, "mmlu_dev_formal_logic_continuation")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(test=rows, dev=rows))
    assert asked == prompts(TaskManager(), "mmlu_formal_logic_continuation")
    assert len(asked) == 4 * len(lines)
    assert asked[0][2][0].endswith("\nAnswer:")
    assert asked[0][2][1] == f" {rows[0]['choices'][0]}"


def sample(number: int, choices: list[str], right: int, logs: list[float]) -> dict[str, Any]:
    asked = [("Q", f" {choice}") for choice in choices]
    return {"doc_id": number, "arguments": asked, "filtered_resps": [(log, False) for log in logs], "target": right}


@pytest.mark.parametrize(
    ("samples", "nats"),
    [
        # of the right answer over its bytes, in order
        ([sample(1, ["5", "four"], 1, [-1.0, -2.0]), sample(0, ["né", "no"], 0, [-6.0, -1.0])], [2.0, 0.5]),
        ([sample(0, ["yes", "no"], 1, [0.0, -math.inf])], [None]),  # diverged
        ([sample(0, ["A", "B"], 0, [-1.0, -2.0])], None),  # letters
        ([{"doc_id": 0, "acc": 1.0}], None),
    ],
)
def test_nats_are_those_of_the_right_answer(samples: list[dict[str, Any]], nats: list[float | None] | None) -> None:
    assert nats_per_byte(samples) == nats


def test_nats_are_paired_by_question_and_less_is_better() -> None:
    planned = plan(["llama"], "smoke")
    specs = [{**run.spec, "evaluation": {**run.spec["evaluation"], "tasks": [TASK]}} for run in planned]
    runs = [run_from_spec({**spec, "seed": seed}) for spec in specs for seed in (0, 1)]
    write_runs(runs, {"emoe": 0.3})
    outcomes = InstructionOutcomes(load_benchmark("llama"), runs)
    row = (
        paired_tests(outcomes, "nats_per_byte")
        .frame.set_index(["tuning", "method", "against"])
        .loc[("lora", "emoe", "dense")]
    )
    assert (row["questions"], row["seeds"], row["verdict"]) == (100, 2, "better")
    means = outcomes.numbers("test", "nats_per_byte").groupby(["tuning", "method"]).mean()
    assert row["delta"] == pytest.approx(means["lora", "emoe"] - means["lora", "dense"])


@pytest.mark.parametrize("frozen_layers", [0, 2])
def test_choices_that_share_their_prompt_are_as_likely_as_alone(frozen_layers: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from benchmarks.llama.shared_prompt import SharedPromptLM

    tokenizer = load_tokenizer(tiny_run().spec["model"])
    built = build_language_model(tiny_run("emoe", "full", training={"frozen_layers": frozen_layers}).spec)
    model, prefix = built.model.eval(), built.prefix
    texts = [("Name a colour.", " red"), ("Name a colour.", " a colour like blue"), ("One plus one is", " two")]
    texts += [("One plus one is", " not three"), ("Name a colour.", " green or so"), ("Alone", " it stands here")]
    asked = [((a, b), tokenizer.encode(a), tokenizer.encode(b, add_special_tokens=False)) for a, b in texts]
    assert len({len(choice) for _, _, choice in asked}) > 2
    settings = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    theirs, ours, again = (
        asked_model._loglikelihood_tokens(asked, disable_tqdm=True)
        for asked_model in (HFLM(**settings), *(SharedPromptLM(prefix=prefix, **settings) for _ in range(2)))
    )
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({value for value, _ in ours}) == len(texts)
    assert again == ours  # what the frozen layers make of the questions is read
    assert len(list(PREFIXES.glob("*.npy"))) == (frozen_layers > 0)
