"""Test every figure at the size of a page: its width, letters of 7 points, no text that touches another or is cut."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.report.claims_figure import draw_claims
from benchmarks.harness.report.plots import draw_forest, sample_text, wrap_text
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.style import EMOE
from benchmarks.text.figures import draw_curves
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.routing import draw_traces
from tests import fake_runs
from tests.drawn import drawn_texts, faults, saved_figures, watched
from tests.planned import plan


@pytest.mark.slow
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
        for page in (shown, *shown.presentations_of_sets.values())
        for name, figure in page.figures.items()
    }
    assert len(figures) >= len(load_benchmark(benchmark).definition.figures)
    for name, draw in figures.items():
        with watched() as problems:
            draw(here / name)
        assert problems == [], name


@pytest.fixture(scope="module")
def full_glue(shared_here: Path) -> TextOutcomes:
    """Make up numbers of full fine-tuning in the suite full: two tasks have more methods than the others."""
    runs = plan(["glue"], "full")
    fake_runs.write_runs(runs)
    return TextOutcomes(load_benchmark("glue"), fake_runs.records(runs))


def test_tasks_with_few_panels_share_a_row_of_traces(
    full_glue: TextOutcomes, tmp_path: Path
) -> None:
    with saved_figures() as figures:
        draw_traces(full_glue, tmp_path / "traces")
    (figure,) = figures
    assert faults(figure) == []
    titles_by_row: dict[int, list[str]] = {}
    for axis in figure.axes:
        if axis.get_visible() and axis.get_title():
            row = axis.get_subplotspec().rowspan.start
            titles_by_row.setdefault(row, []).append(axis.get_title())
    all_methods = ["GMoE", "EMoE", "EMoE-learn", "EMoE, as published"]
    assert titles_by_row == {0: all_methods, 1: all_methods, 2: ["EMoE"] * 3}
    shown = " ".join(text for text, _, _ in drawn_texts(figure)).split()
    for task in ("SST-2,", "STS-B,", "CoLA,", "MRPC,", "RTE,"):
        assert task in shown


def test_curves_are_readable_at_the_width_of_a_telephone(
    full_glue: TextOutcomes, tmp_path: Path
) -> None:
    with saved_figures() as figures:
        draw_curves(full_glue, tmp_path / "curves")
    (figure,) = figures
    assert faults(figure) == []
    inches = figure.get_size_inches()[0]
    smallest = min(size for _, _, size in drawn_texts(figure))
    assert smallest / 72 * 390 / inches >= 11  # pixels


def test_faults_of_a_figure_are_listed() -> None:
    figure, axis = plt.subplots(figsize=(8, 2))
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "two")
    axis.text(0.2, 0.5, "small", fontsize=5)
    axis.text(0.99, 0.2, "goes on beyond the edge")
    expected = {"is 8.0 by 2.0 inches", "'one' touches 'two'", "'small' has 5 points"}
    assert expected | {"'goes on beyond the edge' is cut at the edge"} <= set(faults(figure))
    plt.close(figure)


@pytest.mark.parametrize(
    ("counts", "lows", "text"),
    [
        ([5, 8], [-0.1, 0.1], "n = 5 to 8 seeds, 95 % intervals"),
        ([1, 2], [math.nan, 0.1], "n = 1 to 2 seeds, no intervals: they need 3 seeds"),
        ([1, 3], [math.nan, 0.1], "n = 1 to 3 seeds, 95 % intervals where n ≥ 3"),
        ([3, 3], [math.nan, 0.1], "n = 3 seeds, 95 % intervals, none for equal differences"),
    ],
)
def test_a_missing_interval_has_its_reason(counts: list[int], lows: list[float], text: str) -> None:
    assert sample_text(pd.DataFrame({"n": counts, "low": lows})) == text


def test_a_number_stays_in_the_line_of_its_name() -> None:
    title = "EMoE, N, k and layers searched, N 8, k/N 0.25, layer 1"
    together = ("N\u00a08", "k/N\u00a00.25", "layer\u00a01")
    for inches in (1.0, 1.5, 2.0, 2.5):
        wrapped = wrap_text(title, inches=inches, size=7)
        assert all(words in wrapped for words in together)


def test_a_count_stays_in_the_line_of_its_sign() -> None:
    for inches in (1.0, 1.5, 2.0, 2.5):
        wrapped = wrap_text("n = 2 to 4 trials, 95 % intervals where n ≥ 3", inches=inches)
        assert "n\u00a0=\u00a02" in wrapped
        assert "n\u00a0≥\u00a03" in wrapped


# like the main tests in the suite `full`, but with every verdict; the questions come first
MAIN_TESTS = """
claim_title,test,effect,delta,low,high,n,pair,verdict
It scales to Llama,"questions, LoRA",0.78,-1.19,-4.07,1.69,281,question,undecided
EMoE is better in domain,"text, full fine-tuning",0.1,0.00,-0.56,0.57,16,seed,undecided
EMoE is better in domain,"text, LoRA",0.79,0.05,-0.30,0.34,32,seed,equivalent
EMoE generalises better across images,"images, full fine-tuning",0.83,-4.17,-5.82,-2.53,20,trial,contradicted
avg-k gating beats a learned gate,"published softmax gate: text, LoRA",0.72,0.84,0.46,1.19,32,seed,supported
"Trained with experts and used without, it beats the dense model","text in domain, LoRA",1.21,-0.02,,,1,seed,untestable
"""


def main_tests() -> pd.DataFrame:
    """Return the main tests as rows of `judge_claims`, with the columns that are drawn."""
    rows = pd.read_csv(io.StringIO(MAIN_TESTS))
    differences = []
    counts = []
    for row in rows.itertuples():
        interval = f" [{row.low:+.2f}, {row.high:+.2f}]" if row.n > 1 else ""
        differences.append(f"{row.delta:+.2f}{interval}")
        counts.append(f"{row.n} {row.pair}{'s' if row.n > 1 else ''}")
    return rows.assign(
        unit="points",
        margin=0.35,
        p=0.04,  # all of them are t-tests
        difference_without_unit=differences,
        n_shown=counts,
    )


def claims_drawn(folder: Path, narrow: bool) -> Figure:
    """Return the figure of the main tests."""
    with saved_figures() as figures:
        draw_claims(main_tests(), folder / "claims", narrow=narrow)
    (figure,) = figures
    return figure


@pytest.mark.parametrize(("narrow", "pixels"), [(False, 760), (True, 360)])
def test_the_claims_are_readable_at_the_width_of_a_page_and_of_a_telephone(
    narrow: bool, pixels: int, tmp_path: Path
) -> None:
    figure = claims_drawn(tmp_path, narrow)
    assert faults(figure) == []
    inches = figure.get_size_inches()[0]
    smallest = min(size for _, _, size in drawn_texts(figure))
    assert smallest / 72 * pixels / inches >= 11  # pixels


@pytest.mark.parametrize("narrow", [False, True])
def test_the_claims_say_their_interval_and_count_their_pairs(narrow: bool, tmp_path: Path) -> None:
    texts = [text for text, _, _ in drawn_texts(claims_drawn(tmp_path, narrow))]
    shown = " ".join(texts).replace("\n", " ")
    assert "95 % interval" in shown
    for title in (*main_tests()["claim_title"], *main_tests()["test"]):
        assert title in shown
    differences = re.findall(r"([+−-]\d\.\d\d(?: \[.*?\])?),? (n = \d+ \w+)", shown)
    assert sorted(differences) == sorted(
        [
            ("−1.19 [−4.07, +1.69]", "n = 281 questions"),
            ("+0.00 [−0.56, +0.57]", "n = 16 seeds"),
            ("+0.05 [−0.30, +0.34]", "n = 32 seeds"),
            ("−4.17 [−5.82, −2.53]", "n = 20 trials"),
            ("+0.84 [+0.46, +1.19]", "n = 32 seeds"),
            ("−0.02", "n = 1 seed"),
        ]
    )


@pytest.mark.parametrize("narrow", [False, True])
def test_claims_on_questions_are_apart_at_the_bottom(narrow: bool, tmp_path: Path) -> None:
    box_of = {text: box for text, box, _ in drawn_texts(claims_drawn(tmp_path, narrow))}
    (heading,) = [
        box for text, box in box_of.items() if text == "Intervals cover questions, not training"
    ]
    for text, box in box_of.items():
        if re.search(r"n = \d+ (seed|trial)", text):
            assert box.y0 > heading.y1
        elif "n = 281 questions" in text or "Llama" in text:
            assert box.y1 < heading.y0


def test_claims_on_trainings_alone_have_no_heading(tmp_path: Path) -> None:
    rows = main_tests()
    with saved_figures() as figures:
        draw_claims(rows[rows["pair"] != "question"], tmp_path / "claims")
    texts = [text for text, _, _ in drawn_texts(figures[0])]
    assert "EMoE is better in domain" in texts
    assert not any(text.startswith("Intervals cover") for text in texts)


def label_of_claims(rows: pd.DataFrame, folder: Path) -> str:
    """Draw tests, and return the label of the axis, with single blanks for line breaks."""
    with saved_figures() as figures:
        draw_claims(rows, folder / "claims")
    return " ".join(figures[0].axes[-1].get_xlabel().split())


def test_an_undecided_interval_that_excludes_zero_is_explained(tmp_path: Path) -> None:
    rows = main_tests()
    reason = "undecided: not significant after correction for the number of tests"
    assert reason not in label_of_claims(rows, tmp_path)
    is_question = rows["pair"] == "question"
    without_zero = rows.assign(high=rows["high"].mask(is_question, -0.01))
    assert reason in label_of_claims(without_zero, tmp_path)
    # a claim of the same score is judged by its interval alone, without a p to correct
    assert reason not in label_of_claims(without_zero.assign(p=math.nan), tmp_path)


def test_every_verdict_has_a_mark_of_its_own_even_without_colour(tmp_path: Path) -> None:
    (legend,) = claims_drawn(tmp_path, narrow=False).legends
    series = [text.get_text() for text in legend.get_texts()]
    assert set(series) == {*main_tests()["verdict"], "the paper"}
    marks = [(mark.get_marker(), mark.get_mfc() == "white") for mark in legend.legend_handles]
    assert len(set(marks)) == len(series)


@pytest.mark.parametrize("narrow", [False, True])
def test_no_margin_is_behind_a_cross_of_the_paper(narrow: bool, tmp_path: Path) -> None:
    num_crosses = 0
    for axis in claims_drawn(tmp_path, narrow).axes:
        bands = [patch.get_bbox() for patch in axis.patches]
        assert bands
        assert [(band.x0, band.x1) for band in bands] == [pytest.approx((-0.35, 0.35))] * len(bands)
        for line in axis.lines:
            if line.get_marker() == "x" and len(line.get_ydata()):
                num_crosses += 1
                (height,) = line.get_ydata()
                assert not any(band.y0 <= height <= band.y1 for band in bands)
    assert num_crosses == len(main_tests())


def test_the_legend_shows_our_mark_even_if_the_papers_comes_first(tmp_path: Path) -> None:
    crosses = replace(EMOE, marker="x")
    rows = pd.DataFrame(
        {
            "panel": ["Images", "Text"],
            "line": ["ViT-Small", "BERT-base"],
            "series": "EMoE",
            "delta": [0.01, 0.02],
            "low": [math.nan, 0.01],
            "high": [math.nan, 0.03],
            "n": [0, 5],
            "style": [crosses, EMOE],
        }
    )
    with saved_figures() as figures:
        draw_forest(rows, tmp_path / "figure", "Difference")
    (legend,) = figures[0].legends
    assert [mark.get_marker() for mark in legend.legend_handles] == [EMOE.marker]
