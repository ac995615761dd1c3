"""The profile for Kubernetes, with kubectl and a made-up cluster on this machine: the jobs that it asks for, and what Snakemake makes of their ends."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.config.suite import load_suite
from tests.checkout import SNAKEMAKE, Checkout, wait_for
from tests.conftest import ROOT
from tests.kubernetes.api import Cluster

PROFILE = ROOT / "profiles/kubernetes"
_PRESENT = shutil.which("kubectl") and importlib.util.find_spec("snakemake_executor_plugin_cluster_generic")
on_a_cluster = pytest.mark.skipif(
    "EMOE_NEED_KUBERNETES" not in os.environ and not _PRESENT,
    reason="wants kubectl (Debian's kubernetes-client) and pip's snakemake-executor-plugin-cluster-generic",
)
KUBERNETES = ("--workflow-profile", "profiles/kubernetes", "--seconds-between-status-checks", "1")
MODULARITY = [run for run in load_suite({"suite": "smoke"}).runs if run.benchmark == "modularity"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder)
    monkeypatch.setenv("KUBECONFIG", str(made.config))
    yield made
    made.stop()


def submit(checkout: Checkout, *words: str) -> str:
    """As in the pod where Snakemake runs."""
    found = checkout.run(SNAKEMAKE, *KUBERNETES, *words)
    return found.stdout + found.stderr


@contextmanager
def started(checkout: Checkout, epochs: int) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Snakemake at work on one run of so many epochs, and the run's folder; what Snakemake says goes to said.txt."""
    checkout.edit(
        "benchmarks/glue/benchmark.yaml",
        "  smoke:\n    training: {epochs: 3,",
        f"  smoke:\n    training: {{epochs: {epochs},",
    )
    folder = checkout.folder / checkout.run(sys.executable, "-c", _FOLDER).stdout.strip()
    target = (folder / "metrics.json").relative_to(checkout.folder)
    with (checkout.folder / "said.txt").open("w") as stream:
        main = checkout.start(SNAKEMAKE, *KUBERNETES, "--config", "suite=smoke", "--", target, stream=stream)
        yield main, folder
        main.kill()


