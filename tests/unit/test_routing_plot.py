"""Test that the figure of a routing record shows the record's numbers, with readable text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import emoe
from benchmarks.harness.report.plots import plot_routing
from emoe.records import RoutingRecord
from tests.drawn import drawn_texts

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def record(experts: int, layers: list[int], labels: int = 0, passes: int = 1) -> RoutingRecord:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, max(layers) + 1, enable_nested_tensor=False)
    config = emoe.EMoEConfig(num_experts=experts, top_k=experts // 4, layers=layers, partition="contiguous")
    emoe.convert_(model, config)
    with emoe.record_routing(model) as result:
        result.set_labels(torch.arange(30) % labels if labels else None)
        for _ in range(passes):
            model(torch.randn(30, 3, 16))
    return result


@pytest.mark.parametrize("layer", [None, 1])
def test_the_figure_shows_the_records_numbers(layer: int | None) -> None:
    routing = record(8, [1, 3], labels=3)
    layers, labels, line, _ = plot_routing(routing, layer=layer).axes
    assert [text.get_text() for text in layers.get_yticklabels()] == ["1", "3"]
    np.testing.assert_allclose(layers.images[0].get_array(), [8 * counts.shares for counts in routing.layers.values()])
    busiest = [counts.max_over_mean for counts in routing.layers.values()]
    np.testing.assert_allclose(line.lines[-1].get_xydata(), [(busiest[0], 0), (busiest[1], 1)])
    loads = routing.layers[layer or 3].by_label
    np.testing.assert_allclose(labels.images[0].get_array(), [8 * loads[name] / loads[name].sum() for name in range(3)])
    assert layers.images[0].norm(1) == 0.5  # an even load is white


@pytest.mark.parametrize("width", [3.3, 6.9])
@pytest.mark.parametrize(("experts", "depth", "labels"), [(4, 1, 0), (4, 24, 2), (64, 24, 10)])
def test_text_is_readable_and_does_not_overlap(experts: int, depth: int, labels: int, width: float) -> None:
    figure = plot_routing(record(experts, list(range(depth)), labels), width=width)
    texts = drawn_texts(figure)
    assert figure.get_figheight() < 7
    assert min(size for _, _, size in texts) >= 7
    for text, box, _ in texts:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (first, first_box, _), (second, second_box, _) in itertools.combinations(texts, 2):
        assert not first_box.overlaps(second_box), (first, second)
