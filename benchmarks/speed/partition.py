"""Time and quality of balanced clustering, beside the library that the authors use."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.models.loading import load_backbone
from benchmarks.speed.definition import PartitionSettings, RunModel
from emoe.architectures import find_ffns
from emoe.clustering import balanced_kmeans, explained_variance_ratio


def measure(model: RunModel, settings: PartitionSettings) -> dict[str, dict[str, float]]:
    """Seconds, ratio to the library and unexplained share of the variance, by candidate.

    Args:
        model: ``layer`` of a model in ``models.yaml`` whose FFN's keys are clustered; or ``hidden`` and ``neurons`` of made-up keys.
        settings: of the measure.
    """
    rows = keys_of(model)
    n = settings.num_experts
    found: dict[str, dict[str, float]] = {}
    for name in settings.candidates:
        start, cpu = time.perf_counter(), time.process_time()
        labels = CANDIDATES[name](rows, n, settings.starts)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        unexplained = 1 - explained_variance_ratio(rows, labels, n)
        found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "inertia": unexplained}
    base = found.get("kmeans_constrained")
    if base is not None:
        for row in found.values():
            row["ratio"] = row["seconds"] / base["seconds"]
    return found


def keys_of(model: RunModel) -> Tensor:
    """Key vectors ``[d, h]``: real ones, or Gaussian rows around 128 centres whose spread is a quarter of theirs."""
    if model.model is not None:
        loaded = load_backbone(load_models()[model.model].spec(model.model))
        return find_ffns(loaded)[cast(int, model.layer)].keys().detach().float()
    neurons, hidden = cast(int, model.neurons), cast(int, model.hidden)
    generator = torch.Generator().manual_seed(derive_seed("keys", neurons, hidden))
    centres = torch.randn(128, hidden, generator=generator)
    own = torch.randn(neurons, hidden, generator=generator)
    return own + 0.25 * centres[torch.randint(128, (neurons,), generator=generator)]


def _ours(rows: Tensor, num_clusters: int, _starts: int) -> Tensor:
    return balanced_kmeans(rows, num_clusters)


def _library(rows: Tensor, num_clusters: int, starts: int) -> Tensor:
    """The authors' call: normalised keys, equal sizes, random state 0."""
    if importlib.util.find_spec("k_means_constrained") is None:
        raise DataError("k-means-constrained is not installed: pip install '.[mini]'")
    from k_means_constrained import KMeansConstrained

    size = len(rows) // num_clusters
    clusterer = KMeansConstrained(n_clusters=num_clusters, size_min=size, size_max=size, n_init=starts, random_state=0)
    return torch.from_numpy(clusterer.fit_predict(F.normalize(rows, dim=1).double().numpy()).astype(np.int64))


CANDIDATES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "emoe": _ours,
    "kmeans_constrained": _library,
}
