"""Compute task scores with scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

_f1 = partial(metrics.f1_score, zero_division=0.0)


def _accuracy_f1(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    return (
        float(metrics.accuracy_score(labels, predictions)) + float(_f1(labels, predictions))
    ) / 2


def _pearson_spearman(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """Return the mean of both correlations; 0 if the predictions are constant or not finite."""
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(
            (stats.pearsonr(labels, predictions)[0] + stats.spearmanr(labels, predictions)[0]) / 2
        )


SCORES: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": metrics.accuracy_score,
    "accuracy_f1": _accuracy_f1,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "f1": _f1,
    "mcc": metrics.matthews_corrcoef,
    "pearson_spearman": _pearson_spearman,
}


def score(
    metric: str, logits: NDArray[Any], labels: NDArray[Any], merged: Sequence[int] | None = None
) -> float:
    """Score logits ``[rows, classes]``, or ``[rows, 1]`` for a regression, against labels ``[rows]``.

    Args:
        metric: The key in :data:`SCORES`.
        logits: The logits of the head.
        labels: The labels of the set.
        merged: The set's class for each class of the head; None if they are equal.
    """
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
    if merged:
        predictions = np.asarray(merged)[predictions]
    return float(SCORES[metric](labels, predictions))


def mean_loss(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean over rows of the cross entropy, or of the squared error of a regression."""
    values = torch.as_tensor(logits, dtype=torch.float64)
    if values.shape[1] == 1:
        return float(F.mse_loss(values[:, 0], torch.as_tensor(labels, dtype=torch.float64)))
    return float(F.cross_entropy(values, torch.as_tensor(labels, dtype=torch.int64)))
