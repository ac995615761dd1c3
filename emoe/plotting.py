"""A picture of which experts were used; matplotlib is imported by the call that draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from emoe.errors import EMoEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
# purple and orange, white in the middle: the colour-blind tell them apart
_COLOURS, _LINE, _GREY = "PuOr_r", "#0072b2", "#888888"
# in inches: a row of a heat map; a whole one at least and at most; what stands around one; the panel of the line; the bar of colours
_ROW, _LEAST, _MOST, _AROUND, _PANEL, _BAR = 0.17, 0.4, 3.2, 0.5, 0.85, 0.08
_LINE_HEIGHT = 0.14  # of a number beside a row


class Drawn(Protocol):
    """What is drawn of a layer: of its :class:`emoe.records.LayerRecord`."""

    @property
    def loads(self) -> Tensor: ...
    @property
    def tokens(self) -> int: ...
    @property
    def max_over_mean(self) -> float: ...
    @property
    def by_label(self) -> dict[int, Tensor]: ...


def plot_routing(
    layers: Mapping[int, Drawn], axes: Axes | Sequence[Axes] | None, layer: int | None, width: float
) -> Figure:
    """Draw a record's layers; see :meth:`emoe.records.RoutingRecord.plot`."""
    try:
        import matplotlib as mpl
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("plot: matplotlib is not installed; `pip install matplotlib`") from error
    layer = list(layers)[-1] if layer is None else layer
    by_label = layers[layer].by_label
    if not any(found.tokens for found in layers.values()):
        raise EMoEError(
            "plot: nothing was recorded; call the model inside `with emoe.record_routing(model) as record:`"
        )
    uses = torch.stack([_use(found.loads) for found in layers.values()])
    of_labels = torch.stack([_use(loads) for loads in by_label.values()]) if by_label else None
    with mpl.rc_context(_STYLE):
        bar_place = None
        if axes is None:
            *places, bar_place = _new_axes(plt, [len(layers), *([len(by_label)] if by_label else [])], width)
        else:
            places = [axes] if isinstance(axes, mpl.axes.Axes) else list(axes)
        highest = max(2.0, *(float(use.nan_to_num().max()) for use in (uses, of_labels) if use is not None))
        norm = mpl.colors.TwoSlopeNorm(1, 0, highest)
        heat = [_draw_uses(places[0], uses, list(layers), "layer", norm)]
        if len(places) > 1:
            _draw_balance(places[1], layers)
        if len(places) > 2 and of_labels is not None:
            heat.append(_draw_uses(places[2], of_labels, list(by_label), "label", norm))
            places[2].set_title(f"layer {layer}, by label")
        figure = places[0].get_figure(root=True)
        assert figure is not None  # noqa: S101  axes are in one
        bar = figure.colorbar(heat[0], bar_place, [image.axes for image in heat], orientation="horizontal")
        bar.set_ticks([0, 1, highest], labels=["0", "1", f"{highest:.1f}"])
        bar.set_label("expert's load ÷ mean load")
    return figure


def _use(loads: Tensor) -> Tensor:
    """``[N]`` each expert's load over the mean load; nan where nothing was routed."""
    return loads.double() / loads.double().mean()


def _new_axes(plt: Any, rows: list[int], width: float) -> list[Axes]:
    """Axes for the layers, the line beside them, the labels below them where there are any, and the bar of colours."""
    heights = [*(min(max(_ROW * count, _LEAST), _MOST) for count in rows), _BAR]
    figure = plt.figure(figsize=(width, sum(heights) + _AROUND * len(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[width - _PANEL, _PANEL])
    layers = figure.add_subplot(grid[0, 0])
    line = figure.add_subplot(grid[0, 1], sharey=layers)
    line.tick_params(labelleft=False)
    return [layers, line, *(figure.add_subplot(grid[row, 0]) for row in range(1, len(heights)))]


def _draw_uses(axis: Axes, uses: Tensor, names: list[int], what: str, norm: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(uses.numpy(), cmap=_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_xlabel("expert")
    axis.set_ylabel(what)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    _name_rows(axis, names)
    return image


def _draw_balance(axis: Axes, layers: Mapping[int, Drawn]) -> None:
    busiest = [found.max_over_mean if found.tokens else math.nan for found in layers.values()]
    axis.axvline(1, color=_GREY, lw=0.8, ls="--")
    axis.plot(busiest, range(len(busiest)), "o-", color=_LINE, ms=3, lw=1)
    axis.set_ylim(len(busiest) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("max ÷ mean")
    axis.spines[["top", "right"]].set_visible(False)
    _name_rows(axis, list(layers))


def _name_rows(axis: Axes, names: list[int]) -> None:
    """Number as many rows as there is room for."""
    figure = axis.get_figure(root=True)
    assert figure is not None  # noqa: S101  axes are in one
    room = axis.get_window_extent().height / figure.dpi
    step = max(1, math.ceil(len(names) * _LINE_HEIGHT / room))
    axis.set_yticks(range(0, len(names), step), [str(name) for name in names[::step]])
