"""Check the repository: environments, versions, configuration keys, and the files that runs ask for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.base import PACKAGES
from benchmarks.harness.config.runs import run_inputs
from benchmarks.harness.config.suite import SuiteSettings, load_suite
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
    command = [Path(sys.executable).with_name("snakemake"), "--snakefile", ROOT / "Snakefile", "--directory", tmp_path]
    command += ["--cores", "1", "-n", "--quiet", "all", "--config", "suite=paper", "benchmarks=[llama]"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mini_search", "paper"])
def test_runs_ask_for_nothing_that_no_rule_makes(name: str) -> None:
    """Check the files of all runs without Snakemake's graph of thousands of jobs."""
    suite = load_suite({"suite": name})
    made = {*suite.metric_files(), *(job.file for job in suite.partitions.values())}
    needed = {file for run in suite.runs for file in run_inputs(run) if not file.startswith(str(PACKAGES))}
    assert needed <= made
    assert {"threads", "mem_mb", "runtime"} <= set.intersection(*(set(run.resources) for run in suite.runs))


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "config/README.md").read_text()
    assert [key for key in SuiteSettings.model_fields if f"`{key}`" not in text] == []
