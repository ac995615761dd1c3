"""Write made-up ``metrics.json`` files for real plans, so that tables and checks need no training."""

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
}
_ENVIRONMENT |= {
    "packages": {"torch": "2"},
    "processor": "CPU",
    "cores": 2,
    "threads": 1,
    "memory_gb": 4.0,
    "gpus": [],
}
_ENVIRONMENT |= {"fingerprint": {"processor": "CPU", "threads": "1", "package torch": "2"}}
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
    {"index": 1, "name": "layer.1", "neurons": 64, "experts": 8, "expert_size": 8, "top_k": 2}
    | {"explained": 0.25, "seconds": 0.1}
]
_ROUTING = {"load_entropy": 0.9, "load_max_over_mean": 2.0, "drop_rate": 0.0}
_MEASURING = {"job_seconds": 1.0, "startup_seconds": 0.1, "peak_memory_mb": 100.0}
_ROWS = {"source": "made up", "rows": 10, "dropped": 1, "labels": {"0": 4, "1": 6}}


def metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Make up plausible numbers; the same for the same run."""
    makers = {
        "settings": _measured,
        "finetuning": _instructions,
        "reading": _modularity,
        "test_envs": _domains,
    }
    make = next((maker for key, maker in makers.items() if key in run.spec), _text)
    return {"run_id": run.id, **make(run, random.Random(run.id), gain), "environment": _ENVIRONMENT}


def _trained(trained: dict[str, Any]) -> dict[str, Any]:
    model = dict.fromkeys(("parameters", "dense_parameters", "trainable_parameters"), 1000)
    model |= {"active_parameters": 900, "flops_per_token": 1800}
    model |= {"active_neurons": 0.5, "source": _SOURCE, "conversion": [], "trained": trained}
    return {"model": model, "cost": _TRAINING}


def _text(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    task, config = run.spec["task"], run.spec["method"]["config"]
    several = task.get("tasks")
    tasks = {entry["name"]: [entry["metric"]] for entry in several or [task]}
    others = {other["name"]: other["ood_metrics"] for other in run.spec["ood"]}

    def scores(base: float, sets: dict[str, list[str]]) -> dict[str, dict[str, float]]:
        made = {}
        for name, keys in sets.items():
            made[name] = {key: min(base + gain + draw.uniform(-0.02, 0.02), 1.0) for key in keys}
            # a better score has a smaller loss; a regression has no loss at the best temperature
            score = made[name][keys[0]]
            made[name]["loss"] = 1.5 - score
            if keys[0] != "pearson_spearman":
                made[name]["loss_calibrated"] = 1.4 - score
        return made

    ood_names = [f"ood:{name}" for name in others]
    if several:
        parts = [f"{part}:{name}" for name in tasks for part in ("train", "dev", "test")]
        return {
            "scores": {
                "dev": scores(0.9, tasks),
                "test": scores(0.88, tasks),
                "ood": scores(0.75, others),
            },
            "dev_curve": [{"epoch": 1.0, "mean_score": 0.9}],
            "kept_epoch": 1.0,
            "probe": {"losses": ["0.7"], "loads": {"1": [10, 10]} if config else {}},
            "routing": _ROUTING if config else {},
            **_trained({}),
            "data": dict.fromkeys([*parts, *ood_names], _ROWS),
        }
    ood = scores(0.75, others)
    experts = config["num_experts"] if config else _experts_of_chosen_model(run)
    used: dict[str, Any] = {"routing": {}, "usage": {}}
    if experts:
        used = _used(experts, [*tasks, *others], draw)
    data = dict.fromkeys(["test", *ood_names], _ROWS)
    if "candidates" in run.spec:
        chosen = {"run": run.spec["candidates"][0], "learning_rate": 0.1, "variant": ""}
        evaluated = {"scores": {"test": scores(0.88, tasks), "ood": ood}, **used, "chosen": chosen}
        return evaluated | {"cost": _EVALUATION, "data": data}
    name = task["name"]
    dev = scores(0.9, tasks)
    made: dict[str, Any] = {"scores": {"dev": dev, "test": scores(0.88, tasks), "ood": ood}}
    made["epochs"] = [
        {"epoch": e, **scores(base, tasks)[name]} for e, base in ((1.0, 0.85), (2.0, 0.9))
    ]
    # only evaluations of the test split and of OOD sets have a loss at the best temperature
    for numbers in (dev[name], *made["epochs"]):
        numbers.pop("loss_calibrated", None)
    if config:
        loads = (
            np.random.default_rng(draw.randrange(2**32))
            .integers(1, 99, (20, config["num_experts"]))
            .tolist()
        )
        used["routing"]["windows"] = {"ends": [*range(100, 2001, 100)], "loads": {"1": loads}}
    if used_as := run.spec.get("used_as"):
        made["transformed"] = {
            used_as["name"]: {"scores": {"ood": scores(0.74, others), "test": scores(0.87, tasks)}}
        }
    same = {"parameters": 10, "names": "same"}
    probe: dict[str, Any] = {"losses": [repr(0.7 - 0.01 * step) for step in range(8)]}
    probe |= {"logits": {"mean": 0.1, "deviation": 1.0, "rms": 1.1, "projection": 0.5}}
    probe |= {"loads": {"1": [10, 10, 10, 10]} if config else {}}
    made |= {"kept_epoch": 2.0, "probe": probe, "data": {"train": _ROWS, "dev": _ROWS, **data}}
    return {
        **made,
        **used,
        **_trained({"adapters": same, "head": same} if run.spec["training"]["lora"] else {}),
    }


def _experts_of_chosen_model(run: Run) -> int:
    """Make up the experts of the model that an evaluation uses; 0 if it is dense."""
    if "candidates" not in run.spec:
        return 0
    used_as = run.spec.get("used_as", run.spec["trained"])
    method = load_benchmark(run.benchmark).methods()[used_as]
    return 0 if method.kind == "dense" else 8


def _used(experts: int, sets: list[str], draw: random.Random) -> dict[str, Any]:
    """Make up how the tokens of a routed model, and the rows of some sets, use its experts."""
    if len(sets) < 2:
        return {"routing": {**_ROUTING}, "usage": {}}
    names = [
        f"{name}_information{end}"
        for name in ("task", "class")
        for end in ("", "_chance", "_chance_95")
    ]
    routing = _ROUTING | {name: draw.uniform(0, 0.1) for name in names}
    shares, marks = [1 / experts] * experts, [1, -1][:experts] + [0] * (experts - 2)
    usage = {
        name: {"shares": shares, "marks": marks, "classes": {"0": shares, "1": shares}}
        for name in sets
    }
    shared = [2] if experts > 2 and draw.random() < 0.5 else []
    return {"routing": routing, "usage": {"tasks": usage, "shared": shared, "specialised": [0]}}


def _modularity(run: Run, draw: random.Random, _gain: float) -> dict[str, Any]:
    experts = run.spec["method"]["config"]["num_experts"]
    names = [run.spec["task"]["name"], *(other["name"] for other in run.spec["ood"])]
    tasks = [name for name in names for _ in range(10)]
    used = _used(experts, names, draw)
    measured = {
        "best_quarter": 0.7,
        "best_quarter_mass": 0.3,
        "usage_gini": 0.2,
        "inertia": 0.9,
        "dead": 0.2,
    }
    measured |= {
        f"{name}_{selection}": 0.3
        for name in ("kept", "active", "dead")
        for selection in ("top", "bottom")
    }
    measured |= {name: value for name, value in used["routing"].items() if "_information" in name}
    matrix = {"tasks": tasks, "neurons": 8 * experts, "tokens": list(range(len(tasks)))}
    matrix |= {
        "places": [draw.randrange(8 * experts) for _ in tasks],
        "values": [draw.uniform(1, 8) for _ in tasks],
    }
    return {
        "measured": {"experts": {**measured, "shared_experts": 1.0, "specialised_experts": 2.0}},
        "usage": used["usage"],
        "matrix": matrix,
        "model": {"source": _SOURCE, "conversion": _CONVERTED},
        "cost": _MEASURING,
        "data": {
            f"test:{name}": {**_ROWS, "dropped": 0, "labels": {"0": 5, "1": 5}} for name in names
        },
    }


def _measured(run: Run, draw: random.Random, _gain: float) -> dict[str, Any]:
    candidates = run.spec["settings"]["candidates"]
    if run.spec["task"]["name"] == "partition":
        measured = {
            candidate: {"seconds": draw.uniform(0.3, 2.0), "inertia": 0.9}
            for candidate in candidates
        }
        return {"measured": measured, "cost": _MEASURING}
    ratios = {"dense": 1.0} | {candidate: draw.uniform(0.3, 2.0) for candidate in candidates}
    measured = {
        candidate: {
            "ratio": ratio,
            "ratio_low": 0.9 * ratio,
            "ratio_high": 1.1 * ratio,
            "seconds": 0.1 * ratio,
        }
        for candidate, ratio in ratios.items()
    }
    return {"measured": measured, "cost": _MEASURING}


def _domains(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    task, training, config = (
        run.spec["task"]["name"],
        run.spec["training"],
        run.spec["method"]["config"],
    )
    names = [name for name, _ in run.spec["task"]["environments"]]
    parts = [(env, part) for env in range(len(names)) for part in ("in", "out")]
    last = training["steps"] - 1
    records: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 10, "loss": 1.0}
        | {f"env{env}_{part}_acc": 0.5 + gain + draw.uniform(0, 0.3) for env, part in parts}
        for step in sorted({*range(0, last, training["eval_every"]), last})
    ]
    routing: dict[str, Any] = {}
    if config:
        loads = [
            [[draw.randrange(9) for _ in range(config["num_experts"])] for _ in range(2)]
            for _ in names
        ]
        ends = ("", "_chance", "_chance_95")
        for name, bits in {"class": (0.1, 0.03, 0.05), "environment": (0.01, 0.01, 0.02)}.items():
            routing |= {
                f"{name}_information{end}": value for end, value in zip(ends, bits, strict=True)
            }
        chance = {"8": {"class": [0.031, 0.052], "environment": [0.011, 0.022]}}
        routing |= {"load_entropy": 0.9, "chance": chance, "loads": {"8": loads}}
    held_out = {
        names[env]: {"accuracy": records[-1][f"env{env}_in_acc"]} for env in run.spec["test_envs"]
    }
    rows = {"source": "made up", "rows": 8, "dropped": 0, "labels": {"cat": 4, "dog": 4}}
    return {
        "records": records,
        "scores": {
            "train": {task: {"loss": 1.0}},
            "dev": {task: {"accuracy": 0.8}},
            "test": held_out,
        },
        "confusion": {name: [[3, 1], [0, 4]] for name in names},
        "classes": ["cat", "dog"],
        "routing": routing,
        "data": {f"{names[env]} {part}": rows for env, part in parts},
        **_trained({}),
    }


def _instructions(run: Run, draw: random.Random, gain: float) -> dict[str, Any]:
    def answers(count: int) -> str:
        return "".join(str(int(draw.random() < 0.4 + gain)) for _ in range(count))

    tasks = {}
    for entry in InstructionSpec.model_validate(run.spec).evaluation.tasks:
        correct = {name: answers(count) for name, count in SUBJECTS.items()}
        subjects = {name: _share(digits) for name, digits in correct.items()}
        macro = sum(subject["acc"] for subject in subjects.values()) / len(subjects)
        other = _share(correct["anatomy"] + correct["virology"])
        tasks[entry.title] = task = {
            "scores": {
                "accuracy": _share("".join(correct.values()))["acc"],
                "accuracy_macro": macro,
            },
            "questions": sum(SUBJECTS.values()),
            "metric": "acc",
            "categories": {"stem": subjects["astronomy"], "other": other},
            "subjects": subjects,
            "correct": correct,
        }
        if "continuation" in entry.task:
            nats = {
                name: [draw.uniform(1, 2) - gain for _ in digits]
                for name, digits in correct.items()
            }
            values = [value for subject in nats.values() for value in subject]
            task["nats_per_byte"] = nats
            task["scores"] |= {"accuracy_norm": 0.5, "nats_per_byte": sum(values) / len(values)}
    config = run.spec["method"]["config"]
    data: dict[str, Any] = {
        "rows": 8,
        "tokens": 900,
        "learned_tokens": 300,
        "longest": 128,
        "source": "made up",
    }
    data |= {
        "template": "alpaca",
        "truncated_responses": 2,
        "truncated_tokens": 31,
        "broken_rows": 1,
    }
    shares = {"16": [1 / config["num_experts"]] * config["num_experts"]} if config else {}
    return {
        "scores": {
            "dev": {run.spec["task"]["name"]: {"loss": 2.0 - gain - draw.uniform(0, 0.01)}},
            "test": {name: task["scores"] for name, task in tasks.items()},
        },
        "tasks": tasks,
        "curve": [3.0, 2.5, 2.2] if run.spec["learning_rate"] else [],
        "answers": [
            {
                "instruction": "Name a colour.",
                "input": "",
                "reference": "Red.",
                "answer": "Blue. " * 100,
            }
        ],
        "routing": {**_ROUTING, "shares": shares} if config else {},
        "data": {"train": data, "held_out": data},
        **_trained({}),
    }


def _share(digits: str) -> dict[str, float]:
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
    for run in runs:
        path = folder / run.folder / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(metrics(run, (gains or {}).get(run.spec["method"]["name"], 0.0)))
        )


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
