"""Write made-up ``metrics.json`` files for real plans.

With them, tests of tables and checks need no training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness.base import RUNS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report import writing
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.results import records as results
from benchmarks.harness.results.code import code_digest
from benchmarks.harness.results.records import Record, read_record
from benchmarks.harness.results.reference import write_reference
from benchmarks.llama.definition import InstructionSpec
from tests.planned import plan

SUBJECTS = {"anatomy": 40, "astronomy": 40, "virology": 20}
_ENVIRONMENT: dict[str, Any] = {
    "python": "3",
    "platform": "Linux",
    "git_commit": "abc",
    "git_dirty": False,
    "code": code_digest(),
    "packages": {"torch": "2"},
    "processor": "CPU",
    "cores": 2,
    "threads": 1,
    "memory_gb": 4.0,
    "gpus": [],
    "fingerprint": {"processor": "CPU", "threads": "1", "package torch": "2"},
}
_EVALUATION = {
    "evaluation_seconds": 1.0,
    "startup_seconds": 0.2,
    "job_seconds": 2.0,
    "peak_memory_mb": 100.0,
}
_TRAINING = {
    **_EVALUATION,
    "evaluation_seconds": 0.7,
    "steps": 2,
    "step_seconds": 0.5,
    "train_seconds": 1.0,
}
_SOURCE = {"from": "random weights", "weights": "0123456789abcdef"}
_CONVERTED = [
    {
        "index": 1,
        "name": "layer.1",
        "neurons": 64,
        "experts": 8,
        "expert_size": 8,
        "top_k": 2,
        "explained": 0.25,
        "seconds": 0.1,
    }
]
# bits that the experts tell about the data set and about the class, and their chance levels
_INFORMATION = (
    "task_information",
    "task_information_chance",
    "task_information_chance_95",
    "class_information",
    "class_information_chance",
    "class_information_chance_95",
)
_ROUTING = {"load_entropy": 0.9, "load_max_over_mean": 2.0, "drop_rate": 0.0}
_MEASURING = {"job_seconds": 1.0, "startup_seconds": 0.1, "peak_memory_mb": 100.0}
_ROWS = {"source": "made up", "rows": 10, "dropped": 1, "labels": {"0": 4, "1": 6}}


def metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Make up the plausible numbers of a run, which are the same at each call.

    ``gain`` is added to the scores, and lowers the losses.
    """
    draw = random.Random(run.id)
    # each kind of benchmark has a key of its own in its specs
    if "settings" in run.spec:
        made = _measured(run, draw)
    elif "finetuning" in run.spec:
        made = _instructions(run, draw, gain)
    elif "reading" in run.spec:
        made = _modularity(run, draw)
    elif "test_envs" in run.spec:
        made = _domains(run, draw, gain)
    elif "tasks" in run.spec["task"]:
        made = _several_texts(run, draw, gain)
    elif "candidates" in run.spec:
        made = _evaluated_text(run, draw, gain)
    else:
        made = _trained_text(run, draw, gain)
    return {"run_id": run.id, **made, "environment": _ENVIRONMENT}


def _trained(trained: dict[str, Any]) -> dict[str, Any]:
    """Make up the model and the costs of a training."""
    model = {
        "parameters": 1000,
        "dense_parameters": 1000,
        "trainable_parameters": 1000,
        "active_parameters": 900,
        "flops_per_token": 1800,
        "active_neurons": 0.5,
        "source": _SOURCE,
        "conversion": [],
        "trained": trained,
    }
    return {"model": model, "cost": _TRAINING}


def _scores(
    metrics_by_set: dict[str, list[str]], base: float, draw: random.Random
) -> dict[str, dict[str, float]]:
    """Draw scores around ``base`` by set and metric, with the losses that belong to them."""
    scores_by_set = {}
    for name, metric_names in metrics_by_set.items():
        numbers = {}
        for metric in metric_names:
            numbers[metric] = min(base + draw.uniform(-0.02, 0.02), 1.0)
        # a better score has a smaller loss; a regression has no loss at the best temperature
        first_metric = metric_names[0]
        first_score = numbers[first_metric]
        numbers["loss"] = 1.5 - first_score
        if first_metric != "pearson_spearman":
            numbers["loss_calibrated"] = 1.4 - first_score
        scores_by_set[name] = numbers
    return scores_by_set


