"""Made-up ``metrics.json`` files for real plans: tables, mirrors and checks without training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.domainbed.grid import validation_job
from benchmarks.harness.base import RUNS
from benchmarks.harness.config.runs import Run, plan
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.llama.definition import InstructionSpec
from benchmarks.llama.evaluation import task_title

ENVIRONMENT = {
    "packages": {"torch": "2"},
    "python": "3",
    "platform": "Linux",
    "git_commit": "abc",
    "git_dirty": False,
    "processor": "CPU",
    "cores": 2,
    "threads": 1,
    "memory_gb": 4.0,
    "gpus": [],
    "fingerprint": {"processor": "CPU", "threads": "1", "package torch": "2"},
}


def metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Plausible numbers; the same for the same run."""
    draw = random.Random(run.id)
    metric, task = run.spec["task"]["metric"], run.spec["task"]["name"]

    def one(base: float, metrics: tuple[str, ...] = (metric,)) -> dict[str, float]:
        return {name: min(base + gain + draw.uniform(-0.02, 0.02), 1.0) for name in metrics} | {"loss": 0.5}

    config = run.spec["method"]["config"]
    summary = {"rows": 10, "dropped": 1, "labels": {"0": 4, "1": 6}}
    ood = {other["name"]: one(0.75, tuple(other["ood_metrics"])) for other in run.spec["ood"]}
    data = {f"ood:{other['name']}": summary for other in run.spec["ood"]}
    used = routed(config["num_experts"], [task, *ood], draw) if config else {"routing": {}, "usage": {}}
    if "candidates" in run.spec:
        return {
            "run_id": run.id,
            "scores": {"test": {task: one(0.88)}, "ood": ood},
            **used,
            "chosen": {"run": run.spec["candidates"][0], "learning_rate": 0.1, "variant": ""},
            "cost": {"evaluation_seconds": 1.0, "startup_seconds": 0.2, "job_seconds": 2.0, "peak_memory_mb": 100.0},
            "data": {"test": summary, **data},
            "environment": ENVIRONMENT,
        }
    same = {"parameters": 10, "names": "same"}
    probe = {
        "losses": [repr(0.7 - 0.01 * step) for step in range(8)],
        "logits": {"mean": 0.1, "deviation": 1.0, "rms": 1.1, "projection": 0.5},
        "loads": {"1": [10, 10, 10, 10]} if config else {},
    }
    return {
        "run_id": run.id,
        "scores": {
            "dev": {task: one(0.9)},
            "test": {task: one(0.88)},
            "ood": ood,
        },
        "epochs": [{"epoch": 1.0, **one(0.85)}, {"epoch": 2.0, **one(0.9)}],
        "kept_epoch": 2.0,
        "probe": probe,
        **used,
        "routing": used["routing"] | ({"windows": windows(config, draw)} if config else {}),
        **made_another(run, task, one),
        **trained_model({"adapters": same, "head": same} if run.spec["training"]["lora"] else {}),
        "data": {
            "train": summary,
            "dev": summary,
            "test": summary,
            **data,
        },
        "environment": ENVIRONMENT,
    }


def routed(experts: int, sets: list[str], draw: random.Random) -> dict[str, Any]:
    """How a routed model's tokens, and the rows of some sets, use its experts."""
    shares = [1 / experts] * experts
    marks = [1, -1][:experts] + [0] * (experts - 2)
    routing: dict[str, Any] = {"load_entropy": 0.9, "load_max_over_mean": 2.0, "drop_rate": 0.0}
    if len(sets) < 2:
        return {"routing": routing, "usage": {}}
    for name in ("task", "class"):
        routing |= {f"{name}_information{end}": draw.uniform(0, 0.1) for end in ("", "_chance", "_chance_95")}
    return {
        "routing": routing,
        "usage": {
            "tasks": {name: {"shares": shares, "marks": marks, "classes": {"0": shares, "1": shares}} for name in sets},
            "shared": [2] if experts > 2 and draw.random() < 0.5 else [],
            "specialised": [0],
        },
    }


