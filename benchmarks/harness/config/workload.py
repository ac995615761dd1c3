"""What a run computes, from its spec alone: tokens, passes, parameters. From it follow time, memory and disk before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.shapes import Shape, shape_of_config
from emoe.layer_numbers import resolve_layers

# of English, by WordPiece and BPE; 3.8 (tweets) to 4.8 (instructions) in the sets that ship inside packages
BYTES_PER_TOKEN = 4.4
_PADDING = 0.24  # by doubling of the batch, in the same sets: 1.7 times the mean length at 8 rows, 2.2 times at 32
_FLOAT, _HALF, _FOUR_BIT = 4.0, 2.0, 0.55
STATES_ROOM = 2**29  # bytes of what is kept of one pass for the next
_MOMENTS = 8  # bytes that Adam keeps of a trained number


@dataclass(frozen=True)
class ModelSize:
    """What a run's model holds and computes, its experts and adapters included.

    Attributes:
        shape: of the model as it was downloaded.
        parameters: all numbers in memory.
        trained: those that the optimiser moves.
        forward: parameters that a token is multiplied with, on its way through the whole model.
        above: those of them above the frozen first layers.
        learned: those of them that have a gradient of their own.
        layers: above the frozen ones.
        neurons: in the FFNs of these, copies included.
        bytes_each: of a number that is not trained, on an accelerator.
    """

    shape: Shape
    parameters: int
    trained: int
    forward: int
    above: int
    learned: int
    layers: int
    neurons: int
    bytes_each: float = _FLOAT

    @property
    def trained_bytes(self) -> float:
        """Of what is kept of a run."""
        return self.trained * _FLOAT

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint: what is trained, with Adam's moments."""
        return self.trained * (_FLOAT + _MOMENTS)

    def state_bytes(self, *, on_cpu: bool) -> float:
        """Of weights, gradients and Adam's moments."""
        still = _FLOAT if on_cpu else self.bytes_each  # a CPU computes in float32
        return (self.parameters - self.trained) * still + self.trained * (_FLOAT + _FLOAT + _MOMENTS)


@dataclass(frozen=True)
class Passes:
    """Passes of one sort through a model.

    Attributes:
        count: how many: micro-batches, or tokens that are made one by one.
        tokens: of all of them, padding included.
        parameters: that a token is multiplied with. Backward counts as further ones: with the gradients of activations and of weights
            it is three times the forward pass, with those of activations alone twice.
        layers: that one of them goes through, one after the other.
    """

    count: float
    tokens: float
    parameters: float
    layers: float

    @property
    def operations(self) -> float:
        """Floating-point operations: a multiplication and an addition each."""
        return 2 * self.tokens * self.parameters

    def again(self, shape: Shape, first: int) -> Passes:
        """The same passes once more, where what reaches the first layer that differs is kept, as far as there is room."""
        kept = min(1.0, STATES_ROOM / max(self.tokens * shape.width * _FLOAT, 1))
        share = 1 - kept * first / shape.layers
        return replace(self, parameters=self.parameters * share, layers=self.layers * share)


