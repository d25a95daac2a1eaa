"""The count of singular values above x agrees with a full decomposition, on every shape and next to the poles."""

import pytest
import torch

from intruder.krylov import Product
from intruder.secular import count_above, leading_gaps


def operator(shape: tuple[int, int], rank: int, strength: float, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    d = torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values * 3
    left, right = (torch.randn(side, rank, generator=generator, dtype=torch.float64) for side in shape)
    return Product(d, shape, left * strength**0.5 / n**0.5, right * strength**0.5 / n**0.5)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 3.0, 100.0])
@pytest.mark.parametrize("shape", [(30, 30), (34, 30), (30, 34), (3, 3)])
def test_count_above_equals_the_full_count(shape, strength):
    """At 60 points, some of them 1e-6 from a diagonal entry, a certain count is right and nearly all are certain."""
    for seed in range(4):
        W = operator(shape, min(4, shape[0]), strength, seed)
        S = torch.linalg.svdvals(W.times(torch.eye(shape[1], dtype=torch.float64)))
        points = torch.cat([torch.linspace(0.01, 1.1 * float(S[0]), 50).double(), W.matrix[:10] + 1e-6])
        counts = count_above(W, points)
        certain = counts >= 0
        assert torch.equal(counts[certain], (points[certain, None] < S).sum(1))
        assert float(certain.double().mean()) > 0.9


def test_points_on_a_pole_are_not_certain():
    """x equal to a diagonal entry gives -1, not a number."""
    W = operator((20, 20), 2, 1.0, 0)
    assert int(count_above(W, W.matrix[3:4])[0]) == -1


def test_gaps_are_proven_for_the_true_list_and_refused_for_a_wrong_one():
    """The true values give gaps below half the true distances; a list with a hole gives 0 from the hole on."""
    W = operator((40, 40), 3, 5.0, 1)
    S = torch.linalg.svdvals(W.times(torch.eye(40, dtype=torch.float64)))
    gaps = leading_gaps(W, S, 6)
    assert bool((gaps > 0).all()) and bool((gaps[1:] <= (S[:5] - S[1:6]) / 2 + 1e-12).all())
    holed = leading_gaps(W, torch.cat([S[:2], S[3:]]), 6)
    assert bool((holed[:1] > 0).all()) and bool((holed[2:] == 0).all())
