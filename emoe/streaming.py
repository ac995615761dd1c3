"""Convert a model's folder, or fold it back, from disk to disk, with one layer or weight file in memory."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emoe import checkpoint, convert, files
from emoe.architectures import FFN, find_ffns
from emoe.checks import check_weights
from emoe.config import EMoEConfig, GMoEConfig, resolve_layers
from emoe.errors import CheckpointError, EMoEError
from emoe.layer import RoutedActivation
from emoe.partitioning import group_neurons

_Changes = dict[str, Callable[[Tensor], Tensor]]  # functions of stored tensors, by their names


class NotStreamedError(EMoEError):
    """Raised if a folder cannot be converted from disk to disk; load the model instead."""


def convert_folder(source: Path, out: Path, config: EMoEConfig | GMoEConfig) -> convert.ConversionReport:
    """Convert a dense model's folder to a new folder without loading the model.

    The new folder loads to the model that ``convert_`` and ``save_pretrained`` make. Learned routers are drawn from
    seed 0. A co-activation partition is not supported.

    Raises:
        NotStreamedError: the model must be loaded instead; nothing was written.
        ConversionError, ConfigError, CheckpointError: as :func:`emoe.convert_`.
    """
    if checkpoint.read_mark(source) is not None:
        raise CheckpointError(f"{source} holds experts already; fold them back first (python -m emoe to-dense)")
    if not isinstance(config, EMoEConfig):
        raise NotStreamedError("a GMoE's copies are made in memory")
    model, weights = _open(source)
    ffns = find_ffns(model)
    chosen = [ffns[index] for index in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    before, neurons = convert.count_parameters(model), sum(ffn.d for ffn in ffns)
    changes: _Changes = {}
    reports, described = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for ffn in tqdm(chosen, "Grouping neurons", unit="layer", disable=None):  # None: off without a terminal
            with _load_projections(ffn, model, weights) as stored:
                check_weights(model, [ffn])
                convert.check_config_fits([ffn], config)
                partition = group_neurons(ffn.keys(), config, ffn.index)
                reports.append(convert.convert_ffn(ffn, config, partition))
                layer = cast(RoutedActivation, ffn.activation)
                described.append(checkpoint.describe_layer(ffn.index, layer))
                changes |= _reorder(ffn, stored, partition[ffn.index])
                if layer.output_bias is not None:
                    changes[stored[f"{ffn.spec.proj_out}.bias"]] = partial(Tensor.type_as, layer.mean_output_bias())
    convert.mark_(model)
    with files.new_folder(out, source) as new:
        _write(source, new, changes, {convert.MARK: cast(Any, model).config.emoe})
        checkpoint.write_sidecars(described, config, [ffn.index for ffn in chosen], new)
    return convert.conversion_report(reports, config, len(ffns), neurons, convert.count_parameters(model) - before)


def fold_folder(source: Path, out: Path, *, restore_order: bool = False) -> None:
    """Fold the experts of a folder back, and write the dense model to a new folder, without loading the model.

    Raises:
        NotStreamedError: the model must be loaded instead; nothing was written.
        ConversionError, CheckpointError: as :func:`emoe.to_dense_` and :func:`emoe.from_pretrained`.
    """
    mark, tensors, _ = checkpoint.read_sidecars(source)
    convert.check_foldable([mark.config])
    model, weights = _open(source)
    if checkpoint.has_routing_state(mark, weights):
        raise NotStreamedError("routers are stored among the weights")
    changes: _Changes = {}
    for ffn, permutation in checkpoint.stored_expert_ffns(model, mark, tensors, source):
        if restore_order and permutation is None:
            raise NotStreamedError("the original order of the neurons is unknown")
        with _load_projections(ffn, model, weights) as stored:
            checkpoint.check_key_norms(ffn, tensors, source)
        if restore_order:
            changes |= _reorder(ffn, stored, torch.argsort(cast(Tensor, permutation)))
    with files.new_folder(out, source) as new:
        _write(source, new, changes, {})


def _open(source: Path) -> tuple[nn.Module, files.Weights]:
    """Return a folder's model on the meta device, and its stored weights."""
    loader = files.loader_for(source)
    if not hasattr(loader, "from_pretrained") or importlib.util.find_spec("accelerate") is None:
        raise NotStreamedError("from disk to disk needs a transformers model and the package 'accelerate'")
    if "quantization_config" in files.read_settings(source):
        raise NotStreamedError("the weights are quantised")
    with files.quiet():
        return files.load_stock(loader, source, device_map="meta"), files.Weights(source)


@contextmanager
def _load_projections(ffn: FFN, model: nn.Module, weights: files.Weights) -> Iterator[dict[str, str]]:
    """Load the weights of an FFN's projections for the ``with`` block. Yield their stored names by path."""
    paths = [f"{path}.{name}" for path, module in ffn.projections() for name in module.state_dict()]
    names = weights.find(model, [f"{ffn.name}.{path}" for path in paths])
    if len(names) < len(paths):
        raise NotStreamedError(f"the weights of {ffn.name} are stored under other names")
    stored = {path: names[f"{ffn.name}.{path}"] for path in paths}
    for path, module in ffn.projections():
        dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        state = {name: weights[stored[f"{path}.{name}"]].to(dtype, copy=True) for name, dtype in dtypes.items()}
        module.load_state_dict(state, assign=True)
    yield stored
    for _, module in ffn.projections():
        module.to("meta")


def _reorder(ffn: FFN, stored: dict[str, str], neurons: Tensor) -> _Changes:
    """Return functions that reorder the neurons in an FFN's stored tensors."""
    return {stored[path]: partial(ffn.take, path, neurons=neurons) for path in ffn.neuron_dims() if path in stored}


def _write(source: Path, out: Path, changes: _Changes, mark: dict[str, Any]) -> None:
    """Copy a folder file by file with changed tensors, and replace the mark in its configuration by ``mark``."""
    paths = files.weight_files(source)
    for path in tqdm(paths, "Writing", unit="file", disable=None):
        tensors = files.read_tensors(path)
        for name in tensors.keys() & changes.keys():
            tensors[name] = changes[name](tensors[name]).contiguous()
        metadata = files.read_metadata(path) or {"format": "pt"}  # transformers requires the format
        files.write_tensors(tensors, out / path.name, metadata)
    if paths[0].name != files.WEIGHT_FILES[0]:
        shutil.copyfile(source / files.WEIGHT_FILES[1], out / files.WEIGHT_FILES[1])
    settings = {key: value for key, value in files.read_settings(source).items() if key != convert.MARK}
    (out / files.STOCK_CONFIG_FILE).write_text(json.dumps(settings | mark, indent=2) + "\n")
