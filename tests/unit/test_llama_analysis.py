"""Test tables, figures and verdicts of instruction tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.report.claims import Comparison
from benchmarks.harness.report.evidence import find_evidence
from benchmarks.harness.results.records import read_record
from benchmarks.llama.outcomes import InstructionOutcomes
from benchmarks.llama.presentation import paper_table, results, verdicts
from benchmarks.llama.presentation import tests_table as paired_tests
from emoe.config import resolve_layers
from tests.fake_runs import edit, records, write_runs
from tests.planned import edited_part, paper_runs, plan, specs

pytestmark = pytest.mark.usefixtures("here")
LLAMA = load_benchmark("llama")
TASK, ANSWERS = "mmlu_dev (0-shot, first 2)", "mmlu_dev_continuation (0-shot)"

METHODS = ("dense", "emoe")


@pytest.fixture
def runs() -> list[Run]:
    """Write the smoke suite's runs with both forms of questions and a second seed of LoRA; EMoE is better."""
    tasks = [("mmlu_dev", 2), ("mmlu_dev_continuation", None)]
    evaluation = {
        "tasks": [{"task": name, "num_fewshot": 0, "limit": limit} for name, limit in tasks]
    }
    planned = []
    for run in plan(["llama"], "smoke"):
        spec = {**run.spec, "evaluation": {**run.spec["evaluation"], **evaluation}}
        seeds = (0, 1) if spec["finetuning"] == "lora" else (0,)
        planned += [run_from_spec({**spec, "seed": seed}) for seed in seeds]
    write_runs(planned, {"emoe": 0.3})
    return planned


def test_drawn_questions_have_titles_a_note_and_the_papers_difference() -> None:
    """Only MMLU's letters, which the paper asked, have a difference to the paper."""
    entries = [
        {"task": name, "num_fewshot": 0, "limit": None, "draw": 2000}
        for name in ("mmlu", "mmlu_continuation")
    ]
    drawn = []
    for run in plan(["llama"], "smoke"):
        model = {**run.spec["model"], "name": "llama2-7b"}
        evaluation = {**run.spec["evaluation"], "tasks": entries}
        drawn.append(run_from_spec({**run.spec, "model": model, "evaluation": evaluation}))
    write_runs(drawn, {})
    outcomes = outcomes_of(drawn)
    text = results(outcomes).markdown()
    assert "MMLU, continuations (nat/byte)" in text
    assert "MMLU (0-shot, 2,000 drawn) has " in text  # in the caption
    assert "Drawn questions are the same for all runs" in text
    assert "MMLU-dev has" not in text
    ours = paper_table(outcomes).frame.dropna(subset="difference")
    assert set(ours["eval_task_title"]) == {"MMLU (0-shot, 2,000 drawn)"}


def of(
    runs: list[Run], tuning: str, method: str, number: Callable[[dict[str, Any]], float]
) -> list[float]:
    """Return a number of the runs of a cell, by seed."""
    cell = (tuning, method)
    of_cell = [run for run in runs if (run.spec["finetuning"], run.spec["method"]["name"]) == cell]
    return [number(read_record(run).metrics.scores or {}) for run in of_cell]


def outcomes_of(runs: list[Run]) -> InstructionOutcomes:
    return InstructionOutcomes(LLAMA, records(runs))


def accuracy(scores: dict[str, Any]) -> float:
    return float(scores["test"][TASK]["accuracy"])


def loss(scores: dict[str, Any]) -> float:
    return float(scores["dev"]["alpaca_demo"]["loss"])


