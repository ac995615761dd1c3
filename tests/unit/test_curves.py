"""Test the numbers and the lines of figures over training: images by step, texts by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.domainbed.figures import draw_steps, step_differences, step_values
from benchmarks.domainbed.outcomes import DomainOutcomes
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.report import plots
from benchmarks.harness.report.style import EMOE
from benchmarks.text.figures import draw_curves, epoch_numbers
from benchmarks.text.outcomes import TextOutcomes
from tests import fake_runs
from tests.image_sets import pacs_run
from tests.planned import plan

LORA = load_benchmark("glue_lora")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """List the figures that are saved, without writing them. Placeholders are not listed."""
    saved: list[Figure] = []

    def save(figure: Figure, path: Path, description: str | None = None) -> None:
        if description is None:
            saved.append(figure)

    monkeypatch.setattr(plots, "save", save)
    yield saved
    plt.close("all")


def line(axis: Any, title: str) -> list[float]:
    """Return the values of the line with a title."""
    (found,) = [drawn for drawn in axis.lines if drawn.get_label() == title]
    return list(found.get_ydata())


# images


def image_run(
    method: str, held_out: Sequence[int], trial: int, accuracy: float, **spec: Any
) -> Run:
    """Write a run on PACS with evaluations at the steps 0, 3 and 6.

    The held-out environments have ``accuracy`` at step 3, and 0.1 more at step 6. The loss is 2
    minus this accuracy. Environment i has the accuracy 0.2 i on its out split, 0 if it is held out.
    """
    planned = pacs_run(method)
    run = run_from_spec({**planned.spec, "test_envs": [*held_out], "seed": trial, **spec})
    fake_runs.write_runs([run])

    def edit(content: dict[str, Any]) -> None:
        for record, value in zip(content["records"], (0.9, accuracy, accuracy + 0.1), strict=True):
            record["loss"] = 2 - value
            for env in range(4):
                record[f"env{env}_in_acc"] = value if env in held_out else 1.0
                record[f"env{env}_out_acc"] = 0.0 if env in held_out else 0.2 * env

    fake_runs.edit(run, edit)
    return run


def image_outcomes(runs: list[Run]) -> DomainOutcomes:
    return DomainOutcomes(load_benchmark("domainbed"), fake_runs.records(runs))


@pytest.fixture
def image_runs(here: Path) -> list[Run]:
    """Write three trials of ERM and EMoE, a run of each without its pair, and runs to leave out.

    The first trial has two environments, the others have one.
    """
    return [
        image_run("erm", [0], 0, 0.50),
        image_run("erm", [1], 0, 0.70),
        image_run("erm", [0], 1, 0.60),
        image_run("erm", [0], 2, 0.60),
        image_run("erm", [3], 0, 0.10),
        image_run("emoe", [0], 0, 0.49),
        image_run("emoe", [1], 0, 0.73),
        image_run("emoe", [0], 1, 0.62),
        image_run("emoe", [0], 2, 0.66),
        image_run("emoe", [2], 0, 0.30),
        image_run("erm", [0, 1], 0, 0.00),
        image_run("emoe", [0, 1], 0, 0.80),
    ]


# the differences of the three trials are 0.01 (the mean of -0.01 and 0.03), 0.02 and 0.06
MEAN = 0.03
DEVIATION = math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2)
REACH = 4.302653 * DEVIATION / math.sqrt(3)  # the 97.5 % quantile of Student's t with 2 degrees


def test_differences_by_step_are_means_over_environments_paired_by_trial(
    image_runs: list[Run],
) -> None:
    outcomes = image_outcomes(image_runs)
    differences = step_differences(outcomes, step_values(outcomes, "pacs"))
    assert set(differences["method"]) == {"emoe"}
    assert set(differences["step"]) == {3, 6}  # without the first
    assert set(differences["n"]) == {3}
    by_number = differences.set_index(["quantity", "step"])
    for step in (3, 6):
        accuracy = by_number.loc[("held_out", step)]
        expected = (MEAN, MEAN - REACH, MEAN + REACH)
        assert (accuracy["delta"], accuracy["low"], accuracy["high"]) == pytest.approx(expected)
        loss = by_number.loc[("loss", step)]
        assert (-loss["delta"], -loss["high"], -loss["low"]) == pytest.approx(expected)


def test_accuracies_by_step_are_of_the_held_out_environment_and_of_the_others(
    image_runs: list[Run],
) -> None:
    numbers = step_values(image_outcomes(image_runs), "pacs")
    several = {run.id for run in image_runs if len(run.spec["test_envs"]) > 1}
    assert set(numbers["run_id"]) == {run.id for run in image_runs} - several
    values = numbers.set_index(["method", "pair", "quantity", "step"])["value"]
    assert values["emoe", "C, trial 0", "held_out", 0] == 0.9
    assert values["emoe", "C, trial 0", "held_out", 3] == 0.73
    assert values["emoe", "C, trial 0", "loss", 3] == 2 - 0.73
    # the mean of 0, 0.4 and 0.6, without the held-out environment 1
    assert values["emoe", "C, trial 0", "in_domain", 3] == pytest.approx(1 / 3)


def test_lines_by_step_are_means_and_bars_are_intervals(
    image_runs: list[Run], figures: list[Figure]
) -> None:
    draw_steps(image_outcomes(image_runs), "pacs", Path("steps"))
    (figure,) = figures
    loss, loss_difference, _, held_out, held_out_difference = figure.axes
    mean = (0.49 + 0.73 + 0.62 + 0.66) / 4  # without the run that has no pair
    assert line(held_out, "EMoE") == pytest.approx([90, 100 * mean, 100 * mean + 10])
    assert line(loss, "EMoE") == pytest.approx([1.1, 2 - mean, 1.9 - mean])
    for axis, sign, scale in ((held_out_difference, 1, 100), (loss_difference, -1, 1)):
        (container,) = axis.containers
        marks, _, (bars,) = container.lines
        assert list(marks.get_xdata()) == [3, 6]
        assert list(marks.get_ydata()) == pytest.approx([sign * scale * MEAN] * 2)
        for (_, low), (_, high) in bars.get_segments():
            assert (low + high) / 2 == pytest.approx(sign * scale * MEAN)
            assert (high - low) / 2 == pytest.approx(scale * REACH)
        assert [0, 0] in [list(drawn.get_ydata()) for drawn in axis.lines]
    # with single blanks for line breaks and no-break spaces
    label = " ".join(held_out_difference.get_xlabel().split())
    assert "lines without Δ: n = 3 trials" in label
    assert "Δ to ERM (vanilla ViT): n = 3 trials, 95 % intervals" in label


def test_without_a_pair_that_all_methods_have_only_differences_are_drawn(
    here: Path, figures: list[Figure]
) -> None:
    runs = [
        image_run("erm", [0], 0, 0.5),
        image_run("erm", [1], 0, 0.5),
        image_run("emoe", [0], 0, 0.6),
        image_run("gmoe", [1], 0, 0.7),
    ]
    draw_steps(image_outcomes(runs), "pacs", Path("steps"))
    (figure,) = figures
    assert [axis.get_ylabel()[0] for axis in figure.axes] == ["Δ", "Δ"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["GMoE (EMoE's README)", "EMoE"]


def test_two_trials_have_no_interval(here: Path, figures: list[Figure]) -> None:
    runs = [
        image_run("erm", [0], 0, 0.5),
        image_run("erm", [0], 1, 0.5),
        image_run("emoe", [0], 0, 0.6),
        image_run("emoe", [0], 1, 0.8),
    ]
    draw_steps(image_outcomes(runs), "pacs", Path("steps"))
    (container,) = figures[0].axes[-1].containers
    marks, _, (bars,) = container.lines
    assert list(marks.get_ydata()) == pytest.approx([20, 20])
    assert not any(len(segment) for segment in bars.get_segments())


def test_without_the_baseline_no_differences_are_drawn(here: Path, figures: list[Figure]) -> None:
    draw_steps(image_outcomes([image_run("emoe", [0], 0, 0.5)]), "pacs", Path("steps"))
    (figure,) = figures
    assert [axis.get_ylabel().split()[0] for axis in figure.axes] == [
        "training",
        "accuracy",
        "held-out",
    ]


def test_of_several_draws_the_figure_has_the_one_that_validation_chooses(here: Path) -> None:
    default = image_run("emoe", [0], 0, 0.5)
    drawn = image_run("emoe", [0], 0, 0.6, hparams_seed=1)

    def improve(content: dict[str, Any]) -> None:
        for record in content["records"]:
            record["env1_out_acc"] = 0.9

    fake_runs.edit(drawn, improve)
    numbers = step_values(image_outcomes([default, drawn]), "pacs")
    assert set(numbers["run_id"]) == {drawn.id}


def test_a_line_by_step_ends_where_a_run_diverges(here: Path, figures: list[Figure]) -> None:
    runs = [image_run("erm", [0], 0, 0.5), image_run("erm", [1], 0, 0.7)]

    def diverge(content: dict[str, Any]) -> None:
        content["records"][-1]["loss"] = None

    fake_runs.edit(runs[0], diverge)
    draw_steps(image_outcomes(runs), "pacs", Path("steps"))
    values = line(figures[0].axes[0], "ERM (vanilla ViT)")
    assert values == pytest.approx([1.1, 1.4, math.nan], nan_ok=True)


def test_differences_of_the_loss_are_missing_where_a_run_diverges(image_runs: list[Run]) -> None:
    """The other environment of the trial alone would give another mean."""

    def diverge(content: dict[str, Any]) -> None:
        content["records"][-1]["loss"] = None

    diverged = next(run for run in image_runs if run.method == "emoe" and run.seed == 0)
    fake_runs.edit(diverged, diverge)
    outcomes = image_outcomes(image_runs)
    differences = step_differences(outcomes, step_values(outcomes, "pacs"))
    deltas = differences.set_index(["quantity", "step"])["delta"]
    assert math.isnan(deltas["loss", 6])
    assert deltas["loss", 3] == pytest.approx(-MEAN)
    assert deltas["held_out", 6] == pytest.approx(MEAN)


def test_a_missing_difference_of_a_run_that_diverged_is_not_called_equal(
    image_runs: list[Run], figures: list[Figure]
) -> None:
    def diverge(content: dict[str, Any]) -> None:
        content["records"][-1]["loss"] = None

    fake_runs.edit(next(run for run in image_runs if run.method == "emoe"), diverge)
    draw_steps(image_outcomes(image_runs), "pacs", Path("steps"))
    label = " ".join(figures[0].axes[-1].get_xlabel().split())
    assert label.endswith("Δ to ERM (vanilla ViT): n = 3 trials, 95 % intervals")


def test_differences_at_a_single_step_are_drawn(here: Path, figures: list[Figure]) -> None:
    runs = [image_run("erm", [0], 0, 0.5), image_run("emoe", [0], 0, 0.6)]
    fake_runs.edit(runs[0], lambda content: content["records"].pop())
    draw_steps(image_outcomes(runs), "pacs", Path("steps"))
    (container,) = figures[0].axes[-1].containers
    marks, *_ = container.lines
    assert list(marks.get_xdata()) == [3]
    assert list(marks.get_ydata()) == pytest.approx([10])


def test_a_single_evaluation_after_the_first_makes_a_placeholder(
    here: Path, figures: list[Figure]
) -> None:
    run = image_run("erm", [0], 0, 0.5)
    fake_runs.edit(run, lambda content: content["records"].pop())
    draw_steps(image_outcomes([run]), "pacs", Path("steps"))
    draw_steps(image_outcomes([]), "pacs", Path("steps"))
    assert figures == []


def test_without_a_baseline_and_a_shared_pair_the_figure_is_a_placeholder(
    here: Path, figures: list[Figure]
) -> None:
    runs = [image_run("emoe", [0], 0, 0.5), image_run("gmoe", [1], 0, 0.5)]
    draw_steps(image_outcomes(runs), "pacs", Path("steps"))
    assert figures == []


# texts


def text_runs() -> list[Run]:
    """Write runs on CoLA with three learning rates and seeds; the middle rate is the best.

    The score of epoch e and seed s is 0.5 + 0.1 e + 0.01 s, and the loss is 1 minus the score. The
    other rates have 0.3 less. Seed 0 stops after three epochs, the others after four.
    """
    methods = ("lora", "lora_emoe", "lora_random", "lora_not_top")
    runs = []
    for run in plan(["glue_lora"], "paper"):
        names = (run.model, run.task, run.spec["protocol"])
        if names == ("bert-large-cased", "cola", "published") and run.method in methods:
            runs.append(run)
    fake_runs.write_runs(runs)
    for run in runs:
        shift = 0.01 * run.seed - (0.0 if run.learning_rate == 3e-4 else 0.3)
        epochs = []
        for epoch in range(1, 4 if run.seed == 0 else 5):
            score = 0.5 + 0.1 * epoch + shift
            epochs.append({"epoch": float(epoch), "mcc": score, "loss": 1 - score})
        dev = {"mcc": 0.8 + shift, "loss": 0.2}

        def edit(content: dict[str, Any], epochs: Any = epochs, dev: Any = dev) -> None:
            content["epochs"] = epochs
            content["scores"]["dev"] = {"cola": dev}

        fake_runs.edit(run, edit)
    return runs


def text_outcomes(runs: list[Run]) -> TextOutcomes:
    return TextOutcomes(LORA, fake_runs.records(runs))


def test_numbers_by_epoch_are_those_of_the_chosen_main_runs(here: Path) -> None:
    numbers = epoch_numbers(text_outcomes(text_runs()))
    assert set(numbers["method"]) == {"lora", "lora_emoe"}  # no control, no ablation
    assert set(numbers["step"]) == {1, 2, 3}  # seed 0 has no fourth epoch
    means = numbers.groupby(["method", "metric", "step"])["value"].agg(["mean", "count"])
    for epoch in (1, 2, 3):
        score = 0.51 + 0.1 * epoch  # the mean over the seeds 0, 1 and 2
        assert tuple(means.loc[("lora", "mcc", epoch)]) == pytest.approx((100 * score, 3))
        assert tuple(means.loc[("lora", "loss", epoch)]) == pytest.approx((1 - score, 3))


def test_numbers_by_epoch_are_of_the_seeds_that_all_methods_have(here: Path) -> None:
    kept = [run for run in text_runs() if (run.method, run.seed) != ("lora_emoe", 0)]
    numbers = epoch_numbers(text_outcomes(kept))
    assert set(numbers["seed"]) == {1, 2}
    assert set(numbers["step"]) == {1, 2, 3, 4}  # without seed 0, no seed stops early


def test_lines_by_epoch_are_means_and_end_where_a_run_diverges(
    here: Path, figures: list[Figure]
) -> None:
    runs = text_runs()
    (diverging,) = [
        run for run in runs if (run.method, run.seed, run.learning_rate) == ("lora_emoe", 1, 3e-4)
    ]

    def diverge(content: dict[str, Any]) -> None:
        content["epochs"][2]["loss"] = None

    fake_runs.edit(diverging, diverge)
    draw_curves(text_outcomes(runs), Path("curves"))
    score, loss = figures[0].axes
    assert score.get_ylabel().replace("\n", " ") == "Matthews correlation on dev (%)"
    assert line(score, "LoRA") == pytest.approx([61, 71, 81])
    assert line(score, "LoRA + EMoE") == pytest.approx([61, 71, 81])
    assert line(loss, "LoRA") == pytest.approx([0.39, 0.29, 0.19])
    assert line(loss, "LoRA + EMoE") == pytest.approx([0.39, 0.29, math.nan], nan_ok=True)
    assert loss.get_xlabel() == "epoch\nn = 3 seeds"


def test_a_single_epoch_makes_a_placeholder(here: Path, figures: list[Figure]) -> None:
    runs = text_runs()
    for run in runs:
        fake_runs.edit(run, lambda content: content.update(epochs=content["epochs"][:1]))
    draw_curves(text_outcomes(runs), Path("curves"))
    draw_curves(text_outcomes([]), Path("curves"))
    assert figures == []


def test_a_legend_is_not_wider_than_its_figure() -> None:
    figure, axis = plt.subplots(figsize=(3.6, 2), layout="constrained")
    for letter in "abcd":
        axis.plot([0, 1], [0, 1], label=letter * 30)
    height = plots.legend_below(figure, [axis], columns=3)
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.width <= figure.bbox.width
    assert height == pytest.approx(extent.height / figure.dpi)
    assert height > 4 * 7 / 72  # four lines of 7 points
    plt.close(figure)


def test_labels_of_curves_are_on_panels_that_have_data(figures: list[Figure]) -> None:
    """The first model has only a loss, and the second one only a score."""
    points = pd.DataFrame({"method_title": "EMoE", "step": [1, 2], "value": [0.5, 0.6]})
    models = ["one model", "another"]
    with plots.curve_figure(Path("curves"), models, ["loss", "score"], 2.0) as axes:
        plots.draw_means(axes[0, 0], points, {"EMoE": EMOE})
        plots.draw_means(axes[1, 1], points, {"EMoE": EMOE})
        plots.label_steps(axes[-1, 0], "step of one model")
        plots.label_steps(axes[-1, 1], "step of another")
    loss, *hidden, score = figures[0].axes
    assert not any(axis.get_visible() for axis in hidden)
    assert loss.get_title() == "one model"
    assert loss.get_ylabel() == "loss"
    assert loss.get_xlabel() == "step of one model"
    assert score.get_title() == "another"
    assert score.get_ylabel() == "score"
    assert score.get_xlabel() == "step of another"
    figures[0].draw_without_rendering()
    assert all(label.get_visible() for label in score.get_yticklabels())
