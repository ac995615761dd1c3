"""Test every figure at the size of a page: its width, letters of 7 points, no text that touches another or is cut."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import emoe
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.plots import plot_routing
from benchmarks.harness.report.presentation import present
from emoe.records import RoutingRecord
from tests import fake_runs
from tests.drawn import faults, watched

_PART = {"learning_rate": 3e-4, "protocol": "published"}  # of the paper's by adapters: as good as all for figures


@pytest.mark.parametrize(
    ("suite", "benchmark"),
    [
        *(("mini", name) for name in ("glue", "glue_lora", "glue_ood", "modularity", "domainbed", "llama")),
        *(("paper", name) for name in ("glue_lora", "glue_ood", "modularity", "domainbed", "llama")),
    ],
)
def test_figures_fit_a_page_and_no_text_touches_another(suite: str, benchmark: str, here: Path) -> None:
    runs = fake_runs.write(Path("results/runs"), suite, benchmarks=(benchmark,))
    if benchmark == "domainbed":
        runs = [run for run in runs if suite != "paper" or run.spec["task"]["name"] == "pacs"]
        fake_runs.write_samples(runs)
    elif (suite, benchmark) == ("paper", "glue_lora"):
        runs = [run for run in runs if {key: run.spec[key] for key in _PART} == _PART]
    shown = present(load_benchmark(benchmark), runs)
    figures = {name: figure.draw for page in (shown, *shown.parts.values()) for name, figure in page.figures.items()}
    assert len(figures) >= len(load_benchmark(benchmark).definition.figures)
    for name, draw in figures.items():
        with watched() as problems:
            draw(here / name)
        assert problems == [], name


def test_what_is_wrong_with_a_figure_is_seen() -> None:
    figure, axis = plt.subplots(figsize=(8, 2))
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "two")
    axis.text(0.2, 0.5, "small", fontsize=5)
    axis.text(0.99, 0.2, "goes on beyond the edge")
    problems = faults(figure)
    plt.close(figure)
    assert "is 8.0 by 2.0 inches" in problems
    assert "'one' touches 'two'" in problems
    assert "'small' has 5 points" in problems
    assert "'goes on beyond the edge' is cut at the edge" in problems


mpl.use("Agg")


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
def test_the_figure_of_a_routing_record_shows_its_numbers(layer: int | None) -> None:
    routing = record(8, [1, 3], labels=3)
    figure = plot_routing(routing, layer=layer, width=3.3)
    layers, labels, line, _ = figure.axes
    assert [text.get_text() for text in layers.get_yticklabels()] == ["1", "3"]
    np.testing.assert_allclose(layers.images[0].get_array(), [8 * counts.shares for counts in routing.layers.values()])
    busiest = [counts.max_over_mean for counts in routing.layers.values()]
    np.testing.assert_allclose(line.lines[-1].get_xydata(), [(busiest[0], 0), (busiest[1], 1)])
    loads = routing.layers[layer or 3].by_label
    np.testing.assert_allclose(labels.images[0].get_array(), [8 * loads[name] / loads[name].sum() for name in range(3)])
    assert layers.images[0].norm(1) == 0.5  # an even load is white
    assert faults(figure) == []
