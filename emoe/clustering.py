"""Balanced k-means: clusters of exactly equal size.

Two phases. Lloyd iterations with a balanced greedy assignment find the basin; pairwise swaps then
improve the exact objective. Lloyd alone stops early here: with few points a cluster in a space of
many dimensions a point is a sizeable part of its own centre and holds itself in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LLOYD_ITERATIONS = 30
_SWAP_CANDIDATES = 4
_SWAP_ROUNDS = 500


@dataclass(frozen=True)
class Clustering:
    """Result of :func:`balanced_kmeans`.

    Attributes:
        labels: ``[n]`` int64; clusters are numbered by their lowest member.
        inertia: sum of squared distances to the cluster means, on the normalised rows.
        total: the same with a single cluster, so that ``1 - inertia / total`` is the explained share.
    """

    labels: Tensor
    inertia: float
    total: float

    @property
    def explained(self) -> float:
        """Share of the variance between rows that the clusters explain, 0 to 1."""
        return 1.0 - self.inertia / self.total if self.total > 0 else 0.0


@torch.no_grad()
def balanced_kmeans(points: Tensor, num_clusters: int, *, seed: int = 0) -> Clustering:
    """Cluster L2-normalised rows into ``num_clusters`` groups of exactly equal size (the paper's expert construction).

    Deterministic for a seed, a device and a number of threads. Memory is linear in the rows.

    Args:
        points: ``[n, h]``, any floating dtype.
        num_clusters: must divide n.
        seed: of the initial centres.

    Raises:
        ValueError: n is not a multiple of ``num_clusters``, or a value is not finite.
    """
    n = points.shape[0]
    if num_clusters < 1 or n % num_clusters:
        raise ValueError(f"{n} rows cannot be split into {num_clusters} equal clusters")
    if not torch.isfinite(points).all():
        raise ValueError("the rows hold values that are not finite")
    rows = F.normalize(points.detach().to(torch.float32), dim=1)
    size = n // num_clusters
    if num_clusters == 1 or size == 1:
        labels = torch.zeros(n, dtype=torch.int64) if num_clusters == 1 else torch.arange(n)
    else:
        labels = _lloyd(rows, num_clusters, seed)
        labels = _swap(rows, labels, num_clusters)
    labels = _canonical(labels.cpu())
    return Clustering(labels, inertia(rows, labels, num_clusters), inertia(rows, torch.zeros_like(labels), 1))


def inertia(rows: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Sum of squared distances of rows ``[n, h]`` to the means of their clusters, in float64."""
    rows = rows.double()
    sums = _sums(rows, labels.to(rows.device), num_clusters)
    counts = torch.bincount(labels, minlength=num_clusters).clamp(min=1).to(rows)
    return float((rows.square().sum() - (sums.square().sum(1) / counts).sum()).clamp(min=0))


def explained_share(points: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Share of the variance between the L2-normalised ``points`` ``[n, h]`` that a grouping explains, 0 to 1."""
    rows = F.normalize(points.detach().float(), dim=1)
    total = inertia(rows, torch.zeros_like(labels), 1)
    return 1.0 - inertia(rows, labels, num_clusters) / total if total > 0 else 0.0


def _sums(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    return rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)


def _initial_centres(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """k-means++ on squared distances, from a seeded generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(rows.shape[0], (1,), generator=generator))
    chosen = [first]
    distance = (rows - rows[first]).square().sum(1)
    for _ in range(num_clusters - 1):
        weights = distance.double().cpu().clamp(min=0)
        weights[chosen] = 0
        if float(weights.sum()) == 0:  # only duplicates are left
            weights = torch.ones(rows.shape[0], dtype=torch.float64)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]


