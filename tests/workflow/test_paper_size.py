"""Test the suite `paper` at its whole size with made-up results: its graph, tables, figures and report.

It takes minutes: `make test-paper-size` and the nightly workflow run it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.config.suite import load_suite
from tests import fake_runs
from tests.checkout import SNAKEMAKE, Checkout

pytestmark = [pytest.mark.paper_size, pytest.mark.timeout(3600)]
SUITE = load_suite({"suite": "paper"})
GIB = 2**20  # in kibibytes, as a process's memory is counted


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    found = Checkout(tmp_path_factory.mktemp("paper"))
    here = Path.cwd()
    os.chdir(found.folder)
    try:
        fake_runs.write_runs(SUITE.runs, {"emoe": 0.01})
        fake_runs.write_samples(SUITE.runs_of("domainbed"))
        yield found
    finally:
        os.chdir(here)


def finished(checkout: Checkout, *command: object) -> tuple[str, int]:
    """Return the output of a command and the most memory that it took, in kibibytes."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=checkout.folder,
        env=checkout.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return said, usage.ru_maxrss


def test_the_graph_of_all_runs_fits_in_a_gibibyte(checkout: Checkout) -> None:
    said, memory = finished(checkout, SNAKEMAKE, "--dry-run", "--quiet", "all", "--config", "suite=paper")
    assert "Error" not in said
    assert memory < GIB


@pytest.mark.parametrize("benchmark", SUITE.settings.benchmarks)
def test_every_benchmark_is_shown(checkout: Checkout, benchmark: str) -> None:
    parts = SUITE.parts(benchmark)
    for part in (None, *parts):
        words = ["--part", part] if part else []
        _, memory = finished(
            checkout, sys.executable, "-m", "benchmarks", "tables", "--suite", "paper", "--benchmark", benchmark, *words
        )
        assert memory < 4 * GIB
    there = [
        Path(file) for file in SUITE.output_files(benchmark) if Path(file).suffix in (".csv", ".md", ".tex", ".png")
    ]
    assert there
    assert [str(file) for file in there if not (checkout.folder / file).exists()] == []


def test_the_report_opens(checkout: Checkout) -> None:
    finished(checkout, sys.executable, "-m", "benchmarks", "claims", "--suite", "paper", "--write")
    page = "results/paper/report.html"
    finished(checkout, sys.executable, "-m", "benchmarks", "report", "--suite", "paper", "--output", page)
    text = (checkout.folder / page).read_text()
    assert len(text) < 40_000_000
    assert (
        re.findall(r'<section id="(\w+)">', text)[1 : 1 + len(SUITE.settings.benchmarks)] == SUITE.settings.benchmarks
    )
    assert re.search(rf"{len(SUITE.runs):,} runs|{len(SUITE.runs)} runs", text)
