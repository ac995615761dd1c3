"""Freeze a prefix (embeddings and first layers) of a network, and cache its output for every row.

A row is one text or image. Frozen layers give the same output for a row in every epoch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness.base import (
    PREFIXES,
    DefinitionError,
    atomic_write,
    first_line,
    print_warning,
    short_digest,
)
from benchmarks.harness.config.methods import is_below
from benchmarks.harness.models.loading import architecture_of
from benchmarks.harness.models.machine import implementation_variables, read_processor
from emoe.architectures import find_ffns
from emoe.files import tensor_digest

STATES = "prefix_states"  # model argument with the output of its prefix

# modules and parameters that run before the layers, by model type or, in timm, by class
_PATHS_BEFORE_LAYERS: dict[str, tuple[str, ...]] = {
    "bert": ("embeddings",),
    "roberta": ("embeddings",),
    "xlm-roberta": ("embeddings",),
    "vit": ("embeddings",),
    "deit": ("embeddings",),
    "dinov2": ("embeddings",),
    "llama": ("embed_tokens",),
    "mistral": ("embed_tokens",),
    "qwen2": ("embed_tokens",),
    "qwen3": ("embed_tokens",),
    "electra": ("embeddings", "embeddings_project"),
    "gpt2": ("wte", "wpe", "drop"),
    "VisionTransformer": (
        "patch_embed",
        "cls_token",
        "reg_token",
        "pos_embed",
        "pos_drop",
        "patch_drop",
        "norm_pre",
    ),
}
_VERSION = 2  # part of the cached files' names; increase it if the same settings give other numbers
_TOKENS_AT_ONCE = 4096  # largest number of tokens in a batch, with padding

Row = dict[str, Any]
# a function that takes the numbers of rows, and returns the model's inputs for these rows
MakeInputs = Callable[[Sequence[int]], Mapping[str, Any]]


class Prefix:
    """The embeddings and first layers of a network, which :meth:`freeze_` freezes.

    Frozen layers have no gradient, dropout or stochastic depth. If the frozen model is called with
    ``prefix_states`` ``[rows, tokens, width]``, the frozen layers return these states, and the
    other layers run on them. Without prefix states, the whole model runs. Modules and parameters
    keep their names.

    Args:
        model: The model that is called: the network, or a module around it.
        network: The classifier or language model, not yet converted or adapted.
        layers: The number of frozen layers.

    Attributes:
        names: The names of the prefix's parameters in the network.
        seconds: The time spent in :meth:`output` so far.

    Raises:
        DefinitionError: The architecture is unknown here, or has fewer layers.
    """

    def __init__(self, model: nn.Module, network: nn.Module, layers: int) -> None:
        self._model = model
        self._network = network
        # the prefix states that were passed to the current call of the model, if any
        self._states: Tensor | None = None
        self.seconds = 0.0

        frozen_paths = _frozen_paths(network, layers)
        paths = [*frozen_paths.before, *frozen_paths.layers]
        self.names = _parameters_at(network, paths)

        modules = dict(network.named_modules())
        self._frozen_layers = [modules[path] for path in frozen_paths.layers]
        # a path may also lead to a parameter, such as timm's cls_token, which is not a module
        self._prefix_modules = [modules[path] for path in paths if path in modules]
        # The description becomes part of the digest. It may contain irrelevant settings, such as
        # the path of the weights. If only these differ, the states are computed again for nothing,
        # but they are never wrong.
        config = getattr(network, "config", "")  # models of timm have none
        lines = [type(network).__name__, str(config)]
        for module in self._prefix_modules:
            lines.append(str(module))  # its layers and their settings, in several lines
        self._description = "\n".join(lines)

    def freeze_(self) -> None:
        """Freeze the prefix permanently: no gradient, and eval mode in every call of the model."""
        for name in self.names:
            self._network.get_parameter(name).requires_grad_(False)
        # with prefix states in a call, the layers return them instead of computing
        for block in self._frozen_layers:
            cast(Any, block).forward = partial(self._forward, block)
        self._model.register_forward_pre_hook(self._take_states, with_kwargs=True)
        self._model.register_forward_hook(self._forget_states, always_call=True)

    @functools.cached_property
    def digest(self) -> str:
        """Return a hash of all that determines a row's output: architecture, settings, weights."""
        digest = hashlib.sha256(self._description.encode())
        for name, tensor in sorted(self._network.state_dict().items()):
            if name in self.names:
                digest.update(f"{name}:{tensor_digest(tensor)}".encode())
        return digest.hexdigest()

    @torch.inference_mode()
    def output(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the prefix, and return its output ``[rows, tokens, width]``, float32, on the CPU.

        If there is an accelerator, the model is moved to it first. The prefix always runs without
        autocast.

        Args:
            inputs: The arguments of the model.

        Raises:
            RuntimeError: The model ran to its end without calling the last frozen layer.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(device)
        start_time = time.perf_counter()
        moved_inputs = {name: value.to(device) for name, value in inputs.items()}
        try:
            states = self._run_to_last_frozen_layer(moved_inputs, device)
            return states.float().cpu()
        finally:
            self.seconds += time.perf_counter() - start_time

    def _run_to_last_frozen_layer(
        self, inputs: Mapping[str, Tensor], device: torch.device
    ) -> Tensor:
        """Call the model, end the call after the last frozen layer, and return its output.

        Args:
            inputs: The arguments of the model, on the device.
            device: The device of the model.

        Raises:
            RuntimeError: The model ran to its end without calling the last frozen layer.
        """
        # This hook runs after the last frozen layer, and raises _Stopped with its output. So the
        # layers above do not run.
        hook = self._frozen_layers[-1].register_forward_hook(_stop)
        try:
            with self._no_autocast(device):
                self._model(**inputs)
        except _Stopped as stopped:
            return stopped.states
        finally:
            hook.remove()
        raise RuntimeError(
            f"{type(self._network).__name__} does not call its layers one after the other"
        )

    @contextmanager
    def _no_autocast(self, device: torch.device) -> Iterator[None]:
        """Run the model without autocast in this block, even if accelerate has wrapped it.

        The files of states are shared by all runs, so a state must not depend on whether the model
        was wrapped already.
        """
        # Accelerate sets the attribute `forward` of the model to a function that enables autocast.
        # The attribute hides the class's method `forward`. This block needs the method.
        model = cast(Any, self._model)
        wrapped_forward = vars(model).pop("forward", None)
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if wrapped_forward is not None:
                model.forward = wrapped_forward

    def _take_states(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep the prefix states of a call, and return the other arguments (a pre-hook).

        Also sets the prefix to eval mode.
        """
        # a call of model.train() may have set the prefix to training mode
        for module in self._prefix_modules:
            module.eval()
        self._states = kwargs.get(STATES)
        other_arguments = {name: value for name, value in kwargs.items() if name != STATES}
        return args, other_arguments

    def _forget_states(self, *_call: object) -> None:
        """Forget the prefix states after a call of the model (a hook)."""
        self._states = None

    def _forward(self, block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a frozen layer, or return the prefix states if the call has any.

        Replaces the ``forward`` of the layer.
        """
        if self._states is None:
            return type(block).forward(block, states, *args, **kwargs)
        return self._states.to(states.dtype)


class _Stopped(Exception):  # noqa: N818  no error: ends a forward pass after the last frozen layer
    """The end of a forward pass after the last frozen layer, with its output."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(_module: nn.Module, _args: object, output: Tensor) -> None:
    """End the forward pass with the output of a layer (a hook)."""
    raise _Stopped(output)


class _FrozenPaths(NamedTuple):
    """The paths of the modules and parameters to freeze, such as ``bert.encoder.layer.0``."""

    before: list[str]
    """Modules and parameters that run before the layers."""
    layers: list[str]
    """The first layers."""


def _parameters_at(network: nn.Module, paths: Sequence[str]) -> frozenset[str]:
    """Return the names of the parameters in some modules of a network.

    Args:
        network: The network.
        paths: The paths of the modules. A path may also be the name of a single parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    # a path is a module around the parameter, or the parameter itself
    return frozenset(name for name in names if name in paths or is_below(name, paths))


def _frozen_paths(network: nn.Module, layers: int) -> _FrozenPaths:
    """Find the first ``layers`` layers of a network, and the embeddings before them.

    Raises:
        DefinitionError: The architecture is unknown here, or has fewer layers.
    """
    architecture = architecture_of(network)
    if architecture not in _PATHS_BEFORE_LAYERS:
        raise DefinitionError(
            f"training.frozen_layers is {layers}, but it is unknown which modules come before "
            f"the layers of '{architecture}'; choose from {', '.join(_PATHS_BEFORE_LAYERS)}"
        )
    ffns = find_ffns(network)
    if layers > len(ffns):
        raise DefinitionError(
            f"training.frozen_layers is {layers}, but the model has {len(ffns)} layers"
        )
    # The constant has paths inside the module `parent`, which contains the layers too. If the first
    # layer is ``bert.encoder.layer.0``, `parent` is ``bert.``.
    path_of_first_layer = f"{ffns[0].spec.layers}.0"
    parent = ffns[0].name.removesuffix(path_of_first_layer)
    before = [f"{parent}{name}" for name in _PATHS_BEFORE_LAYERS[architecture]]
    frozen_layers = [ffn.name for ffn in ffns[:layers]]
    return _FrozenPaths(before, frozen_layers)


class PrefixStates:
    """The prefix's output for every row of a data set: ``[tokens, width]`` each, float32.

    All runs with the same prefix and rows read the same memory-mapped file below
    ``resources/prefixes/``. Its name is a digest of everything that determines the numbers: weights
    and settings of the prefix, rows, processor, variables that choose its kernels, threads, torch,
    transformers and timm. The first run computes the file in large batches of rows of similar
    length; other runs wait.

    Args:
        prefix: The prefix of the model.
        rows_digest: The digest of the model inputs of all rows.
        lengths: The number of tokens of each row.
        make_inputs: A function that returns the model's inputs for rows, given their numbers. It
            pads on the right.
        folder: The folder of the files.
    """

    def __init__(
        self,
        prefix: Prefix,
        rows_digest: str,
        lengths: Sequence[int],
        make_inputs: MakeInputs,
        folder: Path = PREFIXES,
    ) -> None:
        num_tokens = int(np.sum(lengths, dtype=np.int64))
        key = _states_key(prefix.digest, rows_digest)
        file = folder / f"{key}.npy"
        folder.mkdir(parents=True, exist_ok=True)
        # only one run computes the file; the others wait for it here
        with FileLock(folder / f".{key}.lock"):
            if not _is_intact(file, num_tokens):
                _write_states(file, prefix, lengths, make_inputs)
        self._values = _open_states(file)  # [tokens of all rows, width]
        self._starts = _first_tokens(lengths)
        self._lengths = lengths

    def __getitem__(self, row: int) -> Tensor:
        """Return the states of a row: ``[tokens, width]``."""
        start = int(self._starts[row])
        end = start + int(self._lengths[row])
        states = np.array(self._values[start:end])  # copies from the file
        return torch.from_numpy(states)


def _first_tokens(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Return the index of each row's first token, if the tokens of all rows are joined: ``[rows]``.

    Args:
        lengths: The number of tokens of each row.
    """
    tokens_of_rows = np.asarray(lengths, dtype=np.int64)
    tokens_up_to_row = np.cumsum(tokens_of_rows)
    return tokens_up_to_row - tokens_of_rows


def _open_states(file: Path) -> np.memmap[Any, Any]:
    """Open a file of prefix states. Numbers are only read from it when they are used."""
    # unlike np.load, this refuses other formats, such as a pickle
    return np.lib.format.open_memmap(file, mode="r")


def _is_intact(file: Path, num_tokens: int) -> bool:
    """Return True if a file of prefix states exists and has the right form and size.

    Prints a warning if it is damaged. The numbers are not checked, because a file may have many GB.

    Args:
        file: The file.
        num_tokens: The number of tokens of all rows.
    """
    if not file.exists():
        return False
    try:
        values = _open_states(file)
    except Exception as error:  # NumPy's reader raises many types
        print_warning(f"{file} is damaged: {first_line(error)}; it is computed again")
        return False
    has_form = values.ndim == 2 and len(values) == num_tokens and values.flags.c_contiguous
    has_type = values.dtype == np.float32
    # the values begin after a header of `offset` bytes
    has_size = file.stat().st_size == values.offset + values.nbytes
    if not (has_form and has_type and has_size):
        print_warning(
            f"{file} is damaged: it is not that of {num_tokens:,} tokens; it is computed again"
        )
        return False
    return True


def _states_key(prefix_digest: str, rows_digest: str) -> str:
    """Return 24 hex digits of a hash over all that determines the prefix states of rows."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = read_processor().flags_digest
    packages = ("torch", "transformers", "timm")
    versions = [importlib.metadata.version(name) for name in packages]
    determinants = [
        _VERSION,
        prefix_digest,
        rows_digest,
        device,
        implementation_variables(),
        torch.get_num_threads(),
        versions,
    ]
    return short_digest(json.dumps(determinants), 24)


def collate_states(
    collate: Callable[[list[Row]], Mapping[str, Any]],
) -> Callable[[list[Row]], dict[str, Any]]:
    """Return a collator that also collates the prefix states of rows.

    If the rows of a batch have ``prefix_states``, the batch gets them. Otherwise it is unchanged.

    Args:
        collate: The collator of the other columns. It pads on the right, or packs all rows into
            one sequence.
    """

    def collate_with_states(rows: list[Row]) -> dict[str, Any]:
        """Collate rows, and treat their prefix states like their tokens: pad them or pack them."""
        states = [row[STATES] for row in rows if STATES in row]  # [tokens, width] each
        other_columns = [_without_states(row) for row in rows]
        batch = dict(collate(other_columns))
        if not states:
            return batch
        sequences, tokens = batch["input_ids"].shape
        # A padded batch has a sequence for each row. A packed batch has one sequence with the
        # tokens of all rows. A single row is treated as padded.
        is_packed = sequences != len(rows)
        if is_packed:
            packed = torch.cat(states)  # [tokens of all rows, width]
            return {**batch, STATES: packed.unsqueeze(0)}
        return {**batch, STATES: _pad_states(states, tokens)}

    return collate_with_states


def _pad_states(states: list[Tensor], num_tokens: int) -> Tensor:
    """Pad the prefix states of rows on the right with zeros: ``[rows, num_tokens, width]``.

    Args:
        states: The prefix states of each row: ``[tokens, width]``.
        num_tokens: The number of tokens of the batch. It may be larger than that of the longest
            row, for example because it is a multiple of 8.
    """
    padded = pad_sequence(states, batch_first=True)  # [rows, tokens of the longest, width]
    num_missing = num_tokens - padded.shape[1]
    # F.pad takes two numbers for each dimension, the last dimension first. The width gets nothing
    # before and after it, and the tokens get zeros after them.
    return F.pad(padded, (0, 0, 0, num_missing))


def _without_states(row: Row) -> Row:
    """Return the columns of a row except its prefix states."""
    return {name: value for name, value in row.items() if name != STATES}


def columns_digest(columns: Mapping[str, NDArray[Any]]) -> str:
    """Return a sha256 over columns of numbers, such as the token ids of all rows."""
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _write_states(
    file: Path, prefix: Prefix, lengths: Sequence[int], make_inputs: MakeInputs
) -> None:
    """Compute the prefix states of all rows; write them as one array ``[all tokens, width]``.

    Args:
        file: The file to write.
        prefix: The prefix of the model.
        lengths: The number of tokens of each row.
        make_inputs: A function that returns the model's inputs for rows, given their numbers.

    Raises:
        OSError: The disk has no space for the file; names the file.
    """
    num_tokens = int(np.sum(lengths, dtype=np.int64))
    starts = _first_tokens(lengths)
    values: Any = None  # the file's array, as soon as its width is known
    with atomic_write(file) as temporary:
        for rows in _batches_of_similar_rows(lengths):
            inputs = make_inputs(rows)
            outputs = prefix.output(inputs).numpy()  # [rows, tokens of the longest row, width]
            if values is None:
                width = outputs.shape[2]
                values = _create_states(temporary, num_tokens, width)
            for row, output in zip(rows, outputs, strict=True):
                start = starts[row]
                length = lengths[row]
                values[start : start + length] = output[:length]  # without the padding
        values.flush()


def _create_states(file: Path, num_tokens: int, width: int) -> np.memmap[Any, Any]:
    """Create a file for prefix states ``[num_tokens, width]``, and map it into memory for writing.

    Raises:
        OSError: The disk or the user's quota has no space for the file.
    """
    shape = (num_tokens, width)
    values = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    # The new file has a size, but no disk space yet. If the space ran out when numbers are written
    # to the map, the system would kill the process. So reserve the space now.
    size = file.stat().st_size
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, size)
    return values


def _batches_of_similar_rows(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of row numbers. The rows of a batch have similar lengths, to avoid padding.

    A batch has at most ``_TOKENS_AT_ONCE`` tokens with padding. A longer row is a batch by itself.
    """
    rows: list[int] = []  # the next batch
    shortest_first = np.argsort(np.asarray(lengths), kind="stable").tolist()
    for row in shortest_first:
        # this row is the longest so far, so the others are padded to its length
        tokens_with_row = lengths[row] * (len(rows) + 1)
        if rows and tokens_with_row > _TOKENS_AT_ONCE:
            yield rows
            rows = []
        rows.append(row)
    yield rows
