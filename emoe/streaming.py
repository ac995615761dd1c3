"""Convert a model's folder, and fold it back, from disk to disk: one layer or one weight file in memory at a time."""

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
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from emoe.architectures import FFN, find_ffns
from emoe.checkpoint import (
    check_key_norms,
    converted_ffns,
    describe_layer,
    has_routing_state,
    read_mark,
    read_permutations,
    read_sidecars,
    write_sidecars,
)
from emoe.checks import check_distinct_keys, check_weights
from emoe.config import EMoEConfig
from emoe.convert import (
    ConversionReport,
    check_config_fits,
    check_foldable,
    conversion_report,
    convert_ffn,
    count_parameters,
    mark_,
)
from emoe.errors import CheckpointError, EMoEError
from emoe.files import (
    STOCK_CONFIG_FILE,
    WEIGHT_FILES,
    Weights,
    copy_companions,
    is_quantized,
    load_stock,
    loader_for,
    new_folder,
    quiet,
    read_object,
    read_tensors,
    some,
    weight_files,
    write_tensors,
)
from emoe.layer import RoutedActivation
from emoe.layer_numbers import resolve_layers
from emoe.partitioning import group_neurons

_Changes = dict[str, Callable[[Tensor], Tensor]]  # functions of stored tensors by name


class NotStreamedError(EMoEError):
    """Report that a folder is not converted from disk to disk. The model can be loaded instead."""


class _Source:
    """Hold a model without weights, and its stored weights.

    Attributes:
        model: model on the meta device.
        weights: stored weights.
    """

    def __init__(self, folder: Path) -> None:
        loader = loader_for(folder)
        if not hasattr(loader, "from_pretrained") or importlib.util.find_spec("accelerate") is None:
            raise NotStreamedError("disk to disk needs a transformers model and the package 'accelerate'")
        if is_quantized(folder):
            raise NotStreamedError("the weights are quantised")
        with quiet():
            self.model = load_stock(loader, folder, device_map="meta")
        self.weights = Weights(folder)

    def stored_names(self, ffn: FFN) -> dict[str, str]:
        """Return the stored names of an FFN's tensors, by their paths (:class:`NotStreamedError`)."""
        paths = [f"{path}.{name}" for path, module in ffn.projections() for name, _ in module.named_parameters()]
        stored = self.weights.find(self.model, [f"{ffn.name}.{path}" for path in paths])
        if missing := [path for path in paths if f"{ffn.name}.{path}" not in stored]:
            raise NotStreamedError(f"the weights do not have {some(missing)} of {ffn.name} under the model's names")
        return {path: stored[f"{ffn.name}.{path}"] for path in paths}

    @contextmanager
    def loaded(self, ffn: FFN) -> Iterator[None]:
        """Load the projections of an FFN for the duration of the block."""
        stored = self.stored_names(ffn)
        for path, module in ffn.projections():
            for name, parameter in list(module.named_parameters()):
                tensor = self.weights[stored[f"{path}.{name}"]].to(parameter.dtype, copy=True)
                if tensor.shape != parameter.shape:
                    raise NotStreamedError(f"{ffn.name}.{path}.{name} is stored with another shape")
                module.register_parameter(name, nn.Parameter(tensor))
        yield
        for _, module in ffn.projections():
            module.to("meta")

    def reorder(self, ffn: FFN, neurons: Tensor) -> _Changes:
        """Return the functions that put an FFN's stored tensors in another order of the neurons."""
        stored = self.stored_names(ffn)
        paths = [path for path in ffn.neuron_dims() if path in stored]
        return {stored[path]: partial(ffn.take, path, neurons=neurons) for path in paths}


