"""Balanced k-means: clusters of exactly equal size.

Lloyd iterations with a greedy balanced assignment give a first solution. They stop early: with few
rows per cluster in many dimensions, a row contributes so much to its own centre that it stays in
its cluster. So exchanges of two rows then improve the exact objective.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LLOYD_ITERATIONS = 30
# Lloyd iterations end if the score grows by less than this share
_LLOYD_TOLERANCE = 1e-6
# Rows have length 1. The computed squared distance of two equal rows is about 1e-7, which is a
# rounding error. If the distances of all rows sum to less than this, they are treated as such.
_ROUNDING_ERRORS = 1e-3
# number of rows of a cluster that are tried in exchanges with one other cluster
_EXCHANGE_CANDIDATES = 2
# largest number of rounds of exchanges
_EXCHANGE_ROUNDS = 500
# largest number of exchanges of a cluster in a round with many exchanges
_EXCHANGES_PER_CLUSTER = 16
# a round searches this many pairs of clusters, times the number of clusters
_PAIRS_PER_CLUSTER = 16
# smaller gains of a single exchange may be rounding errors
_SMALLEST_ABSOLUTE_GAIN = 1e-5
# If a round raises the score by less than this share, later rounds make one exchange per cluster.
_SMALL_RELATIVE_GAIN = 1e-4
# If a round raises the score by less than this share, the search ends.
_NEGLIGIBLE_RELATIVE_GAIN = 2e-5
# The inertia of equal rows of length 1 is 0, except for rounding. It is less than this per row.
_ROUNDING_PER_ROW = 1e-12


class _Stage(NamedTuple):
    """One stage of the search for exchanges.

    Attributes:
        exchanges_per_cluster: largest number of exchanges that a cluster takes part in per round.
        all_pairs: search all pairs of clusters instead of the most promising ones.
    """

    exchanges_per_cluster: int
    all_pairs: bool


# The three stages of the search, in their order.
# Fast: many exchanges at once, whose gains are estimates.
_MANY_EXCHANGES = _Stage(exchanges_per_cluster=_EXCHANGES_PER_CLUSTER, all_pairs=False)
# Exact: exchanges of one round share no cluster, so their gains add up.
_ONE_EXCHANGE = _Stage(exchanges_per_cluster=1, all_pairs=False)
# Thorough: exact gains, and no pair of clusters is left out.
_ALL_PAIRS = _Stage(exchanges_per_cluster=1, all_pairs=True)


@torch.no_grad()
def balanced_kmeans(points: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster L2-normalised rows into groups of exactly equal size (the paper's construction).

    The result depends only on the seed, the device and the number of threads. Memory is linear in
    the rows.

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
        first_labels = _balanced_lloyd(rows, num_clusters, seed)
        labels = _exchange_rows(rows, first_labels, num_clusters)
    return _number_by_first_row(labels)


def _number_by_first_row(labels: Tensor) -> Tensor:
    """Renumber clusters in the order of their first rows, so that equal groupings get equal labels.

    Args:
        labels: cluster of each row ``[n]``.
    """
    numbers: dict[int, int] = {}
    numbered = []
    for label in labels.tolist():
        if label not in numbers:
            numbers[label] = len(numbers)
        numbered.append(numbers[label])
    return torch.tensor(numbered)


def inertia(rows: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Sum the squared distances of rows ``[n, h]`` to their cluster means, in float64."""
    # a copy, because it is squared in place below to save memory
    precise_rows = rows.to(torch.float64, copy=True)
    sums = _cluster_sums(precise_rows, labels.to(rows.device), num_clusters)
    # no division by zero for an empty cluster
    counts = torch.bincount(labels, minlength=num_clusters).clamp(min=1).to(precise_rows)
    # sum over rows of |x|^2, minus sum over clusters of count * |mean|^2
    rows_part = precise_rows.square_().sum()
    means_part = (sums.square().sum(1) / counts).sum()
    # rounding may make the difference negative
    return float((rows_part - means_part).clamp(min=0))


