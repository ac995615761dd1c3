"""``python -m emoe``: convert, inspect and fold back model folders from the shell."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from tabulate import tabulate

import emoe
from emoe.errors import ConfigError, EMoEError
from emoe.folders import copy_companions, load_dense, loader_for, model_folder
from emoe.sidecars import EXTRA_FILE, read_sidecars
from emoe.sparse.build import build_kernels
from emoe.stock import save_weights
from emoe.streaming import NotStreamedError, convert_folder, fold_folder
from emoe.unfinished import check_free

_FOLDER = click.Path(path_type=Path)
# a folder that cannot be written to, a full disk: no mistake of ours
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS: dict[str, type[emoe.EMoEConfig] | type[emoe.GMoEConfig]] = {"emoe": emoe.EMoEConfig, "gmoe": emoe.GMoEConfig}


def _with_clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EMoEError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:  # the library of the model, which the distribution does not ask for
            raise click.ClickException(f"this needs the package '{error.name}': pip install {error.name}") from error

    return wrapped


_EPILOG = """\b
Exit status: 0 fine; 1 an error, said in one line; 2 wrong usage;
130 interrupted.

\b
Shell completion (bash; zsh and fish likewise), in the shell's start-up file:
  eval "$(_EMOE_COMPLETE=bash_source emoe)"
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(emoe.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Turn a pre-trained transformer's FFNs into experts, and back."""


_Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completed_by(*names: str) -> _Completion:
    """Offer a shell these names."""
    return lambda _context, _parameter, begun: [CompletionItem(name) for name in names if name.startswith(begun)]


def _folders(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Have a shell complete folders, where a hub id may stand too."""
    return [CompletionItem(begun, type="dir")]


_FIELDS = sorted({field.name for kind in _KINDS.values() for field in dataclasses.fields(kind)} - {"version"})


def _plain_layers(text: str) -> str | list[int]:
    """``8,10`` is a list of layers; everything else is passed on as it is."""
    return [int(part) for part in text.split(",")] if re.fullmatch(r"-?\d+(,-?\d+)*", text) else text


def _plain_value(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: write name=value, for example --set selection=bottom")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _say_in_memory(reason: NotStreamedError) -> None:
    click.echo(f"Held in memory, and not to be resumed: {reason}", err=True)


def _say_left_out(source: Path, files: list[Path]) -> None:
    for file in files:
        click.echo(f"Not copied: {source / file} is a link that leads out of the folder", err=True)


@cli.command(short_help="Convert a model, and write it to a new folder.")
@click.argument("model", shell_complete=_folders)
@click.argument("out", type=_FOLDER)
@click.option("--num-experts", type=int, required=True, help="N, experts of each converted FFN.")
@click.option("--top-k", type=int, required=True, help="Experts that each token uses.")
@click.option(
    "--layers",
    default="last-half:2",
    show_default=True,
    help="8,10: these; all; last:2: the last two; last-half:2: every second one of the latter half (last-quarter:2 of the last quarter); 8:12:2: a slice.",
)
@click.option(
    "--partition",
    default=None,
    shell_complete=_completed_by("kmeans", "random", "contiguous"),
    help="How neurons are grouped: kmeans (the default), random, contiguous.",
)
@click.option(
    "--kind", type=click.Choice(list(_KINDS)), default="emoe", show_default=True, help="Split or copied FFNs."
)
@click.option(
    "--as-published",
    default=None,
    shell_complete=_completed_by("tutel", "llama"),
    help="The authors' settings: tutel or llama.",
)
@click.option(
    "--set",
    "others",
    multiple=True,
    metavar="NAME=VALUE",
    shell_complete=_completed_by(*(f"{name}=" for name in _FIELDS)),
    help="Any other field of the configuration.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=None,
    help="Layers at a time. By default as many as cores, while memory stays below twice the largest weight file and 1 GB.",
)
@_with_clear_errors
def convert(
    model: str,
    out: Path,
    num_experts: int,
    top_k: int,
    layers: str,
    partition: str | None,
    kind: str,
    as_published: str | None,
    others: tuple[str, ...],
    jobs: int | None,
) -> None:
    """Convert MODEL, a folder or hub id of transformers or timm, and write it to the new folder OUT.

    The model is not held in memory. What was interrupted goes on when the same command is given again.
    """
    values: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "layers": _plain_layers(layers)}
    values |= {"partition": partition} if partition else {}
    values |= dict(_plain_value(text) for text in others)
    cls = _KINDS[kind]
    config = cls.as_published(as_published, **values) if as_published else cls(**values)
    if getattr(config, "partition", None) == "coactivation":
        raise ConfigError("a co-activation partition needs calibration data; convert in Python (docs/library.md)")
    check_free(out)
    source = model_folder(model)
    try:
        report, outside = convert_folder(source, out, config, jobs=jobs, progress=True)
    except NotStreamedError as reason:
        _say_in_memory(reason)
        loaded = load_dense(source)
        report = emoe.convert_(loaded, config, progress=True)
        emoe.save_pretrained(loaded, out)
        outside = copy_companions(source, out, _names(out))
    _say_left_out(source, outside)
    click.echo(report)
    click.echo(f"Written to {out}")


@cli.command(short_help="Show what a converted folder holds.")
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="The same, as JSON for programs.")
@_with_clear_errors
def inspect(folder: Path, as_json: bool) -> None:
    """Show the configuration, experts and files of a converted FOLDER; its weights are not loaded.

    Settings with a * are not the default ones. "moved" is the share of neurons that stand elsewhere than at first, and
    the keys are the lengths of the neurons' input weights.
    """
    config, indices, tensors, extra = read_sidecars(folder)
    measured = [
        {"layer": index, "experts": config.num_experts, **_measures(tensors, index, config)} for index in indices
    ]
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    numbers = sum(tensor.numel() for tensor in extra.values())
    if as_json:
        content = {"config": config.to_dict(), "layers": measured, "files": sizes, "extra_numbers": numbers}
        click.echo(json.dumps(content, indent=1))
        return
    defaults = type(config)(num_experts=config.num_experts, top_k=config.top_k).to_dict()
    settings = [
        (name, json.dumps(value), "" if value == defaults[name] else "*") for name, value in config.to_dict().items()
    ]
    click.echo(tabulate(settings, headers=["field", "value", "set"], tablefmt="simple"))
    click.echo(f"\n* not the default. layers: {_in_words(config.layers)}")
    click.echo()
    click.echo(tabulate([_in_cells(row) for row in measured], headers="keys", tablefmt="simple"))
    if not tensors:
        click.echo("\nSaved by the model's own library, so that it is not known where the neurons stood at first.")
    files = [(name, f"{size / 1e6:.2f} MB") for name, size in sizes.items()]
    click.echo()
    click.echo(tabulate(files, headers=["file", "size"], tablefmt="simple", colalign=("left", "right")))
    if extra:
        click.echo(f"\n{EXTRA_FILE}: {numbers:,} numbers that the stock class has no place for")


def _in_words(layers: str | Sequence[int]) -> str:
    """A request such as ``"last-half:2"`` in words."""
    if not isinstance(layers, str):
        return f"those numbered {', '.join(map(str, layers))}, counted from 0"
    if layers == "all":
        return "all"
    if match := re.fullmatch(r"last:(\d+)", layers):
        return f"the last {match[1]}"
    if match := re.fullmatch(r"last-(half|quarter):(\d+)", layers):
        part = "latter half" if match[1] == "half" else "last quarter"
        return f"one in {match[2]} of the {part}, from its first on"
    if match := re.fullmatch(r"(-?\d*):(-?\d*):?(\d*)", layers):
        every = f", one in {match[3]}" if match[3] else ""
        return f"from {match[1] or 0} up to {match[2] or 'the end'}, itself not included{every}; counted from 0"
    return "not understood"


def _measures(tensors: dict[str, Any], index: int, config: emoe.EMoEConfig | emoe.GMoEConfig) -> dict[str, Any]:
    """What the partition file tells of a layer; empty where there is none."""
    if not tensors:
        return {}
    norms, order = tensors[f"key_norms.{index}"], tensors.get(f"permutation.{index}")
    return {
        "neurons": len(norms),
        "size": len(norms) // config.num_experts,
        "moved": None if order is None else float((order != order.sort().values).float().mean()),
        "smallest_key": float(norms.min()),
        "largest_key": float(norms.max()),
    }


def _in_cells(measured: dict[str, Any]) -> dict[str, Any]:
    """What a layer measures, as it is printed."""
    found = {name.replace("_", " "): value for name, value in measured.items()}
    if "moved" in found:
        found["moved"] = "-" if found["moved"] is None else f"{found['moved']:.0%}"
        found |= {name: f"{found[name]:.3f}" for name in ("smallest key", "largest key")}
    return found


@cli.command(short_help="Fold experts back into a dense model.")
@click.argument("folder", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--restore-order", is_flag=True, help="Put the neurons back where they stood before the conversion.")
@_with_clear_errors
def to_dense(folder: Path, out: Path, restore_order: bool) -> None:
    """Fold the experts of a converted FOLDER back, and write the dense model to the new folder OUT.

    The model is not held in memory. What was interrupted goes on when the same command is given again.
    """
    check_free(out)
    source = model_folder(str(folder))
    try:
        outside = fold_folder(source, out, restore_order=restore_order, progress=True)
    except NotStreamedError as reason:
        _say_in_memory(reason)
        model = emoe.from_pretrained(loader_for(source), source)
        emoe.to_dense_(model, restore_order=restore_order)
        out.mkdir(parents=True, exist_ok=True)
        save_weights(model, out)
        outside = copy_companions(source, out, _names(out))
    _say_left_out(source, outside)
    click.echo(f"Written to {out}")


@cli.command(short_help="Answer a prompt by a language model.")
@click.argument("folder", type=_FOLDER)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the tokenizer's chat template.")
@click.option(
    "--backend",
    type=click.Choice(["sparse", "auto", "masked"]),
    default="sparse",
    show_default=True,
    help="How experts are computed.",
)
@_with_clear_errors
def generate(folder: Path, prompt: str, max_new_tokens: int, raw: bool, backend: str) -> None:
    """Answer PROMPT by the language model of FOLDER, greedily; with experts or without."""
    from emoe.generation import generate_text

    generate_text(model_folder(str(folder)), prompt, max_new_tokens, raw=raw, backend=backend)


@cli.command(short_help="Compile the sparse backend's kernels now.")
@_with_clear_errors
def build() -> None:
    """Compile the sparse backend's kernels now, where there is a compiler, instead of when the first model is converted."""
    try:
        click.echo(f"Kernels: {build_kernels()}")
    except (OSError, RuntimeError, ImportError) as error:
        raise click.ClickException(f"the kernels cannot be built: {error}; the sparse backend uses PyTorch") from error


def main() -> None:
    """Entry point: mistakes are one line, an interrupt ends with the status that shells expect."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        click.echo(f"Error: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
