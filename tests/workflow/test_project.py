"""The repository's own promises: layers, environments, targets."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from benchmarks.domainbed.grid import find_validation
from benchmarks.harness.base import PACKAGES
from benchmarks.harness.config.runs import run_inputs
from benchmarks.harness.config.suite import SuiteSettings, load_suite, suite_names
from tests.conftest import ROOT
from tests.imported import imports

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_arrow_workflow_benchmarks_emoe() -> None:
    assert not imports("emoe") & {"benchmarks", "workflow", "snakemake", "mlflow", "datasets", "pandas", "sklearn"}
    assert not imports("benchmarks") & {"workflow", "snakemake", "tests"}


@pytest.mark.parametrize("file", ["environment.yml", "workflow/envs/emoe.yaml"])
def test_conda_environments_follow_pyproject(file: str) -> None:
    listed = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    assert [item for item in listed if isinstance(item, str)] == [
        f"python{PYPROJECT['project']['requires-python']}",
        "pip",
    ]
    install = "--editable .[suite,mini,dev]"
    assert listed[2:] == ([{"pip": [install]}] if file == "environment.yml" else [])
    for file in ("workflow/envs/emoe.post-deploy.sh", "Makefile"):
        assert "--editable '.[suite,mini,dev]'" in (ROOT / file).read_text()


def test_torch_is_a_range() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    named = [one for part in (PYPROJECT["project"]["dependencies"], *extras) for one in part if one.startswith("torch")]
    assert len(named) == 2
    for requirement in named:
        assert re.fullmatch(r"torch(vision)?>=[\d.]+", requirement)


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    for command in ("make run", "make test"):
        assert command in (ROOT / "README.md").read_text()


def test_every_suite_has_a_configuration_and_the_other_way_round() -> None:
    declared = set()
    for path in (ROOT / "benchmarks").glob("*/benchmark.yaml"):
        declared |= set(yaml.safe_load(path.read_text())["suites"])
    assert set(suite_names()) == declared


def test_snakemake_plans_a_part_of_the_paper(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("snakemake"), "--snakefile", ROOT / "Snakefile", "--directory", tmp_path]
    command += ["--cores", "1", "-n", "--quiet", "all", "--config", "suite=paper", "benchmarks=[llama]"]
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", ["mini_search", "paper"])
def test_runs_ask_for_nothing_that_no_rule_makes(name: str) -> None:
    """What a dry run of the whole suite would find, without Snakemake's graph of thousands of jobs."""
    suite = load_suite({"suite": name})
    made = {*suite.metric_files(), *(job.file for job in suite.partitions.values())}
    needed = {file for run in suite.runs for file in run_inputs(run) if not file.startswith(str(PACKAGES))}
    for file in needed - made:
        assert find_validation(Path(file).stem, suite).file == file
    assert {"threads", "mem_mb", "runtime"} <= set.intersection(*(set(run.resources) for run in suite.runs))


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "config/README.md").read_text()
    for key in SuiteSettings.model_fields:
        assert f"`{key}`" in text
