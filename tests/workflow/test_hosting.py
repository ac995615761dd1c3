"""Releases, versions and pages for contributors agree with the repository."""

from __future__ import annotations

import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT
from tests.workflow.test_project import PYPROJECT

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_workflows_call_targets_that_exist() -> None:
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        assert set(re.findall(r"\bmake ([a-z-]+)", file.read_text())) <= TARGETS


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


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"])
def test_a_page_for_contributors_names_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|results|docs|emoe|benchmarks|workflow|config)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_known_versions_are_allowed_ones() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    known = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    groups = PYPROJECT["project"]["optional-dependencies"]
    asked = [*PYPROJECT["project"]["dependencies"], *groups["suite"], *groups["mini"], *groups["dev"]]
    wanted = {canonicalize_name(found.name): found.specifier for found in map(Requirement, asked)}
    for name in wanted.keys() - {"emoe", "torch", "torchvision"}:  # whose builds are the machine's affair
        assert known[name] in wanted[name], name
