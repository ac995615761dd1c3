"""Run jobs in an image: the Dockerfile, and ``--sdm apptainer`` with a script in place of Apptainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.harness.config.suite import load_suite
from tests.checkout import Checkout
from tests.conftest import ROOT
from tests.workflow.test_project import PYPROJECT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PARTITION = next(iter(load_suite({"suite": "smoke"}).partitions.values())).file
_APPTAINER = """#!/bin/sh
[ "$1" = --version ] && { echo "apptainer version 1.4.0"; exit; }
echo "$* by ${EMOE_FORKSERVER-itself}" >> {folder}/calls.txt
while [ $# -gt 3 ]; do shift; done
exec "$@"
"""


@pytest.mark.slow
def test_apptainer_runs_the_jobs_in_the_image(checkout: Checkout, tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(_APPTAINER.replace("{folder}", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    words = ("--sdm", "apptainer", "--apptainer-args=--nv", "--config", "suite=smoke", "--", PARTITION)
    checkout.snakemake(*words)
    (call,) = (tmp_path / "calls.txt").read_text().splitlines()
    home = re.escape(str(checkout.folder))
    assert re.match(rf"exec --home {home} +--nv .*emoe\.sif bash -c ", call)
    assert "python -m benchmarks partition " in call
    assert call.endswith(" by itself")  # the image's Python, and no fork of this one
    assert (checkout.folder / PARTITION).exists()


def test_the_image_has_a_python_extras_and_a_user_that_fit() -> None:
    oldest = PYPROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert f"FROM python:{oldest}-slim" in DOCKERFILE  # the oldest, by which the numbers were blessed
    (extras,) = re.findall(r"pip install .*'/tmp/dependencies\[(.+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
