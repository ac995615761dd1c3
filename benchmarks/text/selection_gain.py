"""Compute what the choice of the best hyper-parameters adds to scores, and how much is luck."""

from __future__ import annotations

import math

import pandas as pd

from benchmarks.harness.report.common import SEEDS_COVER, format_counts, with_numbers
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.statistics import expected_maximum
from benchmarks.text.definition import CLEAN, ID, PUBLISHED
from benchmarks.text.outcomes import CELL, HEADINGS, PROTOCOL_TITLES, TextOutcomes, choices

# one selection is shown for each model and task, so that all methods are chosen by the same rows
_KEYS_OF_GROUP = ["protocol", "model", "task"]
_KEYS_OF_ROW = [*_KEYS_OF_GROUP, "method"]


def selection_gains(outcomes: TextOutcomes) -> pd.DataFrame:
    """Compute what choosing the best hyper-parameters adds to scores, and what luck would add.

    A choice is a variant and a learning rate. Its score is the mean dev score over seeds. For each
    model and task, the choices are those of the authors' selection if it has runs, else of the
    clean selection. A model and task is left out if no method has several choices.

    Returns:
        One row per protocol, model, task and method. Scores and gains are shares of 1. Besides
        titles, a row has these columns:

        - ``n``: the number of seeds of each choice, as text
        - ``num_choices``: the number of choices
        - ``best_gain``: the score of the best choice, minus the mean score of all choices
        - ``deviation``: the unbiased standard deviation over seeds, pooled over the choices; nan if
          every choice has a single seed
        - ``luck``: what ``best_gain`` would be on average if all choices were equally good, see
          :func:`_gain_by_luck`
        - ``baseline_luck``: the same for the baseline, if it had as many choices as the row
    """
    tried = _tried_choices(outcomes)
    gains = _gains_by_row(tried)
    # give all rows of a model and task the `error` of the baseline, as `baseline_error`
    is_baseline = gains["method"] == outcomes.baseline
    baseline_errors = gains.loc[is_baseline, [*_KEYS_OF_GROUP, "error"]]
    with_baseline = with_numbers(
        gains, on=_KEYS_OF_GROUP, numbers=baseline_errors, prefix="baseline_"
    )
    num_choices = with_baseline["num_choices"]
    with_luck = with_baseline.assign(
        luck=_gain_by_luck(num_choices, with_baseline["error"]),
        baseline_luck=_gain_by_luck(num_choices, with_baseline["baseline_error"]),
    )
    # keep the models and tasks for which some method has several choices; `transform` repeats the
    # maximum of a model and task for each of its rows
    most_choices = with_luck.groupby(_KEYS_OF_GROUP)["num_choices"].transform("max")
    kept = with_luck[most_choices > 1].drop(columns=["error", "baseline_error"])
    seed_counts = format_counts(tried, _KEYS_OF_ROW)  # the column `n`, as text
    with_counts = kept.merge(seed_counts, on=_KEYS_OF_ROW)
    return outcomes.order(with_counts, CELL)


def _tried_choices(outcomes: TextOutcomes) -> pd.DataFrame:
    """Return the choices of all rows, with one selection for each model and task.

    It is the authors' selection if it has runs, else the clean selection. The columns are
    ``protocol`` and those of :func:`~.outcomes.choices`.
    """
    tables = []
    for protocol in (PUBLISHED, CLEAN):
        tables.append(choices(outcomes.recorded_numbers, protocol).assign(protocol=protocol))
    tried = pd.concat(tables, ignore_index=True)
    # The authors' selection comes first. So the first protocol of a model and task is this one if
    # it has runs. `transform` repeats the protocol for each row of the model and task.
    first_protocol = tried.groupby(["model", "task"])["protocol"].transform("first")
    return tried[tried["protocol"] == first_protocol]


def _gains_by_row(tried: pd.DataFrame) -> pd.DataFrame:
    """Compute ``num_choices``, ``best_gain`` and ``deviation`` for each model, task and method.

    See :func:`selection_gains` for these columns. A further column is ``error``, the standard
    error of a choice's mean score.

    Args:
        tried: The choices from :func:`_tried_choices`.
    """
    rows = []
    for keys_of_row, choices_of_row in tried.groupby(_KEYS_OF_ROW, sort=False):
        protocol, model, task, method = keys_of_row
        scores = choices_of_row["mean"]
        deviation = _pooled_deviation(choices_of_row)
        # The score of a choice is a mean over n seeds, so its variance is 1/n of that of a seed.
        # Choices may have different n, so 1/n is averaged.
        variance_factor = (1 / choices_of_row["n"]).mean()
        row = {
            "protocol": protocol,
            "model": model,
            "task": task,
            "method": method,
            "num_choices": len(choices_of_row),
            "best_gain": scores.max() - scores.mean(),
            "deviation": deviation,
            "error": deviation * math.sqrt(variance_factor),
        }
        rows.append(row)
    # the columns are named, so that they exist even without rows
    numbers = ["num_choices", "best_gain", "deviation", "error"]
    return pd.DataFrame(rows, columns=[*_KEYS_OF_ROW, *numbers])


