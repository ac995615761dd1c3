"""Test the suite `paper` at its whole size with made-up results: its graph, tables, figures and report.

It takes minutes: `make test-paper-size` and the nightly workflow run it.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.workflow.targets import output_files
from tests import fake_runs
from tests.checkout import SNAKEMAKE, Checkout, seconds_of_children

pytestmark = [pytest.mark.paper_size, pytest.mark.timeout(3600)]
SUITE = load_suite({"suite": "paper"})
GIB = 2**20  # in kibibytes, as a process's memory is counted


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    made = Checkout(tmp_path_factory.mktemp("paper"))
    here = Path.cwd()
    os.chdir(made.folder)
    try:
        fake_runs.write_runs(SUITE.runs, {"emoe": 0.01})
        yield made
    finally:
        os.chdir(here)


def most_memory(checkout: Checkout, *command: object) -> int:
    """Run a command, and return the most memory that it or an earlier command took, in kibibytes."""
    checkout.run(*command)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def test_the_graph_of_all_runs_fits_in_a_gibibyte(checkout: Checkout) -> None:
    assert (
        most_memory(checkout, SNAKEMAKE, "--dry-run", "--quiet", "all", "--config", "suite=paper")
        < GIB
    )


def test_a_dry_run_takes_ninety_seconds(checkout: Checkout) -> None:
    before = seconds_of_children()
    checkout.run(SNAKEMAKE, "--dry-run", "--quiet", "all", "--config", "suite=paper")
    assert seconds_of_children() - before <= 90


@pytest.mark.parametrize("benchmark", SUITE.settings.benchmarks)
def test_every_benchmark_is_shown(checkout: Checkout, benchmark: str) -> None:
    parts = SUITE.sets_with_tables(benchmark)
    for command, shown in (("collect", parts or [None]), ("tables", [None, *parts])):
        words = [
            sys.executable,
            "-m",
            "benchmarks",
            command,
            "--suite",
            "paper",
            "--benchmark",
            benchmark,
        ]
        for part in shown:
            assert most_memory(checkout, *words, *(["--part", part] if part else [])) < 4 * GIB
    assert [
        file for file in output_files(SUITE, benchmark) if not (checkout.folder / file).exists()
    ] == []


def test_the_report_opens(checkout: Checkout) -> None:
    page = "results/paper/report.html"
    for words in (["claims", "--write"], ["report", "--output", page]):
        checkout.run(sys.executable, "-m", "benchmarks", *words, "--suite", "paper")
    text, names = (checkout.folder / page).read_text(), list(SUITE.settings.benchmarks)
    assert len(text) < 40_000_000
    assert re.findall(r'<section id="(\w+)">', text)[1 : 1 + len(names)] == names
    assert re.search(rf"{len(SUITE.runs):,} runs|{len(SUITE.runs)} runs", text)
