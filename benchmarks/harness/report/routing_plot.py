"""A figure of which experts were used in each layer and for each label."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from emoe.errors import EMoEError
from emoe.records import RoutingRecord

_STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
_COLOURS, _LINE, _GREY = "PuOr_r", "#0072b2", "#888888"  # purple and orange: the colour-blind can distinguish them
_ROW_HEIGHT, _MIN_HEIGHT, _MAX_HEIGHT, _BAR_HEIGHT, _MARGIN = 0.17, 0.4, 3.2, 0.08, 0.5  # inches
_TEXT_HEIGHT = 0.14  # inches of a row's number


def plot_routing(record: RoutingRecord, *, layer: int | None = None, width: float = 6.9) -> Figure:
    """Plot the load of each expert by layer, the busiest expert of each layer and the loads by label.

    Colours show an expert's load divided by the mean load of its layer or label: 1 (white) is an even load. A layer
    without tokens is empty.

    Args:
        record: the record of :func:`emoe.record_routing`.
        layer: number of the layer whose loads are shown by label, by default the last one.
        width: width of the figure in inches.

    Raises:
        EMoEError: no token was recorded.
        KeyError: the layer has no experts.
    """
    if not any(counts.tokens for counts in record.layers.values()):
        raise EMoEError("nothing was recorded; call the model inside `with emoe.record_routing(model) as record:`")
    layer = list(record.layers)[-1] if layer is None else layer
    by_label = record.layers[layer].by_label
    heatmaps = [("layer", {index: _relative(counts.loads) for index, counts in record.layers.items()})]
    if by_label:
        heatmaps.append(("label", {label: _relative(loads) for label, loads in by_label.items()}))
    loads = torch.cat([row for _, rows in heatmaps for row in rows.values()])
    highest = max(2.0, float(loads.nan_to_num().max()))
    norm = mpl.colors.TwoSlopeNorm(1, 0, highest)
    heights = [min(max(_ROW_HEIGHT * len(rows), _MIN_HEIGHT), _MAX_HEIGHT) for _, rows in heatmaps] + [_BAR_HEIGHT]
    with mpl.rc_context(_STYLE):
        figure = plt.figure(figsize=(width, sum(heights) + _MARGIN * len(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[width - 0.85, 0.85])
        axes = [figure.add_subplot(grid[row, 0]) for row in range(len(heatmaps))]
        images = [_draw_loads(axis, rows, name, norm) for axis, (name, rows) in zip(axes, heatmaps, strict=True)]
        if by_label:
            axes[1].set_title(f"layer {layer}, by label")
        _draw_balance(figure.add_subplot(grid[0, 1], sharey=axes[0]), record)
        bar = figure.colorbar(images[0], figure.add_subplot(grid[-1, 0]), orientation="horizontal")
        bar.set_ticks([0, 1, highest], labels=["0", "1", f"{highest:.1f}"])
        bar.set_label("expert's load ÷ mean load")
    return figure


def _relative(loads: Tensor) -> Tensor:
    return loads.double() / loads.double().mean()


def _draw_loads(axis: Axes, rows: dict[int, Tensor], name: str, norm: Any) -> Any:
    uses = torch.stack(list(rows.values())).numpy()
    image = axis.imshow(uses, cmap=_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_xlabel("expert")
    axis.set_ylabel(name)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    room = axis.get_window_extent().height / image.figure.dpi
    step = max(1, math.ceil(len(rows) * _TEXT_HEIGHT / room))
    axis.set_yticks(range(0, len(rows), step), [str(number) for number in rows][::step])
    return image


def _draw_balance(axis: Axes, record: RoutingRecord) -> None:
    busiest = [counts.max_over_mean if counts.tokens else math.nan for counts in record.layers.values()]
    axis.axvline(1, color=_GREY, lw=0.8, ls="--")
    axis.plot(busiest, range(len(busiest)), "o-", color=_LINE, ms=3, lw=1)
    axis.tick_params(labelleft=False)
    axis.set_xlim(left=0)
    axis.set_xlabel("max ÷ mean")
    axis.spines[["top", "right"]].set_visible(False)