def test_results_separate_the_cost_of_conversion_and_the_gain_of_tuning(runs: list[Run]) -> None:
    table = results(outcomes_of(runs))
    rows = table.frame.set_index(["tuning", "method"])
    assert list(rows.index) == [
        (tuning, method) for tuning in ("base", "lora", "full") for method in METHODS
    ]
    assert rows["n"].tolist() == [1, 1, 2, 2, 1, 1]
    values = pd.Series(of(runs, "lora", "emoe", accuracy))
    assert rows.loc[("lora", "emoe"), f"{TASK} accuracy"] == pytest.approx(values.mean())
    assert rows.loc[("lora", "emoe"), f"{TASK} accuracy std"] == pytest.approx(values.std())
    assert rows.loc[("lora", "emoe"), "baseline delta"] == pytest.approx(-0.3, abs=0.02)
    (dense,), (routed,) = (of(runs, "base", method, loss) for method in METHODS)
    assert rows.loc[("base", "emoe"), "baseline delta"] == pytest.approx(routed - dense)
    assert rows.loc["base", "untuned delta"].isna().all()
    gain = sum(of(runs, "lora", "dense", loss)) / 2 - dense
    assert rows.loc[("lora", "dense"), "untuned delta"] == pytest.approx(gain)
    assert (
        rows.loc[("lora", "dense"), "untuned low"]
        < gain
        < rows.loc[("lora", "dense"), "untuned high"]
    )
    assert "has 100 questions" in table.markdown()


@pytest.mark.parametrize(("metric", "task"), [("accuracy", TASK), ("nats_per_byte", ANSWERS)])
def test_tests_pair_questions_and_average_seeds(runs: list[Run], metric: str, task: str) -> None:
    outcomes = outcomes_of(runs)
    frame = paired_tests(outcomes, metric).frame
    frame = frame[(frame["against"] == "dense") & (frame["eval_task"] == task)].set_index("tuning")
    assert frame["questions"].tolist() == [100] * 3
    assert frame["seeds"].to_dict() == {"base": 1, "lora": 2, "full": 1}
    dense, routed = (
        of(runs, "lora", method, lambda scores: scores["test"][task][metric]) for method in METHODS
    )
    assert frame.loc["lora", "delta"] == pytest.approx((sum(routed) - sum(dense)) / 2)
    assert frame.loc["lora", "verdict"] == "better"  # a higher accuracy, or a lower likelihood
    assert any(
        "LoRA, against dense: EMoE: held-out loss -0." in sentence
        for sentence in verdicts(outcomes)
    )


def test_claims_pair_questions_and_average_seeds_as_the_table_does(runs: list[Run]) -> None:
    outcomes = outcomes_of(runs)
    table = paired_tests(outcomes, "accuracy").frame
    (row,) = table[
        (table["against"] == "dense") & (table["eval_task"] == TASK) & (table["tuning"] == "lora")
    ].itertuples()
    names = {
        "benchmark": "llama",
        "method": "emoe",
        "against": "dense",
        "tunings": ["lora"],
        "direction": "higher",
    }
    questions = Comparison(**names, domain="questions", metric="accuracy", questions=[TASK])
    evidence = find_evidence(outcomes.claim_numbers(), questions)
    assert evidence is not None
    assert (evidence.difference.n, evidence.num_incomplete) == (row.questions, 0)
    assert evidence.difference.mean == pytest.approx(row.delta)
    losses = find_evidence(
        outcomes.claim_numbers(), Comparison(**names, domain="held_out", metric="loss")
    )
    assert losses is not None
    assert losses.difference.n == row.seeds


def test_the_papers_numbers_are_beside_ours(runs: list[Run]) -> None:
    frame = paper_table(outcomes_of(runs)).frame
    assert frame["value"].dropna().tolist() == pytest.approx(
        [0.5618, 0.5711, 0.4696, 0.4758, 0.4650, 0.4808]
    )
    assert frame["difference"].isna().all()  # MMLU-dev is not MMLU
    published = [run for run in paper_runs("llama") if run.spec["seed"] == 0]
    write_runs(published)
    frame = paper_table(outcomes_of(published)).frame
    row = frame[
        (frame["model"] == "llama2-7b") & (frame["tuning"] == "full") & (frame["method"] == "dense")
    ]
    assert set(row["eval_task_title"]) == {"MMLU (5-shot)", "MMLU (0-shot)"}
    assert (row["difference"] == row["ours"] - row["value"]).all()


