"""Balanced k-means: clusters of exactly equal size.

Lloyd iterations with a greedy balanced assignment give a first solution. Exchanges of two rows then improve the exact
objective, because Lloyd iterations stop early here: with few rows per cluster in many dimensions, a row contributes so
much to its own centre that it stays in its cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LLOYD_ITERATIONS = 30
_SWAP_CANDIDATES = 2
_SWAP_ROUNDS = 500
_SWAPS_PER_CLUSTER = 16
_PAIRS_PER_CLUSTER = 16
# Relative gains per round: below the first, clusters exchange one pair at a time; below the second, the search ends.
_SMALL_GAIN = 1e-4
_NEGLIGIBLE_GAIN = 2e-5


@torch.no_grad()
def balanced_kmeans(points: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster L2-normalised rows into groups of exactly equal size (the paper's expert construction).

    The result depends only on the seed, the device and the number of threads. Memory is linear in the rows.

    Args:
        points: rows ``[n, h]`` of any floating dtype.
        num_clusters: number of clusters, a divisor of n.
        seed: seed of the initial centres.

    Returns:
        Cluster of each row, ``[n]`` int64 on the CPU. Clusters are numbered by their first row.

    Raises:
        ValueError: n is not a multiple of ``num_clusters``, or a value is not finite.
    """
    n = points.shape[0]
    if num_clusters < 1 or n % num_clusters:
        raise ValueError(f"{n} rows cannot be split into {num_clusters} equal clusters")
    if not torch.isfinite(points).all():
        raise ValueError("the rows hold values that are not finite")
    rows = F.normalize(points.detach().to(torch.float32), dim=1)
    if num_clusters == 1:
        labels = torch.zeros(n, dtype=torch.int64)
    elif num_clusters == n:
        labels = torch.arange(n)
    else:
        labels = _swap(rows, _balanced_lloyd(rows, num_clusters, seed), num_clusters)
    numbers: dict[int, int] = {}  # by first row, so that equal groupings have equal labels
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels.tolist()])


def inertia(rows: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Sum the squared distances of rows ``[n, h]`` to their cluster means, in float64."""
    rows = rows.to(
        torch.float64, copy=True
    )  # a copy, so that squaring in place needs no more memory
    sums = _sums(rows, labels.to(rows.device), num_clusters)
    counts = torch.bincount(labels, minlength=num_clusters).clamp(min=1).to(rows)
    return float((rows.square_().sum() - (sums.square().sum(1) / counts).sum()).clamp(min=0))


def explained_variance_ratio(points: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Normalise rows ``[n, h]``, and compute the share of their variance that a clustering explains (0 to 1)."""
    rows = F.normalize(points.detach().float(), dim=1)
    total = inertia(rows, torch.zeros_like(labels), 1)
    return 1.0 - inertia(rows, labels, num_clusters) / total if total > 0 else 0.0


def _sums(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    return rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)


def _initial_centres(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Draw centres as k-means++ does, with a seeded generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(rows.shape[0], (1,), generator=generator))]
    squares = rows.square().sum(1)

    def distance_to(row: int) -> Tensor:
        return squares + squares[row] - 2 * (rows @ rows[row])

    distance = distance_to(chosen[0])
    for _ in range(num_clusters - 1):
        weights = distance.double().cpu().clamp(min=0)
        weights[chosen] = 0
        if (
            float(weights.sum()) < 1e-3
        ):  # only duplicates are left, and the distances are rounding errors
            weights.fill_(1)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, distance_to(chosen[-1]))
    return rows[chosen]


