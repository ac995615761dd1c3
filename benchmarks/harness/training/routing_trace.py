"""How routing changes while a model is trained: the experts' loads, window by window of steps."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import emoe
from benchmarks.harness.base.files import write_json
from emoe.layer import routed_layers
from emoe.records import RoutingRecord

_AUTHORS = 100  # steps of a window, in the authors' code
_FEWEST, _MOST = 20, 100  # windows of a run


def window_steps(steps: int) -> int:
    """Steps of a window: the authors' 100; fewer where a run would have less than 20 windows, more where it would have over 100.

    >>> window_steps(80), window_steps(5000), window_steps(60_000)
    (4, 100, 600)
    """
    return max(1, min(_AUTHORS, steps // _FEWEST), math.ceil(steps / _MOST))


class RoutingTrace(TrainerCallback):
    """Counts the experts' loads of training batches; kept beside every checkpoint. Of a dense model there is nothing to count.

    As in the authors' code (and so in the paper's figure of them) a window ends with the epoch, however many steps it has by then.
    """

    FILE = "routing_trace.json"

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._loads: dict[str, list[list[int]]] = {}
        self._open, self._steps = ExitStack(), 0
        self._record: RoutingRecord | None = None

    def resume(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint keeps."""
        saved = json.loads((checkpoint / self.FILE).read_text())
        self._ends, self._loads = saved["ends"], saved["loads"]

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._record is None and model is not None and routed_layers(model):
            self._record, self._steps = self._open.enter_context(emoe.record_routing(model)), 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps == window_steps(state.max_steps):
            self._close(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close(state.global_step)

    def _close(self, step: int) -> None:
        if self._record is None:
            return
        self._ends.append(step)
        for layer, found in self._record.layers.items():
            self._loads.setdefault(str(layer), []).append(found.loads.tolist())
        self._record = None
        self._open.close()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_json(folder / self.FILE, {"ends": self._ends, "loads": self._loads})

    def summary(self) -> dict[str, Any]:
        """``windows`` of ``routing`` in ``metrics.json``: the last step of each, and by layer the loads ``[windows, N]``; empty for a dense model."""
        return {"windows": {"ends": self._ends, "loads": self._loads}} if self._ends else {}
