"""Callbacks of the training loop: times, first losses, running gates, and the epoch of the row order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.training.checkpoints import SavedCallback
from benchmarks.harness.training.processes import is_sharded, world_size

FIRST_STEPS = 8
_FIXED_ROWS = 4


@contextmanager
def restore_rng_and_modes(model: nn.Module) -> Iterator[None]:
    """Restore the RNG state, and the train or eval mode of every module, on exit."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class Stopwatch(SavedCallback):
    """Measure the seconds of training steps and of evaluations."""

    SAVED = ("seconds", "steps", "evaluation")

    def __init__(self) -> None:
        self.seconds, self.steps, self.evaluation, self._start = 0.0, 0, 0.0, 0.0

    def cost(self, steps: int) -> dict[str, float]:
        """Return the seconds of this many optimizer steps, for ``cost`` of ``metrics.json``."""
        each = self.seconds / max(self.steps, 1)
        return {"steps": steps, "step_seconds": each, "train_seconds": each * steps}

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Trainer evaluates several sets one after another, with a time for each
        self.evaluation += sum(
            value for name, value in kwargs["metrics"].items() if name.endswith("_runtime")
        )

    on_predict = on_evaluate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class SetEpochs(TrainerCallback):
    """Set the epoch of the row order; accelerate does not set it in a resumed run on several processes."""

    def __init__(self, order: Any) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))


class UpdateGates(TrainerCallback):
    """Update running gates from the keys after each optimizer step."""

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        emoe.update_gates_(kwargs["model"])


def fixed_rows(rows: Any) -> list[Any]:
    """Return the first rows of a set, for :meth:`Probe.observe`."""
    return [rows[number] for number in range(min(len(rows), _FIXED_ROWS))]


def summarise_logits(logits: Tensor) -> dict[str, float]:
    """Summarise logits of any shape by numbers that hardly depend on the order of summation.

    ``projection`` is on a fixed random direction, so it changes if two logits are exchanged.
    """
    flat = logits.detach().double().flatten().cpu()
    source = torch.Generator().manual_seed(derive_seed("probe", len(flat)))
    # random integers are equal on all processors, normal numbers are not
    direction = (
        torch.randint(-1000, 1001, (len(flat),), generator=source).double() / 577
    )  # of variance 1
    return {
        "mean": float(flat.mean()),
        "deviation": float(flat.std(correction=0)),
        "rms": float(flat.square().mean().sqrt()),
        "projection": float(flat @ direction / max(len(flat), 1) ** 0.5),
    }


class Probe(SavedCallback):
    """Record numbers that barely differ between machines: first losses, and logits and loads of a fixed batch."""

    SAVED = ("losses",)

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._observed: dict[str, Any] = {"loads": {}}

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Summarise a batch's logits, and count its expert choices; do nothing if the model is sharded.

        Args:
            model: The converted model before training. Its state and all random states are restored.
            batch: The model's inputs; labels are ignored.
        """
        if is_sharded():
            return
        if (
            torch.cuda.is_available()
            and world_size() == 1
            and not getattr(model, "is_quantized", False)
        ):
            model.to("cuda")  # training uses it
        device = next(model.parameters()).device
        inputs = send_to_device(
            {name: value for name, value in batch.items() if name != "labels"}, device
        )
        recording = emoe.record_routing(model) if emoe.is_converted(model) else nullcontext()
        with restore_rng_and_modes(model), recording as record:
            model.eval()
            logits = model(**inputs)["logits"]
        loads = (
            {str(number): layer.loads.tolist() for number, layer in record.layers.items()}
            if record
            else {}
        )
        self._observed = {"logits": summarise_logits(logits), "loads": loads}

    def add_loss(self, loss: Tensor) -> None:
        """Record the loss of a training batch, if it is one of the first."""
        if len(self.losses) < FIRST_STEPS:
            self.losses.append(float(loss))

    def summary(self) -> dict[str, Any]:
        """Return ``probe`` of ``metrics.json``: ``losses`` as text with all digits, ``logits``, ``loads`` by layer."""
        return {"losses": [repr(loss) for loss in self.losses], **self._observed}