def _metrics_of_task(run: Run) -> dict[str, list[str]]:
    """Return the metrics of the set that a run on a single text set is trained on, by set."""
    task = run.spec["task"]
    return {task["name"]: [task["metric"]]}


def _metrics_of_ood_sets(run: Run) -> dict[str, list[str]]:
    """Return the metrics of a run's OOD sets, by set."""
    return {other["name"]: other["ood_metrics"] for other in run.spec["ood"]}


def _several_texts(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    """Make up the numbers of a training on several text sets at once."""
    tasks = {entry["name"]: [entry["metric"]] for entry in run.spec["task"]["tasks"]}
    others = _metrics_of_ood_sets(run)
    loads = {}
    routing = {}
    if run.spec["method"]["config"]:
        loads = {"1": [10, 10]}
        routing = _ROUTING

    data = {}
    for name in tasks:
        for split in ("train", "dev", "test"):
            data[f"{split}:{name}"] = _ROWS
    for name in others:
        data[f"ood:{name}"] = _ROWS
    return {
        "scores": {
            "dev": _scores(tasks, 0.9 + gain, draw),
            "test": _scores(tasks, 0.88 + gain, draw),
            "ood": _scores(others, 0.75 + gain, draw),
        },
        "dev_curve": [{"epoch": 1.0, "mean_score": 0.9}],
        "kept_epoch": 1.0,
        "probe": {"losses": ["0.7"], "loads": loads},
        "routing": routing,
        **_trained({}),
        "data": data,
    }


def _evaluated_text(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    """Make up the numbers of an evaluation of a chosen model on text sets."""
    tasks = _metrics_of_task(run)
    others = _metrics_of_ood_sets(run)
    ood_scores = _scores(others, 0.75 + gain, draw)
    experts = _experts_of_chosen_model(run)
    used: dict[str, Any] = {"routing": {}, "usage": {}}
    if experts:
        used = _used(experts, [*tasks, *others], draw)
    test_scores = _scores(tasks, 0.88 + gain, draw)

    data = {"test": _ROWS}
    for name in others:
        data[f"ood:{name}"] = _ROWS
    return {
        "scores": {"test": test_scores, "ood": ood_scores},
        **used,
        "chosen": {"run": run.spec["candidates"][0], "learning_rate": 0.1, "variant": ""},
        "cost": _EVALUATION,
        "data": data,
    }


def _trained_text(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    """Make up the numbers of a training on a single text set."""
    config = run.spec["method"]["config"]
    task_name = run.spec["task"]["name"]
    tasks = _metrics_of_task(run)
    others = _metrics_of_ood_sets(run)

    ood_scores = _scores(others, 0.75 + gain, draw)
    used: dict[str, Any] = {"routing": {}, "usage": {}}
    if config:
        used = _used(config["num_experts"], [*tasks, *others], draw)
    dev_scores = _scores(tasks, 0.9 + gain, draw)
    test_scores = _scores(tasks, 0.88 + gain, draw)
    epochs = []
    for epoch, base in ((1.0, 0.85), (2.0, 0.9)):
        scores = _scores(tasks, base + gain, draw)
        epochs.append({"epoch": epoch, **scores[task_name]})
    # only evaluations of the test split and of OOD sets have a loss at the best temperature
    for numbers in (dev_scores[task_name], *epochs):
        numbers.pop("loss_calibrated", None)

    loads = {}
    if config:
        loads = {"1": [10, 10, 10, 10]}
        # the loads of every 100 steps, by layer
        generator = np.random.default_rng(draw.randrange(2**32))
        window_loads = generator.integers(1, 99, (20, config["num_experts"])).tolist()
        window_ends = list(range(100, 2001, 100))
        used["routing"]["windows"] = {"ends": window_ends, "loads": {"1": window_loads}}

    # the scores of the same model with or without experts
    transformed = {}
    used_as = run.spec.get("used_as")
    if used_as:
        scores_by_split = {
            "ood": _scores(others, 0.74 + gain, draw),
            "test": _scores(tasks, 0.87 + gain, draw),
        }
        transformed = {"transformed": {used_as["name"]: {"scores": scores_by_split}}}

    trained = {}
    if run.spec["training"]["lora"]:
        same = {"parameters": 10, "names": "same"}
        trained = {"adapters": same, "head": same}
    data = {"train": _ROWS, "dev": _ROWS, "test": _ROWS}
    for name in others:
        data[f"ood:{name}"] = _ROWS
    return {
        "scores": {"dev": dev_scores, "test": test_scores, "ood": ood_scores},
        "epochs": epochs,
        **transformed,
        "kept_epoch": 2.0,
        "probe": {
            "losses": [repr(0.7 - 0.01 * step) for step in range(8)],
            "logits": {"mean": 0.1, "deviation": 1.0, "rms": 1.1, "projection": 0.5},
            "loads": loads,
        },
        "data": data,
        **used,
        **_trained(trained),
    }


def _experts_of_chosen_model(run: Run) -> int:
    """Make up the number of experts of the model that an evaluation uses; 0 if it is dense."""
    used_as = run.spec.get("used_as", run.spec["trained"])
    method = load_benchmark(run.benchmark).methods()[used_as]
    return 0 if method.kind == "dense" else 8


def _used(experts: int, sets: list[str], draw: random.Random) -> dict[str, Any]:
    """Make up how the tokens of a routed model, and the rows of some sets, use its experts."""
    if len(sets) < 2:
        return {"routing": {**_ROUTING}, "usage": {}}
    routing: dict[str, Any] = {**_ROUTING}
    for name in _INFORMATION:
        routing[name] = draw.uniform(0, 0.1)

    shares = [1 / experts] * experts
    # the first expert is used more than by chance (1), the second one less (-1)
    marks = [0] * experts
    marks[0] = 1
    if experts > 1:
        marks[1] = -1
    usage = {}
    for name in sets:
        usage[name] = {"shares": shares, "marks": marks, "classes": {"0": shares, "1": shares}}
    shared = []
    if experts > 2 and draw.random() < 0.5:
        shared = [2]
    return {"routing": routing, "usage": {"tasks": usage, "shared": shared, "specialised": [0]}}


def _modularity(run: Run, draw: random.Random) -> dict[str, Any]:
    """Make up the measurements of a model's neurons and experts on several text sets."""
    experts = run.spec["method"]["config"]["num_experts"]
    neurons = 8 * experts
    names = [run.spec["task"]["name"]]
    names += [other["name"] for other in run.spec["ood"]]
    used = _used(experts, names, draw)
    # with a single set, there is no information on it
    information = {name: used["routing"][name] for name in _INFORMATION if name in used["routing"]}

    tasks = []
    data = {}
    for name in names:
        tasks += [name] * 10
        data[f"test:{name}"] = {**_ROWS, "dropped": 0, "labels": {"0": 5, "1": 5}}
    return {
        "measured": {
            "experts": {
                "best_quarter": 0.7,
                "best_quarter_mass": 0.3,
                "usage_gini": 0.2,
                "inertia": 0.9,
                "dead": 0.2,
                "kept_top": 0.3,
                "kept_bottom": 0.3,
                "active_top": 0.3,
                "active_bottom": 0.3,
                "dead_top": 0.3,
                "dead_bottom": 0.3,
                **information,
                "shared_experts": 1.0,
                "specialised_experts": 2.0,
            }
        },
        "usage": used["usage"],
        "matrix": {
            "tasks": tasks,
            "neurons": neurons,
            "tokens": list(range(len(tasks))),
            "places": [draw.randrange(neurons) for _ in tasks],
            "values": [draw.uniform(1, 8) for _ in tasks],
        },
        "model": {"source": _SOURCE, "conversion": _CONVERTED},
        "cost": _MEASURING,
        "data": data,
    }


def _measured(run: Run, draw: random.Random) -> dict[str, Any]:
    """Make up the times of a measurement, by candidate."""
    candidates = run.spec["settings"]["candidates"]
    measured = {}
    if run.spec["task"]["name"] == "partition":
        for candidate in candidates:
            measured[candidate] = {"seconds": draw.uniform(0.3, 2.0), "inertia": 0.9}
        return {"measured": measured, "cost": _MEASURING}

    # the others are compared with the dense model
    measured["dense"] = _ratio(1.0)
    for candidate in candidates:
        measured[candidate] = _ratio(draw.uniform(0.3, 2.0))
    return {"measured": measured, "cost": _MEASURING}


def _ratio(ratio: float) -> dict[str, float]:
    """Make up a ratio of times with its range, and the time."""
    return {
        "ratio": ratio,
        "ratio_low": 0.9 * ratio,
        "ratio_high": 1.1 * ratio,
        "seconds": 0.1 * ratio,
    }


def _domains(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    """Make up the numbers of a training on images of several environments."""
    task_name = run.spec["task"]["name"]
    training = run.spec["training"]
    config = run.spec["method"]["config"]
    names = [name for name, _folder in run.spec["task"]["environments"]]

    last_step = training["steps"] - 1
    evaluated_steps = [*range(0, last_step, training["eval_every"]), last_step]
    records: list[dict[str, Any]] = []
    for step in evaluated_steps:
        record = {"step": step, "epoch": step / 10, "loss": 1.0}
        for env in range(len(names)):
            for part in ("in", "out"):
                record[f"env{env}_{part}_acc"] = 0.5 + gain + draw.uniform(0, 0.3)
        records.append(record)

    held_out = {}
    for env in run.spec["test_envs"]:
        held_out[names[env]] = {"accuracy": records[-1][f"env{env}_in_acc"]}
    rows = {"source": "made up", "rows": 8, "dropped": 0, "labels": {"cat": 4, "dog": 4}}
    data = {}
    for name in names:
        data[f"{name} in"] = rows
        data[f"{name} out"] = rows
    return {
        "records": records,
        "scores": {
            "train": {task_name: {"loss": 1.0}},
            "dev": {task_name: {"accuracy": 0.8}},
            "test": held_out,
        },
        "confusion": {name: [[3, 1], [0, 4]] for name in names},
        "classes": ["cat", "dog"],
        "routing": _routing_of_images(config["num_experts"], len(names), draw) if config else {},
        "data": data,
        **_trained({}),
    }


def _routing_of_images(experts: int, num_environments: int, draw: random.Random) -> dict[str, Any]:
    """Make up how images of two classes and several environments use the experts of layer 8."""
    # by environment, class and expert
    loads = []
    for _environment in range(num_environments):
        loads_of_environment = []
        for _class in range(2):
            loads_of_environment.append([draw.randrange(9) for _expert in range(experts)])
        loads.append(loads_of_environment)
    return {
        "class_information": 0.1,
        "class_information_chance": 0.03,
        "class_information_chance_95": 0.05,
        "environment_information": 0.01,
        "environment_information_chance": 0.01,
        "environment_information_chance_95": 0.02,
        "load_entropy": 0.9,
        "chance": {"8": {"class": [0.031, 0.052], "environment": [0.011, 0.022]}},
        "loads": {"8": loads},
    }


def _instructions(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    """Make up the numbers of a model that is tuned on instructions, or only evaluated."""
    tasks = {}
    for entry in InstructionSpec.model_validate(run.spec).evaluation.tasks:
        continues = "continuation" in entry.task
        tasks[entry.title] = _answered(draw, gain, with_nats=continues)

    config = run.spec["method"]["config"]
    routing: dict[str, Any] = {}
    if config:
        experts = config["num_experts"]
        routing = {**_ROUTING, "shares": {"16": [1 / experts] * experts}}
    curve: list[float] = []
    is_tuned = bool(run.spec["learning_rate"])
    if is_tuned:
        curve = [3.0, 2.5, 2.2]
    data = {
        "rows": 8,
        "tokens": 900,
        "learned_tokens": 300,
        "longest": 128,
        "source": "made up",
        "template": "alpaca",
        "truncated_responses": 2,
        "truncated_tokens": 31,
        "broken_rows": 1,
    }
    answer = {
        "instruction": "Name a colour.",
        "input": "",
        "reference": "Red.",
        "answer": "Blue. " * 100,
    }
    return {
        "scores": {
            "dev": {run.spec["task"]["name"]: {"loss": 2.0 - gain - draw.uniform(0, 0.01)}},
            "test": {name: task["scores"] for name, task in tasks.items()},
        },
        "tasks": tasks,
        "curve": curve,
        "answers": [answer],
        "routing": routing,
        "data": {"train": data, "held_out": data},
        **_trained({}),
    }


def _answered(draw: random.Random, gain: float, *, with_nats: bool) -> dict[str, Any]:
    """Make up the answers to the questions of :data:`SUBJECTS`, and their scores.

    ``with_nats`` adds the loss of the right answer to each question.
    """
    # a digit for each question: 1 for a right answer
    correct = {}
    for name, count in SUBJECTS.items():
        digits = [str(int(draw.random() < 0.4 + gain)) for _question in range(count)]
        correct[name] = "".join(digits)
    subjects = {name: _share(digits) for name, digits in correct.items()}
    shares = [subject["acc"] for subject in subjects.values()]
    scores = {
        "accuracy": _share("".join(correct.values()))["acc"],
        "accuracy_macro": sum(shares) / len(shares),
    }
    answered = {
        "scores": scores,
        "questions": sum(SUBJECTS.values()),
        "metric": "acc",
        "categories": {
            "stem": subjects["astronomy"],
            "other": _share(correct["anatomy"] + correct["virology"]),
        },
        "subjects": subjects,
        "correct": correct,
    }
    if not with_nats:
        return answered

    nats = {}
    all_nats = []
    for name, count in SUBJECTS.items():
        nats[name] = [draw.uniform(1, 2) - gain for _question in range(count)]
        all_nats += nats[name]
    scores["accuracy_norm"] = 0.5
    scores["nats_per_byte"] = sum(all_nats) / len(all_nats)
    return {**answered, "nats_per_byte": nats}


def _share(digits: str) -> dict[str, float]:
    """Return the share of right answers, and the number of questions."""
    return {"acc": digits.count("1") / len(digits), "questions": len(digits)}


def write(
    folder: Path,
    suite: str = "mini",
    gains: dict[str, float] | None = None,
    benchmarks: Iterable[str] = ("glue",),
) -> list[Run]:
    """Write the runs of a suite below ``folder``; ``gains`` shifts all scores of a method."""
    runs = plan([*benchmarks], suite)
    write_runs(runs, gains, folder)
    return runs


def write_runs(runs: list[Run], gains: dict[str, float] | None = None, folder: Path = RUNS) -> None:
    """Write made-up numbers of runs below ``folder``."""
    if gains is None:
        gains = {}
    for run in runs:
        gain = gains.get(run.spec["method"]["name"], 0.0)
        path = folder / run.folder / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics(run, gain)))


def records(runs: Iterable[Run]) -> list[Record]:
    """Read the records of finished runs."""
    return [read_record(run) for run in runs]


def collect(suite: Suite) -> None:
    """Collect the records of all benchmarks of a suite."""
    for benchmark in suite.settings.benchmarks:
        for part in suite.sets_with_records(benchmark):
            results.collect(suite, benchmark, part)


def bless(suite: Suite, leave_out: Iterable[Run] = ()) -> None:
    """Write the finished runs of a suite as the reference, without some of them."""
    for name in suite.settings.benchmarks:
        blessed = [run for run in suite.runs_of(name) if run not in leave_out]
        write_reference(suite.name, name, records(blessed), "0123456789" * 4)


def claim_numbers(suite: Suite) -> dict[str, pd.DataFrame]:
    """Compute the claim numbers of a suite's finished runs, by benchmark."""
    numbers = {}
    for name in claimed_benchmarks(suite):
        numbers[name] = writing.claim_numbers(name, records(suite.runs_of(name)))
    return numbers


def edit(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the recorded numbers of a run."""
    content = json.loads(run.metrics_file.read_text())
    change(content)
    run.metrics_file.write_text(json.dumps(content))
