"""``python -m emoe``: convert, inspect and fold back model folders from the shell."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from tabulate import tabulate

import emoe
from emoe import checkpoint, files
from emoe.compiled.build import build_kernels
from emoe.errors import CheckpointError, ConfigError, EMoEError
from emoe.model_config import Experts

_FOLDER = click.Path(path_type=Path)
_output = click.option("--output", type=_FOLDER, required=True, help="A new folder.")


class _Commands(click.Group):
    """A group of commands that reports expected errors in one line."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> NoReturn:  # type: ignore[override]
        """Run a command, and exit with its status."""
        options["standalone_mode"] = False  # else click reports errors in its own way
        try:
            status = super().main(args, **options)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except EMoEError as error:
            _fail(str(error))
        except ModuleNotFoundError as error:  # the model's library, which is not a dependency
            _fail(f"this needs the package '{error.name}': pip install {error.name}")
        except OSError as error:  # no permission, a full disk
            # an operation on two files, such as a move, writes the second one
            file = error.filename2 or error.filename or "a file"
            reason = error.strerror or error
            _fail(f"{file}: {reason}")
        except click.Abort:  # Ctrl-C
            sys.exit(130)
        sys.exit(status)


def _fail(message: str, status: int = 1) -> NoReturn:
    """Print an error in one line, and exit."""
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(emoe.__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Turn a pre-trained transformer's FFNs into experts, and back."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _parse_layers(text: str) -> str | list[int]:
    """Turn a text like ``8,10`` into a list of layer numbers. Return any other text unchanged."""
    # at most nine digits, because int() rejects very long numbers
    if re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
        return [int(number) for number in text.split(",")]
    return text


def _parse_field(text: str) -> tuple[str, Any]:
    """Split ``name=value`` into the name and the value, which is read as JSON if it is JSON."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: write name=value, for example --set selection=bottom")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):  # not JSON, or too many digits or brackets
        return name, value


@cli.command(short_help="Convert a model, and write it to a new folder.")
@click.argument("model")
@_output
@click.option("--num-experts", type=int, required=True, help="N, experts of each converted FFN.")
@click.option("--top-k", type=int, required=True, help="Experts that each token uses.")
@click.option(
    "--layers",
    default="last-half:2",
    show_default=True,
    help="8,10; all; last:2; last-half:2; 8:12:2.",
)
@click.option(
    "--partition", help="Partition of the neurons: kmeans (the default), random, contiguous."
)
@click.option(
    "--kind",
    type=click.Choice(["emoe", "gmoe"]),
    default="emoe",
    show_default=True,
    help="Split or copy.",
)
@click.option("--as-published", help="The authors' settings: tutel or llama.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other field of the configuration.",
)
def convert(
    model: str,
    output: Path,
    num_experts: int,
    top_k: int,
    layers: str,
    partition: str | None,
    kind: str,
    as_published: str | None,
    assignments: tuple[str, ...],
) -> None:
    """Convert MODEL, a folder or hub id of transformers or timm, and write it to a new folder.

    The folder's other files, such as the tokenizer's, are copied.
    """
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": top_k,
        "layers": _parse_layers(layers),
    }
    if partition is not None:
        fields["partition"] = partition
    for assignment in assignments:
        name, value = _parse_field(assignment)
        fields[name] = value
    config = _build_config(kind, as_published, fields)
    if kind == "emoe" and config.partition == "coactivation":
        raise ConfigError(
            "a co-activation partition needs calibration data; convert in Python (docs/library.md)"
        )

    # check both folders before the model is loaded, which takes long
    files.check_new(output)
    source = _dense_folder(model)

    loader = files.loader_for(source)
    network = files.load_stock(loader, source).eval()
    torch.manual_seed(0)  # for learned routers
    report = emoe.convert_(network, config, progress=True)
    with files.new_folder(output, source) as new:
        emoe.save_pretrained(network, new)
    click.echo(report)
    click.echo(f"Written to {output}")


def _build_config(kind: str, as_published: str | None, fields: dict[str, Any]) -> Any:
    """Build an ``emoe`` or ``gmoe`` configuration from its fields.

    ``as_published`` names the authors' code (``tutel`` or ``llama``) whose settings replace the
    defaults. None keeps the defaults.
    """
    cls: Any = emoe.EMoEConfig if kind == "emoe" else emoe.GMoEConfig
    if as_published is None:
        return cls(**fields)
    return cls.as_published(as_published, **fields)


def _dense_folder(model: str) -> Path:
    """Return the folder of a dense model. If ``model`` is a hub id, download it.

    Raises:
        CheckpointError: the folder holds experts.
    """
    source = files.model_folder(model)
    if checkpoint.read_experts(source) is not None:
        raise CheckpointError(
            f"{source} holds experts already; fold them back first (python -m emoe to-dense)"
        )
    return source


@cli.command(short_help="Show the content of a converted folder.")
@click.argument("folder", type=_FOLDER)
def inspect(folder: Path) -> None:
    """Show the configuration, experts and files of a converted FOLDER without loading its weights.

    A * marks settings that are not the default.
    """
    files.check_loadable(folder)
    experts = checkpoint.read_experts(folder)
    if experts is None:
        raise CheckpointError(f"{folder} holds no experts; convert it with python -m emoe convert")

    # a folder that transformers saved has no partition file
    partition = folder / checkpoint.PARTITION_FILE
    tensors = {}
    if partition.exists():
        tensors = files.read_tensors(partition)

    click.echo(_config_table(experts.config))
    click.echo()
    click.echo(_layer_table(experts, tensors))
    click.echo()
    click.echo(_file_table(folder))
    if not tensors:
        click.echo(
            f"\nThere is no {checkpoint.PARTITION_FILE}: "
            "the original order of the neurons is unknown."
        )


def _config_table(config: emoe.EMoEConfig | emoe.GMoEConfig) -> str:
    """Make a text table of a configuration's fields. A * marks values that are not the default."""
    values = config.to_dict()
    # num_experts and top_k are never marked, because EMoEConfig has no defaults for them
    default_config = type(config)(num_experts=config.num_experts, top_k=config.top_k)
    defaults = default_config.to_dict()
    rows = []
    for name, value in values.items():
        is_default = value == defaults[name]
        star = "" if is_default else "*"
        rows.append((name, json.dumps(value), star))
    return tabulate(rows, headers=["field", "value", "set"], tablefmt="simple")


def _layer_table(experts: Experts, tensors: dict[str, torch.Tensor]) -> str:
    """Make a text table with a row for each converted layer.

    ``tensors`` is the content of the partition file. It is empty if the folder has no such file.
    Then the table has no columns for the number of neurons in a layer and in an expert (``size``).
    """
    num_experts = experts.config.num_experts
    if not tensors:
        rows = [(layer, num_experts) for layer in experts.layers]
        return tabulate(rows, headers=["layer", "experts"], tablefmt="simple")

    rows_with_neurons = []
    for layer in experts.layers:
        # the file has one key norm for each neuron of the layer
        key_norms = tensors.get(f"key_norms.{layer}")
        neurons = 0
        if key_norms is not None:
            neurons = len(key_norms)
        rows_with_neurons.append((layer, num_experts, neurons, neurons // num_experts))
    headers = ["layer", "experts", "neurons", "size"]
    return tabulate(rows_with_neurons, headers=headers, tablefmt="simple")


def _file_table(folder: Path) -> str:
    """Make a text table of the files in a folder and their sizes."""
    rows = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            megabytes = path.stat().st_size / 1e6
            rows.append((path.name, f"{megabytes:.2f} MB"))
    headers = ["file", "size"]
    return tabulate(rows, headers=headers, tablefmt="simple", colalign=("left", "right"))


@cli.command(short_help="Fold experts back into a dense model.")
@click.argument("folder", type=_FOLDER)
@_output
@click.option(
    "--restore-order",
    is_flag=True,
    help="Restore the order of the neurons from before the conversion.",
)
def to_dense(folder: Path, output: Path, restore_order: bool) -> None:
    """Fold the experts of a converted FOLDER back, and write the dense model to a new folder."""
    files.check_new(output)
    source = files.model_folder(str(folder))
    loader = files.loader_for(source)
    model = emoe.from_pretrained(loader, source)
    emoe.to_dense_(model, restore_order=restore_order)
    with files.new_folder(output, source) as new:
        files.save_weights(model, new)
    click.echo(f"Written to {output}")


@cli.command(short_help="Compile the sparse backend's kernels now.")
def build() -> None:
    """Compile the sparse backend's kernels for this machine now, instead of at their first use."""
    try:
        path = build_kernels()
    except (OSError, RuntimeError, ImportError) as error:
        raise click.ClickException(
            f"the kernels cannot be built: {error}; the sparse backend uses PyTorch"
        ) from error
    click.echo(f"Kernels: {path}")


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
