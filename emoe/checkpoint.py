"""Save and load converted models: an ordinary checkpoint with small sidecars.

A folder holds what the library of the model writes (``model.safetensors``, ``config.json``, …) and

- ``emoe_config.json``: the :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`;
- ``emoe_partition.safetensors``: permutations, and the key norms that tie the sidecar to its weights;
- ``emoe_extra.safetensors``: what the stock class has no place for, if there is any: learned routers,
  running gates, output biases of single experts, and GMoE's copied projections.

An EMoE's checkpoint loads into the stock dense class as it is; a GMoE's is refused there, because
its shapes differ. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emoe.architectures import FFN, find_ffns, has_plain_weight
from emoe.checks import check_divisible
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.convert import attach, padding_watches, watch_losses, widen
from emoe.errors import CheckpointError, ConfigError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, routed_layers
from emoe.partitioning import is_permutation
from emoe.tensors import carried

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_NORM_TOLERANCE = 0.02  # key norms survive a cast to bf16 within this
_QUANTISED_NORM_TOLERANCE = 0.15  # and four bits within this


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: an ordinary checkpoint and its sidecars.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     emoe.save_pretrained(model, folder)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['emoe_config.json', 'emoe_partition.safetensors', 'model.safetensors']

    Args:
        model: a converted transformers or timm model.
        folder: made when it does not exist.

    Raises:
        ConversionError: the model is not converted, or still carries adapters.
    """
    layers = routed_layers(model)
    if not layers:
        raise ConversionError("save_pretrained: the model has no routed FFN; save it with its own library")
    if hasattr(model, "peft_config"):
        raise ConversionError("save_pretrained: merge the adapters first (model = model.merge_and_unload())")
    check_one_conversion(layers, "save_pretrained")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder, _stock_state(model))
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors[f"key_norms.{layer.ffn_index}"] = _key_norms(layer.ffn)
        if layer.permutation is not None:
            tensors[f"permutation.{layer.ffn_index}"] = layer.permutation.contiguous()
    tensors["num_experts"] = torch.tensor(layers[0].config.num_experts)
    save_file(tensors, folder / PARTITION_FILE)
    extra = {name: tensor.detach().cpu().contiguous() for layer in layers for name, tensor in _extra(layer).items()}
    if extra:
        save_file(extra, folder / EXTRA_FILE)
    else:
        (folder / EXTRA_FILE).unlink(missing_ok=True)
    text = {"config": layers[0].config.to_dict(), "layers": [layer.ffn_index for layer in layers]}
    (folder / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n")


def _stock_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that the stock class has a place for, with one output bias a layer."""
    state = dict(model.state_dict())
    for path, layer in model.named_modules():
        if not isinstance(layer, RoutedActivation):
            continue
        for name in layer.state_dict():
            del state[f"{path}.{name}"]
        if layer.output_bias is not None:
            proj_out = next(name for name, module in model.named_modules() if module is layer.ffn.proj_out)
            state[f"{proj_out}.bias"] = layer.mean_output_bias()
    return state


def _extra(layer: RoutedActivation) -> dict[str, Tensor]:
    """State of one layer beyond the dense model's, by ``"<layer>.<name>"``."""
    ffn = layer.ffn
    found = {f"{ffn.index}.routing.{name}": tensor for name, tensor in layer.state_dict().items()}
    if isinstance(layer.config, GMoEConfig):
        for path in _projections(ffn):
            found |= {
                f"{ffn.index}.{path}.{name}": tensor
                for name, tensor in ffn.layer.get_submodule(path).state_dict().items()
            }
    return found


def _projections(ffn: FFN) -> list[str]:
    return [*(path for path, _ in ffn.inputs()), ffn.spec.proj_out]


def save_weights(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model as its own library does, with another state where one is given; a plain module as its tensors."""
    state = model.state_dict() if state is None else state
    if hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained(folder, state_dict=state)
        return
    if hasattr(model, "pretrained_cfg"):
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(model, str(folder / "config.json"))
    # tied tensors are written under each of their names
    save_file(
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
        folder / "model.safetensors",
    )


def _key_norms(ffn: FFN) -> Tensor:
    if has_plain_weight(ffn.proj_in):
        keys = ffn.keys()
    else:  # quantised ones are known by what they do
        weight, bias = cast(Tensor, ffn.proj_in.weight), ffn.key_bias()
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        z, _ = carried(ffn.proj_in(torch.eye(ffn.h, dtype=dtype, device=weight.device)))
        rows = ffn.activated_rows(z.t())
        keys = rows if bias is None else rows - bias.unsqueeze(1)
    return keys.detach().float().norm(dim=1).cpu().contiguous()


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load what :func:`save_pretrained` wrote.

    >>> def build():
    ...     layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    ...     return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> model, x = build().eval(), torch.ones(1, 3, 16)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     emoe.save_pretrained(model, folder)
    ...     again = emoe.from_pretrained(build, folder)
    >>> torch.allclose(again(x), model(x))
    True

    Args:
        loader: a transformers class (``AutoModelForSequenceClassification``), ``timm.create_model``, or for a
            plain module whatever builds the dense model.
        folder: the checkpoint folder.
        **options: passed to the loader.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        CheckpointError: a missing or damaged file, or a sidecar of other weights.
    """
    folder = Path(folder)
    config, indices, tensors, extra = read_sidecars(folder)
    load = _load_around_copies if isinstance(config, GMoEConfig) else load_stock
    model = load(loader, folder, **options)
    ffns = {ffn.index: ffn for ffn in find_ffns(model)}
    missing = [index for index in indices if index not in ffns]
    if missing:
        raise CheckpointError(f"{folder / CONFIG_FILE} names the layers {missing}, which the model does not have")
    chosen = [ffns[index] for index in indices]
    if isinstance(config, EMoEConfig):
        check_divisible(chosen, config.num_experts)
    for ffn in chosen if isinstance(config, EMoEConfig) else []:
        if not is_permutation(tensors.get(f"permutation.{ffn.index}"), ffn.d):
            raise CheckpointError(f"{folder / PARTITION_FILE} has no permutation of {ffn.name}'s {ffn.d} neurons")
    padding = padding_watches(model, chosen, config)
    for ffn in chosen:
        if isinstance(config, GMoEConfig):
            widen(ffn, config.num_experts)
        layer = attach(ffn, config, tensors.get(f"permutation.{ffn.index}"), padding.get(ffn.index))
        if isinstance(config, GMoEConfig):
            for path in _projections(ffn):
                _restore(ffn.layer.get_submodule(path), f"{ffn.index}.{path}.", extra, folder)
        _check_norms(ffn, tensors[f"key_norms.{ffn.index}"], folder)
        _restore(layer, f"{ffn.index}.routing.", extra, folder)
    watch_losses(model)
    return model.eval()


def _restore(module: nn.Module, prefix: str, extra: dict[str, Tensor], folder: Path) -> None:
    state = {name.removeprefix(prefix): tensor for name, tensor in extra.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / EXTRA_FILE} does not hold '{prefix}*' as the model needs it: {error}"
        ) from error


def read_sidecars(folder: Path) -> tuple[EMoEConfig | GMoEConfig, list[int], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, layer numbers, permutations with key norms, and extra state of a converted checkpoint.

    Raises:
        CheckpointError: a missing or damaged file.
    """
    config, indices = _read_config(folder / CONFIG_FILE)
    tensors = _read(folder / PARTITION_FILE)
    extra = _read(folder / EXTRA_FILE) if (folder / EXTRA_FILE).exists() else {}
    known = sorted(int(name.rpartition(".")[2]) for name in tensors if name.startswith("key_norms."))
    if sorted(indices) != known or tensors.get("num_experts", torch.tensor(0)) != config.num_experts:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names {config.num_experts} experts in the layers {indices}, but {PARTITION_FILE} is of "
            f"{int(tensors.get('num_experts', torch.tensor(0)))} experts in the layers {known}"
        )
    return config, indices, tensors, extra


def _read_config(path: Path) -> tuple[EMoEConfig | GMoEConfig, list[int]]:
    try:
        text = json.loads(path.read_text())
        if not isinstance(text["config"], dict):
            raise TypeError("'config' is no object")
        return config_from_dict(text["config"]), [int(index) for index in text["layers"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: not a folder that emoe.save_pretrained wrote") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # no JSON, no text, or not of this form
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load_stock(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Load an ordinary checkpoint, safetensors only.

    Raises:
        CheckpointError: no safetensors, or damaged or other ones.
    """
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        raise CheckpointError(f"{folder} holds no {' or '.join(WEIGHT_FILES)}; other formats are not read")
    try:
        if hasattr(loader, "from_pretrained"):
            model, notes = loader.from_pretrained(
                str(folder), use_safetensors=True, output_loading_info=True, **options
            )
            _check_complete(model, notes["missing_keys"], folder)
            return cast(nn.Module, model)
        if _is_timm(loader):
            return cast(nn.Module, loader(f"local-dir:{folder}", **{"pretrained": True, **options}))
        model = cast(nn.Module, loader(**options))
        model.load_state_dict(_read(folder / WEIGHT_FILES[0]))
        return model
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} are not those of this model: {error}") from error


def _check_complete(model: nn.Module, missing: Iterable[str], folder: Path) -> None:
    """A new head may be missing from a checkpoint; a part of the model's layers may not."""
    try:
        prefixes = tuple(f"{ffn.name}." for ffn in find_ffns(model))
    except ConversionError:  # an architecture that has no row is not ours to judge
        return
    parts = sorted(name for name in missing if name.startswith(prefixes))
    if parts:
        raise CheckpointError(f"the checkpoint in {folder} lacks {', '.join(parts[:3])} ({len(parts)} tensors in all)")


def _load_around_copies(loader: Any, folder: Path, **options: Any) -> nn.Module:
    """Load what of a GMoE's checkpoint fits the stock class; its copied projections are restored apart."""
    if hasattr(loader, "from_pretrained"):
        with _quiet():  # the mismatch that it would report is GMoE's own
            return load_stock(loader, folder, ignore_mismatched_sizes=True, **options)
    model = loader(f"local-dir:{folder}", pretrained=False, **options) if _is_timm(loader) else loader(**options)
    own = model.state_dict()
    state = _read(folder / WEIGHT_FILES[0])
    model.load_state_dict(
        {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape},
        strict=False,
    )
    return cast(nn.Module, model)


def _is_timm(loader: Any) -> bool:
    return str(getattr(loader, "__module__", "")).startswith("timm.")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_norms(ffn: FFN, norms: Tensor, folder: Path) -> None:
    with torch.no_grad():
        found = _key_norms(ffn)
    tolerance = _NORM_TOLERANCE if has_plain_weight(ffn.proj_in) else _QUANTISED_NORM_TOLERANCE
    if found.shape != norms.shape or not torch.allclose(found, norms, rtol=tolerance, atol=1e-6):
        raise CheckpointError(
            f"{folder / PARTITION_FILE} does not match the weights of {ffn.name}: it belongs to another model or the weights were changed without it"
        )
