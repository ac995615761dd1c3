"""Compute task scores and losses with scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import optimize, stats
from sklearn import metrics

# the best scale of the logits is searched between the inverse of this number and this number
_LARGEST_SCALE = 1000.0

_f1 = partial(metrics.f1_score, zero_division=0.0)


def _accuracy_f1(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """Return the mean of accuracy and F1."""
    accuracy = float(metrics.accuracy_score(labels, predictions))
    f1 = float(_f1(labels, predictions))
    return (accuracy + f1) / 2


def _pearson_spearman(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """Return the mean of the Pearson and Spearman correlations.

    It is 0 if the predictions are constant or not finite.
    """
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0:
        return 0.0
    # do not warn of nearly constant predictions: an untrained model makes them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = stats.pearsonr(labels, predictions).statistic
        spearman = stats.spearmanr(labels, predictions).statistic
    return float((pearson + spearman) / 2)


SCORES: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": metrics.accuracy_score,
    "accuracy_f1": _accuracy_f1,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "f1": _f1,
    "mcc": metrics.matthews_corrcoef,
    "pearson_spearman": _pearson_spearman,
}


def score(
    metric: str,
    logits: NDArray[Any],
    labels: NDArray[Any],
    merged_classes: Sequence[int] | None = None,
) -> float:
    """Compute a score of predictions against labels.

    Args:
        metric: The key in :data:`SCORES`.
        logits: The logits of the head ``[rows, classes]``, or ``[rows, 1]`` for a regression.
        labels: The labels of the data set ``[rows]``.
        merged_classes: For each class of the head, the class of the data set that replaces it; None
            if both have the same classes.
    """
    is_regression = logits.shape[1] == 1
    predictions = logits[:, 0] if is_regression else logits.argmax(-1)
    # for instance, a head may predict three classes for a data set that has only two of them
    if merged_classes:
        predictions = np.asarray(merged_classes)[predictions]
    compute_score = SCORES[metric]
    return float(compute_score(labels, predictions))


def mean_loss(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean over rows of the cross entropy, or of the squared error of a regression."""
    values = torch.as_tensor(logits, dtype=torch.float64)
    is_regression = values.shape[1] == 1
    if is_regression:
        targets = torch.as_tensor(labels, dtype=torch.float64)
        return float(F.mse_loss(values[:, 0], targets))
    classes = torch.as_tensor(labels, dtype=torch.int64)
    return float(F.cross_entropy(values, classes))


def calibrated_loss(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the cross entropy in nats after fitting a temperature to the same rows.

    Logits are multiplied by the scale (the inverse of the temperature, from 1/1000 to 1000) that
    gives the lowest mean cross entropy. So two classifiers that differ only in the scale of their
    logits have the same number. It is nan if a logit is not finite.

    Args:
        logits: The logits ``[rows, classes]``.
        labels: The class numbers ``[rows]``.
    """
    if not np.isfinite(logits).all():
        return float("nan")
    values = torch.as_tensor(logits, dtype=torch.float64)
    classes = torch.as_tensor(labels, dtype=torch.int64)

    def loss_at(log_scale: float) -> float:
        return float(F.cross_entropy(values * np.exp(log_scale), classes))

    # the loss is convex in the scale, so it has a single minimum in the logarithm of the scale too
    bound = float(np.log(_LARGEST_SCALE))
    best = optimize.minimize_scalar(loss_at, bounds=(-bound, bound), method="bounded")
    return float(best.fun)
