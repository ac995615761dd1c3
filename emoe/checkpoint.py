"""Save and load converted models: an ordinary checkpoint with small sidecars.

A folder holds what the library of the model writes (``model.safetensors``, ``config.json``, …) and

- ``emoe_config.json``: the :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`;
- ``emoe_partition.safetensors``: permutations, and the key norms that tie the sidecar to its weights;
- ``emoe_extra.safetensors``: parameters that the stock class has no place for, if there are any: those
  of learned routers, and GMoE's copied projections.

An EMoE's checkpoint loads into the stock dense class as it is; a GMoE's is refused there, because
its shapes differ. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emoe.architectures import FFN, find_ffns
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.convert import attach, widen
from emoe.errors import CheckpointError, ConfigError, ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.partitioning import check_divisible

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"
_NORM_TOLERANCE = 0.02  # key norms survive a cast to bf16 within this


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: an ordinary checkpoint and its sidecars.

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    routers = {name for name in model.state_dict() if _is_router(name, layers, model)}
    _save_weights(model, folder, {name: tensor for name, tensor in model.state_dict().items() if name not in routers})
    ffns = {ffn.index: ffn for ffn in find_ffns(model)}
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors[f"key_norms.{layer.ffn_index}"] = _key_norms(ffns[layer.ffn_index])
        if layer.permutation is not None:
            tensors[f"permutation.{layer.ffn_index}"] = layer.permutation.contiguous()
    save_file(tensors, folder / PARTITION_FILE)
    extra = {
        name: tensor.detach().cpu().contiguous()
        for layer in layers
        for name, tensor in _extra(layer, ffns[layer.ffn_index]).items()
    }
    if extra:
        save_file(extra, folder / EXTRA_FILE)
    text = {"config": layers[0].config.to_dict(), "layers": [layer.ffn_index for layer in layers]}
    (folder / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n")


def _extra(layer: RoutedActivation, ffn: FFN) -> dict[str, Tensor]:
    """Parameters of one layer beyond the dense model's, by ``"<layer>.<name>"``."""
    found = (
        {}
        if layer.router is None
        else {f"{ffn.index}.router.{name}": tensor for name, tensor in layer.router.state_dict().items()}
    )
    if isinstance(layer.config, GMoEConfig):
        for path in _projections(ffn):
            found |= {
                f"{ffn.index}.{path}.{name}": tensor
                for name, tensor in ffn.layer.get_submodule(path).state_dict().items()
            }
    return found


def _projections(ffn: FFN) -> list[str]:
    return [*(path for path, _ in ffn.inputs()), ffn.spec.proj_out]


def _is_router(name: str, layers: list[RoutedActivation], model: nn.Module) -> bool:
    paths = [path for path, module in model.named_modules() if any(module is layer for layer in layers)]
    return any(name.startswith(f"{path}.router.") for path in paths)


def _save_weights(model: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    if hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained(folder, state_dict=state)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(model, str(folder / "config.json"))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    else:
        raise ConversionError(
            f"{type(model).__name__} is neither a transformers nor a timm model; use emoe.to_dense_ and torch's own saving"
        )


def _key_norms(ffn: FFN) -> Tensor:
    return ffn.keys().detach().float().norm(dim=1).cpu().contiguous()


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load what :func:`save_pretrained` wrote.

    Args:
        loader: a transformers class (``AutoModelForSequenceClassification``) or ``timm.create_model``.
        folder: the checkpoint folder.
        **options: passed to the loader.

    Raises:
        CheckpointError: a missing or damaged file, or a sidecar of other weights.
    """
    folder = Path(folder)
    config, indices = _read_config(folder / CONFIG_FILE)
    tensors = _read(folder / PARTITION_FILE)
    extra = _read(folder / EXTRA_FILE) if (folder / EXTRA_FILE).exists() else {}
    model = _load_model(loader, folder, options, copies=isinstance(config, GMoEConfig))
    ffns = {ffn.index: ffn for ffn in find_ffns(model)}
    missing = [index for index in indices if index not in ffns or f"key_norms.{index}" not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / PARTITION_FILE} and the model do not share the layers {missing} that {CONFIG_FILE} names"
        )
    chosen = [ffns[index] for index in indices]
    if isinstance(config, EMoEConfig):
        check_divisible(chosen, config.num_experts)
    for ffn in chosen:
        if isinstance(config, GMoEConfig):
            widen(ffn, config.num_experts)
            for path in _projections(ffn):
                _restore(ffn.layer.get_submodule(path), f"{ffn.index}.{path}.", extra, folder)
        _check_norms(ffn, tensors[f"key_norms.{ffn.index}"], folder)
        layer = attach(ffn, config, tensors.get(f"permutation.{ffn.index}"))
        if layer.router is not None:
            _restore(layer.router, f"{ffn.index}.router.", extra, folder)
    return model.eval()


def _restore(module: nn.Module, prefix: str, extra: dict[str, Tensor], folder: Path) -> None:
    state = {name.removeprefix(prefix): tensor for name, tensor in extra.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / EXTRA_FILE} does not hold '{prefix}*' as the model needs it: {error}"
        ) from error


def _read_config(path: Path) -> tuple[EMoEConfig | GMoEConfig, list[int]]:
    try:
        text = json.loads(path.read_text())
        return config_from_dict(text["config"]), [int(index) for index in text["layers"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: not a folder that emoe.save_pretrained wrote") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _load_model(loader: Any, folder: Path, options: Mapping[str, Any], *, copies: bool) -> nn.Module:
    load: Callable[..., nn.Module] = getattr(loader, "from_pretrained", loader)
    try:
        if getattr(loader, "__module__", "").startswith("timm."):
            model = load(f"local-dir:{folder}", pretrained=not copies, **options)
            if copies:
                _load_matching(model, folder / "model.safetensors")
            return model
        if not copies:
            return load(str(folder), **options)
        with _quiet():  # the mismatch that it would report is GMoE's own
            return load(str(folder), ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {folder} are damaged: {error}") from error


def _load_matching(model: nn.Module, path: Path) -> None:
    """Load the tensors whose shapes are the stock model's; the others are restored apart."""
    own = model.state_dict()
    state = {name: tensor for name, tensor in _read(path).items() if name in own and own[name].shape == tensor.shape}
    model.load_state_dict(state, strict=False)


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
    found = _key_norms(ffn)
    if found.shape != norms.shape or not torch.allclose(found, norms, rtol=_NORM_TOLERANCE, atol=1e-6):
        raise CheckpointError(
            f"{folder / PARTITION_FILE} does not match the weights of {ffn.name}: it belongs to another model or the weights were changed without it"
        )
