"""Setting up: data, a benchmark of one's own, what editors know."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from benchmarks.commands.shell import AS_JSON, SUITE, command, echo_json, load_suite


@command("Fetch the data of a suite, and say what is there.")
@SUITE
@click.option("--check", is_flag=True, help="Only look; download nothing.")
@click.option("--open", "open_images", is_flag=True, help="Also open every image of image sets; takes minutes.")
@click.option(
    "--data-root",
    type=click.Path(exists=True, file_okay=False),
    default=None,
    help="Folder with data sets; by default the suite's.",
)
@AS_JSON
def data(suite: str, check: bool, open_images: bool, data_root: str | None, as_json: bool) -> None:
    """Fetch the data of a suite and say for every set what is there; ends with status 1 where something is missing."""
    import dataclasses
    import os

    from benchmarks.harness.base.paths import DATA_ROOT
    from benchmarks.harness.run import data_check

    loaded = load_suite(suite)
    os.environ.update(loaded.environment())
    if data_root:
        os.environ[DATA_ROOT] = data_root
    if check:
        data_check.stay_offline()
    else:
        data_check.fetch_packaged(loaded)
    parts, loose = list(data_check.check_data(loaded.runs, open_images=open_images)), data_check.unpinned(loaded)
    if as_json:
        echo_json({"parts": [dataclasses.asdict(part) for part in parts], "unpinned": loose})
    else:
        click.echo(data_check.describe(parts))
        if loose:
            click.echo(f"\nNot pinned to a commit: {'; '.join(loose)}. metrics.json records which was read")
    if any(part.rows is None for part in parts):
        sys.exit(1)


@command("Write a text benchmark from a csv.")
@click.argument("name")
@click.option("--csv", type=click.Path(path_type=Path), required=True, help="Rows with a text and a label.")
@click.option("--text", default="text", show_default=True, help="Column of the text.")
@click.option("--label", default="label", show_default=True, help="Column of the label.")
def new(name: str, csv: Path, text: str, label: str) -> None:
    """Write the text benchmark NAME from a csv: a folder below benchmarks/ and a suite of its name."""
    from benchmarks.text.new import new_benchmark

    new_benchmark(name, csv, text, label)
    click.echo(f"wrote benchmarks/{name} and config/{name}.yaml\nrun it: snakemake --cores 2 {name}")


@command("Write what editors know of the YAML files.")
def schemas() -> None:
    """Write what editors know of the YAML files: benchmarks/schemas/*.schema.json."""
    from benchmarks.harness.config.editor import write_schemas

    click.echo("\n".join(f"wrote {file}" for file in write_schemas()))


COMMANDS = (data, new, schemas)