@dataclass(frozen=True)
class Workload:
    """What a run computes and writes.

    Attributes:
        size: of its model.
        training: forward and backward.
        updates: steps of the optimiser.
        reading: forward alone: evaluations, answers.
        batch_tokens: of the largest micro-batch that is trained; of that which is read, where nothing is.
        precision: of an accelerator's arithmetic.
        threads: cores that it takes whatever it is given.
        least: share of the training that is done at least, where a run may stop early.
        logits: whether every token has a logit for every other token.
        keeps: whether what was trained is kept.
        caches: bytes of what is kept for all runs, by what it is of.
        assumed: what is not known of it, and so is taken at its most or not counted.
    """

    size: ModelSize
    training: Passes
    updates: int
    reading: tuple[Passes, ...]
    batch_tokens: float
    precision: str = "fp32"
    threads: int | None = None
    least: float = 1.0
    logits: bool = False
    keeps: bool = False
    caches: tuple[tuple[str, float], ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def tokens_trained(self) -> float:
        return self.training.tokens

    @property
    def tokens_read(self) -> float:
        return sum(passes.tokens for passes in self.reading)

    @property
    def operations(self) -> float:
        return self.training.operations + sum(passes.operations for passes in self.reading)

    def sent_bytes(self, processes: int, *, sharded: bool) -> float:
        """What each of several processes that train together is sent: gradients at every update; of a sharded model all weights, twice for every micro-batch, and gradients."""
        gradients = self.size.trained * _FLOAT
        if not sharded:
            return 2 * self.updates * gradients
        weights = (self.size.parameters - self.size.trained) * self.size.bytes_each + self.size.trained * _FLOAT
        return self.training.count / processes * (2 * weights + gradients)

    def activation_bytes(self, *, on_cpu: bool) -> float:
        """Of what a micro-batch leaves for the backward pass: of every token a block keeps about ten times its width and twice its neurons."""
        each = _FLOAT if on_cpu or self.precision == "fp32" else _HALF
        size, shape = self.size, self.size.shape
        kept = 10 * shape.width * size.layers + (4 if shape.gated else 2) * size.neurons
        if not self.updates:  # one block after the other, the one with the most copies among them
            kept = 10 * shape.width + 4 * (size.neurons - (size.layers - 1) * shape.neurons)
        logits = 3 * _FLOAT * shape.vocab if self.logits else 0  # with their copy in float32, and its gradient
        return self.batch_tokens * (kept * each + logits)

    def memory_bytes(self, *, on_cpu: bool, processes: int = 1) -> float:
        """On each of so many processes that share model and batch."""
        states = self.size.state_bytes(on_cpu=on_cpu) / processes
        whole = self.size.parameters * (_FLOAT if on_cpu else self.size.bytes_each)  # one process evaluates alone
        return max(states + self.activation_bytes(on_cpu=on_cpu), whole)


NO_PASSES = Passes(0, 0, 0, 0)


def shape_of_model(model: Mapping[str, Any]) -> Shape | None:
    """The shape of a run's model: that of ``models.yaml``, or that of its configuration; None where nobody has written it down."""
    known = load_models().get(model["name"])
    if known is not None and known.shape is not None:
        return known.shape
    return shape_of_config(model["config"]) if model.get("config") else None


def model_size(spec: Mapping[str, Any]) -> ModelSize | None:
    """What a run's model holds and computes; None where its shape is unknown.

    Experts count in full, whether they are parts of an FFN or copies of it: no backend computes more, and the mask computes as much.
    """
    shape = shape_of_model(spec["model"])
    if shape is None:
        return None
    method, training = spec["method"], spec.get("training", {})
    config, tune, lora = method.get("config"), method.get("tune"), training.get("lora")
    converted = resolve_layers(config["layers"], shape.layers) if config else []
    copies = config["num_experts"] if config and config.get("kind") == "gmoe" else 1
    frozen = training.get("frozen_layers") or 0
    head = shape.width * shape.vocab if spec["model"].get("modality") == "language" else 0
    more = len(converted) * (copies - 1) * shape.ffn
    above = (shape.layers - frozen) * shape.block + more + head
    forward = above + frozen * shape.block
    adapters = _adapters(lora, shape.width) * (shape.layers - frozen) if lora else 0
    if "training" not in spec:
        learned = trained = 0
    elif tune is None and lora is None:
        learned = above
        trained = (shape.layers - frozen) * shape.block + more + (0 if frozen else shape.embedding)
    else:
        named = (tune["blocks"] or tune.get("layers")) if tune else None
        blocks = resolve_layers(named, shape.layers) if named else []
        copied = len(set(blocks) & set(converted)) * (copies - 1) * shape.ffn
        learned = trained = adapters + len(blocks) * shape.block + copied
        if tune and tune.get("tuning") and not named:  # a way of one's own: nobody has said which parameters
            learned, trained = above, (shape.layers - frozen) * shape.block
    return ModelSize(
        shape,
        shape.parameters + more + adapters,
        trained,
        forward,
        above,
        learned,
        shape.layers - frozen,
        (shape.layers - frozen + len(converted) * (copies - 1)) * shape.neurons,
        _FOUR_BIT if "quantize" in spec["model"] else _HALF if spec["model"].get("weights") == "bf16" else _FLOAT,
    )


def _adapters(lora: Mapping[str, Any], width: int) -> int:
    """Parameters of one block's adapters, as if they sat on square matrices."""
    return 2 * width * int(lora["rank"]) * max(map(len, lora["targets"].values()))


def trained_passes(size: ModelSize, count: float, tokens: float) -> Passes:
    """Forward and backward through what is not frozen."""
    return Passes(count, tokens, 2 * size.above + size.learned, 3 * size.layers)


def read_passes(size: ModelSize, count: float, tokens: float, *, whole: bool = False) -> Passes:
    """Forward alone.

    Args:
        size: of the model.
        count: batches.
        tokens: of all of them.
        whole: through the frozen layers as well, whose output is not kept.
    """
    return Passes(count, tokens, size.forward if whole else size.above, size.shape.layers if whole else size.layers)


def text_tokens(row_bytes: float | None, max_length: int, special: int) -> float:
    """Mean tokens of a row.

    Args:
        row_bytes: of its text, on average; None where that is not known, and so as many tokens as are kept.
        max_length: tokens that are kept.
        special: tokens that are added to a row.

    >>> text_tokens(88.0, 128, 2)
    22.0
    """
    return max_length if row_bytes is None else min(row_bytes / BYTES_PER_TOKEN + special, max_length)


def padded(tokens: float, batch: int, max_length: int) -> float:
    """Mean tokens of a row that is padded to the longest of its batch, rows in random order.

    >>> round(padded(20.0, 8, 128), 1), padded(100.0, 32, 128), padded(20.0, 1, 128)
    (34.4, 128, 20.0)
    """
    return min(tokens * (1 + _PADDING * math.log2(batch)), max_length)
