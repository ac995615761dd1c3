"""A model's folder to experts and back, from disk to disk: one layer and one tensor in memory at a time, never the model.

Three steps, each of which goes on where it was stopped. The neurons of every layer are grouped. Then each layer, with its weights in place
for a moment, is converted as a model in memory would be, which tells its sidecars. At last each file of weights is written tensor by tensor, with
the neurons of the converted layers in their new order.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emoe.architectures import FFN, find_ffns
from emoe.checkpoint import marked_ffns, restore_layer
from emoe.checks import check_distinct_keys, check_unshared, check_weights
from emoe.config import EMoEConfig, GMoEConfig
from emoe.convert import (
    ConversionReport,
    LayerReport,
    attach,
    check_config_fits,
    check_foldable,
    check_order_known,
    conversion_report,
    convert_ffn,
    count_parameters,
    to_dense_,
)
from emoe.errors import CheckpointError, ConversionError, EMoEError
from emoe.folders import copy_companions, holds_experts, loader_for
from emoe.layer import RoutedActivation, routed_layers
from emoe.layer_numbers import resolve_layers
from emoe.marks import mark_
from emoe.partitioning import (
    ALGORITHM_VERSION,
    Partition,
    group_neurons,
    join_partitions,
    load_partition,
    save_partition,
)
from emoe.shards import Piece, changed_piece, held_pieces, stored_pieces, whole_file, write_pieces
from emoe.sidecars import (
    CONFIG_FILE,
    EXTRA_FILE,
    PARTITION_FILE,
    config_text,
    describe_layer,
    read_sidecars,
)
from emoe.skeleton import load_skeleton, settings_files, stored_names, tensor_paths, weights_in_place
from emoe.stock import is_quantised
from emoe.unfinished import check_begun, unfinished
from emoe.weights import STOCK_CONFIG_FILE, WEIGHT_FILES, Weights, read_object, weight_files

_BASE = 500 << 20  # what Python, torch and a model's library take: 400 MB
_ROOM = 1 << 30  # beside twice the largest file
_BYTES_A_WEIGHT = 20  # that grouping takes at its peak for each number of the keys: 14, and more where they are float32


class NotStreamedError(EMoEError):
    """Tell that a folder is none that is converted from disk to disk, and why."""


@dataclass
class _Folder:
    """A model's folder whose weights stay on the disk.

    Attributes:
        path: of the folder.
        model: without its weights.
        files: the weight files: their tensors by name, and what each says of itself.
        names: of tensors in the files, by layer number and path below the layer.
    """

    path: Path
    model: nn.Module
    files: dict[Path, tuple[dict[str, Piece], dict[str, str]]]
    names: dict[tuple[int, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pieces = {name: piece for pieces, _ in self.files.values() for name, piece in pieces.items()}
        self.weights = Weights(self.path)

    def find(self, ffns: Iterable[FFN]) -> None:
        """Find the tensors of FFNs in the files (:class:`NotStreamedError`)."""
        state = self.model.state_dict()
        names = {(ffn.index, path): f"{ffn.name}.{path}" for ffn in ffns for path in tensor_paths(ffn)}
        stored = stored_names(self.model, names.values())
        for (index, path), name in names.items():
            place = stored.get(name, name)
            if place not in self.pieces:  # with or without the prefix of a base model
                parent, (module, _, own) = name.removesuffix(f".{path}"), path.rpartition(".")
                place = self.weights.places(parent, module, [own]).get(own, name)
            self.check_stored({place: state[name]})
            self.names[index, path] = place

    def check_stored(self, state: Mapping[str, Tensor]) -> None:
        """Check that the files hold tensors of these names and shapes (:class:`NotStreamedError`)."""
        for name, tensor in state.items():
            if name not in self.pieces or self.pieces[name].shape != tensor.shape:
                raise NotStreamedError(f"the weights in {self.path} do not hold {name} as the model has it")

    def tensor(self, ffn: FFN, path: str) -> Tensor:
        """Read a tensor of an FFN by its path below the layer."""
        return self.pieces[self.names[ffn.index, path]].tensor()

    def taken(self, ffn: FFN, neurons: Tensor) -> dict[str, Piece]:
        """The tensors of an FFN with these neurons, in this order, by their paths below the layer."""
        return {
            path: changed_piece(self.pieces[self.names[ffn.index, path]], partial(ffn.take, path, neurons=neurons))
            for path in ffn.neuron_dims()
            if (ffn.index, path) in self.names
        }


@dataclass
class _Changes:
    """What the new folder has otherwise: tensors in the weight files by name, some of which go, and sidecars."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    sidecars: dict[str, dict[str, Piece]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def convert_folder(
    source: Path, out: Path, config: EMoEConfig | GMoEConfig, *, jobs: int | None = None, progress: bool = False
) -> tuple[ConversionReport, list[Path]]:
    """Convert a dense model's folder to a new one, without the model in memory.

    What is written loads to the very model that :func:`emoe.convert_` and :func:`emoe.save_pretrained` make on one thread, with
    learned routers from seed 0. It is the same, to the byte, for any number of jobs, and after any interruption.

    Args:
        source: the folder.
        out: a new folder, or one in which the same conversion was begun.
        config: what to build; no co-activation partition, which needs calibration.
        jobs: layers whose neurons are grouped at a time, each on one thread; None for as many as cores, as far as memory stays below
            twice the largest weight file and 1 GB.
        progress: show progress bars.

    Returns:
        What was done, and the files that were not copied along, see :func:`emoe.folders.copy_companions`.

    Raises:
        NotStreamedError: the weights are not stored as the model has them; nothing was written.
        ConversionError, ConfigError, CheckpointError: as :func:`emoe.convert_`, and for folders.
    """
    if holds_experts(source):
        raise CheckpointError(f"{source} holds experts already; fold them back first (python -m emoe to-dense)")
    if is_quantised(source):
        raise ConversionError(f"{source} is quantised, says its {STOCK_CONFIG_FILE}: convert before quantising")
    plan = _plan("convert", source, {"config": config.to_dict(), "partition version": ALGORITHM_VERSION})
    begun = check_begun(out, plan)
    folder = _open(source)
    model, ffns = folder.model, find_ffns(folder.model)
    chosen = [ffns[i] for i in resolve_layers(config.layers, len(ffns))]  # type: ignore[arg-type]
    folder.find(chosen)
    check_unshared(model, chosen)
    if not begun:
        _check(folder, chosen, config)
    before, neurons = count_parameters(model), sum(ffn.d for ffn in ffns)
    with unfinished(out, plan) as scratch:
        partition = Partition({})
        if isinstance(config, EMoEConfig):
            partition = _group(folder, chosen, config, scratch, jobs or _jobs(folder, chosen), progress)
        changes, reports = _Changes(), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # learned routers are drawn
            for ffn in chosen:
                reports.append(_convert(folder, ffn, config, partition, changes))
        mark_(model)
        changes.sidecars[PARTITION_FILE] |= held_pieces({"num_experts": torch.tensor(config.num_experts)})
        changes.texts[CONFIG_FILE] = config_text(config, [ffn.index for ffn in chosen]).encode()
        outside = _write(folder, out, scratch, changes, progress)
    return conversion_report(reports, config, len(ffns), neurons, count_parameters(model) - before), outside


