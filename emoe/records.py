"""Records of routing: loads of the experts, dropped choices, and statistics of both."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.errors import ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, routed_layers
from emoe.tokens import LabelHook, PaddingMaskHook, is_recomputed, watch_padding

# the printed table: its headers, and the widths of its columns
_TABLE_HEADERS = ("layer", "tokens", "experts", "active", "dropped", "entropy", "max/mean")
_TABLE_LINE = "{:>5}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}"


class LayerRecord:
    """Counts of how often each expert of one layer was chosen, and statistics of these counts.

    The load of an expert is the number of tokens that chose it, before the capacity drops any.
    Padding is not counted.

    Args:
        layer: routed FFN to record.
        labels: hook that reads the labels of the rows.
        padding: hook that reads the padding mask, None to count all tokens.
        window: number of forward passes per window, None for no windows.

    Attributes:
        num_experts: number of experts N.
        windows: loads ``[N]`` of each finished window of forward passes. Empty without windows.
    """

    def __init__(
        self,
        layer: RoutedActivation,
        labels: LabelHook,
        padding: PaddingMaskHook | None,
        window: int | None,
    ) -> None:
        self.num_experts = layer.config.num_experts
        self.windows: list[Tensor] = []
        self._rows_first = layer.ffn.rows_first
        self._labels = labels
        self._padding = padding
        self._window = window
        self._passes = 0
        self._lock = threading.Lock()  # threads may share the model
        self._loads = torch.zeros(self.num_experts, dtype=torch.int64)
        self._loads_at_window_start = torch.zeros(self.num_experts, dtype=torch.int64)
        self._loads_by_label = torch.zeros(0, self.num_experts, dtype=torch.int64)
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._dropped = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, chosen: Tensor, kept: Tensor) -> None:
        """Count one forward pass.

        Args:
            chosen: chosen experts ``[T, N]`` bool.
            kept: chosen experts within the capacity ``[T, N]`` bool.
        """
        # activation checkpointing repeats a forward pass that was counted before
        if is_recomputed():
            return
        with self._lock:
            self._move_counts_(chosen.device)
            mask = self._token_mask(len(chosen), chosen.device)
            if mask is None:
                self._tokens += len(chosen)
                counted = chosen
            else:
                self._tokens += mask.sum()
                counted = chosen & mask.unsqueeze(1)
            self._dropped += (counted & ~kept).sum()
            self._loads += counted.sum(0)
            self._add_by_label(counted)
            self._passes += 1
            # the window is complete
            if self._window and self._passes % self._window == 0:
                self._end_window()

    def _move_counts_(self, device: torch.device) -> None:
        """Move the counts to a device, if they are not there yet.

        They belong on the device of the choices, because an accelerator would wait for each copy to
        the CPU. The weights may be on another device: accelerate keeps offloaded weights on
        ``meta``. So the device is known only in the first forward pass.
        """
        if self._loads.device == device:
            return
        self._loads = self._loads.to(device)
        self._loads_at_window_start = self._loads_at_window_start.to(device)
        self._loads_by_label = self._loads_by_label.to(device)
        self._tokens = self._tokens.to(device)
        self._dropped = self._dropped.to(device)

    def _end_window(self) -> None:
        """Store the loads since the start of the window, and start the next one."""
        self.windows.append((self._loads - self._loads_at_window_start).cpu())
        self._loads_at_window_start = self._loads.clone()

    def _token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return which tokens count, as a mask ``[tokens]`` on ``device``; None if all count.

        A padding mask that does not fit gives a warning, and all tokens count.
        """
        if self._padding is None:
            return None
        try:
            return self._padding.token_mask(tokens, device)
        except RuntimeError as error:  # a statistic should not stop a forward pass
            warnings.warn(f"padding is counted: {error}", stacklevel=2)
            return None

    def _add_by_label(self, chosen: Tensor) -> None:
        """Add the loads of each row to those of its label.

        Rows with a negative label are skipped. Does nothing if the rows have no labels, or if
        tokens cannot be assigned to rows.

        Args:
            chosen: chosen experts ``[T, N]`` bool.
        """
        labels = self._labels.labels
        if labels is None or len(labels) == 0:
            return
        num_rows = len(labels)
        # tokens can be assigned to labels only if each label has the same number of tokens
        if len(chosen) % num_rows != 0:
            return
        # loads of each row [rows, N]
        if self._rows_first:
            # the tokens of a row are adjacent: [rows, tokens of a row, N]
            by_row = chosen.unflatten(0, (num_rows, -1)).sum(1)
        else:
            # the first tokens of all rows come first: [tokens of a row, rows, N]
            by_row = chosen.unflatten(0, (-1, num_rows)).sum(0)
        self._make_room_for(labels)
        labels = labels.to(by_row.device, torch.int64)  # index_add_ takes no smaller integers
        # negative labels, such as -100, mean that a row has none
        is_labelled = labels >= 0
        self._loads_by_label.index_add_(0, labels[is_labelled], by_row[is_labelled])

    def _make_room_for(self, labels: Tensor) -> None:
        """Append zeros to the loads by label, so that the largest of ``labels`` has a row."""
        needed = int(labels.max()) + 1
        missing = max(needed - len(self._loads_by_label), 0)
        # F.pad takes the columns before and after, then the rows before and after
        self._loads_by_label = F.pad(self._loads_by_label, (0, 0, 0, missing))

    @property
    def loads(self) -> Tensor:
        """Number of times that each expert was chosen, ``[N]`` int64."""
        return self._loads.cpu()

    @property
    def tokens(self) -> int:
        """Number of tokens that were counted."""
        return int(self._tokens)

    @property
    def dropped(self) -> int:
        """Number of choices that the capacity dropped."""
        return int(self._dropped)

    @property
    def by_label(self) -> dict[int, Tensor]:
        """Loads ``[N]`` by label. Labels without tokens are left out."""
        by_label = self._loads_by_label.cpu()
        return {label: loads for label, loads in enumerate(by_label) if loads.any()}

    @property
    def shares(self) -> Tensor:
        """Load of each expert divided by the sum of the loads, ``[N]`` float64."""
        loads = self.loads
        return loads.double() / max(int(loads.sum()), 1)

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token chose."""
        return int(self.loads.sum()) / max(self.tokens, 1)

    @property
    def drop_rate(self) -> float:
        """Share of the choices that the capacity dropped."""
        return self.dropped / max(int(self.loads.sum()), 1)

    @property
    def active_neurons(self) -> float:
        """Mean share of the layer's neurons that a token used, after drops."""
        return self.experts_per_token * (1 - self.drop_rate) / self.num_experts

    @property
    def entropy(self) -> float:
        """Entropy of :attr:`shares` divided by ln N. 1 is a perfectly balanced load."""
        if self.num_experts == 1:
            return 1.0
        entropy = torch.special.entr(self.shares).sum()
        return float(entropy / math.log(self.num_experts))

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert divided by the mean load. 1 is a perfectly balanced load."""
        return float(self.shares.max() * self.num_experts)

    @property
    def change(self) -> float | None:
        """Mean L1 distance (0 to 2) between the shares of consecutive windows.

        None with fewer than two windows.
        """
        if len(self.windows) < 2:
            return None
        loads = torch.stack(self.windows).double()  # [windows, N]
        totals = loads.sum(1, keepdim=True).clamp(min=1)
        shares = loads / totals
        distances = shares.diff(dim=0).abs().sum(1)
        return float(distances.mean())


@dataclass(frozen=True)
class RoutingRecord:
    """The records of a model's routed layers, from :func:`record_routing`.

    Attributes:
        layers: records by layer number. The numbers count all layers of the model, not only the
            converted ones.
    """

    layers: dict[int, LayerRecord]
    _labels: LabelHook

    def set_labels(self, labels: Tensor | None) -> None:
        """Set the labels ``[rows]`` of the next forward passes, for models that take no labels.

        None unsets them.
        """
        self._labels.given = labels

    def summary(self) -> dict[str, float]:
        """Return the mean of each statistic over the layers, by name.

        The names are ``load_entropy``, ``load_max_over_mean``, ``experts_per_token``,
        ``drop_rate``, ``active_neurons`` and, with at least two windows, ``load_change``.
        """
        records = list(self.layers.values())
        values = {
            "load_entropy": [record.entropy for record in records],
            "load_max_over_mean": [record.max_over_mean for record in records],
            "experts_per_token": [record.experts_per_token for record in records],
            "drop_rate": [record.drop_rate for record in records],
            "active_neurons": [record.active_neurons for record in records],
            "load_change": [record.change for record in records if record.change is not None],
        }
        means = {}
        for name, numbers in values.items():
            # `load_change` has no numbers if there are fewer than two windows
            if numbers:
                means[name] = sum(numbers) / len(numbers)
        return means

    def __str__(self) -> str:
        head = _TABLE_LINE.format(*_TABLE_HEADERS)
        lines = [head, "-" * len(head)]
        for number, record in self.layers.items():
            cells = [
                str(number),
                str(record.tokens),
                f"{record.experts_per_token:.2f}",
                f"{record.active_neurons:.1%}",
                f"{record.drop_rate:.1%}",
                f"{record.entropy:.3f}",
                f"{record.max_over_mean:.2f}",
            ]
            lines.append(_TABLE_LINE.format(*cells))
        return "\n".join(lines)


@contextmanager
def record_routing(model: nn.Module, *, window: int | None = None) -> Iterator[RoutingRecord]:
    """Count how often each expert is chosen in the forward passes inside the ``with`` block.

    Padding is not counted if the model gets a two-dimensional mask. If the mask has another form
    (as in ``generate`` with a static cache) or does not fit the tokens, padding is counted, with a
    warning. Choices are also counted by label if the model gets one integer label per row, or if
    :meth:`RoutingRecord.set_labels` sets them. Forward passes that activation checkpointing repeats
    are not counted.

    Args:
        model: a converted model. Call this object, not a part of it or a wrapper around it.
        window: number of forward passes per window. The counts of each window are also kept. None
            for no windows.

    Yields:
        The records. Each forward pass updates them, and they stay readable after the block.

    Raises:
        ConversionError: the model has no routed FFN, its parts were converted separately, it is
            already being recorded, or it passes its tokens in chunks (``chunk_size_feed_forward``).
            Or ``window`` is not a whole number of at least 1.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise ConversionError(
            f"record_routing: window is {window!r}; it must be a whole number >= 1, or None"
        )
    layers = routed_layers(model)
    if not layers:
        raise ConversionError("record_routing: the model has no routed FFN; convert it first")
    check_one_conversion(layers, "record_routing")
    if any(layer.record is not None for layer in layers):
        raise ConversionError("record_routing: the model is already being recorded")
    padding = watch_padding(model, [layer.ffn for layer in layers])
    labels = LabelHook(model)
    records: dict[int, LayerRecord] = {}
    try:
        for layer in layers:
            index = layer.ffn.index
            record = LayerRecord(layer, labels, padding.get(index), window)
            layer.record = record
            records[index] = record
        yield RoutingRecord(records, labels)
    finally:
        # also after an error, so that the model can be recorded again
        for hook in (labels, *padding.values()):
            hook.remove()
        for layer in layers:
            layer.record = None
