"""Check the repository: layers, environments, targets, releases, pages for contributors."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks.harness.base import PACKAGES
from benchmarks.harness.config.runs import run_inputs
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.config.suite_file import SuiteSettings
from tests.conftest import ROOT
from tests.imported import imports

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_one_arrow_workflow_benchmarks_emoe() -> None:
    assert not imports("emoe") & {"benchmarks", "workflow", "snakemake", "mlflow", "datasets", "pandas", "sklearn"}
    assert not imports("benchmarks") & {"workflow", "snakemake", "tests"}


@pytest.mark.parametrize("file", ["environment.yml", "workflow/envs/emoe.yaml"])
def test_conda_environments_follow_pyproject(file: str) -> None:
    listed = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    assert listed[:2] == [f"python{PYPROJECT['project']['requires-python']}", "pip"]
    install = "--editable .[suite,mini,dev]"
    assert listed[2:] == ([{"pip": [install]}] if file == "environment.yml" else [])
    for name in ("workflow/envs/emoe.post-deploy.sh", "Makefile"):
        assert "--editable '.[suite,mini,dev]'" in (ROOT / name).read_text()


def test_torch_is_a_range_and_known_versions_are_allowed_ones() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    versions = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    groups = PYPROJECT["project"]["optional-dependencies"]
    texts = [*PYPROJECT["project"]["dependencies"], *groups["suite"], *groups["mini"], *groups["dev"]]
    allowed = {canonicalize_name(one.name): one.specifier for one in map(Requirement, texts)}
    for name in ("torch", "torchvision"):  # whose builds are the machine's affair
        assert re.fullmatch(r">=[\d.]+", str(allowed.pop(name)))
    for name in allowed.keys() - {"emoe"}:
        assert versions[name] in allowed[name], name


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


def test_every_release_has_a_section_in_the_changelog() -> None:
    unreleased, *releases = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "Unreleased"
    versions, dates = zip(
        *(re.fullmatch(r"([\d.]+) - (\d{4}-\d\d-\d\d)", name).groups() for name in releases), strict=True
    )
    assert list(versions) == sorted(versions, key=Version, reverse=True)
    assert list(dates) == sorted(dates, reverse=True)
    tags = subprocess.run(["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {tag.removeprefix("v") for tag in tags.stdout.split()} <= set(versions)


def test_pages_for_contributors_and_ci_name_targets_and_files_that_exist() -> None:
    texts = {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")}
    workflows = [file.read_text() for file in (ROOT / ".github/workflows").glob("*.yml")]
    called = "\n".join([*texts.values(), *workflows, (ROOT / ".ci/run").read_text(), (ROOT / "README.md").read_text()])
    assert {"run", "test"} <= set(re.findall(r"(?:`|\bmake )(?:make )?([a-z-]+)\b", called)) & TARGETS
    for text in (*texts.values(), *workflows):
        assert set(re.findall(r"(?:`|: |&& |\[|, )make ([a-z-]+)", text)) <= TARGETS
    for name, text in texts.items():
        paths = re.findall(r"\]\((?!http)([^)#]+)", text)
        paths += re.findall(r"`((?:tests|results|docs|emoe|benchmarks|workflow|config)/[\w./-]*)`", text)
        assert [path for path in paths if not (ROOT / path).exists()] == [], name