def fold_folder(source: Path, out: Path, *, restore_order: bool = False, progress: bool = False) -> list[Path]:
    """Fold a converted model's folder back to a dense one, without the model in memory.

    Args:
        source: the converted folder.
        out: a new folder, or one in which the same was begun.
        restore_order: put the neurons back where they stood before the conversion.
        progress: show a progress bar.

    Returns:
        The files that were not copied along, see :func:`emoe.folders.copy_companions`.

    Raises:
        NotStreamedError: the weights are not stored as the model has them; nothing was written.
        ConversionError, CheckpointError: as :func:`emoe.to_dense_` and :func:`emoe.from_pretrained`.
    """
    config, indices, tensors, extra = read_sidecars(source)
    check_foldable([config])
    plan = _plan("to-dense", source, {"restore order": restore_order})
    check_begun(out, plan)
    folder = _open(source)
    chosen, order = marked_ffns(folder.model, source, config, indices, tensors)
    folder.find(chosen)
    changes = _Changes()
    for ffn in chosen:
        with weights_in_place(ffn, partial(folder.tensor, ffn)):
            layer = attach(ffn, config, order[ffn.index], None)
            restore_layer(layer, tensors, extra, folder.weights, source)
            _keep_output_bias(folder, layer, changes)
        beside = folder.weights.places(ffn.name, ffn.spec.activation, layer.state_dict())
        changes.gone |= set(beside.values())
    if restore_order:
        check_order_known(routed_layers(folder.model))
        for ffn in chosen:
            taken = folder.taken(ffn, torch.argsort(order[ffn.index]))  # type: ignore[arg-type]
            changes.pieces |= {folder.names[ffn.index, path]: piece for path, piece in taken.items()}
    to_dense_(folder.model)
    with unfinished(out, plan) as scratch:
        return _write(folder, out, scratch, changes, progress)


