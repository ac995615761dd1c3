"""Run the trial of the suite `paper` for each pipeline, on models in the published shapes.

Weights are random, and Llama has two layers. The rows come from the folder that EMOE_DATA_ROOT names.
Sets that are not there get a few made-up rows in their makers' formats. Each test prints the seconds
and the peak memory of its run. It takes minutes: `make test-paper-size` and the nightly workflow run it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import base
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite
from tests.checkout import Checkout
from tests.image_sets import write_images
from tests.instruction_runs import ROWS
from tests.paper_models import write_model
from tests.text_sets import GLUE, OWN_FILES, TASKS, write_glue, write_own, write_saved

pytestmark = [pytest.mark.paper_size, pytest.mark.timeout(7200)]
# tests of the same model follow each other, so that one model at a time is on the disk
RUNS = [
    ("bert-base-cased", "glue"),
    ("bert-large-cased", "glue_lora"),
    ("bert-large-cased", "glue_ood"),
    ("bert-large-cased", "modularity"),
    ("gpt2-xl", "glue_lora"),
    ("gpt2-xl", "glue_ood"),
    ("t5-base", "multitask"),
    ("deit-small", "domainbed"),
    ("llama2-7b", "llama"),
]
SUITE_FILE = "config/paper_trial.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Copy the working tree, with a trial for a machine of one accelerator or none."""
    made = Checkout(tmp_path_factory.mktemp("trial"))
    gpus = 1 if torch.cuda.is_available() else 0
    made.edit(SUITE_FILE, "gpu: 8, processes: 8", f"gpu: {gpus}, processes: 1")
    made.edit(SUITE_FILE, "gpu: 1}", f"gpu: {gpus}}}")
    # lm-eval ships MMLU's dev questions alone: in each subject two examples and a question or more
    made.edit(SUITE_FILE, "task: mmlu, num_fewshot: 5", "task: mmlu_dev, num_fewshot: 2")
    made.edit(SUITE_FILE, "task: mmlu,", "task: mmlu_dev,")
    return made


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a data root and an empty model root."""
    folder = tmp_path_factory.mktemp("roots")
    (folder / "models").mkdir()
    write_data(folder / "data")
    return folder


def write_data(root: Path) -> None:
    """Write the sets of the trial below a data root: links to the user's own, or made-up rows."""
    root.mkdir()
    own = os.environ.get(base.DATA_ROOT)
    if own:
        for path in Path(own).resolve().iterdir():
            (root / path.name).symlink_to(path)
    for name in GLUE:
        if not is_there(root, name):
            write_glue(root, name, train=True, copies=64)
    for name in OWN_FILES:
        if not is_there(root, name):
            write_own(root, name)
    if not is_there(root, "grammar_test"):
        write_saved(root, "grammar_test", [0, 1, 1, 0])
    if not is_there(root, "newsqa_qnli"):
        write_saved(root, "newsqa_qnli", ["entailment", "not_entailment", "entailment"])
    if not (root / "PACS").exists():
        write_images(root, "pacs", rows=8)
    if not any((root / name).exists() for name in ("alpaca.json", "alpaca.jsonl")):
        (root / "alpaca.json").write_text(json.dumps(ROWS))


def is_there(root: Path, name: str) -> bool:
    """Check if a data root has the folder of a text set."""
    return (root / TASKS[name]["source"]["folder"]).exists()


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, roots: Path) -> Iterator[str]:
    """Write a model for the tests that use it, and delete it after them."""
    folder = write_model(roots / "models", request.param)
    yield request.param
    shutil.rmtree(folder)


def planned(checkout: Checkout, model: str, benchmark: str) -> Run:
    """Return the trial's run of a model in a benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CONFIG", checkout.folder / "config")
        suite = load_suite({"suite": "paper_trial"})
        (run,) = (run for run in suite.runs_of(benchmark) if run.model == model)
    return run


@pytest.mark.parametrize(("model", "benchmark"), RUNS, indirect=["model"])
def test_a_run_of_each_pipeline_takes_three_steps(
    checkout: Checkout, roots: Path, model: str, benchmark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned(checkout, model, benchmark)
    folders = [f"data_root={roots / 'data'}", f"model_root={roots / 'models'}"]
    checkout.snakemake(run.metrics_file, "--config", "suite=paper_trial", *folders)
    metrics = json.loads((checkout.folder / run.metrics_file).read_text())
    cost = metrics["cost"]
    seconds = f"{cost['job_seconds']:.0f} s"
    if "step_seconds" in cost:
        seconds = f"{seconds}, {cost['step_seconds']:.1f} s a step"
    with capsys.disabled():
        sys.stdout.write(
            f"\n{benchmark}, {model}: {seconds}, {cost['peak_memory_mb'] / 1000:.1f} GB\n"
        )
    if "training" in run.spec:
        assert cost["steps"] == 3
        assert all(math.isfinite(float(loss)) for loss in metrics["probe"]["losses"])
    # the reservation is that of the suite `paper`
    assert cost["peak_memory_mb"] < run.resources["mem_mb"]