def _lloyd(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    size = rows.shape[0] // num_clusters
    centres = _initial_centres(rows, num_clusters, seed)
    best, best_score, labels = None, -float("inf"), None
    for _ in range(_LLOYD_ITERATIONS):
        affinity = rows @ centres.t() - centres.square().sum(1) / 2
        labels = _assign(affinity, size).to(rows.device)
        sums = _sums(rows, labels, num_clusters)
        score = float(sums.double().square().sum())
        if score <= best_score * (1 + 1e-6):
            break
        best, best_score = labels, score
        centres = sums / size
    return best if best is not None else labels  # type: ignore[return-value]


def _assign(affinity: Tensor, size: int) -> Tensor:
    """Give rows to clusters in order of how much they would lose by their second choice."""
    top = affinity.topk(2, dim=1).values
    order = torch.sort(top[:, 0] - top[:, 1], descending=True, stable=True).indices.tolist()
    preferences = torch.sort(affinity, dim=1, descending=True, stable=True).indices.tolist()
    room = [size] * affinity.shape[1]
    labels = [0] * affinity.shape[0]
    for row in order:
        for cluster in preferences[row]:
            if room[cluster]:
                room[cluster] -= 1
                labels[row] = cluster
                break
    return torch.tensor(labels, dtype=torch.int64)


def _swap(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Exchange pairs of rows between clusters while that lowers the inertia.

    With S_c the sum of cluster c, inertia is a constant minus sum |S_c|^2 / size. Exchanging i in a
    with j in b raises the sum of squares by 2 (g_i + g_j) + 2 |x_i - x_j|^2, where
    g_i = (S_b - S_a) x_i and g_j = (S_a - S_b) x_j.
    """
    size = rows.shape[0] // num_clusters
    labels = labels.clone()
    candidates = min(_SWAP_CANDIDATES, size)
    sums = _sums(rows, labels, num_clusters)
    products = rows @ sums.t()
    squares = rows.square().sum(1)
    first, second = torch.triu_indices(num_clusters, num_clusters, 1, device=rows.device)
    for _ in range(_SWAP_ROUNDS):
        members = torch.sort(labels, stable=True).indices.view(num_clusters, size)
        # gain[a, i, b]: what the i-th member of a gains by going to b
        own = products.gather(1, labels[:, None])
        gain = (products - own)[members]
        value, place = gain.topk(candidates, dim=1)
        moved = members.gather(1, place.reshape(num_clusters, -1)).view_as(place)
        left, right = moved[first, :, second], moved[second, :, first]
        cross = _cross(rows, left, right)
        apart = squares[left][:, :, None] + squares[right][:, None, :] - 2 * cross
        total = value[first, :, second][:, :, None] + value[second, :, first][:, None, :] + apart
        best, where = total.flatten(1).max(1)
        order = torch.sort(best, descending=True, stable=True).indices
        order = order[best[order] > 1e-5]
        used: set[int] = set()
        swaps: list[tuple[int, int, int, int]] = []
        for pair in order.tolist():
            a, b = int(first[pair]), int(second[pair])
            if a in used or b in used:
                continue
            used |= {a, b}
            i, j = divmod(int(where[pair]), candidates)
            swaps.append((a, b, int(left[pair, i]), int(right[pair, j])))
        if not swaps:
            break
        a_ids, b_ids, i_ids, j_ids = (torch.tensor(column, device=rows.device) for column in zip(*swaps, strict=True))
        labels[i_ids], labels[j_ids] = b_ids, a_ids
        step = rows[j_ids] - rows[i_ids]
        change = rows @ step.t()
        products[:, a_ids] += change
        products[:, b_ids] -= change
    return labels


def _cross(rows: Tensor, left: Tensor, right: Tensor, chunk: int = 256) -> Tensor:
    """Inner products of the candidates of each pair of clusters, without gathering all at once."""
    parts = [
        rows[left[start : start + chunk]] @ rows[right[start : start + chunk]].transpose(1, 2)
        for start in range(0, left.shape[0], chunk)
    ]
    return torch.cat(parts)


def _canonical(labels: Tensor) -> Tensor:
    """Renumber clusters by their lowest member, so that equal groupings have equal labels."""
    order = labels.tolist()
    names: dict[int, int] = {}
    for label in order:
        names.setdefault(label, len(names))
    return torch.tensor([names[label] for label in order], dtype=torch.int64)
