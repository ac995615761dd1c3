"""Callbacks of the training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import emoe
from benchmarks.harness.base.files import write_json


class Stopwatch(TrainerCallback):
    """Time spent in steps, without evaluation and checkpoints, and in evaluation; kept beside every checkpoint."""

    FILE = "stopwatch.json"

    def __init__(self) -> None:
        self.seconds, self.steps, self.evaluation, self._start = 0.0, 0, 0.0, 0.0

    def cost(self, steps: int) -> dict[str, float]:
        """What so many steps of the optimiser took, for ``cost`` of ``metrics.json``."""
        each = self.seconds / max(self.steps, 1)
        return {"steps": steps, "step_seconds": each, "train_seconds": each * steps}

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's count."""
        saved = json.loads((checkpoint / self.FILE).read_text())
        self.seconds, self.steps, self.evaluation = saved["seconds"], saved["steps"], saved["evaluation"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        content = {"seconds": self.seconds, "steps": self.steps, "evaluation": self.evaluation}
        write_json(folder / self.FILE, content)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # several sets are evaluated one after the other, each with a time of its own
        self.evaluation += sum(value for name, value in (metrics or {}).items() if name.endswith("_runtime"))

    on_predict = on_evaluate

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class FollowEpochs(TrainerCallback):
    """Tells the order which epoch begins: accelerate does not reach it in a run on several processes that goes on."""

    def __init__(self, order: Any) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._order.set_epoch(int(state.epoch or 0))


class RetieGates(TrainerCallback):
    """Lets running gates follow the keys after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            emoe.update_gates_(model)
