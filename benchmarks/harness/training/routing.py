"""Record the routing of a model while it trains, and in evaluations.

The load of an expert is the number of tokens that choose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import TrainerState

import emoe
from benchmarks.harness.training.checkpoints import SavedCallback
from emoe.records import LayerRecord, RoutingRecord

# steps per window in the authors' code
_AUTHORS_WINDOW = 100
# windows per run
_FEWEST_WINDOWS = 20
_MOST_WINDOWS = 100

Result = TypeVar("Result")


def evaluate_with_routing(
    model: nn.Module, evaluate: Callable[[], Result]
) -> tuple[Result, dict[str, Any]]:
    """Evaluate a model, and summarise the routing of its tokens.

    Returns:
        The result of ``evaluate``, and the summary, which is empty for a dense model.
    """
    if not emoe.is_converted(model):
        return evaluate(), {}
    with emoe.record_routing(model) as record:
        result = evaluate()
    return result, routing_summary(record)


def routing_summary(record: RoutingRecord) -> dict[str, Any]:
    """Return the mean of each routing statistic over layers, and ``shares`` by layer.

    ``shares`` are the loads of a layer's experts, divided by their sum.
    """
    shares = {str(number): layer.shares.tolist() for number, layer in record.layers.items()}
    return {**record.summary(), "shares": shares}


def loads_by_row(record: LayerRecord, rows: int) -> NDArray[np.int64]:
    """Count how often the tokens of each row chose each expert: ``[rows, experts]``.

    Args:
        record: The record of a layer, made with the numbers of the rows as labels.
        rows: The number of rows.
    """
    loads = np.zeros((rows, record.num_experts), dtype=np.int64)
    for row, counts in record.by_label.items():
        loads[row] = counts.numpy()
    return loads


@contextmanager
def label_rows(model: nn.Module, record: RoutingRecord, labels: Tensor) -> Iterator[None]:
    """Label the tokens of each row in a routing record, in the passes inside the ``with`` block.

    The record then counts the choices of experts by label, but not those of negative labels.

    Args:
        model: The recorded model. Each row must pass through it once, in the order of ``labels``.
            Its inputs must be named, and the first one must have an entry for each row.
        record: The record, from :func:`emoe.record_routing`.
        labels: The label of each row, ``[rows of all batches]``.
    """
    labeller = _RowLabeller(record, labels)
    # called before each forward pass of the model, with the model inputs of a batch
    hook = model.register_forward_pre_hook(labeller.label_batch, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _RowLabeller:
    """Gives a routing record the labels of each batch, see :func:`label_rows`."""

    def __init__(self, record: RoutingRecord, labels: Tensor) -> None:
        self._record = record
        self._labels = labels
        self._start = 0  # the index of the next batch's first row

    def label_batch(
        self, _module: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> None:
        """Set the labels of a batch in the record."""
        first_input = next(iter(inputs.values()))
        end = self._start + len(first_input)
        self._record.set_labels(self._labels[self._start : end])
        self._start = end


def window_steps(steps: int) -> int:
    """Return the steps per window: 100 as in the authors' code, but with 20 to 100 windows per run.

    >>> window_steps(80), window_steps(5000), window_steps(60_000)
    (4, 100, 600)
    """
    # longer windows would give too few per run, and shorter ones too many
    longest = steps // _FEWEST_WINDOWS
    shortest = math.ceil(steps / _MOST_WINDOWS)
    wanted = min(_AUTHORS_WINDOW, longest)
    # at least one step, even for a run without steps
    return max(wanted, shortest, 1)


class RoutingTrace(SavedCallback):
    """A callback that counts the experts' loads per window of training steps.

    As in the authors' code and the paper's figure, each epoch also ends a window. The callback does
    nothing for dense models.

    Attributes:
        ends: The last step of each window.
        loads: The loads ``[windows, experts]`` by layer number.
    """

    SAVED = ("ends", "loads")

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.loads: dict[str, list[list[int]]] = {}
        self._recording = ExitStack()
        self._record: RoutingRecord | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        # the first step of a window
        if self._record is None and emoe.is_converted(model):
            self._record = self._recording.enter_context(emoe.record_routing(model))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # the step at which the previous window ended
        start = 0
        if self.ends:
            start = self.ends[-1]
        if state.global_step - start == window_steps(state.max_steps):
            self._end_window(state.global_step)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._end_window(state.global_step)

    def _end_window(self, step: int) -> None:
        """Store the loads of the window that ends with a step. The next step begins a new one."""
        # nothing is recorded if the model is dense, or if this step has already ended the window
        if self._record is None:
            return
        self.ends.append(step)
        for number, layer_record in self._record.layers.items():
            loads_of_windows = self.loads.setdefault(str(number), [])
            loads_of_windows.append(layer_record.loads.tolist())
        # on_step_begin starts a new recording
        self._record = None
        self._recording.close()

    def summary(self) -> dict[str, Any]:
        """Return the ``ends`` and ``loads`` under the key ``windows``. Empty for a dense model."""
        if not self.ends:
            return {}
        return {"windows": {"ends": self.ends, "loads": self.loads}}
