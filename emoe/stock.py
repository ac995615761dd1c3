"""How a dense model is saved and loaded by its own library: transformers, timm, or for a plain module safetensors."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from emoe.architectures import find_ffns
from emoe.errors import CheckpointError, ConversionError, EMoEError
from emoe.permissions import share
from emoe.weights import (
    STOCK_CONFIG_FILE,
    WEIGHT_FILES,
    Weights,
    one_line,
    read_object,
    read_tensors,
    weight_files,
    write_tensors,
)

_ADAPTER_FILE = "adapter_config.json"


def save_weights(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model as its own library does, with another state where one is given; a plain module as its tensors."""
    state = model.state_dict() if state is None else state
    if any(tensor.is_meta for tensor in state.values()) and not hasattr(model, "hf_device_map"):
        raise ConversionError(
            f"{type(model).__name__}: accelerate holds its weights elsewhere; take its hooks away first (accelerate.hooks.remove_hook_from_submodules)"
        )
    if hasattr(model, "save_pretrained"):
        try:
            cast(Any, model).save_pretrained(folder, state_dict=state)
        except NotImplementedError as error:
            raise ConversionError(f"{type(model).__name__} is not saved by its library as it is: quantised?") from error
        for file in folder.glob("*.safetensors"):
            share(file)
        return
    if hasattr(model, "pretrained_cfg"):
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(model, str(folder / STOCK_CONFIG_FILE))
    # tied tensors are written under each of their names
    write_tensors(
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
        folder / WEIGHT_FILES[0],
    )


def is_quantised(folder: Path) -> bool:
    """Whether a folder holds quantised weights, as its ``config.json`` says."""
    path = folder / STOCK_CONFIG_FILE
    return path.exists() and "quantization_config" in read_object(path)


def load_stock(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Load an ordinary checkpoint: safetensors only, and no code that comes with it.

    Raises:
        CheckpointError: no safetensors, or damaged or other ones, or adapters without their model.
    """
    files = _checked_files(loader, folder)
    try:
        if hasattr(loader, "from_pretrained"):
            options = {"trust_remote_code": False, **options}
            model, notes = loader.from_pretrained(
                str(folder), use_safetensors=True, output_loading_info=True, **options
            )
            _check_complete(model, notes["missing_keys"], folder)
            return cast(nn.Module, model)
        if _is_timm(loader):
            return cast(nn.Module, loader(f"local-dir:{folder}", **{"pretrained": True, **options}))
        model = cast(nn.Module, loader(**options))
        model.load_state_dict(read_tensors(files[0]))
        return model
    except EMoEError:
        raise
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged: {one_line(error)}") from error
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} are not those of this model: {one_line(error)}") from error
    except Exception as error:
        if not _is_library(loader):  # the user's own function
            raise
        raise CheckpointError(f"{folder} cannot be loaded by {_name(loader)}: {one_line(error)}") from error


def load_around(loader: Any, folder: Path, *, resized: bool, **options: Any) -> nn.Module:
    """Load what of a converted model's own state fits the stock class; what stands in the way is restored apart.

    Args:
        loader: as in :func:`load_stock`.
        folder: the checkpoint folder.
        resized: projections may have other shapes than the stock class's.
        **options: passed to the loader.
    """
    if hasattr(loader, "from_pretrained"):
        with quiet():  # what it would report is the converted model's own
            return load_stock(loader, folder, **({"ignore_mismatched_sizes": True} if resized else {}), **options)
    state = read_tensors(_checked_files(loader, folder)[0])
    model = loader(f"local-dir:{folder}", pretrained=False, **options) if _is_timm(loader) else loader(**options)
    own = model.state_dict()
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    lacking = [name for name in own if name not in (state if resized else fitting)]
    if lacking:
        raise CheckpointError(
            f"the checkpoint in {folder} lacks {', '.join(lacking[:3])} ({len(lacking)} tensors in all)"
        )
    model.load_state_dict(fitting, strict=False)
    return cast(nn.Module, model)


def _checked_files(loader: Any, folder: Path) -> list[Path]:
    """The weight files of a folder that a loader may be let loose on."""
    refuse_adapters(folder)
    files, path = weight_files(folder), folder / STOCK_CONFIG_FILE
    if not hasattr(loader, "from_pretrained") and files[0].name != WEIGHT_FILES[0]:
        raise CheckpointError(f"{folder} holds no {WEIGHT_FILES[0]}; shards are read for transformers only")
    if not _is_library(loader) or not path.exists():
        return files
    settings, tensors = read_object(path), len(Weights(folder).names)
    if "transformers_weights" in settings:
        raise CheckpointError(
            f"{path} names other weight files by 'transformers_weights'; only {WEIGHT_FILES[0]} is read"
        )
    if _most_layers(settings) > tensors:  # building them would take forever
        raise CheckpointError(f"{path} asks for more layers than there are tensors in the weights, {tensors}")
    return files


def _most_layers(settings: Any, name: str = "") -> int:
    """The largest number that a configuration gives for layers."""
    if isinstance(settings, dict):
        return max((_most_layers(value, str(key)) for key, value in settings.items()), default=0)
    if isinstance(settings, list):
        return max((_most_layers(value, name) for value in settings), default=0)
    counts = type(settings) is int and re.search(r"(layers?|depths?)$", name)
    return settings if counts else 0


def refuse_adapters(folder: Path) -> None:
    """Refuse a folder that PEFT wrote (:class:`CheckpointError`); transformers would load the model that it names."""
    if (folder / _ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder} holds adapters, not a model: load the model that they were trained on by emoe.from_pretrained, "
            "then the adapters by peft.PeftModel.from_pretrained(model, folder)"
        )


def _check_complete(model: nn.Module, missing: Iterable[str], folder: Path) -> None:
    """A new head may be missing from a checkpoint; a part of the model's layers may not."""
    if not {name for name, _ in model.named_parameters()} - set(missing):
        raise CheckpointError(
            f"the weights in {folder} are not those of a {type(model).__name__}: it has none of their names"
        )
    try:
        prefixes = tuple(f"{ffn.name}." for ffn in find_ffns(model))
    except ConversionError:  # an architecture that has no row is not ours to judge
        return
    parts = sorted(name for name in missing if name.startswith(prefixes))
    if parts:
        raise CheckpointError(f"the checkpoint in {folder} lacks {', '.join(parts[:3])} ({len(parts)} tensors in all)")


def _is_timm(loader: Any) -> bool:
    return str(getattr(loader, "__module__", "")).startswith("timm.")


def _is_library(loader: Any) -> bool:
    return hasattr(loader, "from_pretrained") or _is_timm(loader)


def _name(loader: Any) -> str:
    return str(getattr(loader, "__name__", type(loader).__name__))


@contextmanager
def quiet(*, bars: bool = True) -> Iterator[None]:
    """Keep transformers from reporting on a model that is loaded or saved for our own ends.

    Args:
        bars: let it show its progress bars.
    """
    logger = logging.getLogger("transformers")  # all of it: modeling_utils checks more where its own level is high
    level = logger.level
    logger.setLevel(logging.ERROR)
    library = sys.modules.get("transformers")
    hidden = library is not None and not bars and library.utils.logging.is_progress_bar_enabled()
    if hidden:
        cast(Any, library).utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hidden:
            cast(Any, library).utils.logging.enable_progress_bar()
