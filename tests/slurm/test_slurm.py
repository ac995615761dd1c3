"""The workflow on a real Slurm: controller and node on this machine, started for these tests alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite
from tests.checkout import SNAKEMAKE, Checkout, wait_for
from tests.conftest import ROOT

_CLUSTER = ROOT / "tests/slurm/cluster.sh"
_PRESENT = all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) and importlib.util.find_spec(
    "snakemake_executor_plugin_slurm"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "EMOE_NEED_SLURM" not in os.environ
        and (not _PRESENT or os.geteuid() != 0 or Path("/etc/slurm/slurm.conf").exists()),
        reason="wants root, Debian's slurm-wlm and munge, no Slurm beside, and pip's snakemake-executor-plugin-slurm",
    ),
]
# this cluster keeps no accounts, and answers at once
SLURM = ("--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue", "--slurm-no-account")
SLURM += ("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2")
RUNS = {(run.benchmark, run.spec["method"]["name"]): run for run in load_suite({"suite": "smoke"}).runs}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One node with the cores and the memory of this machine, and two made-up GPUs."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([_CLUSTER, "start", folder], env={**os.environ, "GPUS": "2"}, check=True)
    yield
    subprocess.run([_CLUSTER, "stop", folder], check=True)


@pytest.fixture
def checkout(cluster: None, tmp_path: Path, archive: Path) -> Checkout:
    """A copy of the working tree, with the sentences fetched."""
    made = Checkout(tmp_path)
    made.put(archive)
    return made


def metrics(run: Run) -> str:
    return f"results/runs/{run.folder}/metrics.json"


def submit(checkout: Checkout, *words: str) -> str:
    """As on a login node, whose cores say nothing."""
    found = checkout.run(SNAKEMAKE, *SLURM, *words)
    return found.stdout + found.stderr


def queued() -> list[list[str]]:
    """Number, state, and rule with run of the jobs that Slurm knows and that have not ended."""
    shown = subprocess.run(
        ["squeue", "--noheader", "--format", "%A %T %k"], capture_output=True, text=True, check=True
    ).stdout
    return [line.split() for line in shown.splitlines()]


def test_a_benchmark_runs_from_its_partitions_to_its_tables(checkout: Checkout) -> None:
    table = "results/smoke/tables/modularity_usage.csv"
    said = submit(checkout, "--config", "suite=smoke", "--", table)
    assert len(re.findall(r"has been submitted with SLURM jobid", said)) == 4  # three runs, and what they wait for
    assert (checkout.folder / table).stat().st_size > 20
    for (benchmark, _), run in RUNS.items():
        if benchmark == "modularity":
            assert json.loads((checkout.folder / metrics(run)).read_text())["run_id"] == run.id
    assert not queued()


def test_jobs_that_the_cluster_ends_are_tried_again_with_more_and_go_on(checkout: Checkout) -> None:
    """One takes more memory than it asked for, one is cancelled by somebody, one takes longer than it may."""
    files = {name: f"benchmarks/{name}/benchmark.yaml" for name in ("glue", "glue_lora", "modularity")}
    checkout.edit(files["modularity"], "  smoke:\n", "  smoke:\n    resources: {mem_mb: 300}\n")
    checkout.edit(
        files["glue"],
        "  smoke:\n    training: {epochs: 3,",
        "  smoke:\n    resources: {runtime: 1}\n    training: {epochs: 600,",
    )
    checkout.edit(files["glue_lora"], "  smoke:\n    training: {epochs: 2,", "  smoke:\n    training: {epochs: 60,")
    listed = checkout.run(sys.executable, "-c", _LISTED).stdout.splitlines()
    cancelled = next(name for name in listed if "glue_lora" in name)
    with (checkout.folder / "said.txt").open("w") as stream:
        main = checkout.start(SNAKEMAKE, *SLURM, "--config", "suite=smoke", "--", *listed, stream=stream)
        log = (checkout.folder / cancelled).with_name("log.txt")
        wait_for(lambda: log.exists() and "training," in log.read_text())
        (number,) = (job[0] for job in queued() if "run_glue_lora" in job[2] and job[1] == "RUNNING")
        subprocess.run(["scancel", number], check=True)
        assert main.wait() == 0, (checkout.folder / "said.txt").read_text()
    said = (checkout.folder / "said.txt").read_text()
    for name in ("glue", "glue_lora", "modularity"):
        assert f"Error in rule run_{name}:" in said
    assert all((checkout.folder / name).exists() for name in listed)
    assert (
        "resumed at step"
        in (checkout.folder / next(n for n in listed if "/glue/" in n)).with_name("log.txt").read_text()
    )
    assert not queued()


# the edited suite's own: one run of each, whose ids have changed
_LISTED = """
from benchmarks.harness.config.suite import load_suite
wanted = {"glue": "vanilla", "glue_lora": "lora", "modularity": "contiguous"}
for run in load_suite({"suite": "smoke"}).runs:
    if wanted.get(run.benchmark) == run.spec["method"]["name"]:
        wanted.pop(run.benchmark)
        print(f"results/runs/{run.folder}/metrics.json")
"""


def test_a_job_gets_the_gpu_that_its_run_asks_for(checkout: Checkout) -> None:
    checkout.edit("benchmarks/modularity/benchmark.yaml", "  smoke:\n", "  smoke:\n    resources: {gpu: 1}\n")
    ask = "import os; from benchmarks.harness.run.devices import visible; print(visible())"
    assert checkout.run("srun", "--gpus", 1, sys.executable, "-c", ask).stdout.strip() in ("['0']", "['1']")
    target = metrics(RUNS["modularity", "contiguous"])
    said = submit(checkout, "--config", "suite=smoke", "--", target)
    (number,) = re.findall(r"Job \d+ has been submitted with SLURM jobid (\d+)", said)
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
    assert "gres/gpu:1" in shown
    assert "NumNodes=1" in shown
    assert (checkout.folder / target).exists()
