"""Summarise traces: how the loads of experts are balanced, and how they change over training.

A trace is a frame with the loads of one layer. Each row has the shares of the experts in a window
of training steps. Its index is the last step of the window.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr

from benchmarks.harness.results.content import Windows

_PERIODS = 4  # quarters of the training
NUMBERS = ("load_entropy", "load_max_over_mean", "load_change", "load_drift", "load_drift_chance")


def layer_traces(windows: Windows) -> dict[str, pd.DataFrame]:
    """Return the shares of the experts in each window of training steps, by layer.

    Args:
        windows: The expert loads of a run: for each layer and window, how often each expert was
            chosen.

    Returns:
        For each layer a trace: a frame ``[windows, experts]`` of shares. They are 0 in a window
        without choices. The index of the frame is the last training step of each window.
    """
    traces = {}
    for layer, loads in windows.loads.items():
        counts = np.asarray(loads, dtype=np.float64)  # [windows, experts]
        totals = np.maximum(counts.sum(1, keepdims=True), 1)  # no division by 0
        traces[layer] = pd.DataFrame(counts / totals, windows.ends)
    return traces


def mean_load_change(windows: Windows) -> float:
    """Return how much the loads of a run change between consecutive windows.

    It is the mean L1 distance between the shares of consecutive windows, averaged over layers. It
    is 0 without a change and at most 2. It is nan for a single window.
    """
    changes = [trace_numbers(trace)["load_change"] for trace in layer_traces(windows).values()]
    return float(np.mean(changes))


def trace_numbers(trace: pd.DataFrame) -> dict[str, float]:
    """Summarise a trace: how balanced the loads are, and how much they change.

    Returns:
        - ``windows``: the number of windows
        - ``load_entropy``: the entropy of the shares over its maximum ln N, a mean over windows
        - ``load_max_over_mean``: the load of the busiest expert over the mean load, a mean over
          windows
        - ``load_change``: the mean L1 distance between the shares of consecutive windows
        - ``load_drift``: the L1 distance between the mean shares of the first and the last quarter
        - ``load_drift_chance``: the drift that is expected by chance
    """
    # [windows, experts], always in the same memory layout: the last digit of sums depends on it
    shares = np.ascontiguousarray(trace)
    windows, experts = shares.shape
    return {
        "windows": float(windows),
        "load_entropy": float(_entropies(shares).mean()),
        "load_max_over_mean": float(shares.max(1).mean() * experts),
        **_measure_changes(shares),
    }


def _entropies(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of each window, divided by its maximum; 1 for a single expert."""
    windows, experts = shares.shape
    if experts == 1:
        return np.ones(windows)
    entropies: NDArray[np.float64] = entr(shares).sum(1)  # [windows]
    return entropies / np.log(experts)


def _measure_changes(shares: NDArray[np.float64]) -> dict[str, float]:
    """Measure how shares ``[windows, experts]`` change over training, by L1 distances.

    Returns:
        - ``load_change``: the mean distance between consecutive windows. It grows if windows have
          fewer tokens, so compare it only between runs with the same data, N and k.
        - ``load_drift``: the distance between the mean shares of the first and the last quarter.
        - ``load_drift_chance``: an estimate of the drift by chance. For each half of the training,
          it takes the distance between the mean shares of the even and the odd windows. It is the
          mean of the two distances.

        A quarter has a quarter of the windows, rounded down, but at least one. A half has two
        quarters. All numbers are nan for a single window.
    """
    windows = len(shares)
    if windows < 2:
        return {"load_change": math.nan, "load_drift": math.nan, "load_drift_chance": math.nan}
    changes = np.abs(np.diff(shares, axis=0)).sum(1)  # [windows - 1]
    quarter = max(windows // _PERIODS, 1)
    # A half has as many even windows as a quarter has windows, and as many odd ones. So the means
    # below have as much noise as the means of the quarters.
    first_half = shares[: 2 * quarter]
    last_half = shares[-2 * quarter :]
    chances = []
    for half in (first_half, last_half):
        even_windows = half[::2]
        odd_windows = half[1::2]
        chances.append(_distance(even_windows, odd_windows))
    return {
        "load_change": float(changes.mean()),
        "load_drift": _distance(shares[:quarter], shares[-quarter:]),
        "load_drift_chance": float(np.mean(chances)),
    }


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the L1 distance between the mean shares of two periods ``[windows, experts]``."""
    difference = first.mean(0) - second.mean(0)
    return float(np.abs(difference).sum())
