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
_SWAP_CANDIDATES = 2
_SWAP_ROUNDS = 500
_SWAPS_PER_CLUSTER = 16
_PAIRS_PER_CLUSTER = 16
# of the sum of squares, per round: below the first exchanges are made singly, below the second no more
_SMALL_GAIN = 1e-4
_NEGLIGIBLE_GAIN = 2e-5


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
    rows = rows.to(torch.float64, copy=True)  # a copy, whose squares then take no memory of their own
    sums = _sums(rows, labels.to(rows.device), num_clusters)
    counts = torch.bincount(labels, minlength=num_clusters).clamp(min=1).to(rows)
    return float((rows.square_().sum() - (sums.square().sum(1) / counts).sum()).clamp(min=0))


def explained_variance_ratio(points: Tensor, labels: Tensor, num_clusters: int) -> float:
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
    squares = rows.square().sum(1)

    def distance_to(row: int) -> Tensor:
        return squares + squares[row] - 2 * (rows @ rows[row])

    distance = distance_to(first)
    for _ in range(num_clusters - 1):
        weights = distance.double().cpu().clamp(min=0)
        weights[chosen] = 0
        if float(weights.sum()) < 1e-3:  # only duplicates are left: the distances are rounding
            weights = torch.ones(rows.shape[0], dtype=torch.float64)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, distance_to(chosen[-1]))
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
    g_i = (S_b - S_a) x_i and g_j = (S_a - S_b) x_j. Every round makes many exchanges at once. Those of
    one cluster disturb each other a little, so the sum is checked, and a round that did not raise it is
    made again with one exchange a cluster, which is exact.
    """
    labels = labels.clone()
    squares = rows.square().sum(1)
    sums = _sums(rows, labels, num_clusters)
    products = rows @ sums.t()
    score, depth = float(sums.double().square().sum()), _SWAPS_PER_CLUSTER
    everywhere = False
    for _ in range(_SWAP_ROUNDS):
        moves = _best_exchanges(rows, squares, labels, products, depth, everywhere=everywhere)
        if not moves.numel():
            if depth == 1 and everywhere:
                break
            depth, everywhere = 1, True
            continue
        i, j = moves
        changed = labels.clone()
        changed[i], changed[j] = labels[j], labels[i]
        changed_sums = _sums(rows, changed, num_clusters)
        changed_score = float(changed_sums.double().square().sum())
        if changed_score <= score:
            if depth == 1:
                break  # only rounding is left
            depth = 1
            continue
        gain = (changed_score - score) / score
        touched = labels[moves].unique()
        products[:, touched] = rows @ changed_sums[touched].t()
        labels, score = changed, changed_score
        if gain < _NEGLIGIBLE_GAIN:
            break
        if gain < _SMALL_GAIN:
            depth = 1
    return labels


def _best_exchanges(
    rows: Tensor, squares: Tensor, labels: Tensor, products: Tensor, depth: int, *, everywhere: bool
) -> Tensor:
    """Exchanges that pay off, ``[2, count]`` rows: no row twice, no cluster more than ``depth`` times.

    Args:
        rows: ``[n, h]``.
        squares: ``[n]``, their squared lengths.
        labels: ``[n]``, their clusters.
        products: ``[n, clusters]``, inner products of rows with the clusters' sums.
        depth: exchanges of one cluster.
        everywhere: look at all pairs of clusters, not only at the most promising.
    """
    clusters = products.shape[1]
    size = rows.shape[0] // clusters
    candidates = min(_SWAP_CANDIDATES, size)
    members = torch.sort(labels, stable=True).indices.view(clusters, size)
    # gain[a, b, i]: what the i-th member of a gains by going to b
    gain = (products - products.gather(1, labels[:, None]))[members].transpose(1, 2).contiguous()
    value, place = _largest(gain, candidates)
    moved = members.gather(1, place.view(clusters, -1)).view_as(place)
    first, second = torch.triu_indices(clusters, clusters, 1, device=rows.device)
    if not everywhere:
        hope = value[first, second, 0] + value[second, first, 0]
        chosen = hope.topk(min(_PAIRS_PER_CLUSTER * clusters, hope.numel())).indices
        first, second = first[chosen], second[chosen]
    left, right = moved[first, second], moved[second, first]
    apart = squares[left][:, :, None] + squares[right][:, None, :] - 2 * _cross(rows, left, right)
    total = value[first, second][:, :, None] + value[second, first][:, None, :] + apart
    best, where = total.flatten(1).max(1)
    order = torch.sort(best, descending=True, stable=True).indices
    order = order[best[order] > 1e-5]
    where = where[order]
    table = torch.stack(
        [
            first[order],
            second[order],
            left[order, where // candidates],
            right[order, where % candidates],
        ]
    )
    busy, used, moves = [0] * clusters, set(), []
    for a, b, i, j in table.t().tolist():
        if busy[a] < depth and busy[b] < depth and i not in used and j not in used:
            busy[a] += 1
            busy[b] += 1
            used |= {i, j}
            moves.append((i, j))
    return torch.tensor(moves, dtype=torch.int64, device=rows.device).t()


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``topk`` over the last dimension, which changes ``values``; faster for a few of many short rows."""
    found = []
    for _ in range(count):
        largest, place = values.max(-1, keepdim=True)
        found.append((largest, place))
        values.scatter_(-1, place, -torch.inf)
    return torch.cat([largest for largest, _ in found], -1), torch.cat([place for _, place in found], -1)


def _cross(rows: Tensor, left: Tensor, right: Tensor, chunk: int = 128) -> Tensor:
    """Inner products of the candidates of each pair of clusters, without gathering all at once."""

    def chosen(candidates: Tensor) -> Tensor:  # index_select is several times faster than indexing
        return rows.index_select(0, candidates.flatten()).view(*candidates.shape, -1)

    pairs = zip(left.split(chunk), right.split(chunk), strict=True)
    return torch.cat([chosen(one) @ chosen(other).transpose(1, 2) for one, other in pairs])


def _canonical(labels: Tensor) -> Tensor:
    """Renumber clusters by their lowest member, so that equal groupings have equal labels."""
    order = labels.tolist()
    names: dict[int, int] = {}
    for label in order:
        names.setdefault(label, len(names))
    return torch.tensor([names[label] for label in order], dtype=torch.int64)
