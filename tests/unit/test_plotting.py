"""A picture of a record: its numbers, and text that can be read at the widths of a paper's column and page."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import emoe
from emoe.records import RoutingRecord
from tests.drawn import drawn_texts

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def record(experts: int, layers: list[int], labels: int = 0, passes: int = 1) -> RoutingRecord:
    torch.manual_seed(0)
    depth = max(layers) + 1
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    config = emoe.EMoEConfig(num_experts=experts, top_k=experts // 4, layers=layers, partition="contiguous")
    emoe.convert_(model, config)
    with emoe.record_routing(model) as found:
        found.set_labels(torch.arange(30) % labels if labels else None)
        for _ in range(passes):
            model(torch.randn(30, 3, 16))
    return found


def test_the_numbers_drawn_are_the_records() -> None:
    found = record(8, [1, 3], labels=3)
    layers, line, labels, _ = found.plot().axes
    assert [text.get_text() for text in layers.get_yticklabels()] == ["1", "3"]
    np.testing.assert_allclose(layers.images[0].get_array(), [8 * layer.shares for layer in found.layers.values()])
    busiest = [layer.max_over_mean for layer in found.layers.values()]
    np.testing.assert_allclose(line.lines[-1].get_xydata(), [(busiest[0], 0), (busiest[1], 1)])
    loads = found.layers[3].by_label
    np.testing.assert_allclose(labels.images[0].get_array(), [8 * loads[name] / loads[name].sum() for name in range(3)])
    assert labels.get_title() == "layer 3, by label"
    norm = layers.images[0].norm
    assert norm(1) == 0.5  # an even load is white
    assert norm(max(2, *busiest, float(labels.images[0].get_array().max()))) == 1


def test_a_layer_may_be_asked_for_and_others_are_named() -> None:
    found = record(8, [1, 3], labels=3)
    loads = found.layers[1].by_label[0]
    drawn = found.plot(layer=1).axes[2].images[0].get_array()
    np.testing.assert_allclose(drawn[0], 8 * loads / loads.sum())
    with pytest.raises(KeyError, match="layer 2 has no experts; those that have are 1, 3"):
        found.plot(layer=2)


def test_axes_may_be_given() -> None:
    found = record(8, [0, 1], labels=2)
    figure, (own, line, labels) = plt.subplots(3)
    assert found.plot([own, line, labels]) is figure
    assert (len(own.images), len(labels.images)) == (1, 1)
    assert line.lines
    alone, axis = plt.subplots()
    assert found.plot(axis) is alone
    assert len(axis.images) == 1
    _, pair = plt.subplots(1, 2)
    found.plot(pair)
    assert pair[1].lines


@pytest.mark.parametrize("width", [3.3, 6.9])
@pytest.mark.parametrize(("experts", "depth", "labels"), [(4, 1, 0), (4, 24, 2), (64, 1, 10), (64, 24, 10)])
def test_text_is_large_enough_and_apart(experts: int, depth: int, labels: int, width: float) -> None:
    figure = record(experts, list(range(depth)), labels).plot(width=width)
    shown = drawn_texts(figure)
    assert figure.get_figwidth() == width
    assert figure.get_figheight() < 7
    assert {"expert", "layer", "max ÷ mean"} <= {text for text, _, _ in shown}
    assert min(size for _, _, size in shown) >= 7
    for text, box, _ in shown:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, its, _), (other, theirs, _) in itertools.combinations(shown, 2):
        assert not its.overlaps(theirs), (one, other)


def test_nothing_recorded_is_said() -> None:
    with pytest.raises(emoe.EMoEError, match="nothing was recorded; call the model inside"):
        record(8, [0], passes=0).plot()


def test_matplotlib_is_asked_for_by_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record(8, [0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^plot: matplotlib is not installed; `pip install matplotlib`$"):
        found.plot()
