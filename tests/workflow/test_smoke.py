"""The whole workflow on the smoke suite, in a copy of the checkout, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.sources import vader
from tests.checkout import SNAKEMAKE, Checkout, wait_for
from tests.programs import call

pytestmark = pytest.mark.slow

SUITE = load_suite({"suite": "smoke"})


def metrics(checkout: Checkout, folder: str) -> dict[str, Any]:
    """Read the results of a run."""
    return json.loads((checkout.folder / "results/runs" / folder / "metrics.json").read_text())


def jobs(text: str) -> dict[str, int]:
    """Return the number of jobs by rule, from Snakemake's output."""
    return {name: int(count) for name, count in re.findall(r"^([a-z_]+) +(\d+)$", text, re.M) if name != "total"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("checkout"))
    made.put(archive)
    text = made.snakemake("smoke")
    assert "Traceback" not in text
    return made


def test_everything_that_the_suite_promises_is_there(checkout: Checkout) -> None:
    for file in (*SUITE.metric_files(), *SUITE.output_files(), "results/smoke/report.html", "results/smoke/mlflow.txt"):
        assert (checkout.folder / file).stat().st_size > 20, file
    assert (checkout.folder / "results/runs" / SUITE.runs[0].folder / "log.txt").exists()
    page = (checkout.folder / "results/smoke/report.html").read_text()
    assert "its scores mean nothing" in page


def test_an_edit_of_a_table_reruns_only_the_tables_and_pages_of_its_benchmark(checkout: Checkout) -> None:
    """This is before the tests that repeat runs, because repeated runs are newer than their tables."""
    file = "benchmarks/llama/presentation.py"
    assert "Nothing to be done" in checkout.snakemake("-n", "smoke")
    checkout.edit(file, '"""', '"""Edited. ')
    rerun = {"tables_of_llama", "table_of_claims", "benchmark_report", "report", "smoke"}
    assert jobs(checkout.snakemake("-n", "smoke")) == dict.fromkeys(rerun, 1)
    checkout.edit(file, '"""Edited. ', '"""')


def test_pdflatex_compiles_every_table(checkout: Checkout) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX on this machine (Debian: apt-get install texlive-latex-recommended)")
    tables = sorted((checkout.folder / "results/smoke").glob("*/*.tex"))
    assert len(tables) > 60
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,longtable}"
    body = "\\clearpage\n".join(table.read_text() for table in tables)
    document = checkout.folder / "tables.tex"
    document.write_text(f"\\documentclass{{article}}{packages}\\begin{{document}}\n{body}\\end{{document}}\n")
    result = checkout.run("pdflatex", "-interaction=nonstopmode", document.name, check=False)
    log = document.with_suffix(".log").read_text(errors="replace")
    assert result.returncode == 0, log
    assert re.findall(r".*multiply defined.*", log) == []


def test_the_numbers_are_the_blessed_ones_within_the_tolerances(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.folder)
    call("check", "--suite", "smoke", "--elsewhere")


def test_only_runs_of_a_new_seed_and_of_deleted_weights_are_planned(checkout: Checkout) -> None:
    """A comment in a suite's file runs nothing."""
    file = "config/smoke.yaml"
    original = (checkout.folder / file).read_text()
    weights = checkout.folder / SUITE.weight_files()[0]
    content = weights.read_bytes()
    weights.unlink()
    try:
        checkout.edit(file, "  glue_ood:\n", "  glue_ood: # only a comment\n")
        checkout.edit(file, "method: [vanilla, emoe], seed: [0, 1]", "method: [vanilla, emoe], seed: [0, 1, 2]")
        plan = jobs(checkout.snakemake("-n", "smoke"))
        assert plan["run_glue"] == 2
        assert plan.get("run_glue_lora", 0) + plan.get("run_llama", 0) == 1
        assert "partition_neurons" not in plan
    finally:
        (checkout.folder / file).write_text(original)
        weights.write_bytes(content)


