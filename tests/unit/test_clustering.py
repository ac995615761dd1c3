from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.clustering import balanced_kmeans, explained_variance_ratio, inertia


@settings(max_examples=30, deadline=None)
@given(clusters=st.integers(1, 9), size=st.integers(1, 7), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_sizes_are_exact_and_labels_canonical(clusters: int, size: int, width: int, seed: int) -> None:
    rows = torch.randn(clusters * size, width, generator=torch.Generator().manual_seed(seed))
    labels = balanced_kmeans(rows, clusters, seed=seed)
    assert torch.bincount(labels, minlength=clusters).eq(size).all()
    firsts = [int((labels == cluster).nonzero()[0]) for cluster in range(clusters)]
    assert firsts == sorted(firsts)


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(8).repeat(16)
    rows = torch.randn(8, 32, generator=generator)[truth] + 0.1 * torch.randn(128, 32, generator=generator)
    labels = balanced_kmeans(rows, 8)
    assert torch.equal(labels, truth)  # canonical numbers: by first member


def test_no_swap_of_two_rows_improves() -> None:
    rows = torch.nn.functional.normalize(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    best = balanced_kmeans(rows, 4)
    for i in range(24):
        for j in range(i):
            labels = best.clone()
            labels[i], labels[j] = best[j], best[i]
            assert inertia(rows, labels, 4) >= inertia(rows, best, 4) - 1e-4


def test_same_seed_same_labels_and_scale_does_not_matter() -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    first = balanced_kmeans(rows, 8, seed=5)
    assert torch.equal(first, balanced_kmeans(rows, 8, seed=5))
    assert torch.equal(first, balanced_kmeans(rows * 4.0, 8, seed=5))
    assert 0 < explained_variance_ratio(rows, first, 8) < 1


@pytest.mark.parametrize("rows", [torch.zeros(12, 4), torch.ones(12, 4), torch.eye(12)])
def test_zero_and_duplicate_rows_are_clustered(rows: torch.Tensor) -> None:
    assert torch.bincount(balanced_kmeans(rows, 3)).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(torch.ones(8, 4), "8 rows cannot be split into 3"), (torch.full((12, 4), torch.nan), "not finite")],
)
def test_rows_that_cannot_be_clustered_are_refused(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_kmeans(rows, 3)