def test_rows_of_the_paper_table_name_their_set_if_there_are_several(runs: list[Run]) -> None:
    of_another_set = []
    for run in runs:
        task = {**run.spec["task"], "name": "alpaca"}
        of_another_set.append(run_from_spec({**run.spec, "task": task}))
    write_runs(of_another_set)
    table = paper_table(outcomes_of([*runs, *of_another_set]))
    assert table.keys["task_title"] == "Set"
    is_ours = table.frame["ours"].notna()
    titles = {LLAMA.tasks[run.task].title for run in (*runs, *of_another_set)}
    assert len(titles) == 2
    assert set(table.frame["task_title"][is_ours]) == titles
    assert not table.frame[list(table.keys)].duplicated().any()
    assert set(table.frame["task_title"][~is_ours]) == {""}  # the paper's set is unknown


def test_only_the_papers_numbers_of_experts_have_a_difference() -> None:
    """The paper's LoRA value is for k/N = 1/4. Its k with full tuning is unknown."""
    runs = [run for run in paper_runs("llama") if run.spec["seed"] == 0]
    write_runs(runs)
    frame = paper_table(outcomes_of(runs)).frame
    ours = frame[(frame["model"] == "llama2-7b") & frame["ours"].notna() & frame["value"].notna()]
    compared = {
        (tuning, variant.split("-")[0]): rows["difference"].notna().tolist()
        for (tuning, variant), rows in ours[ours["method"] == "emoe"].groupby(["tuning", "variant"])
    }
    assert compared == {
        ("lora", "k0.25"): [True, True],  # 5 shots and none
        ("lora", "k0.5"): [False, False],
        ("full", "k0.25"): [True, True],
        ("full", "k0.5"): [True, True],
    }
    assert ours.loc[ours["method"] == "dense", "difference"].notna().all()


@pytest.mark.parametrize("template", ["random", "alpaca"])
def test_a_tuned_run_is_compared_with_the_untuned_run_of_its_template(template: str) -> None:
    """A random template depends on the seed, so only a run of the same seed has the same one."""
    planned = specs(
        LLAMA,
        edited_part(
            "llama",
            "smoke",
            {
                "data.template": template,
                "grid": [
                    {"finetuning": ["base"], "seed": [0, 1]},
                    {"finetuning": ["lora"], "learning_rate": [0.1], "seed": [1, 2]},
                ],
            },
        ),
    )
    runs = [run_from_spec(spec | {"files": {}}) for spec in planned]
    write_runs(runs)
    outcomes = outcomes_of(runs)
    gains = outcomes.loss_differences("untuned").set_index(["tuning", "method"])["delta"]
    for method in METHODS:
        untuned = of(runs, "base", method, loss)
        tuned = of(runs, "lora", method, loss)
        gain = sum(tuned) / 2 - sum(untuned) / 2
        if template == "random":
            # only the seed 1 has both
            gain = tuned[0] - untuned[1]
        assert gains["lora", method] == pytest.approx(gain)
    caption = results(outcomes).caption
    assert ("The seed draws the prompt template" in caption) == (template == "random")
    # answers to questions do not depend on the template
    tests = outcomes.tests["accuracy"]
    seeds = tests.loc[tests["against"] == "untuned", "seeds"]
    assert set(seeds) == {2}


def test_the_learning_rate_with_the_lowest_loss_is_chosen_and_never_one_that_diverged(
    runs: list[Run],
) -> None:
    dense = next(run.spec for run in runs if run.spec["finetuning"] == "lora")
    others = [run_from_spec({**dense, "learning_rate": rate}) for rate in (0.5, 0.6)]
    write_runs(others, {"dense": -0.5})
    edit(others[1], lambda content: content["scores"]["dev"]["alpaca_demo"].update(loss=None))
    outcomes = outcomes_of([*runs, *others])
    assert {run.id for run in outcomes.runs} == {run.id for run in runs}