def test_only_killed_or_deleted_runs_run_again_with_the_same_numbers(checkout: Checkout) -> None:
    """Delete two trainings (one is killed then), an evaluation with its training, and an evaluation alone."""
    evaluations = [run for run in SUITE.runs if run.benchmark == "glue_ood"]
    (trained,) = evaluations[0].spec["candidates"]
    alone = next(run for run in evaluations if trained not in run.spec["candidates"])
    other, killed = (SUITE.runs_of("glue")[number].folder for number in (0, 2))
    before = {}
    for folder in (killed, other, trained, evaluations[0].folder, alone.folder):
        before[folder] = metrics(checkout, folder)["scores"]
        (checkout.folder / "results/runs" / folder / "metrics.json").unlink()

    target = f"results/runs/{killed}/metrics.json"
    log = (checkout.folder / target).with_name("log.txt")
    log.unlink()
    with (checkout.folder / "killed.txt").open("w") as stream:
        main = checkout.start(SNAKEMAKE, "--cores", 1, target, stream=stream)
        wait_for(lambda: log.exists() and "training," in log.read_text())
        main.send_signal(signal.SIGKILL)
        main.wait()
    assert list((checkout.folder / ".snakemake/locks").iterdir())
    unlocked = checkout.run(sys.executable, "workflow/scripts/unlock_stale.py")
    assert "was killed and left its lock" in unlocked.stderr

    again = [run for run in evaluations if trained in run.spec["candidates"]]
    runs = {"run_glue": 2, "run_glue_lora": 1, "run_glue_ood": 1 + len(again)}
    shown = {f"tables_of_{name.removeprefix('run_')}" for name in runs}
    planned = jobs(checkout.snakemake("-n", "smoke"))
    assert {name: count for name, count in planned.items() if name.startswith("run_")} == runs
    assert {name for name in planned if name.startswith("tables_of_")} == shown
    folders = {killed, other, trained, alone.folder, *(run.folder for run in again)}
    assert jobs(checkout.snakemake(*(f"results/runs/{folder}/metrics.json" for folder in folders))) == runs
    assert {folder: metrics(checkout, folder)["scores"] for folder in before} == before


def test_a_wrong_suite_or_target_ends_with_one_clear_message(checkout: Checkout) -> None:
    for words, message in (
        (["--config", "suite=minni"], "there is no suite 'minni'; did you mean 'mini'?"),
        (["table_multitask", "--config", "suite=mini"], "error: the suite 'mini' does not run multitask; smoke, paper"),
    ):
        result = checkout.run(SNAKEMAKE, "--cores", 1, "-n", *words, check=False)
        assert result.returncode != 0
        assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_failed_run_shows_its_log_and_the_others_go_on(checkout: Checkout) -> None:
    archive = checkout.folder / vader.ARCHIVE
    content, stamp = archive.read_bytes(), archive.stat()
    target = checkout.folder / SUITE.metric_files()[0]
    kept = target.read_bytes()
    target.unlink()
    archive.write_bytes(content[:-1])
    os.utime(archive, (stamp.st_atime, stamp.st_mtime))
    try:
        result = checkout.run(SNAKEMAKE, "--cores", 1, SUITE.metric_files()[0], check=False)
        assert result.returncode != 0
        assert "is damaged or another version" in result.stdout + result.stderr
        assert not target.exists()
    finally:
        archive.write_bytes(content)
        os.utime(archive, (stamp.st_atime, stamp.st_mtime))
        target.write_bytes(kept)


def test_runs_that_were_copied_from_another_machine_are_finished(checkout: Checkout, tmp_path: Path) -> None:
    other = Checkout(tmp_path)
    # rsync copies inputs before their runs, in the order of names; cp has no order, and must keep the times
    copy = ("rsync", "-r") if shutil.which("rsync") else ("cp", "-a")
    other.run(*copy, checkout.folder / "results/runs", other.folder / "results")
    assert "Nothing to be done" in other.snakemake("-n", *SUITE.metric_files())
