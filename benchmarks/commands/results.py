"""The commands that show finished runs: tables, figures, claims, the report, MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.commands.shell import AS_JSON, SUITE, benchmark_option, command, echo_json, load_suite

if TYPE_CHECKING:
    from benchmarks.harness.config.suite import Suite


@command("Write the tables and figures of a benchmark.")
@SUITE
@benchmark_option("Which benchmark.", required=True)
@click.option("--part", default=None, help="One of its sets alone, where sets are shown one by one.")
def tables(suite: str, benchmark: str, part: str | None) -> None:
    """Write the tables and figures of a benchmark whose runs are finished."""
    from benchmarks.harness.base import paths
    from benchmarks.harness.config.artifacts import artifacts_of
    from benchmarks.harness.config.definition import load_benchmark
    from benchmarks.harness.config.schema import check_names
    from benchmarks.harness.report.paper_items import write_paper_items
    from benchmarks.harness.report.presentation import present

    loaded = load_suite(suite, benchmark)
    if part:
        check_names(f"suite {suite}: '", "part", [part], loaded.parts(benchmark))
    _check_finished(loaded, [benchmark], part)
    presented = present(load_benchmark(benchmark), loaded.runs_of(benchmark, part))
    shown = presented.parts[part] if part else presented
    folder = paths.RESULTS / suite
    for table in shown.tables:
        table.write(folder / "tables")
    shown.draw(folder / "figures")
    write_paper_items(loaded, artifacts_of(benchmark, part), shown)


@command("Say what the runs say of the paper's claims.")
@SUITE
@AS_JSON
@click.option("--write", is_flag=True, help="Write table and figure below results/ instead of printing.")
def claims(suite: str, as_json: bool, write: bool) -> None:
    """Say what a suite's finished runs say of the paper's claims."""
    from benchmarks.harness.report.claims import as_records, claims_table, judged
    from benchmarks.harness.report.claims_figure import write_claims

    loaded = load_suite(suite)
    _check_finished(loaded, loaded.claimed, which=" that claims compare")
    if write:
        write_claims(loaded)
    elif as_json:
        click.echo(as_records(judged(loaded)))
    else:
        click.echo(claims_table(loaded, judged(loaded)).markdown())


@command("Write the one-page report.")
@SUITE
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The HTML page.")
@benchmark_option("Show this benchmark alone.")
@click.option("--copy", type=click.Path(path_type=Path), default=None, help="Copy this page, with links that hold.")
def report(suite: str, output: Path, benchmark: str | None, copy: Path | None) -> None:
    """Write the one-page report of a suite whose tables exist."""
    from benchmarks.harness.report.report import copy_report, write_report

    if copy:
        copy_report(copy, output)
    else:
        loaded = load_suite(suite, benchmark)
        shown = [benchmark] if benchmark else loaded.settings.benchmarks
        _check_finished(loaded, shown)
        write_report(loaded, output, benchmark)


@command("Mirror finished runs to MLflow.")
@SUITE
@click.option("--uri", default=None, help="MLflow's store; by default the suite's.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Receipt to write.")
def mirror(suite: str, uri: str | None, output: Path | None) -> None:
    """Mirror a suite's finished runs to MLflow; doing it twice adds nothing."""
    from benchmarks.harness.base.files import write_json
    from benchmarks.harness.base.secrets import without_passwords
    from benchmarks.harness.results.mlflow import mirror as mirror_runs

    loaded = load_suite(suite)
    _check_finished(loaded, loaded.settings.benchmarks)
    figures = {
        name: [Path(file) for file in loaded.output_files(name) if file.endswith(".png")]
        for name in loaded.settings.benchmarks
    }
    counts = mirror_runs(loaded.runs, uri or loaded.tracking_uri, figures)
    click.echo("MLflow: " + ", ".join(f"{count} {word}" for word, count in counts.items()), err=True)
    if output:
        write_json(output, {"uri": without_passwords(uri or loaded.tracking_uri), "runs": len(loaded.runs)})


@command("Open the MLflow UI on the runs.")
@SUITE
def ui(suite: str) -> None:
    """Open the MLflow UI on the suite's store."""
    from benchmarks.harness.base.secrets import without_passwords

    uri = load_suite(suite).tracking_uri
    if uri.startswith("http"):
        click.echo(f"The runs are on the MLflow server {without_passwords(uri)}")
    else:  # by its environment, which other users do not see
        store = {"MLFLOW_BACKEND_STORE_URI": uri}
        subprocess.run([sys.executable, "-m", "mlflow", "ui"], env=os.environ | store, check=False)


@command("List the paper's tables and figures.")
@SUITE
@AS_JSON
def paper(suite: str, as_json: bool) -> None:
    """List the paper's tables and figures: the command that makes each, its files, whether they are there."""
    from benchmarks.harness.report.paper_items import paper_index
    from benchmarks.harness.report.rendering import MISSING

    index = paper_index(load_suite(suite))
    if as_json:
        echo_json(index.to_dict("records"))
    else:
        click.echo(index.assign(files=index["files"].map(", ".join)).replace("", MISSING).to_markdown(index=False))


def _check_finished(suite: Suite, benchmarks: Sequence[str], part: str | None = None, which: str = "") -> None:
    """Refuse to show runs of which some are missing: says how many, which the name of the first would not."""
    from benchmarks.harness.results.records import check_finished

    runs = [run for name in benchmarks for run in suite.runs_of(name, part)]
    whole = which or (part is None and len(benchmarks) == len(suite.settings.benchmarks))
    of = "" if whole else f"{part or benchmarks[0]} in "
    check_finished(runs, f"of {of}the suite {suite.name}{which}", f"make run SUITE={suite.name}")


COMMANDS = (tables, claims, paper, report, mirror, ui)