@pytest.fixture
def diverging(runs: list[Run]) -> Run:
    """Return the second run of EMoE with LoRA, of which a test can remove the loss."""
    cell = ("lora", "emoe", 1)
    (found,) = [run for run in runs if (run.spec["finetuning"], run.method, run.seed) == cell]
    return found


def compare(outcomes: InstructionOutcomes, **domain: Any) -> Any:
    """Return the evidence of a claim that compares EMoE with dense, both with LoRA."""
    names = {"benchmark": "llama", "method": "emoe", "against": "dense", "tunings": ["lora"]}
    comparison = Comparison(**names, direction="higher", **domain)
    return find_evidence(outcomes.claim_numbers(), comparison)


def test_the_loss_of_a_seed_that_diverged_is_left_out_nowhere(
    runs: list[Run], diverging: Run
) -> None:
    """Seeds that did not diverge are not a fair sample, so neither their mean nor a test is made."""
    edit(diverging, lambda content: content["scores"]["dev"]["alpaca_demo"].update(loss=None))
    outcomes = outcomes_of(runs)
    table = results(outcomes)
    rows = table.frame.set_index(["tuning", "method"])
    assert rows.loc[("lora", "emoe"), "n"] == 2
    numbers = ["loss", "loss std", "baseline delta", "untuned delta"]
    assert rows.loc[("lora", "emoe"), numbers].isna().all()
    assert rows.loc[("lora", "dense"), ["loss", "loss std", "untuned delta"]].notna().all()
    assert "is a dash if the model of a seed diverged. " in table.caption
    evidence = compare(outcomes, domain="held_out", metric="loss")
    assert (evidence.num_diverged, evidence.difference.n) == (1, 1)
    (sentence,) = [text for text in verdicts(outcomes) if "LoRA, against dense: EMoE:" in text]
    assert "held-out loss without a difference, because a model diverged; by tuning: dense" in (
        sentence
    )
    assert "nan" not in sentence


def test_the_likelihoods_of_a_seed_that_diverged_are_left_out_nowhere(
    runs: list[Run], diverging: Run
) -> None:
    def diverge(content: dict[str, Any]) -> None:
        content["scores"]["test"][ANSWERS]["nats_per_byte"] = None
        result = content["tasks"][ANSWERS]
        result["scores"]["nats_per_byte"] = None
        for values in result["nats_per_byte"].values():
            values[:] = [None] * len(values)

    edit(diverging, diverge)
    outcomes = outcomes_of(runs)
    table = results(outcomes)
    rows = table.frame.set_index(["tuning", "method"])
    assert pd.isna(rows.loc[("lora", "emoe"), f"{ANSWERS} nats_per_byte"])
    assert "is a dash if the model of a seed diverged. " in table.caption
    tests = paired_tests(outcomes, "nats_per_byte").frame
    (test,) = tests[(tests["against"] == "dense") & (tests["tuning"] == "lora")].itertuples()
    assert (test.questions, test.seeds, test.verdict) == (100, 2, "–")
    assert pd.isna(test.delta)
    evidence = compare(outcomes, domain="questions", metric="nats_per_byte", questions=[ANSWERS])
    assert evidence.num_diverged == 100
    assert not any("nan" in text for text in verdicts(outcomes))


