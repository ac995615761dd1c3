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


@command("Write JSON Schemas of all YAML files, for editors.")
def schemas() -> None:
    """Write JSON Schemas of all YAML files, for editors: benchmarks/schemas/*.schema.json, which git ignores."""
    from benchmarks.harness.config.schemas import write_schemas

    click.echo("\n".join(f"wrote {file}" for file in write_schemas()))


COMMANDS = (data, new, schemas)