def made_another(run: Run, task: str, one: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """Scores of a run's model made another method's, where its spec says so."""
    used_as = run.spec.get("used_as")
    if not used_as:
        return {}
    ood = {other["name"]: one(0.74, tuple(other["ood_metrics"])) for other in run.spec["ood"]}
    return {"transformed": {used_as["name"]: {"scores": {"test": {task: one(0.87)}, "ood": ood}}}}


def windows(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Loads of twenty windows of a layer's training."""
    loads = np.random.default_rng(draw.randrange(2**32)).integers(1, 99, (20, config["num_experts"])).tolist()
    return {"ends": [100 * number for number in range(1, 21)], "loads": {"1": loads}}


def multitask_metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Plausible numbers of a run on several tasks; the same for the same run."""
    draw = random.Random(run.id)

    def one(base: float, names: list[str]) -> dict[str, float]:
        return {name: min(base + gain + draw.uniform(-0.02, 0.02), 1.0) for name in names} | {"loss": 0.5}

    tasks, config = run.spec["task"]["tasks"], run.spec["method"]["config"]
    summary = {"rows": 10, "dropped": 1, "labels": {"0": 4, "1": 6}}
    parts = [f"{part}:{task['name']}" for task in tasks for part in ("train", "dev", "test")]
    return {
        "run_id": run.id,
        "scores": {
            "dev": {task["name"]: one(0.9, [task["metric"]]) for task in tasks},
            "test": {task["name"]: one(0.88, [task["metric"]]) for task in tasks},
            "ood": {other["name"]: one(0.75, other["ood_metrics"]) for other in run.spec["ood"]},
        },
        "dev_curve": [{"epoch": 1.0, "mean_score": 0.9}],
        "kept_epoch": 1.0,
        "probe": {"losses": ["0.7"], "loads": {"1": [10, 10]} if config else {}},
        "routing": {"load_entropy": 0.9, "load_max_over_mean": 2.0, "drop_rate": 0.0} if config else {},
        **trained_model({}),
        "data": dict.fromkeys([*parts, *(f"ood:{other['name']}" for other in run.spec["ood"])], summary),
        "environment": ENVIRONMENT,
    }


def modularity_metrics(run: Run) -> dict[str, Any]:
    """Plausible numbers of a pre-trained model as it is; the same for the same run."""
    draw, experts = random.Random(run.id), run.spec["method"]["config"]["num_experts"]
    names = [run.spec["task"]["name"], *(other["name"] for other in run.spec["ood"])]
    tasks = [name for name in names for _ in range(10)]
    measured = {"best_quarter": 0.7, "best_quarter_mass": 0.3, "usage_gini": 0.2, "inertia": 0.9, "dead": 0.2}
    measured |= {f"{name}_{selection}": 0.3 for name in ("kept", "active", "dead") for selection in ("top", "bottom")}
    used = routed(experts, names, draw)
    measured |= {name: value for name, value in used["routing"].items() if "_information" in name}
    return {
        "run_id": run.id,
        "measured": {"experts": {**measured, "shared_experts": 1.0, "specialised_experts": 2.0}},
        "usage": used["usage"],
        "matrix": {
            "tasks": tasks,
            "neurons": 8 * experts,
            "tokens": list(range(len(tasks))),
            "places": [draw.randrange(8 * experts) for _ in tasks],
            "values": [draw.uniform(1, 8) for _ in tasks],
        },
        "cost": {"job_seconds": 1.0, "startup_seconds": 0.1},
        "data": {f"test:{name}": {"rows": 10, "dropped": 0, "labels": {"0": 5, "1": 5}} for name in names},
        "environment": ENVIRONMENT,
    }


def trained_model(trained: dict[str, Any]) -> dict[str, Any]:
    """What a run says of its model and of what it took."""
    return {
        "model": {
            "parameters": 1000,
            "dense_parameters": 1000,
            "trainable_parameters": 1000,
            "active_parameters": 900,
            "flops_per_token": 1800,
            "trained": trained,
            "active_neurons": 0.5,
            "conversion": [],
        },
        "cost": {
            "steps": 2,
            "step_seconds": 0.5,
            "train_seconds": 1.0,
            "evaluation_seconds": 0.7,
            "startup_seconds": 0.2,
            "job_seconds": 2.0,
            "peak_memory_mb": 100.0,
        },
    }


def measured(run: Run) -> dict[str, Any]:
    """Plausible measurements; the same for the same run."""
    draw = random.Random(run.id)
    found = {}
    for candidate in ("dense", *run.spec["settings"]["candidates"]):
        ratio = 1.0 if candidate == "dense" else draw.uniform(0.3, 2.0)
        found[candidate] = {"ratio": ratio, "ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio, "seconds": 0.1 * ratio}
        found[candidate] |= {"inertia": 0.9} if run.spec["task"]["name"] == "partition" else {"memory_ratio": 0.3}
        if candidate == "sparse":
            found[candidate]["expected_ratio"] = 0.4
    return {"run_id": run.id, "measured": found, "cost": {"job_seconds": 1.0}, "environment": ENVIRONMENT}


def domain_metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Plausible records of a run of domain generalisation; the same for the same run."""
    draw = random.Random(run.id)
    names = [name for name, _ in run.spec["task"]["environments"]]
    held_out = run.spec["test_envs"]
    last = run.spec["training"]["steps"] - 1
    steps = sorted({*range(0, last, run.spec["training"]["eval_every"]), last})
    records: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 10, "loss": 1.0}
        | {
            f"env{env}_{part}_acc": 0.5 + gain + draw.uniform(0, 0.3)
            for env in range(len(names))
            for part in ("in", "out")
        }
        for step in steps
    ]
    config = run.spec["method"]["config"]
    experts = config["num_experts"] if config else 0
    return {
        "run_id": run.id,
        "records": records,
        "scores": {
            "train": {run.spec["task"]["name"]: {"loss": 1.0}},
            "dev": {run.spec["task"]["name"]: {"accuracy": 0.8}},
            "test": {names[env]: {"accuracy": records[-1][f"env{env}_in_acc"]} for env in held_out},
        },
        "confusion": {name: [[3, 1], [0, 4]] for name in names},
        "classes": ["cat", "dog"],
        "routing": {
            "load_entropy": 0.9,
            "class_information": 0.1,
            "class_information_chance": 0.03,
            "class_information_chance_95": 0.05,
            "environment_information": 0.01,
            "environment_information_chance": 0.01,
            "environment_information_chance_95": 0.02,
            "chance": {"8": {"class": [0.031, 0.052], "environment": [0.011, 0.022]}},
            "loads": {"8": [[[draw.randrange(9) for _ in range(experts)] for _ in range(2)] for _ in names]},
        }
        if config
        else {},
        "data": {
            f"{name} {part}": {"rows": 8, "dropped": 0, "labels": {"cat": 4, "dog": 4}}
            for name in names
            for part in ("in", "out")
        },
        **trained_model({}),
        "environment": ENVIRONMENT,
    }


