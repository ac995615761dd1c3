"""Run the workflow on a real Slurm, whose controller and node are started on this machine for these tests."""

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

from benchmarks.harness.config.suite import load_suite
from tests.checkout import SNAKEMAKE, Checkout, wait_for
from tests.conftest import ROOT

_CLUSTER = ROOT / "tests/slurm/cluster.sh"
_PRESENT = all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) and importlib.util.find_spec(
    "snakemake_executor_plugin_slurm"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(
        "EMOE_NEED_SLURM" not in os.environ
        and (not _PRESENT or os.geteuid() != 0 or Path("/etc/slurm/slurm.conf").exists()),
        reason="wants root, Debian's slurm-wlm and munge, no Slurm beside, and pip's snakemake-executor-plugin-slurm",
    ),
]
# this cluster keeps no accounts, and answers at once
SLURM = (
    "--workflow-profile",
    "profiles/slurm",
    "--slurm-status-command",
    "squeue",
    "--slurm-no-account",
)
SLURM += ("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start one node with this machine's cores and memory, and two made-up GPUs."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([_CLUSTER, "start", folder], check=True)
    yield
    subprocess.run([_CLUSTER, "stop", folder], check=True)


def queued() -> list[list[str]]:
    """List number, state, and rule with run of the jobs that have not ended."""
    shown = subprocess.check_output(["squeue", "--noheader", "--format", "%A %T %k"], text=True)
    return [line.split() for line in shown.splitlines()]


def test_a_benchmark_runs_from_its_partitions_to_its_tables_on_the_gpu_that_it_asks_for(
    checkout: Checkout,
) -> None:
    checkout.edit(
        "config/smoke.yaml", "  modularity:\n", "  modularity:\n    resources: {gpu: 1}\n"
    )
    ask = "from benchmarks.harness.run.devices import visible_devices; print(visible_devices())"
    assert checkout.run("srun", "--gpus", 1, sys.executable, "-c", ask).stdout.strip() in (
        "['0']",
        "['1']",
    )
    table = "results/smoke/tables/modularity_usage.csv"
    done = checkout.run(SNAKEMAKE, *SLURM, "--config", "suite=smoke", "--", table)
    numbers = re.findall(r"has been submitted with SLURM jobid (\d+)", done.stdout + done.stderr)
    assert len(numbers) == 4  # three runs, and their partitions
    jobs = [
        subprocess.check_output(["scontrol", "show", "job", number], text=True)
        for number in numbers
    ]
    assert sum("gres/gpu:1" in job for job in jobs) == 3
    assert all("NumNodes=1" in job for job in jobs)
    assert (checkout.folder / table).stat().st_size > 20
    for run in load_suite({"suite": "smoke"}).runs_of("modularity"):
        assert (
            json.loads((checkout.folder / f"results/runs/{run.folder}/metrics.json").read_text())[
                "run_id"
            ]
            == run.id
        )
    assert not queued()


def test_jobs_that_the_cluster_ends_are_tried_again_with_more_and_go_on(checkout: Checkout) -> None:
    """End one job for its memory, one by a user, and one for its time."""
    glue, lora, modularity = "  glue:\n", "  glue_lora:\n", "  modularity:\n"
    for old, new in (
        (modularity, f"{modularity}    resources: {{mem_mb: 300}}\n"),
        (
            f"{glue}    training: {{epochs: 3,",
            f"{glue}    resources: {{runtime: 1}}\n    training: {{epochs: 400,",
        ),
        (f"{lora}    training: {{epochs: 2,", f"{lora}    training: {{epochs: 60,"),
    ):
        checkout.edit("config/smoke.yaml", old, new)
    listed = checkout.run(sys.executable, "-c", _LISTED).stdout.splitlines()
    cancelled = next(name for name in listed if "glue_lora" in name)
    with (checkout.folder / "shown.txt").open("w") as stream:
        main = checkout.start(
            SNAKEMAKE, *SLURM, "--config", "suite=smoke", "--", *listed, stream=stream
        )
        log = (checkout.folder / cancelled).with_name("log.txt")
        wait_for(lambda: log.exists() and "training," in log.read_text())
        (number,) = (
            job[0] for job in queued() if "run_glue_lora" in job[2] and job[1] == "RUNNING"
        )
        subprocess.run(["scancel", number], check=True)
        assert main.wait() == 0, (checkout.folder / "shown.txt").read_text()
    shown = (checkout.folder / "shown.txt").read_text()
    for name in ("glue", "glue_lora", "modularity"):
        assert f"Error in rule run_{name}:" in shown
    assert all((checkout.folder / name).exists() for name in listed)
    log = (checkout.folder / next(name for name in listed if "/glue/" in name)).with_name("log.txt")
    assert "resumed at step" in log.read_text()
    assert not queued()


# the edited suite's own: one run of each, whose ids have changed
_LISTED = """
import benchmarks.kinds
from benchmarks.harness.config.suite import load_suite
wanted = {"glue": "vanilla", "glue_lora": "lora", "modularity": "contiguous"}
for run in load_suite({"suite": "smoke"}).runs:
    if wanted.get(run.benchmark) == run.spec["method"]["name"]:
        wanted.pop(run.benchmark)
        print(f"results/runs/{run.folder}/metrics.json")
"""