BLOCK = {
    "model": ["tiny-llama"],
    "task": ["alpaca_demo"],
    "finetuning": ["lora"],
    "method": ["dense"],
    "seed": [0],
}
TRAINS = {**BLOCK, "finetuning": ["full"], "learning_rate": [0.1]}
EXPERTS = {**TRAINS, "method": ["emoe"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [BLOCK]}, "the finetuning 'lora' trains, so it needs 'learning_rate'"),
        ({"grid": [{**BLOCK, "finetuning": ["lorra"]}]}, "did you mean 'lora'"),
        (
            {"data.template": "alpacca"},
            r"data.template' is 'alpacca', which .* did you mean 'alpaca'",
        ),
        (
            {"grid": [TRAINS], "finetuning": {"full": {"quantize": "nf4"}}},
            "weights in 4 bits cannot be trained",
        ),
        (
            {"grid": [TRAINS], "finetuning": {"full": {"layers": "all"}}},
            "'layers' is required with 'train: blocks' or 'quantize'",
        ),
        (
            {"grid": [EXPERTS | {"finetuning": ["blocks"], "layers": ["28::2"]}]},
            r"smoke.yaml: 'benchmarks.llama.grid\[0\]': method 'emoe' converts the layers '28::2', "
            r"but the finetuning 'blocks' trains the blocks '2::1'; set 'layers' of the method to "
            r"'2::1', or 'finetuning.blocks.layers' to '28::2'; the layers have to fit for every ",
        ),
        (
            {"grid": [EXPERTS | {"finetuning": ["qlora"], "layers": ["28::2"]}]},
            "the finetuning 'qlora' leaves unquantised only 'last-half:4'; .* to '28::2'; ",
        ),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        specs(
            LLAMA,
            edited_part(
                "llama",
                "smoke",
                change if "grid" not in change else {"grid_defaults": {}, **change},
            ),
        )


@pytest.mark.parametrize(
    ("finetuning", "layers"),
    [
        ("blocks", "2::1"),
        ("blocks", "2:"),  # another word for the same layers
        ("qlora", "last-half:4"),
        ("qlora", "last-half:8"),  # fewer than are unquantised
    ],
)
def test_converted_layers_that_are_trained_or_unquantised_are_planned(
    finetuning: str, layers: str
) -> None:
    block = {**EXPERTS, "method": list(METHODS), "finetuning": [finetuning], "layers": [layers]}
    part = edited_part("llama", "smoke", {"grid_defaults": {}, "grid": [block]})
    assert [spec["method"]["name"] for spec in specs(LLAMA, part)] == list(METHODS)


def test_the_papers_grid_is_as_published() -> None:
    published = paper_runs("llama")
    for spec in (run.spec for run in published):
        training = spec["training"]
        if spec["finetuning"] == "full":
            schedule = {"epochs": 3, "batch_size": 128, "schedule": "cosine", "warmup": 0.03}
            assert training | schedule == training
            assert (spec["learning_rate"], spec["data"]["max_length"]) == (2e-5, 512)
        if spec["finetuning"] == "lora":
            assert training["lora"] | {"rank": 8, "alpha": 16, "dropout": 0.05} == training["lora"]
            assert training["lora"]["targets"]["llama"] == ["q_proj", "v_proj"]
    parallel = [
        (run.resources["processes"], run.resources["parallel"])
        for run in published
        if run.spec["learning_rate"]
    ]
    assert set(parallel) == {(8, "fsdp")}
    configs = [(run.spec["model"]["name"], run.spec["method"]["config"]) for run in published]
    configs = [(name, config) for name, config in configs if config]
    cells = {
        (name, config["num_experts"], config["top_k"], config["score"]) for name, config in configs
    }
    assert cells == {
        ("llama2-7b", 64, 16, "gate"),
        ("llama2-7b", 64, 32, "gate"),
        ("llama-30b", 256, 64, "gate"),
    }
    depths = {"llama2-7b": 32, "llama-30b": 60}
    assert {
        (name, tuple(resolve_layers(config["layers"], depths[name]))) for name, config in configs
    } == {
        ("llama2-7b", (28, 30)),  # the authors' commands
        ("llama2-7b", (16, 20, 24, 28)),
        ("llama-30b", tuple(range(45, 60, 2))),  # their words
        ("llama-30b", tuple(range(30, 60, 4))),
    }
