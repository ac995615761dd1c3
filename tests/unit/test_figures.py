"""Test every figure at the size of a page: its width, letters of 7 points, no text that touches another or is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.presentation import present
from tests import fake_runs
from tests.drawn import faults, watched
from tests.planned import plan


@pytest.mark.parametrize(
    ("suite", "benchmark"),
    [
        *(
            ("mini", name)
            for name in ("glue", "glue_lora", "glue_ood", "modularity", "domainbed", "llama")
        ),
        *(
            ("paper", name)
            for name in ("glue_lora", "glue_ood", "modularity", "domainbed", "llama")
        ),
    ],
)
def test_figures_fit_a_page_and_no_text_touches_another(
    suite: str, benchmark: str, here: Path
) -> None:
    runs = plan([benchmark], suite)
    if (suite, benchmark) == ("paper", "domainbed"):
        runs = [run for run in runs if run.spec["task"]["name"] == "pacs"]
    elif (suite, benchmark) == ("paper", "glue_lora"):  # as good as all for figures
        runs = [
            run
            for run in runs
            if (run.spec["learning_rate"], run.spec["protocol"]) == (3e-4, "published")
        ]
    fake_runs.write_runs(runs)
    shown = present(load_benchmark(benchmark), fake_runs.records(runs))
    figures = {
        name: figure.draw
        for page in (shown, *shown.parts.values())
        for name, figure in page.figures.items()
    }
    assert len(figures) >= len(load_benchmark(benchmark).definition.figures)
    for name, draw in figures.items():
        with watched() as problems:
            draw(here / name)
        assert problems == [], name


def test_faults_of_a_figure_are_listed() -> None:
    figure, axis = plt.subplots(figsize=(8, 2))
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "two")
    axis.text(0.2, 0.5, "small", fontsize=5)
    axis.text(0.99, 0.2, "goes on beyond the edge")
    expected = {"is 8.0 by 2.0 inches", "'one' touches 'two'", "'small' has 5 points"}
    assert expected | {"'goes on beyond the edge' is cut at the edge"} <= set(faults(figure))
    plt.close(figure)