# the edited suite's own, whose ids have changed
_FOLDER = """
from benchmarks.harness.config.suite import load_suite
runs = load_suite({"suite": "smoke"}).runs
print("results/runs", next(r.folder for r in runs if r.benchmark == "glue" and r.spec["method"]["name"] == "vanilla"), sep="/")
"""


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def limits(job: dict[str, Any]) -> dict[str, Any]:
    resources = pod(job)["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]  # Kubernetes wants that of GPUs
    return resources["limits"]


def described(folder: Path, **properties: object) -> dict[str, Any]:
    """The Job of a script of Snakemake's."""
    asked = {"threads": 1, "resources": {"mem_mb": 3000, "runtime": 30}, "rule": "run_glue"} | properties
    script = folder / "job.sh"
    script.write_text(f"#!/bin/sh\n# properties = {json.dumps(asked)}\ntrue\n")
    spec = importlib.util.spec_from_file_location("submit", PROFILE / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.manifest(script)


def test_a_job_asks_for_what_its_run_asks_for(tmp_path: Path) -> None:
    resources = {"mem_mb": 400000, "runtime": 2880, "gpu": 8, "processes": 8}
    wildcards = {"benchmark": "llama", "run": "llama2-7b-0123abcd"}
    job = described(tmp_path, rule="run_llama", threads=16, resources=resources, wildcards=wildcards)
    assert job["metadata"]["generateName"] == "emoe-run-llama-"
    assert job["metadata"]["annotations"]["run"] == "llama/llama2-7b-0123abcd"
    assert limits(job) == {"cpu": 16, "memory": "400000M", "nvidia.com/gpu": 8}
    assert pod(job)["activeDeadlineSeconds"] == 2880 * 60
    assert [one["key"] for one in pod(job)["tolerations"]] == ["nvidia.com/gpu"]
    container = pod(job)["containers"][0]
    assert container["command"] == ["/bin/sh", str(tmp_path / "job.sh")]
    assert container["workingDir"] == str(Path.cwd())


@pytest.mark.parametrize("resources", [{}, {"gpu": 0}])
def test_a_job_without_gpus_keeps_off_their_nodes(tmp_path: Path, resources: dict[str, int]) -> None:
    job = described(tmp_path, resources={"mem_mb": 3000, "runtime": 30, **resources})
    assert set(limits(job)) == {"cpu", "memory"}
    assert "tolerations" not in pod(job)


def test_a_group_of_jobs_is_named_after_the_group(tmp_path: Path) -> None:
    job = described(tmp_path, rule=None, groupid="partitions")
    assert job["metadata"]["generateName"] == "emoe-partitions-"


def test_what_keeps_a_job_from_being_submitted_is_one_line(tmp_path: Path) -> None:
    profile, script = tmp_path / "kubernetes", tmp_path / "job.sh"
    shutil.copytree(PROFILE, profile)
    described(tmp_path)

    def said(path: str = os.defpath) -> str:
        command = [sys.executable, profile / "submit.py", script]
        environment = {"PATH": path, "KUBECONFIG": "/dev/null"}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode
        assert not found.stdout
        return found.stderr

    assert said(str(tmp_path)) == "error: kubectl is not there\n"
    (profile / "job.yaml").write_text("kind: Job\nspec: [\n")
    assert re.fullmatch(r"error: .*job\.yaml: .* line 3, column 1.*\n", said())
    (profile / "job.yaml").unlink()
    assert re.fullmatch(r"error: .*job\.yaml is not there\n", said())


def test_all_pods_have_the_same_image_user_cache_and_volume(tmp_path: Path) -> None:
    parts = list(yaml.safe_load_all((PROFILE / "cluster.yaml").read_text()))
    by_kind = {part["kind"]: part for part in parts}
    main, run = by_kind["Pod"]["spec"], pod(described(tmp_path))
    assert [main["containers"][0][key] for key in ("image", "env")] == [
        run["containers"][0][key] for key in ("image", "env")
    ]
    assert main["securityContext"] == run["securityContext"]
    claim = {"persistentVolumeClaim": {"claimName": by_kind["PersistentVolumeClaim"]["metadata"]["name"]}}
    for spec in (main, run):
        assert {"name": "shared", **claim} in spec["volumes"]
        assert {"name": "shared", "mountPath": "/shared"} in spec["containers"][0]["volumeMounts"]
    assert by_kind["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    # what the scripts have kubectl do
    assert {"create", "get", "delete"} <= set(by_kind["Role"]["rules"][0]["verbs"])
    assert main["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]


@on_a_cluster
def test_a_dry_run_plans_the_paper(checkout: Checkout) -> None:
    said = submit(checkout, "-n", "--config", "suite=paper", "benchmarks=[llama]")
    assert re.search(r"^run_llama +\d+$", said, re.MULTILINE)


@on_a_cluster
@pytest.mark.slow
def test_a_benchmark_runs_from_its_partitions_to_its_tables(checkout: Checkout, cluster: Cluster) -> None:
    checkout.edit("benchmarks/modularity/benchmark.yaml", "  smoke:\n", "  smoke:\n    resources: {gpu: 1}\n")
    table = "results/smoke/tables/modularity_usage.csv"
    submit(checkout, "--config", "suite=smoke", "--", table)
    assert (checkout.folder / table).stat().st_size > 20
    assert not cluster.running
    runs = [job for job in cluster.jobs.values() if job["metadata"]["generateName"] == "emoe-run-modularity-"]
    assert len(runs) == len(MODULARITY)
    assert len(cluster.jobs) == len(runs) + 1  # what they wait for shares a pod
    for job in runs:
        run = checkout.folder / "results/runs" / job["metadata"]["annotations"]["run"]
        resources = json.loads((run / "run.json").read_text())
        assert resources["benchmark"] == "modularity"
        assert (run / "metrics.json").exists()
        assert limits(job) == {"cpu": 1, "memory": "3000M", "nvidia.com/gpu": 1}
        assert pod(job)["containers"][0]["workingDir"] == str(checkout.folder)
    submit(checkout, "--config", "suite=smoke", "--", table)
    assert len(cluster.jobs) == len(runs) + 1  # nothing was left to do


@on_a_cluster
@pytest.mark.slow
def test_a_run_that_the_cluster_ends_is_tried_again_with_more_and_goes_on(checkout: Checkout, cluster: Cluster) -> None:
    """Also where the cluster does not answer for some time."""
    with started(checkout, 60) as (main, folder):
        said = checkout.folder / "said.txt"
        wait_for(lambda: any("run-glue" in name for name in cluster.running))
        cluster.down = True
        wait_for(lambda: "ServiceUnavailable" in said.read_text())
        cluster.down = False
        wait_for(lambda: list(folder.glob("**/checkpoint-*/trainer_state.json")))
        (name,) = cluster.running
        cluster.end(name)
        assert main.wait() == 0, said.read_text()
    first, second = (job for job in cluster.jobs.values() if "run-glue" in job["metadata"]["generateName"])
    assert [limits(job)["memory"] for job in (first, second)] == ["3000M", "6000M"]
    assert pod(second)["activeDeadlineSeconds"] == 2 * pod(first)["activeDeadlineSeconds"]
    assert "resumed at step" in (folder / "log.txt").read_text()
    assert (folder / "metrics.json").exists()


@on_a_cluster
@pytest.mark.slow
def test_what_is_cancelled_leaves_no_pod_behind(checkout: Checkout, cluster: Cluster) -> None:
    with started(checkout, 600) as (main, _):
        wait_for(lambda: "with external jobid 'emoe-run-glue-" in (checkout.folder / "said.txt").read_text())
        assert cluster.running
        main.send_signal(signal.SIGINT)
        main.wait()
        wait_for(lambda: not cluster.running)