SUBJECTS = {"anatomy": 40, "astronomy": 40, "virology": 20}


def instruction_metrics(run: Run, gain: float = 0.0) -> dict[str, Any]:
    """Plausible numbers of a run of instruction tuning; the same for the same run."""
    draw = random.Random(run.id)
    tasks = {}
    for entry in InstructionSpec.model_validate(run.spec).evaluation.tasks:
        correct = {
            name: "".join(str(int(draw.random() < 0.4 + gain)) for _ in range(count))
            for name, count in SUBJECTS.items()
        }
        subjects = {
            name: {"acc": digits.count("1") / len(digits), "questions": len(digits)} for name, digits in correct.items()
        }
        whole = "".join(correct.values())
        tasks[task_title(entry)] = {
            "scores": {
                "accuracy": whole.count("1") / len(whole),
                "accuracy_macro": sum(found["acc"] for found in subjects.values()) / len(subjects),
            },
            "questions": len(whole),
            "metric": "acc",
            "categories": {
                "stem": {"acc": correct["astronomy"].count("1") / 40, "questions": 40},
                "other": {"acc": (correct["anatomy"] + correct["virology"]).count("1") / 60, "questions": 60},
            },
            "subjects": subjects,
            "correct": correct,
        }
        if "continuation" in entry.task:
            nats = {name: [draw.uniform(1, 2) - gain for _ in digits] for name, digits in correct.items()}
            every = [value for values in nats.values() for value in values]
            tasks[task_title(entry)]["nats_per_byte"] = nats
            tasks[task_title(entry)]["scores"] |= {"accuracy_norm": 0.5, "nats_per_byte": sum(every) / len(every)}
    config = run.spec["method"]["config"]
    counts = {"rows": 8, "tokens": 900, "learned_tokens": 300, "longest": 128}
    counts |= {"truncated_responses": 2, "truncated_tokens": 31, "broken_rows": 1}
    shared = {**counts, "source": "made up", "template": "alpaca"}
    return {
        "run_id": run.id,
        "scores": {
            "dev": {run.spec["task"]["name"]: {"loss": 2.0 - gain - draw.uniform(0, 0.01)}},
            "test": {name: found["scores"] for name, found in tasks.items()},
        },
        "tasks": tasks,
        "curve": [3.0, 2.5, 2.2] if run.spec["learning_rate"] else [],
        "answers": [{"instruction": "Name a colour.", "input": "", "reference": "Red.", "answer": "Blue. " * 100}],
        "routing": {
            "load_entropy": 0.9,
            "load_max_over_mean": 2.0,
            "drop_rate": 0.0,
            "shares": {"16": [1 / config["num_experts"]] * config["num_experts"]},
        }
        if config
        else {},
        "data": {"train": shared, "held_out": shared},
        **trained_model({}),
        "environment": ENVIRONMENT,
    }


