"""What the hosting platform runs and shows: workflows, issue forms, citation. Checked here as far as that goes offline."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT
from tests.workflow.test_project import PYPROJECT

GITHUB = ROOT / ".github"
FILES = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def workflow(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in content["jobs"].values() for step in job["steps"]]


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_workflow_calls_what_exists(file: Path) -> None:
    content = workflow(file)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = "\n".join(step.get("run", "") for step in steps(content))
    called = set(re.findall(r"\bmake ([a-z-]+)", said))
    assert called <= targets
    names = {workflow(other)["name"] for other in FILES}
    assert set(content["on"].get("workflow_run", {}).get("workflows", ())) <= names
    for job in content["jobs"].values():
        needs = job.get("needs", [])
        assert {*([needs] if isinstance(needs, str) else needs)} <= set(content["jobs"])
        assert job["timeout-minutes"] <= 360


def test_a_workflow_runs_a_python_that_is_allowed(file: Path) -> None:
    content = workflow(file)
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    for job in content["jobs"].values():
        versions = job.get("strategy", {}).get("matrix", {}).get("python", [])
        for step in job["steps"]:
            given = step.get("with", {}).get("python-version", "")
            versions = [*versions, *([given] if given and "${{" not in given else [])]
        assert all(isinstance(version, str) and version in allowed for version in versions)


def test_a_workflow_may_do_no_more_than_it_has_to(file: Path) -> None:
    content = workflow(file)
    assert "pull_request_target" not in content["on"]
    assert content["permissions"] in ({}, {"contents": "read"})
    for job in content["jobs"].values():
        if "pull_request" in content["on"] and "write" in job.get("permissions", {}).values():
            assert job["if"] == "github.event_name == 'push'"
    for step in steps(content):
        # what others write (branch names, titles) is never part of a script
        assert not re.search(r"\$\{\{[^}]*github\.(event\.|head_ref)", step.get("run", ""))
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@(v\d+|release/v\d+)", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_ci_runs_the_oldest_python_and_a_newer_one() -> None:
    content = workflow(GITHUB / "workflows/ci.yml")
    versions = content["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions[0] == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert len(versions) > 1
    assert {step.get("run") for step in steps(content)} >= {"make lint", "make test"}


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_finds_nothing() -> None:
    found = subprocess.run(["actionlint", *map(str, FILES)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_is_one(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    assert len({field["id"] for field in content["body"]}) == len(content["body"])
    for field in content["body"]:
        assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        options = field["attributes"].get("options", ["none"])
        assert all(isinstance(one, dict if field["type"] == "checkboxes" else str) for one in options)


def test_every_release_has_a_section_in_the_changelog() -> None:
    unreleased, *releases = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert unreleased == "Unreleased"
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in releases]
    assert None not in found
    versions, dates = zip(*(match.groups() for match in found if match), strict=True)
    assert list(versions) == sorted(versions, key=Version, reverse=True)
    assert list(dates) == sorted(dates, reverse=True)
    tags = subprocess.run(["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {tag.removeprefix("v") for tag in tags.stdout.split()} <= set(versions)


def test_the_paper_is_what_is_cited() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Qiu", "Huang", "Fu"]
    assert paper["doi"] == "10.18653/v1/2024.naacl-long.144"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"])
def test_a_page_for_contributors_names_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= set(targets)
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|results|docs|emoe|benchmarks|workflow|config)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_ci_installs_the_known_versions_which_are_allowed_ones() -> None:
    assert "constraints.txt" in workflow(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["env"]["PIP_CONSTRAINT"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    known = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    groups = PYPROJECT["project"]["optional-dependencies"]
    asked = [*PYPROJECT["project"]["dependencies"], *groups["suite"], *groups["mini"], *groups["dev"]]
    wanted = {canonicalize_name(found.name): found.specifier for found in map(Requirement, asked)}
    for name in wanted.keys() - {"emoe", "torch", "torchvision"}:  # whose builds are the machine's affair
        assert known[name] in wanted[name], name