def _pooled_deviation(choices_of_row: pd.DataFrame) -> float:
    """Return an unbiased standard deviation over seeds, pooled over the choices of a row.

    It is nan if every choice has a single seed.
    """
    freedom = choices_of_row["n"] - 1  # degrees of freedom of each choice
    total_freedom = freedom.sum()
    if total_freedom == 0:
        return math.nan
    # a choice with a single seed has no deviation, and the weight 0
    variances = choices_of_row["std"].fillna(0.0) ** 2
    deviation = math.sqrt((freedom * variances).sum() / total_freedom)
    # The root of an unbiased variance is too small on average; for a single choice with two seeds,
    # by a fifth. For normal scores and f degrees of freedom, its mean is this share of the true
    # deviation: sqrt(2 / f) * gamma((f + 1) / 2) / gamma(f / 2).
    log_of_gammas = math.lgamma((total_freedom + 1) / 2) - math.lgamma(total_freedom / 2)
    share_of_true = math.sqrt(2 / total_freedom) * math.exp(log_of_gammas)
    return deviation / share_of_true


def _gain_by_luck(num_choices: pd.Series[int], error: pd.Series[float]) -> pd.Series[float]:
    """Return how far the best of equally good choices is above their mean on average.

    The scores of choices are taken as independent and normal around the same mean.

    Args:
        num_choices: The number of choices of each row.
        error: The standard deviation of the score of a choice, which is a mean over seeds.
    """
    maxima = [expected_maximum(count) for count in num_choices]
    # the type is given, because pandas cannot infer it without rows
    return error * pd.Series(maxima, num_choices.index, dtype=float)


def selection_gain_table(outcomes: TextOutcomes) -> Table:
    """Make a table of what choosing the best hyper-parameters adds to the dev score.

    It has a row per model, training task and method. A row also has the difference of the reported
    score to the baseline, under each protocol.
    """
    columns = [
        Column(metric="runs", value="num_choices", label="Choices"),
        Column(metric="score", value="best_gain", label="Best − mean", decimals=2),
        Column(metric="score", value="deviation", label="Deviation of seeds", decimals=2),
        Column(metric="score", value="luck", label="By luck", decimals=2),
        Column(
            metric="score",
            value="baseline_luck",
            label=f"By luck, {outcomes.baseline_title} with as many choices",
            decimals=2,
        ),
    ]
    frame = selection_gains(outcomes)
    # for each protocol, add the difference to the baseline, and the number of seeds of both
    for protocol in (PUBLISHED, CLEAN):
        differences = outcomes.of(ID, protocol)[[*CELL, "delta", "low", "high", "pairs"]]
        frame = with_numbers(frame, on=CELL, numbers=differences, prefix=f"{protocol}_")
        difference = Column(
            metric="score",
            value=f"{protocol}_delta",
            label=f"Δ, {PROTOCOL_TITLES[protocol]} selection",
            interval=(f"{protocol}_low", f"{protocol}_high"),
            signed=True,
            decimals=2,
        )
        pairs = Column(
            metric="runs",
            value=f"{protocol}_pairs",
            label=f"n of Δ, {PROTOCOL_TITLES[protocol]} selection",
        )
        columns += [difference, pairs]
    return Table(
        title="What the selection adds",
        caption=_caption(outcomes),
        keys={**HEADINGS, "selection": "Selection", "n": "n"},
        columns=columns,
        frame=frame,
        # A row uses the runs of both protocols. Without the column `protocol`, it is linked to all.
        origins=outcomes.recorded_numbers.drop(columns="protocol"),
    )


def _caption(outcomes: TextOutcomes) -> str:
    """Write the caption of :func:`selection_gain_table`."""
    baseline = outcomes.baseline_title
    return (
        "The authors' selection reports the dev score that it chooses by, so luck in the choice "
        "raises the reported score. A choice is a learning rate and a variant; its dev score is a "
        "mean over n seeds. Best − mean: the dev score of the best choice, minus the mean of all "
        "choices. By luck: this difference on average if all choices were equally good (with "
        "independent normal scores that have the deviation of seeds; the deviation is pooled over "
        "the choices, and unbiased). Luck adds less if some choices are really better, or if equal "
        f"seeds are lucky together. By luck, {baseline} with as many choices: the same with the "
        f"deviation of {baseline}. Δ: the reported score minus that of {baseline}, paired by seed "
        "over all seeds that both have, "
        f"with a 95 % confidence interval (Student's t). {SEEDS_COVER} Without runs of a "
        "selection, Δ is a dash or has no column. If a task has only clean runs, the choices "
        "are those of the clean selection, where luck does not enter the reported score. The "
        "choice of the epoch is not counted. A task is left out if every method has a single "
        "choice."
    )
