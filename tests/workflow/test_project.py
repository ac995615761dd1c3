"""Check the repository: environments, images, configuration keys, and the files that runs ask for."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.base import PACKAGES
from benchmarks.harness.config.runs import run_inputs
from benchmarks.harness.config.suite import SuiteSettings, load_suite
from tests.checkout import SNAKEMAKE, Checkout
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("file", ["environment.yml", "workflow/envs/emoe.yaml"])
def test_conda_environments_follow_pyproject(file: str) -> None:
    listed = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    assert listed[:2] == [f"python{PYPROJECT['project']['requires-python']}", "pip"]
    install = "--editable .[suite,mini,dev]"
    assert listed[2:] == ([{"pip": [install]}] if file == "environment.yml" else [])
    for name in ("workflow/envs/emoe.post-deploy.sh", "Makefile"):
        assert "--editable '.[suite,mini,dev]'" in (ROOT / name).read_text()


def test_snakemake_plans_a_part_of_the_paper(tmp_path: Path) -> None:
    command = [SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", tmp_path]
    command += ["--cores", "1", "-n", "--quiet", "all", "--config", "suite=paper", "benchmarks=[llama]"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mini_search", "paper"])
def test_every_input_of_a_run_is_made_by_a_rule(name: str) -> None:
    """Check the files of all runs without Snakemake's graph of thousands of jobs."""
    suite = load_suite({"suite": name})
    made = {*suite.metric_files(), *(job.file for job in suite.partitions.values())}
    needed = {file for run in suite.runs for file in run_inputs(run) if not file.startswith(str(PACKAGES))}
    assert needed <= made
    assert {"threads", "mem_mb", "runtime"} <= set.intersection(*(set(run.resources) for run in suite.runs))


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "config/README.md").read_text()
    assert [key for key in SuiteSettings.model_fields if f"`{key}`" not in text] == []


_APPTAINER = """#!/bin/sh
[ "$1" = --version ] && { echo "apptainer version 1.4.0"; exit; }
echo "$* by ${EMOE_FORKSERVER-itself}" >> {folder}/calls.txt
while [ $# -gt 3 ]; do shift; done
exec "$@"
"""


@pytest.mark.slow
def test_apptainer_runs_the_jobs_in_the_image(checkout: Checkout, tmp_path: Path, monkeypatch) -> None:
    """Use a script in place of Apptainer."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(_APPTAINER.replace("{folder}", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    partition = next(iter(load_suite({"suite": "smoke"}).partitions.values())).file
    words = ("--sdm", "apptainer", "--apptainer-args=--nv", "--config", "suite=smoke", "--", partition)
    checkout.snakemake(*words)
    (call,) = (tmp_path / "calls.txt").read_text().splitlines()
    home = re.escape(str(checkout.folder))
    assert re.match(rf"exec --home {home} +--nv .*emoe\.sif bash -c ", call)
    assert "python -m benchmarks partition " in call
    assert call.endswith(" by itself")  # the image's Python, and no fork of this one
    assert (checkout.folder / partition).exists()


def test_the_image_has_a_python_extras_and_a_user_that_fit() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    oldest = PYPROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert f"FROM python:{oldest}-slim" in dockerfile  # the oldest, by which the numbers were blessed
    (extras,) = re.findall(r"pip install .*'/tmp/dependencies\[(.+)\]'", dockerfile)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    (user,) = re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert int(user) > 0