def _plan(command: str, source: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes a new folder, the content of the old one by sizes and times of its files."""
    files = [
        *weight_files(source),
        *(source / name for name in (STOCK_CONFIG_FILE, CONFIG_FILE, PARTITION_FILE, EXTRA_FILE)),
    ]
    stats = {path.name: path.stat() for path in files if path.exists()}
    marks = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"command": command, "source": str(source.resolve()), **settings, **marks}


def _open(source: Path) -> _Folder:
    loader = loader_for(source)
    if is_quantised(source):
        raise NotStreamedError(f"the weights in {source} are quantised")
    if hasattr(loader, "from_pretrained") and importlib.util.find_spec("accelerate") is None:
        raise NotStreamedError("the package 'accelerate' is not installed")
    folder = _Folder(
        source, load_skeleton(loader, source), {path: stored_pieces(path) for path in weight_files(source)}
    )
    if not hasattr(loader, "from_pretrained"):  # timm, which has not looked at the files
        folder.check_stored(folder.model.state_dict())
    return folder


def _check(folder: _Folder, chosen: list[FFN], config: EMoEConfig | GMoEConfig) -> None:
    """Everything that :func:`emoe.convert_` checks, before anything is written."""
    for ffn in chosen:
        with weights_in_place(ffn, partial(folder.tensor, ffn)):
            check_weights(folder.model, [ffn])
            check_config_fits([ffn], config)
            if isinstance(config, EMoEConfig) and config.partition == "kmeans":
                check_distinct_keys([ffn])


def _jobs(folder: _Folder, chosen: list[FFN]) -> int:
    """As many layers at a time as there are cores and room in memory for."""
    largest = max(path.stat().st_size for path in folder.files)
    layer = max(ffn.d * ffn.h for ffn in chosen) * _BYTES_A_WEIGHT
    return max(1, min(torch.get_num_threads(), (2 * largest + _ROOM - _BASE) // layer))


def _group(
    folder: _Folder, chosen: list[FFN], config: EMoEConfig, scratch: Path, jobs: int, progress: bool
) -> Partition:
    def group(ffn: FFN) -> Partition:
        file = scratch / f"layer-{ffn.index}.safetensors"
        try:
            return load_partition(file)
        except CheckpointError:  # not there yet, or cut off
            path = f"{ffn.spec.proj_in}.weight"
            keys = ffn.keys_of(folder.tensor(ffn, path).to(ffn.proj_in.weight.dtype))  # type: ignore[arg-type]
            save_partition(group_neurons(keys, config, ffn.index), file)
            return load_partition(file)

    # one thread a layer, so that sums are the same however many layers and cores there are
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = pool.map(group, chosen)
            parts = list(tqdm(found, "Grouping neurons", len(chosen), unit="layer", disable=not progress))
    finally:
        torch.set_num_threads(threads)
    return join_partitions(parts)


def _convert(
    folder: _Folder, ffn: FFN, config: EMoEConfig | GMoEConfig, partition: Partition, changes: _Changes
) -> LayerReport:
    """Convert one layer, and note what that changes in the files."""
    neurons = torch.arange(ffn.d).repeat(config.num_experts) if isinstance(config, GMoEConfig) else partition[ffn.index]
    taken = folder.taken(ffn, neurons)
    with weights_in_place(ffn, partial(folder.tensor, ffn)):
        report = convert_ffn(ffn, config, partition)
        layer = cast(RoutedActivation, ffn.activation)
        described, extra = describe_layer(ffn.index, layer)
        _keep_output_bias(folder, layer, changes)
    changes.pieces |= {folder.names[ffn.index, path]: piece for path, piece in taken.items()}
    # copies are written from the disk, too
    copies = {f"{ffn.index}.{path}": piece for path, piece in taken.items() if f"{ffn.index}.{path}" in extra}
    own = held_pieces({name: tensor for name, tensor in extra.items() if name not in copies})
    for file, pieces in ((PARTITION_FILE, held_pieces(described)), (EXTRA_FILE, {**own, **copies})):
        changes.sidecars.setdefault(file, {}).update(pieces)
    return report


def _keep_output_bias(folder: _Folder, layer: RoutedActivation, changes: _Changes) -> None:
    """Write the one bias that stands for the experts' own in a dense model."""
    if layer.output_bias is not None:
        name = folder.names[layer.ffn.index, f"{layer.ffn.spec.proj_out}.bias"]
        changes.pieces |= held_pieces({name: layer.mean_output_bias()})


def _write(folder: _Folder, out: Path, scratch: Path, changes: _Changes, progress: bool) -> list[Path]:
    """Write the new folder, ``config.json`` last; files that are there already are whole."""
    files = {
        path.name: (
            {name: changes.pieces.get(name, piece) for name, piece in pieces.items() if name not in changes.gone},
            metadata,
        )
        for path, (pieces, metadata) in folder.files.items()
    }
    todo = {name: content for name, content in files.items() if not (out / name).exists()}
    size = sum(piece.length for pieces, _ in todo.values() for piece in pieces.values())
    free = shutil.disk_usage(out).free
    if size > free:
        raise CheckpointError(
            f"{out}: {size / 1e9:.1f} GB are to be written, and the disk has {free / 1e9:.1f} GB left"
        )
    with tqdm(desc="Writing", total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, (pieces, metadata) in todo.items():
            write_pieces(pieces, out / name, scratch, metadata=metadata, told=bar.update)
    for name, pieces in changes.sidecars.items():
        if pieces:
            write_pieces(pieces, out / name, scratch)
    settings = settings_files(folder.model)
    outside = copy_companions(folder.path, out, settings)
    for name, content in {**_index(folder.path, files), **changes.texts, **settings}.items():
        with whole_file(out / name, scratch) as file:
            file.write(content)
    return outside


def _index(source: Path, files: Mapping[str, tuple[dict[str, Piece], dict[str, str]]]) -> dict[str, bytes]:
    """The index of the new shards; nothing where the weights are one file."""
    if list(files) == [WEIGHT_FILES[0]]:
        return {}
    sizes = [piece.length for pieces, _ in files.values() for piece in pieces.values()]
    metadata = read_object(source / WEIGHT_FILES[1]).get("metadata")
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes)},
        "weight_map": {name: file for file, (pieces, _) in files.items() for name in pieces},
    }
    return {WEIGHT_FILES[1]: (json.dumps(index, indent=2) + "\n").encode()}
