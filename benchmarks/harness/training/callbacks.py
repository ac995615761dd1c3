"""Callbacks of the training loop: times, first losses, running gates, epoch of the row order.

A running gate is a moving average of the mean of an expert's neuron keys. A router scores the
expert with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.training.checkpoints import SavedCallback
from benchmarks.harness.training.processes import is_sharded, world_size
from emoe.modes import restored_modes
from emoe.records import RoutingRecord

_FIRST_BATCHES = 8  # number of training batches whose loss is recorded
# number of rows in the batch that Probe.observe gets
_FIXED_ROWS = 4


@contextmanager
def restore_rng_and_modes(model: nn.Module) -> Iterator[None]:
    """Restore the RNG state, and the train or eval mode of every module, on exit."""
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices), restored_modes(model):
        yield


class Stopwatch(SavedCallback):
    """A callback that measures the seconds of training steps and of evaluations.

    Attributes:
        seconds: The time of all measured training steps.
        steps: The number of measured training steps.
        evaluation: The time of all evaluations and predictions.
    """

    SAVED = ("seconds", "steps", "evaluation")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.evaluation = 0.0
        self._start = 0.0

    def cost(self, steps: int) -> dict[str, float]:
        """Return the time of the training for the ``cost`` section of ``metrics.json``.

        Args:
            steps: The number of steps of the training.

        Returns:
            ``steps``, ``step_seconds`` (the mean time of a measured step) and ``train_seconds``
            (the mean time, multiplied by ``steps``).
        """
        step_seconds = self.seconds / max(self.steps, 1)
        return {
            "steps": steps,
            "step_seconds": step_seconds,
            "train_seconds": step_seconds * steps,
        }

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        # "eval_runtime" or "eval_<data set>_runtime"; none if a subclass measures the time itself
        runtimes = [value for name, value in metrics.items() if name.endswith("_runtime")]
        # Trainer reads the wall clock, which may be set back during an evaluation
        self.evaluation += max(sum(runtimes), 0.0)

    on_predict = on_evaluate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        # a GPU may still compute the step
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class SetEpochs(TrainerCallback):
    """A callback that sets the epoch of the row order at the start of each epoch.

    The callback is needed for a resumed run on several processes, where accelerate does not set the
    epoch.

    Args:
        order: A sampler with the method ``set_epoch``.
    """

    def __init__(self, order: Any) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # state.epoch is a fraction if the run resumes within an epoch, and may be None at first
        epoch = state.epoch or 0
        self._order.set_epoch(int(epoch))


class UpdateGates(TrainerCallback):
    """A callback that updates the running gates of a model after each optimizer step.

    :class:`emoe.TrainerCallback` does this too. But it refuses a dense model, and it adds the
    balance loss, which :class:`~benchmarks.harness.training.trainer.RoutedTrainer` adds itself.
    """

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # mixed precision skips a step with infinite gradients, which then changes no weights
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            emoe.update_gates_(kwargs["model"])


def fixed_rows(rows: Any) -> list[Any]:
    """Return the rows for :meth:`Probe.observe`: the first rows of a data set.

    A data set with fewer rows gives all of them.
    """
    count = min(len(rows), _FIXED_ROWS)
    return [rows[number] for number in range(count)]


# about the standard deviation of random integers from -1000 to 1000, sqrt((2001**2 - 1) / 12)
_INTEGERS_DEVIATION = 577


def summarise_logits(logits: Tensor) -> dict[str, float]:
    """Summarise logits of any shape with numbers that hardly depend on the order of summation.

    ``projection`` is the product with a fixed random direction of about unit length. It changes if
    two logits are exchanged.
    """
    flat = logits.detach().double().flatten().cpu()
    generator = torch.Generator().manual_seed(derive_seed("probe", len(flat)))
    # random integers are the same on all processors; normal numbers are not
    integers = torch.randint(-1000, 1001, (len(flat),), generator=generator)
    # n elements with a standard deviation of about 1 have a length of about sqrt(n)
    direction = integers.double() / _INTEGERS_DEVIATION
    length = max(len(flat), 1) ** 0.5
    projection = flat @ direction / length
    return {
        "mean": float(flat.mean()),
        "deviation": float(flat.std(correction=0)),
        "rms": float(flat.square().mean().sqrt()),
        "projection": float(projection),
    }


def _expert_loads(record: RoutingRecord | None) -> dict[str, list[int]]:
    """Return how often the tokens chose each expert, by layer; empty for a dense model (None)."""
    if record is None:
        return {}
    return {str(number): layer.loads.tolist() for number, layer in record.layers.items()}


class Probe(SavedCallback):
    """A recorder of numbers that barely differ between machines.

    The numbers are the first losses of the training, and the logits and expert loads of a fixed
    batch.

    Attributes:
        losses: The losses of the first training batches.
    """

    SAVED = ("losses",)

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._observed: dict[str, Any] = {"loads": {}}

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Summarise the logits of a batch, and count how often its tokens choose each expert.

        Does nothing if the model is sharded.

        Args:
            model: The converted model before training. Its modes and all random states are
                restored.
            batch: The model's inputs; labels are ignored.
        """
        if is_sharded():
            return
        # The model moves to the accelerator, which training uses too. A quantised model stays where
        # it is, and so does a model that several processes train.
        is_quantized = getattr(model, "is_quantized", False)
        if torch.cuda.is_available() and world_size() == 1 and not is_quantized:
            model.to("cuda")
        device = next(model.parameters()).device
        without_labels = {name: value for name, value in batch.items() if name != "labels"}
        inputs = send_to_device(without_labels, device)
        # a dense model has no experts, so `record` is None for it
        recording: AbstractContextManager[RoutingRecord | None] = nullcontext()
        if emoe.is_converted(model):
            recording = emoe.record_routing(model)
        with restore_rng_and_modes(model), recording as record:
            model.eval()
            logits = model(**inputs)["logits"]
        self._observed = {"logits": summarise_logits(logits), "loads": _expert_loads(record)}

    def add_loss(self, loss: Tensor) -> None:
        """Record the loss of a training batch, if it is one of the first batches."""
        if len(self.losses) < _FIRST_BATCHES:
            self.losses.append(float(loss))

    def summary(self) -> dict[str, Any]:
        """Return ``probe`` of ``metrics.json``: ``losses``, ``logits``, and ``loads`` by layer."""
        # as text with all digits, so that no reader of the file rounds them
        losses = [repr(loss) for loss in self.losses]
        return {"losses": losses, **self._observed}