def convert_folder(source: Path, out: Path, config: Any, *, progress: bool = False) -> ConversionReport:
    """Convert a dense model's folder to a new folder without loading the model.

    The new folder loads to the model that :func:`emoe.convert_` and :func:`emoe.save_pretrained` make. Learned routers
    are drawn from seed 0.

    Args:
        source: folder of the dense model.
        out: new folder.
        config: configuration of the experts, without a co-activation partition.
        progress: show progress bars.

    Raises:
        NotStreamedError: the model must be loaded instead; nothing was written.
        ConversionError, ConfigError, CheckpointError: as :func:`emoe.convert_`.
    """
    if read_mark(source) is not None:
        raise CheckpointError(f"{source} holds experts already; fold them back first (python -m emoe to-dense)")
    if not isinstance(config, EMoEConfig):
        raise NotStreamedError("a GMoE's copies are made in memory")
    folder = _Source(source)
    ffns = find_ffns(folder.model)
    chosen = [ffns[index] for index in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    before, neurons = count_parameters(folder.model), sum(ffn.d for ffn in ffns)
    changes: _Changes = {}
    reports, described = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for ffn in tqdm(chosen, "Grouping neurons", unit="layer", disable=not progress):
            with folder.loaded(ffn):
                check_weights(folder.model, [ffn])
                check_config_fits([ffn], config)
                if config.partition == "kmeans":
                    check_distinct_keys([ffn])
                partition = group_neurons(ffn.keys(), config, ffn.index)
                changes |= folder.reorder(ffn, partition[ffn.index])
                bias = folder.stored_names(ffn).get(f"{ffn.spec.proj_out}.bias")
                reports.append(convert_ffn(ffn, config, partition))
                layer = cast(RoutedActivation, ffn.activation)
                described.append(describe_layer(ffn.index, layer))
                if bias is not None and layer.output_bias is not None:
                    changes[bias] = partial(Tensor.type_as, layer.mean_output_bias())
    mark_(folder.model)
    settings = {**read_object(source / STOCK_CONFIG_FILE), "emoe": cast(Any, folder.model).config.emoe}
    with new_folder(out) as new:
        _write(source, new, changes, settings, progress)
        write_sidecars(described, config, [ffn.index for ffn in chosen], new)
    return conversion_report(reports, config, len(ffns), neurons, count_parameters(folder.model) - before)


def fold_folder(source: Path, out: Path, *, restore_order: bool = False, progress: bool = False) -> None:
    """Fold a converted model's folder back to a dense model's folder without loading the model.

    Args:
        source: folder of the converted model.
        out: new folder.
        restore_order: restore the original order of the neurons.
        progress: show a progress bar.

    Raises:
        NotStreamedError: the model must be loaded instead; nothing was written.
        ConversionError, CheckpointError: as :func:`emoe.to_dense_` and :func:`emoe.from_pretrained`.
    """
    mark, tensors, _ = read_sidecars(source)
    check_foldable([mark.config])
    folder = _Source(source)
    if has_routing_state(mark, folder.weights):
        raise NotStreamedError("routers are stored among the weights")
    ffns = converted_ffns(folder.model, mark, source)
    permutations = read_permutations(ffns, tensors, source)
    changes: _Changes = {}
    for ffn in ffns:
        with folder.loaded(ffn):
            check_key_norms([ffn], tensors, source)
        permutation = permutations[ffn.index]
        if restore_order and permutation is None:
            raise NotStreamedError("the original order of the neurons is unknown")
        if restore_order:
            changes |= folder.reorder(ffn, torch.argsort(cast(Tensor, permutation)))
    settings = {key: value for key, value in read_object(source / STOCK_CONFIG_FILE).items() if key != "emoe"}
    with new_folder(out) as new:
        _write(source, new, changes, settings, progress)


def _write(source: Path, out: Path, changes: _Changes, settings: dict[str, Any], progress: bool) -> None:
    """Write a folder with changed tensors and settings, one weight file at a time."""
    files = weight_files(source)
    for path in tqdm(files, "Writing", unit="file", disable=not progress):
        tensors = read_tensors(path)
        for name in tensors.keys() & changes.keys():
            tensors[name] = changes[name](tensors[name]).contiguous()
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {"format": "pt"}  # transformers requires the format
        write_tensors(tensors, out / path.name, notes)
    if files[0].name != WEIGHT_FILES[0]:
        shutil.copyfile(source / WEIGHT_FILES[1], out / WEIGHT_FILES[1])
    (out / STOCK_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    copy_companions(source, out)
