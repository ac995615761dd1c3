"""Test what a finished run says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.base import DataError
from benchmarks.harness.config.suite import load_suite, plain_suite
from benchmarks.harness.report.closing import closing_lines
from tests import fake_runs
from tests.programs import call

HEADING = "Verdicts on the paper's claims, by test:"


def write_claims(*rows: str, suite: str = "mini") -> None:
    file = Path(f"results/{suite}/tables/claims.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["claim_title,endpoint,verdict", *rows]) + "\n")
    Path(f"results/{suite}/report.html").touch()


def test_each_verdict_has_a_line_with_its_claims(here: Path) -> None:
    long = "A claim " * 20
    write_claims(
        "First,main,supported",
        "First,main,supported",
        "Second,main,supported",
        "Second,loss,contradicted",
        f"{long},main,undecided",
        "Third,main,missing",
    )
    lines = closing_lines(load_suite({"suite": "mini"}))
    assert lines[0].startswith("Open next: results/mini/report.html")
    assert lines[-3:-1] == [HEADING, "  3 supported: First; Second"]
    assert lines[-1].startswith("  1 undecided: A claim A claim")
    assert lines[-1].endswith(" …")
    assert max(map(len, lines[-3:])) <= 100


@pytest.mark.parametrize("verdict", ["–", "missing"])
def test_without_verdicts_nothing_is_said_of_them(verdict: str, here: Path) -> None:
    write_claims(f"First,main,{verdict}")
    lines = closing_lines(load_suite({"suite": "mini"}))
    assert len(lines) == 4
    assert HEADING not in lines


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"claim_title,verdict\na,b\n", "test 1 has no 'endpoint'"), (b"\xff", "'utf-8' codec .*")],
)
def test_a_damaged_table_is_one_line_with_the_way_out(
    content: bytes, problem: str, here: Path
) -> None:
    write_claims()
    file = Path("results/mini/tables/claims.csv")
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=f"^{file} is damaged: {problem}; `snakemake .*makes it again$"
    ):
        closing_lines(load_suite({"suite": "mini"}))


def test_a_suite_without_a_report_says_nothing(here: Path) -> None:
    assert closing_lines(load_suite({"suite": "mini"})) == []


def test_status_ends_with_it_when_all_runs_are_finished(here: Path) -> None:
    runs = plain_suite("smoke").runs
    fake_runs.write_runs(runs)
    write_claims("First,main,–", suite="smoke")
    assert "Open next: results/smoke/report.html" in call("status", "--suite", "smoke")
    runs[0].metrics_file.unlink()
    assert "Open next" not in call("status", "--suite", "smoke")
