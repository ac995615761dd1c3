"""Freeze a prefix (embeddings and first layers) of a network, and cache its output for every row."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness.base import PREFIXES, DefinitionError, atomic_write
from emoe.architectures import find_ffns
from emoe.files import tensor_digest

STATES = "prefix_states"  # model argument with the output of its prefix

# modules and parameters that run before the layers, by model type or, in timm, by class
_BEFORE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "vit", "deit", "dinov2"), ("embeddings",)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("embed_tokens",)),
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
_VERSION = 1
_TOKENS_AT_ONCE = 4096

Batch = Callable[[Sequence[int]], Mapping[str, Any]]


class Prefix:
    """Run the embeddings and first layers of a network without gradient, dropout and stochastic depth.

    If the model is called with ``prefix_states`` ``[rows, tokens, width]``, its frozen layers return them, and the rest
    continues. Without them the whole model runs. Names of modules and parameters stay the same.

    Args:
        model: The model that is called: the network, or a module around it.
        network: The classifier or language model, not yet converted or adapted.
        layers: The number of frozen layers.

    Attributes:
        names: The frozen parameters of the network.
        seconds: The time spent in :meth:`output` so far.

    Raises:
        DefinitionError: The architecture is unknown here, or has fewer layers.
    """

    def __init__(self, model: nn.Module, network: nn.Module, layers: int) -> None:
        before, blocks = _frozen_paths(network, layers)
        paths, modules = [*before, *blocks], dict(network.named_modules())
        below = tuple(f"{path}." for path in paths)
        self.names = frozenset(
            name for name, _ in network.named_parameters() if f"{name}.".startswith(below)
        )
        self._model, self._network = model, network
        self._blocks = [modules[path] for path in blocks]
        self._modules = [modules[path] for path in paths if path in modules]
        # irrelevant differences, such as the path of the weights, only cause a recomputation
        described = [type(network).__name__, getattr(network, "config", ""), *self._modules]
        self._description = "\n".join(map(str, described))
        self._states: Tensor | None = None
        self.seconds = 0.0

    def freeze_(self) -> None:
        """Freeze the prefix permanently: no gradient, and eval mode in every call of the model."""
        for name in self.names:
            self._network.get_parameter(name).requires_grad_(False)
        for block in self._blocks:
            cast(Any, block).forward = partial(self._forward, block)
        self._model.register_forward_pre_hook(self._take_states, with_kwargs=True)
        self._model.register_forward_hook(self._forget_states, always_call=True)

    @functools.cached_property
    def digest(self) -> str:
        """Hash the architecture, settings and weights, which determine the output for a row."""
        digest = hashlib.sha256(self._description.encode())
        for name, tensor in sorted(self._network.state_dict().items()):
            if name in self.names:
                digest.update(f"{name}:{tensor_digest(tensor)}".encode())
        return digest.hexdigest()

    @torch.inference_mode()
    def output(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the last frozen layer's output ``[rows, tokens, width]`` for inputs: float32, on the CPU."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(device)
        handle, started = self._blocks[-1].register_forward_hook(_stop), time.perf_counter()
        try:
            self._model(**{name: value.to(device) for name, value in inputs.items()})
        except _Stopped as stopped:
            return stopped.states.float().cpu()
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started
        raise RuntimeError(
            f"{type(self._network).__name__} does not call its layers one after the other"
        )

    def _take_states(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for module in self._modules:
            module.eval()
        self._states = kwargs.get(STATES)
        return args, {name: value for name, value in kwargs.items() if name != STATES}

    def _forget_states(self, *_call: object) -> None:
        self._states = None

    def _forward(self, block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._states is None:
            return type(block).forward(block, states, *args, **kwargs)
        return self._states.to(states.dtype)


class _Stopped(Exception):  # noqa: N818  no error: ends a forward pass after the last frozen layer
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(_module: nn.Module, _args: object, output: Tensor) -> None:
    raise _Stopped(output)


def _frozen_paths(network: nn.Module, layers: int) -> tuple[list[str], list[str]]:
    """Return the paths of the modules and parameters before the layers, and the paths of the frozen layers."""
    kind = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
    if kind not in _BEFORE:
        raise DefinitionError(
            f"training.frozen_layers is {layers}, but it is unknown which modules come before the layers of '{kind}'; "
            f"choose from {', '.join(_BEFORE)}"
        )
    ffns = find_ffns(network)
    if layers > len(ffns):
        raise DefinitionError(
            f"training.frozen_layers is {layers}, but the model has {len(ffns)} layers"
        )
    parent = ffns[0].name.removesuffix(f"{ffns[0].spec.layers}.0")
    return [f"{parent}{name}" for name in _BEFORE[kind]], [ffn.name for ffn in ffns[:layers]]


class PrefixStates:
    """Cache the prefix's output for every row of a set: ``[tokens, width]`` each, float32.

    All runs with the same prefix and rows read the same memory-mapped file below ``resources/prefixes/``. Its name is a
    digest of everything that determines the numbers: weights and settings of the prefix, rows, processor, threads,
    torch. The first run computes it in large batches of rows of similar length; other runs wait.

    Args:
        prefix: The prefix of the model.
        rows: The digest of the model inputs.
        lengths: The tokens of each row.
        batch: A function that returns the model's inputs for rows by their numbers, padded on the right.
        folder: The folder of the files.
    """

    def __init__(
        self,
        prefix: Prefix,
        rows: str,
        lengths: Sequence[int],
        batch: Batch,
        folder: Path = PREFIXES,
    ) -> None:
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else torch.backends.cpu.get_cpu_capability()
        )
        contents = [
            _VERSION,
            prefix.digest,
            rows,
            device,
            torch.get_num_threads(),
            torch.__version__,
        ]
        key = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:24]
        file = folder / f"{key}.npy"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{key}.lock"):
            if not file.exists():
                _write(file, prefix, ends, lengths, batch)
        self._values, self._ends, self._lengths = np.load(file, mmap_mode="r"), ends, lengths

    def __getitem__(self, row: int) -> Tensor:
        end = int(self._ends[row])
        return torch.from_numpy(np.array(self._values[end - int(self._lengths[row]) : end]))


def collate_states(
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that also collates the rows' prefix states, if any: padded or packed."""

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        states = [row[STATES] for row in rows if STATES in row]
        batch = dict(
            collate(
                [{name: value for name, value in row.items() if name != STATES} for row in rows]
            )
        )
        if not states:
            return batch
        count, tokens = batch["input_ids"].shape
        if count != len(rows):  # packed
            return {**batch, STATES: torch.cat(states)[None]}
        padded = pad_sequence(states, batch_first=True)
        return {**batch, STATES: F.pad(padded, (0, 0, 0, tokens - padded.shape[1]))}

    return collated


def columns_digest(columns: Mapping[str, NDArray[Any]]) -> str:
    """Return the digest of columns of numbers."""
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _write(
    file: Path, prefix: Prefix, ends: NDArray[np.int64], lengths: Sequence[int], batch: Batch
) -> None:
    values: Any = None
    with atomic_write(file) as temporary:
        for rows in _similar_rows(lengths):
            outputs = prefix.output(batch(rows)).numpy()
            if values is None:
                shape = (int(ends[-1]), outputs.shape[2])
                values = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=np.float32, shape=shape
                )
            for row, output in zip(rows, outputs, strict=True):
                values[ends[row] - lengths[row] : ends[row]] = output[: lengths[row]]
        values.flush()


def _similar_rows(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group rows of similar length, of at most ``_TOKENS_AT_ONCE`` padded tokens, and yield their numbers."""
    rows: list[int] = []
    for row in np.argsort(np.asarray(lengths), kind="stable").tolist():
        if (
            rows and lengths[row] * (len(rows) + 1) > _TOKENS_AT_ONCE
        ):  # rows are sorted: it is the longest
            yield rows
            rows = []
        rows.append(row)
    yield rows