def explained_variance_ratio(points: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Compute the share (0 to 1) of the normalised rows' variance that a clustering explains.

    Args:
        points: rows ``[n, h]``; they are L2-normalised first.
        labels: cluster of each row ``[n]``.
        num_clusters: number of clusters.
    """
    rows = F.normalize(points.detach().float(), dim=1)
    # all rows in one cluster, numbered 0
    total = inertia(rows, torch.zeros_like(labels), 1)
    if total > _ROUNDING_PER_ROW * len(rows):
        return 1.0 - inertia(rows, labels, num_clusters) / total
    # equal rows have no variance to explain, only a tiny one from rounding
    return 0.0


def _cluster_sums(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Sum the rows ``[n, h]`` of each cluster: ``[clusters, h]``."""
    return rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)


def _sum_of_squares(sums: Tensor) -> float:
    """Sum the squared lengths of cluster sums ``[clusters, h]`` in float64.

    Clusters have equal sizes, so a larger value is a lower inertia.
    """
    return float(sums.double().square().sum())


def _initial_centres(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Draw the first centres ``[clusters, h]`` from the rows, as k-means++ does.

    The first row is drawn uniformly. Each later row is drawn with a probability proportional to its
    squared distance to the nearest centre so far. If every row equals a centre, the next row is
    drawn uniformly from the rows that are not centres. No row is drawn twice.
    """
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(rows.shape[0], (1,), generator=generator))
    chosen = [first]
    squares = rows.square().sum(1)
    # squared distance of each row to the nearest chosen row [n]
    distance = _squared_distances(rows, squares, first)
    for _ in range(num_clusters - 1):
        weights = distance.double().cpu().clamp(min=0)
        # rows with weight 0 are never drawn
        weights[chosen] = 0
        # If each other row equals a chosen row, all distances are rounding errors. Then the other
        # rows get equal weights.
        if float(weights.sum()) < _ROUNDING_ERRORS:
            weights.fill_(1)
            weights[chosen] = 0
        new = int(torch.multinomial(weights, 1, generator=generator))
        chosen.append(new)
        distance = torch.minimum(distance, _squared_distances(rows, squares, new))
    return rows[chosen]


def _squared_distances(rows: Tensor, squares: Tensor, index: int) -> Tensor:
    """Compute the squared distance ``[n]`` of each row to the row with number ``index``.

    Args:
        rows: rows ``[n, h]``.
        squares: squared lengths of the rows ``[n]``.
        index: number of the row to which distances are computed.
    """
    products = rows @ rows[index]
    return squares + squares[index] - 2 * products


def _balanced_lloyd(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Run Lloyd iterations with clusters of equal size, until the inertia hardly falls.

    Returns:
        Cluster of each row ``[n]``.
    """
    size = rows.shape[0] // num_clusters
    centres = _initial_centres(rows, num_clusters, seed)
    labels = _assign(_affinity(rows, centres), size).to(rows.device)
    sums = _cluster_sums(rows, labels, num_clusters)
    # Clusters have equal sizes, so the inertia is the rows' sum of squares minus score / size. The
    # higher the score, the lower the inertia.
    score = _sum_of_squares(sums)
    for _ in range(_LLOYD_ITERATIONS - 1):
        centres = sums / size
        new_labels = _assign(_affinity(rows, centres), size).to(rows.device)
        new_sums = _cluster_sums(rows, new_labels, num_clusters)
        new_score = _sum_of_squares(new_sums)
        # the assignment is greedy, so the new score may even be lower
        if new_score <= score * (1 + _LLOYD_TOLERANCE):
            break
        labels = new_labels
        sums = new_sums
        score = new_score
    return labels


def _affinity(rows: Tensor, centres: Tensor) -> Tensor:
    """Compute the affinity of each row to each centre. It is higher for a nearer centre.

    A squared distance is ``|row|^2 - 2 * (row @ centre - |centre|^2 / 2)``. The affinity is the
    number in brackets, because ``|row|^2`` is the same for all centres.

    Args:
        rows: rows ``[n, h]``.
        centres: centres ``[clusters, h]``.

    Returns:
        Affinities ``[n, clusters]``.
    """
    half_squares = centres.square().sum(1) / 2
    return rows @ centres.t() - half_squares


def _assign(affinity: Tensor, size: int) -> Tensor:
    """Give each row the cluster with the highest affinity among those that have room.

    Rows choose one after another. The first is the row with the largest gap between its best and
    its second-best affinity.

    Args:
        affinity: affinity of each row to each cluster ``[n, clusters]``.
        size: number of rows that a cluster takes.

    Returns:
        Cluster of each row, ``[n]`` int64 on the CPU.
    """
    best, second_best = affinity.topk(2, dim=1).values.unbind(1)
    gap = best - second_best
    # rows in the order in which they choose
    order = torch.sort(gap, descending=True, stable=True).indices.tolist()
    # for each row, all clusters from the best to the worst
    preferences = torch.sort(affinity, dim=1, descending=True, stable=True).indices.tolist()
    num_rows, num_clusters = affinity.shape
    free = [size] * num_clusters
    labels = [0] * num_rows
    for row in order:
        for cluster in preferences[row]:
            if free[cluster] > 0:
                labels[row] = cluster
                free[cluster] -= 1
                break
    return torch.tensor(labels, dtype=torch.int64)


def _exchange_rows(rows: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Exchange pairs of rows between clusters while this lowers the inertia.

    The sum of the rows of cluster c is S_c. The inertia is a constant minus sum |S_c|^2 / size, so
    exchanges must raise the score, sum |S_c|^2. If row x_i of cluster a and row x_j of cluster b
    change places, the score rises by 2 (g_i + g_j) + 2 |x_i - x_j|^2. The gains are
    g_i = (S_b - S_a) x_i and g_j = (S_a - S_b) x_j.

    The search has three stages. At first, a round makes many exchanges at once. Exchanges of the
    same cluster influence each other, so their gains are estimates. When a round raises the score
    little or not at all, the next rounds make one exchange per cluster, whose gain is exact. When
    no exchange is found, the last stage searches all pairs of clusters. A negligible rise of the
    score ends the search.

    Args:
        rows: rows ``[n, h]``.
        labels: cluster of each row ``[n]``.
        num_clusters: number of clusters.

    Returns:
        Cluster of each row after the exchanges, ``[n]``.
    """
    squares = rows.square().sum(1)
    sums = _cluster_sums(rows, labels, num_clusters)
    products = rows @ sums.t()  # [n, clusters]
    score = _sum_of_squares(sums)
    stage = _MANY_EXCHANGES
    for _ in range(_EXCHANGE_ROUNDS):
        # row numbers [2, count]: the two rows of a column change places
        exchanges = _best_exchanges(rows, squares, labels, products, stage)
        has_found_none = exchanges.numel() == 0
        if has_found_none and stage == _ALL_PAIRS:
            break
        if has_found_none:
            stage = _ALL_PAIRS
            continue

        # flip(0) swaps the two rows of each pair, so that each gets the other one's cluster
        changed_labels = labels.clone()
        changed_labels[exchanges] = labels[exchanges.flip(0)]
        changed_sums = _cluster_sums(rows, changed_labels, num_clusters)
        changed_score = _sum_of_squares(changed_sums)
        if changed_score <= score:
            # with one exchange per cluster gains are exact, so this gain was a rounding error
            if stage != _MANY_EXCHANGES:
                break
            stage = _ONE_EXCHANGE
            continue

        # only the sums of the exchanged rows' clusters have changed
        changed_clusters = labels[exchanges].unique()
        products[:, changed_clusters] = rows @ changed_sums[changed_clusters].t()
        relative_gain = (changed_score - score) / score
        labels = changed_labels
        score = changed_score
        if relative_gain < _NEGLIGIBLE_RELATIVE_GAIN:
            break
        if relative_gain < _SMALL_RELATIVE_GAIN and stage == _MANY_EXCHANGES:
            stage = _ONE_EXCHANGE
    return labels


class _Candidates(NamedTuple):
    """The rows of each cluster that gain most from moving to each other cluster.

    Attributes:
        rows: row numbers ``[clusters, clusters, candidates]``; ``rows[a, b]`` move from a to b.
        gains: gain ``(S_b - S_a) @ row`` of each of these rows, in descending order. S is the sum
            of a cluster's rows.
    """

    rows: Tensor
    gains: Tensor


class _Exchanges(NamedTuple):
    """The best exchange of two rows for each pair of clusters.

    Attributes:
        gain: half of the rise of the score by the exchange ``[pairs]``. The score is the sum of the
            squared lengths of the clusters' sums.
        first_cluster: cluster of the first row ``[pairs]``.
        second_cluster: cluster of the second row ``[pairs]``.
        first_row: row that leaves the first cluster ``[pairs]``.
        second_row: row that leaves the second cluster ``[pairs]``.
    """

    gain: Tensor
    first_cluster: Tensor
    second_cluster: Tensor
    first_row: Tensor
    second_row: Tensor


def _best_exchanges(
    rows: Tensor, squares: Tensor, labels: Tensor, products: Tensor, stage: _Stage
) -> Tensor:
    """Find the exchanges of one round.

    Args:
        rows: rows ``[n, h]``.
        squares: squared lengths of the rows ``[n]``.
        labels: clusters of the rows ``[n]``.
        products: inner products of the rows with the clusters' sums ``[n, clusters]``.
        stage: stage of the search.

    Returns:
        Row numbers ``[2, count]``: each column is a pair of rows that change places. A row is in at
        most one pair.
    """
    num_clusters = products.shape[1]
    # rows that may move, for each pair of clusters
    candidates = _find_candidates(labels, products)
    # the clusters of each pair that is searched: both [pairs]
    first_clusters, second_clusters = _pairs_to_search(candidates.gains, all_pairs=stage.all_pairs)
    best_exchanges = _best_of_each_pair(rows, squares, candidates, first_clusters, second_clusters)
    return _select_exchanges(best_exchanges, num_clusters, stage.exchanges_per_cluster)


def _find_candidates(labels: Tensor, products: Tensor) -> _Candidates:
    """Find, for each ordered pair of clusters, the rows that gain most from moving.

    They move from the first cluster of the pair to the second.

    Args:
        labels: clusters of the rows ``[n]``.
        products: inner products of the rows with the clusters' sums ``[n, clusters]``.
    """
    num_rows, num_clusters = products.shape
    size = num_rows // num_clusters
    # row numbers of each cluster [clusters, size]
    members = torch.sort(labels, stable=True).indices.view(num_clusters, size)
    # gains of moving each row from its own cluster to each other one [n, clusters]
    products_with_own_sum = products.gather(1, labels.unsqueeze(1))  # [n, 1]
    gains_of_rows = products - products_with_own_sum
    # the same, grouped by the rows' own clusters: [own cluster, member, other cluster]
    gains_of_members = gains_of_rows[members]
    # the members last, to find the best of them: [own cluster, other cluster, member]
    gains = gains_of_members.transpose(1, 2).contiguous()
    count = min(_EXCHANGE_CANDIDATES, size)
    # both [own cluster, other cluster, count]; this overwrites `gains`
    largest_gains, positions = _largest_(gains, count)
    # convert positions among a cluster's members into row numbers
    own_clusters = torch.arange(num_clusters, device=members.device).view(-1, 1, 1)
    candidate_rows = members[own_clusters, positions]
    return _Candidates(rows=candidate_rows, gains=largest_gains)


def _pairs_to_search(gains: Tensor, *, all_pairs: bool) -> tuple[Tensor, Tensor]:
    """Choose the pairs of clusters between which exchanges are searched.

    Args:
        gains: gains ``[clusters, clusters, candidates]`` of :class:`_Candidates`, in descending
            order for each pair.
        all_pairs: choose all pairs instead of the most promising ones.

    Returns:
        The first and the second cluster of each pair, both ``[pairs]``.
    """
    num_clusters = gains.shape[0]
    # all pairs of different clusters: (0, 1), (0, 2), ..., (1, 2), ...
    first, second = torch.triu_indices(num_clusters, num_clusters, offset=1, device=gains.device)
    if all_pairs:
        return first, second
    # The gain of a pair's best exchange, estimated without the distance of its two rows. Candidate
    # 0 is the row with the largest gain.
    best_gains = gains[:, :, 0]
    estimated_gains = best_gains[first, second] + best_gains[second, first]
    count = min(_PAIRS_PER_CLUSTER * num_clusters, estimated_gains.numel())
    most_promising = estimated_gains.topk(count).indices
    return first[most_promising], second[most_promising]


def _best_of_each_pair(
    rows: Tensor, squares: Tensor, candidates: _Candidates, first: Tensor, second: Tensor
) -> _Exchanges:
    """Find the best exchange of two candidates for each pair of clusters.

    Args:
        rows: rows ``[n, h]``.
        squares: squared lengths of the rows ``[n]``.
        candidates: rows that may be exchanged.
        first: first cluster of each pair ``[pairs]``.
        second: second cluster of each pair ``[pairs]``.
    """
    # row numbers of the candidates of both clusters [pairs, candidates]
    left = candidates.rows[first, second]
    right = candidates.rows[second, first]
    left_gains = candidates.gains[first, second]
    right_gains = candidates.gains[second, first]
    # Gain of exchanging each candidate on the left with each one on the right: all of these are
    # [pairs, candidates, candidates]. |x - y|^2 is |x|^2 + |y|^2 - 2 x y.
    sums_of_squares = squares[left].unsqueeze(2) + squares[right].unsqueeze(1)
    products = _products_of_pairs(rows, left, right)
    squared_distances = sums_of_squares - 2 * products
    sums_of_gains = left_gains.unsqueeze(2) + right_gains.unsqueeze(1)
    total_gains = sums_of_gains + squared_distances
    best_gain, best = total_gains.flatten(1).max(1)
    # `best` is a position among all combinations: convert it into a position on each side
    num_candidates = left.shape[1]
    best_left = best // num_candidates
    best_right = best % num_candidates
    pair = torch.arange(len(best), device=best.device)
    return _Exchanges(
        gain=best_gain,
        first_cluster=first,
        second_cluster=second,
        first_row=left[pair, best_left],
        second_row=right[pair, best_right],
    )


def _select_exchanges(exchanges: _Exchanges, num_clusters: int, per_cluster: int) -> Tensor:
    """Select exchanges in descending order of gain, at most ``per_cluster`` of each cluster.

    Returns:
        Row numbers ``[2, count]``. Each row takes part in at most one exchange.
    """
    order = torch.sort(exchanges.gain, descending=True, stable=True).indices
    profitable = order[exchanges.gain[order] > _SMALLEST_ABSOLUTE_GAIN]
    # a line of Python numbers for each exchange: its two clusters and its two rows
    columns = [
        exchanges.first_cluster[profitable],
        exchanges.second_cluster[profitable],
        exchanges.first_row[profitable],
        exchanges.second_row[profitable],
    ]
    table = torch.stack(columns).t().tolist()

    exchanges_of_cluster = [0] * num_clusters
    used_rows: set[int] = set()
    selected = []
    for first_cluster, second_cluster, first_row, second_row in table:
        if exchanges_of_cluster[first_cluster] >= per_cluster:
            continue
        if exchanges_of_cluster[second_cluster] >= per_cluster:
            continue
        if first_row in used_rows or second_row in used_rows:
            continue
        exchanges_of_cluster[first_cluster] += 1
        exchanges_of_cluster[second_cluster] += 1
        used_rows.update((first_row, second_row))
        selected.append((first_row, second_row))
    return torch.tensor(selected, dtype=torch.int64, device=order.device).t()


def _largest_(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute ``topk`` over the last dimension and overwrite ``values``.

    Faster than ``topk`` for many short rows.

    Returns:
        The largest values and their positions, both ``[..., count]``.
    """
    largest = []
    positions = []
    for _ in range(count):
        top = values.max(-1, keepdim=True)
        largest.append(top.values)
        positions.append(top.indices)
        # the next pass finds the next largest
        values.scatter_(-1, top.indices, -torch.inf)
    return torch.cat(largest, -1), torch.cat(positions, -1)


def _products_of_pairs(rows: Tensor, left: Tensor, right: Tensor, chunk: int = 128) -> Tensor:
    """Compute the inner products of the candidate rows of each pair of clusters.

    Args:
        rows: rows ``[n, h]``.
        left: row numbers of the first cluster's candidates ``[pairs, candidates]``.
        right: row numbers of the second cluster's candidates ``[pairs, candidates]``.
        chunk: number of pairs that are computed together, which limits the memory.

    Returns:
        Inner products ``[pairs, candidates, candidates]``.
    """
    products = []
    for left_chunk, right_chunk in zip(left.split(chunk), right.split(chunk), strict=True):
        left_rows = _take_rows(rows, left_chunk)
        right_rows = _take_rows(rows, right_chunk)
        products.append(left_rows @ right_rows.transpose(1, 2))
    return torch.cat(products)


def _take_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows ``[..., h]`` with these numbers ``[...]``. Much faster than indexing."""
    return rows.index_select(0, numbers.flatten()).view(*numbers.shape, -1)