def write(
    folder: Path, suite: str = "mini", gains: dict[str, float] | None = None, benchmarks: tuple[str, ...] = ("glue",)
) -> list[Run]:
    """Write the runs of a suite below ``folder``; ``gains`` shifts all scores of a method."""
    runs = plan(list(benchmarks), suite)
    write_runs(runs, gains, folder)
    return runs


def write_runs(runs: list[Run], gains: dict[str, float] | None = None, folder: Path = RUNS) -> None:
    """Write made-up numbers of runs below ``folder``."""
    for run in runs:
        path = folder / run.folder / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        gain = (gains or {}).get(run.spec["method"]["name"], 0.0)
        path.write_text(json.dumps(_made_up(run, gain)))


def _made_up(run: Run, gain: float) -> dict[str, Any]:
    if "settings" in run.spec:
        return measured(run)
    if "finetuning" in run.spec:
        return instruction_metrics(run, gain)
    if "reading" in run.spec:
        return modularity_metrics(run)
    if "tasks" in run.spec["task"]:
        return multitask_metrics(run, gain)
    return domain_metrics(run, gain) if run.benchmark == "domainbed" else metrics(run, gain)


def write_samples(runs: list[Run]) -> None:
    """Write a picture of samples and the names of their environments for the image sets of runs."""
    for job in {found.id: found for found in (validation_job(run.spec) for run in runs)}.values():
        picture = Path(job.picture)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60)).save(picture)
        Path(job.file).write_text(json.dumps({"samples": ["0", "15", "30", "45", "60", "75"]}))


def text_and_measurements() -> list[Run]:
    """Write runs of glue, some seeds of three methods, and measurements, into the working directory."""
    write(RUNS, benchmarks=("glue",))
    write(RUNS, suite="smoke", benchmarks=("speed",))
    text = [run for run in plan(["glue"], "mini") if run.spec["method"]["name"] in ("vanilla", "emoe", "gmoe")]
    return [*text, *plan(["speed"], "smoke")]


def text_suite() -> Suite:
    """The text of the mini suite, finished in the working directory with a gain of EMoE."""
    benchmarks = ("glue", "glue_lora", "glue_ood")
    write(RUNS, gains={"emoe": 0.05, "random_partition": -0.1}, benchmarks=benchmarks)
    return load_suite({"benchmarks": list(benchmarks)})


def edit(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a run wrote."""
    path = RUNS / run.folder / "metrics.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
