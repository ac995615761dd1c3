"""The whole workflow on the smoke suite, in a copy of the checkout, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.sources.packages import find_package
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


def test_an_edit_of_a_table_or_title_reruns_only_the_tables_and_pages_of_its_benchmark(checkout: Checkout) -> None:
    """This is before the tests that repeat runs, because repeated runs are newer than their tables."""
    edits = [
        ("benchmarks/llama/presentation.py", '"""', '"""Edited. '),
        ("benchmarks/multitask/benchmark.yaml", "T5 on", "The T5 on"),
    ]
    assert "Nothing to be done" in checkout.snakemake("-n", "smoke")
    for file, old, new in edits:
        checkout.edit(file, old, new)
    rerun = {"tables_of_llama": 1, "tables_of_multitask": 1, "table_of_claims": 1, "benchmark_report": 2, "report": 1}
    assert jobs(checkout.snakemake("-n", "smoke")) == {**rerun, "smoke": 1}
    for file, old, new in edits:
        checkout.edit(file, new, old)


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
    """Delete two trainings (one is killed then), an evaluation with its training, and an evaluation alone.

    Before the killed run, another one fails, because its package is damaged.
    """
    evaluations = [run for run in SUITE.runs if run.benchmark == "glue_ood"]
    (trained,) = evaluations[0].spec["candidates"]
    alone = next(run for run in evaluations if trained not in run.spec["candidates"])
    other, killed = (SUITE.runs_of("glue")[number].folder for number in (0, 2))
    before = {}
    for folder in (killed, other, trained, evaluations[0].folder, alone.folder):
        before[folder] = metrics(checkout, folder)["scores"]
        (checkout.folder / "results/runs" / folder / "metrics.json").unlink()

    failing, target = (f"results/runs/{folder}/metrics.json" for folder in (SUITE.runs_of("llama")[0].folder, killed))
    log = (checkout.folder / target).with_name("log.txt")
    log.unlink()
    with damaged(checkout, failing), (checkout.folder / "shown.txt").open("w+") as stream:
        main = checkout.start(SNAKEMAKE, "--cores", 1, "--prioritize", failing, "--", failing, target, stream=stream)
        wait_for(lambda: log.exists() and "training," in log.read_text())
        main.send_signal(signal.SIGKILL)
        main.wait()
        stream.seek(0)
        assert "is damaged or another version" in stream.read()
        assert not (checkout.folder / failing).exists()
    assert list((checkout.folder / ".snakemake/locks").iterdir())
    locked = checkout.snakemake(target, check=False)
    assert "Directory cannot be locked" in locked
    assert "--unlock" in locked
    checkout.snakemake("--unlock")

    again = [run for run in evaluations if trained in run.spec["candidates"]]
    runs = {"run_glue": 2, "run_glue_lora": 1, "run_glue_ood": 1 + len(again)}
    shown = {f"tables_of_{name.removeprefix('run_')}" for name in runs}
    planned = jobs(checkout.snakemake("-n", "smoke"))
    assert {name: count for name, count in planned.items() if name.startswith("run_")} == runs
    assert {name for name in planned if name.startswith("tables_of_")} == shown
    folders = {killed, other, trained, alone.folder, *(run.folder for run in again)}
    assert jobs(checkout.snakemake(*(f"results/runs/{folder}/metrics.json" for folder in folders))) == runs
    assert {folder: metrics(checkout, folder)["scores"] for folder in before} == before
    plan = json.loads((checkout.folder / "results/mini/plan.json").read_text())
    needed = {folder for run in (alone, *again) for folder in run.spec["candidates"]}
    assert set(plan["runs"]) == folders | needed  # progress counts the target's runs


@contextmanager
def damaged(checkout: Checkout, target: str) -> Iterator[None]:
    """Delete the results of a run and damage the package of its instructions; restore all its files."""
    folder, package = (checkout.folder / target).parent, checkout.folder / find_package("llamafactory").path
    files = {file: (file.read_bytes(), file.stat()) for file in (package, *folder.glob("*.json"))}
    (checkout.folder / target).unlink()
    package.write_bytes(b"damaged")
    restore_times(package, files[package][1])
    yield
    for file, (content, stat) in files.items():
        file.write_bytes(content)
        restore_times(file, stat)


def restore_times(file: Path, stat: os.stat_result) -> None:
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_wrong_suite_or_target_ends_with_one_clear_message(checkout: Checkout) -> None:
    for words, message in (
        (["--config", "suite=minni"], "there is no suite 'minni'; did you mean 'mini'?"),
        (["table_multitask", "--config", "suite=mini"], "error: the suite 'mini' does not run multitask; smoke, paper"),
        (["results/runs/glue/nothing-12345678/metrics.json"], "error: no suite has the run 'glue/nothing-12345678'"),
    ):
        result = checkout.run(SNAKEMAKE, "--cores", 1, "-n", *words, check=False)
        assert result.returncode != 0
        assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_runs_that_were_copied_from_another_machine_are_finished(checkout: Checkout, tmp_path: Path) -> None:
    other = Checkout(tmp_path)
    # rsync copies inputs before their runs, in the order of names; cp has no order, and must keep the times
    copy = ("rsync", "-r") if shutil.which("rsync") else ("cp", "-a")
    other.run(*copy, checkout.folder / "results/runs", other.folder / "results")
    assert "Nothing to be done" in other.snakemake("-n", *SUITE.metric_files())
