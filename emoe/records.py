"""Looking inside: which experts were used, by how many tokens."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emoe.checks import check_one_conversion
from emoe.errors import ConversionError
from emoe.layer import routed_layers
from emoe.plotting import plot_routing
from emoe.tokens import LabelHook, PaddingMaskHook, is_recomputed, watch_padding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class LayerRecord:
    """Count what one routed FFN uses. Choices are counted before the capacity drops any; padding is not counted.

    Attributes:
        num_experts: N.
        windows: loads ``[N]`` of each finished window of forward passes, when windows were asked for.
    """

    def __init__(
        self,
        num_experts: int,
        device: torch.device,
        labels: LabelHook,
        padding: PaddingMaskHook | None,
        window: int | None,
        *,
        rows_first: bool = True,
    ) -> None:
        self.num_experts = num_experts
        self._rows_first = rows_first
        self._lock = threading.Lock()
        self.windows: list[Tensor] = []
        self._labels, self._padding, self._window, self._passes = labels, padding, window, 0
        # on the layer's device: reading a number from an accelerator in every step would stop it
        self._loads = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self._labelled = self._loads.new_zeros(0, num_experts)
        self._tokens = self._loads.new_zeros(())
        self._dropped = self._loads.new_zeros(())
        self._window_start = self._loads.clone()

    @torch.no_grad()
    def update(self, chosen: Tensor, kept: Tensor) -> None:
        """Add one forward pass.

        Args:
            chosen: ``[T, N]`` experts chosen.
            kept: ``[T, N]`` those that found a place.
        """
        if is_recomputed():
            return
        with self._lock:  # threads may share the model
            self._update(chosen, kept)

    def _update(self, chosen: Tensor, kept: Tensor) -> None:
        tokens = chosen.shape[0]
        real = self._real_tokens(tokens)
        dropped = chosen & ~kept if kept is not chosen else None
        if real is not None:
            real = real.to(chosen.device).unsqueeze(1)
            chosen = chosen & real
        labels = self._labels.labels
        if labels is None or tokens % max(labels.numel(), 1):
            loads = chosen.sum(0)
        else:
            rows = labels.numel()
            by_row = chosen.unflatten(0, (rows, -1) if self._rows_first else (-1, rows)).sum(int(self._rows_first))
            loads = by_row.sum(0)
            self._count_labels(labels.to(by_row.device), by_row, self._labels.num_labels(labels))
        self._loads += loads
        self._tokens += tokens if real is None else real.sum()
        if dropped is not None:
            self._dropped += dropped.sum() if real is None else (dropped & real).sum()
        self._passes += 1
        if self._window and self._passes % self._window == 0:
            self.windows.append((self._loads - self._window_start).cpu())
            self._window_start = self._loads.clone()

    def _real_tokens(self, tokens: int) -> Tensor | None:
        try:
            return None if self._padding is None else self._padding.token_mask(tokens)
        except RuntimeError as error:  # a statistic is no reason to stop a forward pass
            warnings.warn(f"padding is counted: {error}", stacklevel=2)
            return None

    def _count_labels(self, labels: Tensor, by_row: Tensor, num_labels: int) -> None:
        named = labels >= 0
        labels, by_row = labels[named], by_row[named]
        missing = num_labels - self._labelled.shape[0]
        if missing > 0:
            self._labelled = torch.cat([self._labelled, self._labelled.new_zeros(missing, self.num_experts)])
        self._labelled.index_add_(0, labels, by_row)

    @property
    def loads(self) -> Tensor:
        """``[N]`` int64, how often each expert was chosen."""
        return self._loads.cpu()

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return int(self._tokens)

    @property
    def dropped(self) -> int:
        """Choices that found no place under the capacity."""
        return int(self._dropped)

    @property
    def by_label(self) -> dict[int, Tensor]:
        """Label to loads ``[N]``, where labels were known."""
        return {label: loads for label, loads in enumerate(self._labelled.cpu()) if loads.any()}

    @property
    def shares(self) -> Tensor:
        """``[N]`` float64, share of all choices that went to each expert; sums to 1."""
        return _shares(self.loads)

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token chose."""
        return int(self.loads.sum()) / max(self.tokens, 1)

    @property
    def drop_rate(self) -> float:
        """Share of the choices that found no place under the capacity."""
        return self.dropped / max(int(self.loads.sum()), 1)

    @property
    def active_neurons(self) -> float:
        """Share of the layer's neurons that took part for a token, in the mean, after drops."""
        return self.experts_per_token * (1 - self.drop_rate) / self.num_experts

    @property
    def entropy(self) -> float:
        """Entropy of :attr:`shares` divided by ln N: 1 is a perfectly balanced load."""
        if self.num_experts == 1:
            return 1.0
        return float(torch.special.entr(self.shares).sum() / math.log(self.num_experts))

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load; 1 is balanced."""
        return float(self.shares.max() * self.num_experts)

    @property
    def change(self) -> float | None:
        """Mean L1 distance between the shares of one window and the next (0 to 2); None below two windows."""
        if len(self.windows) < 2:
            return None
        shares = torch.stack([_shares(loads) for loads in self.windows])
        return float(shares.diff(dim=0).abs().sum(1).mean())


def _shares(loads: Tensor) -> Tensor:
    return loads.double() / max(int(loads.sum()), 1)


class _ByLayer(dict[int, LayerRecord]):
    def __missing__(self, index: int) -> LayerRecord:
        raise KeyError(f"layer {index} has no experts; those that have are {', '.join(map(str, self))}")


@dataclass(frozen=True)
class RoutingRecord:
    """What :func:`record_routing` collected.

    Attributes:
        layers: by the number of the layer in the model, not by its place among the converted ones.
    """

    layers: dict[int, LayerRecord]
    _labels: LabelHook

    def set_labels(self, labels: Tensor | None) -> None:
        """Give the labels of the rows ``[rows]`` of the coming forward passes, for models that are not called with them."""
        self._labels.given = labels

    def summary(self) -> dict[str, float]:
        """Average the records' properties over layers, by ``load_entropy``, ``load_max_over_mean``,
        ``experts_per_token``, ``drop_rate``, ``active_neurons`` and, with windows, ``load_change``."""
        records = list(self.layers.values())

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        changes = [record.change for record in records if record.change is not None]
        return {
            "load_entropy": mean([record.entropy for record in records]),
            "load_max_over_mean": mean([record.max_over_mean for record in records]),
            "experts_per_token": mean([record.experts_per_token for record in records]),
            "drop_rate": mean([record.drop_rate for record in records]),
            "active_neurons": mean([record.active_neurons for record in records]),
        } | ({"load_change": mean(changes)} if changes else {})

    def plot(
        self, axes: Axes | Sequence[Axes] | None = None, *, layer: int | None = None, width: float = 6.9
    ) -> Figure:
        """Draw which experts were used: a heat map of layers and experts, the busiest expert of each layer, and, where labels were known, one layer's experts by label.

        Colours are an expert's load over the mean load of its layer or label: 1 (white) is an even load, 0 an expert that was never used. The line is
        :attr:`LayerRecord.max_over_mean`. A layer that no token passed is empty. Needs matplotlib.

        Args:
            axes: where to draw, by default a new figure: axes of the heat map alone, or a sequence of those of heat map, line and labels, from which
                the last or the last two may be left out.
            layer: whose experts are shown by label, by its number in the model; the last one by default.
            width: of a new figure in inches; its height follows from the number of layers and labels.

        Returns:
            The figure, which pyplot shows; save it by ``.savefig("routing.png")``.

        Raises:
            EMoEError: nothing was recorded.
            ImportError: matplotlib is not installed.
            KeyError: that layer has no experts.
        """
        return plot_routing(self.layers, axes, layer, width)

    def __str__(self) -> str:
        head = f"{'layer':>5}{'tokens':>10}{'experts':>9}{'active':>9}{'dropped':>9}{'entropy':>9}{'max/mean':>10}"
        lines = [
            f"{index:>5}{record.tokens:>10}{record.experts_per_token:>9.2f}{record.active_neurons:>9.1%}"
            f"{record.drop_rate:>9.1%}{record.entropy:>9.3f}{record.max_over_mean:>10.2f}"
            for index, record in self.layers.items()
        ]
        return "\n".join([head, "-" * len(head), *lines])


@contextmanager
def record_routing(model: nn.Module, *, window: int | None = None) -> Iterator[RoutingRecord]:
    """Count the experts' loads during the forward passes inside the ``with`` block.

    Padding is left out where a two-dimensional mask tells it (otherwise it is counted, with a warning if there is a mask
    that does not fit), and
    loads are also kept by label when it is called with one integer label a row (or was told by
    :meth:`RoutingRecord.set_labels`). Passes that activation checkpointing repeats are not counted.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> with emoe.record_routing(model) as record:
    ...     y = model(torch.randn(2, 5, 16))
    >>> record.layers[0].tokens, record.layers[0].experts_per_token, tuple(record.layers[0].loads.shape)
    (10, 1.0, (4,))

    Args:
        model: a converted model, the one that is then called.
        window: also keep the loads of each that many forward passes, to see routing change.

    Raises:
        ConversionError: the model has no routed FFN, parts of it were converted apart, or it is being
            recorded already.
    """
    layers = routed_layers(model)
    if not layers:
        raise ConversionError("record_routing: the model has no routed FFN; convert it first")
    check_one_conversion(layers, "record_routing")
    if any(layer.record is not None for layer in layers):
        raise ConversionError("record_routing: the model is being recorded already")
    labels = LabelHook(model)
    padding = watch_padding(model, [layer.ffn for layer in layers])
    records = _ByLayer()
    try:
        for layer in layers:
            n, device = layer.config.num_experts, layer.ffn.keys().device
            record = LayerRecord(
                n, device, labels, padding.get(layer.ffn_index), window, rows_first=layer.ffn.rows_first
            )
            layer.record = records[layer.ffn_index] = record
        yield RoutingRecord(records, labels)
    finally:
        for watch in (labels, *padding.values()):
            watch.remove()
        for layer in layers:
            layer.record = None