def _balanced_lloyd(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Run balanced k-means. Return labels ``[n]``."""
    size = rows.shape[0] // num_clusters
    centres = _initial_centres(rows, num_clusters, seed)
    best_score = -float("inf")
    for _ in range(_LLOYD_ITERATIONS):
        affinity = rows @ centres.t() - centres.square().sum(1) / 2
        labels = _assign(affinity, size).to(rows.device)
        sums = _sums(rows, labels, num_clusters)
        score = float(sums.double().square().sum())
        if score <= best_score * (1 + 1e-6):
            break
        best, best_score = labels, score
        centres = sums / size
    return best


def _assign(affinity: Tensor, size: int) -> Tensor:
    """Assign rows to clusters with free capacity, in descending order of first minus second affinity."""
    top = affinity.topk(2, dim=1).values
    order = torch.sort(top[:, 0] - top[:, 1], descending=True, stable=True).indices.tolist()
    preferences = torch.sort(affinity, dim=1, descending=True, stable=True).indices.tolist()
    free = [size] * affinity.shape[1]
    labels = [0] * affinity.shape[0]
    for row in order:
        labels[row] = next(cluster for cluster in preferences[row] if free[cluster])
        free[labels[row]] -= 1
    return torch.tensor(labels, dtype=torch.int64)


def _swap(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Exchange pairs of rows between clusters while this lowers the inertia.

    With S_c the sum of cluster c, the inertia is a constant minus sum |S_c|^2 / size. An exchange of row i of cluster a
    with row j of cluster b raises the sum of squares by 2 (g_i + g_j) + 2 |x_i - x_j|^2, with g_i = (S_b - S_a) x_i and
    g_j = (S_a - S_b) x_j. A round makes many exchanges at once. Exchanges of the same cluster influence each other. If
    a round did not raise the sum, it is repeated with one exchange per cluster, whose gain is exact.
    """
    squares = rows.square().sum(1)
    sums = _sums(rows, labels, num_clusters)
    products = rows @ sums.t()
    score, depth, all_pairs = float(sums.double().square().sum()), _SWAPS_PER_CLUSTER, False
    for _ in range(_SWAP_ROUNDS):
        moves = _best_exchanges(rows, squares, labels, products, depth, all_pairs=all_pairs)
        if not moves.numel():
            if depth == 1 and all_pairs:
                break
            depth, all_pairs = 1, True
            continue
        changed = labels.clone()
        changed[moves] = labels[moves.flip(0)]
        changed_sums = _sums(rows, changed, num_clusters)
        changed_score = float(changed_sums.double().square().sum())
        if changed_score <= score:
            if depth == 1:
                break  # the predicted gain was a rounding error
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
    rows: Tensor, squares: Tensor, labels: Tensor, products: Tensor, depth: int, *, all_pairs: bool
) -> Tensor:
    """Select profitable exchanges ``[2, count]`` of rows, each row at most once.

    Args:
        rows: rows ``[n, h]``.
        squares: squared lengths of the rows ``[n]``.
        labels: clusters of the rows ``[n]``.
        products: inner products of the rows with the clusters' sums ``[n, clusters]``.
        depth: maximum number of exchanges per cluster.
        all_pairs: search all pairs of clusters instead of the most promising ones.
    """
    clusters = products.shape[1]
    size = rows.shape[0] // clusters
    candidates = min(_SWAP_CANDIDATES, size)
    members = torch.sort(labels, stable=True).indices.view(clusters, size)
    # gain[a, b, i]: gain of moving the i-th member of a to b
    gain = (products - products.gather(1, labels[:, None]))[members].transpose(1, 2).contiguous()
    value, index = _largest_(gain, candidates)
    moved = members.gather(1, index.view(clusters, -1)).view_as(index)
    first, second = torch.triu_indices(clusters, clusters, 1, device=rows.device)
    if not all_pairs:
        bound = value[first, second, 0] + value[second, first, 0]
        chosen = bound.topk(min(_PAIRS_PER_CLUSTER * clusters, bound.numel())).indices
        first, second = first[chosen], second[chosen]
    left, right = moved[first, second], moved[second, first]
    distance = (
        squares[left][:, :, None]
        + squares[right][:, None, :]
        - 2 * _products_of_pairs(rows, left, right)
    )
    total = value[first, second][:, :, None] + value[second, first][:, None, :] + distance
    best, pair = total.flatten(1).max(1)
    order = torch.sort(best, descending=True, stable=True).indices
    order = order[best[order] > 1e-5]
    i, j = left[order, pair[order] // candidates], right[order, pair[order] % candidates]
    used_clusters, used_rows = [0] * clusters, set[int]()
    moves = []
    for a, b, row, other in torch.stack([first[order], second[order], i, j]).t().tolist():
        if (
            used_clusters[a] < depth
            and used_clusters[b] < depth
            and used_rows.isdisjoint((row, other))
        ):
            used_clusters[a] += 1
            used_clusters[b] += 1
            used_rows |= {row, other}
            moves.append((row, other))
    return torch.tensor(moves, dtype=torch.int64, device=rows.device).t()


def _largest_(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute ``topk`` over the last dimension and overwrite ``values``. Faster than ``topk`` for many short rows."""
    largest = []
    for _ in range(count):
        largest.append(values.max(-1, keepdim=True))
        values.scatter_(-1, largest[-1].indices, -torch.inf)
    return torch.cat([top.values for top in largest], -1), torch.cat(
        [top.indices for top in largest], -1
    )


def _products_of_pairs(rows: Tensor, left: Tensor, right: Tensor, chunk: int = 128) -> Tensor:
    """Compute the inner products of the candidate rows of each pair of clusters, ``chunk`` pairs at a time."""

    def take(candidates: Tensor) -> Tensor:  # index_select is several times faster than indexing
        return rows.index_select(0, candidates.flatten()).view(*candidates.shape, -1)

    pairs = zip(left.split(chunk), right.split(chunk), strict=True)
    return torch.cat([take(a) @ take(b).transpose(1, 2) for a, b in pairs])
