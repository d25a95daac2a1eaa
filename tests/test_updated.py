"""The leading vectors of W0 + s B A in the basis of W0: right, within their error bound, and with nothing missing."""

import numpy as np
import pytest
import torch

from intruder.basis import Basis
from intruder.leading import examine
from intruder.mitigate_layer import Layer, Settings, mitigate_layer
from intruder.spectrum import LowRank
from intruder.updated import Side, in_basis, leading_updated

SHAPES = [(160, 160), (260, 150), (150, 260)]


def _pair(shape, rank=5, strength=7.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m, p = shape
    U, V = (torch.linalg.qr(torch.randn(side, 12, generator=generator)).Q for side in shape)
    W0 = torch.randn(shape, generator=generator) / (m**0.5 + p**0.5) + (U * torch.linspace(5, 1.5, 12)) @ V.T
    B, A = torch.randn(m, rank, generator=generator) / m**0.5, torch.randn(rank, p, generator=generator) / p**0.5
    return W0, LowRank(B * torch.linspace(1, 0.3, rank), A, strength)


def _truth(W0, update):
    W = W0.double() + update.scale * (update.B.double() @ update.A.double())
    return torch.linalg.svd(W, full_matrices=False), torch.linalg.svd(W0.double(), full_matrices=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [Basis, Side])
def test_triplets_and_cosines_are_those_of_the_dense_matrix(shape, kind):
    """sigma, the vectors up to sign within the stated error, and the cosines with every x_i, from either basis."""
    W0, update = _pair(shape)
    (U, S, _), (U0, _, _) = _truth(W0, update)
    found = leading_updated(kind.of(W0), update, 8, pretrained=W0)
    np.testing.assert_allclose(found.sigma, S[:8], rtol=1e-9)
    # without their signs, which are arbitrary on both sides
    distance = torch.linalg.vector_norm(found.inside.abs() - (U0.T @ U[:, :8]).abs(), dim=0)
    assert bool((distance <= found.error + 1e-9).all()) and float(found.error.max()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_count_is_that_of_a_decomposition(shape):
    """#{ sigma_j^2 > t } between any two singular values, and -1 on a pole; also without an update."""
    for W0, update in (_pair(shape), _pair(shape, strength=0.0)):
        S = _truth(W0, update)[0].S
        sides, _ = in_basis(Basis.of(W0), update)
        for j in (1, 2, 7, 40, 100):
            assert sides.count_above(float((S[j - 1] + S[j]) / 2) ** 2) == j
        assert sides.count_above(float(sides.d[3]) ** 2) == -1


def test_a_direction_that_the_start_does_not_hold_is_not_missed():
    """A start that is blind to the strongest vector of all: found, or the list is not called complete."""
    W0 = torch.diag(torch.linspace(3, 1, 200))
    B, A = torch.zeros(200, 1), torch.zeros(1, 200)
    B[150], A[0, 160] = 1.0, 1.0
    start = torch.eye(200, 18, dtype=torch.float64)
    found = leading_updated(Basis.of(W0), LowRank(B, A, 10.0), 10, start=start)
    assert found is None or not bool(torch.isfinite(found.error).all()) or float(found.sigma[0]) > 9


def test_equal_singular_values_are_not_told_apart():
    """Within a cluster the error is infinite; verdicts then come from elsewhere and are those of a decomposition."""
    W0, update = torch.eye(128) * 2.0, _pair((128, 128), 2, 6.0)[1]
    found = leading_updated(Basis.of(W0), update, 8)
    assert found is None or torch.isinf(found.error[4:]).all()
    exact = _truth(W0, update)[0]
    vectors = examine(W0, update, 8, 0.5, Basis.of(W0)).vectors
    np.testing.assert_allclose(vectors.S, exact.S[:8], rtol=1e-5)


def test_one_side_is_refused_where_squares_hide_too_much():
    """A matrix with a singular value of 1e-8 sigma_1 or 0 has no side; examine then decomposes it."""
    W0 = torch.diag(torch.cat([torch.linspace(3, 1, 119), torch.tensor([1e-8])])).double()
    assert Side.of(W0) is None and Side.of(torch.zeros(120, 120)) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_from_before_the_edit_gives_the_recount(shape):
    """After scaling two intruders, examine with the earlier vectors as a start agrees with a fresh one."""
    W0, update = _pair(shape)
    basis = Side.of(W0)
    first = examine(W0, update, 8, 0.5, basis)
    outcome = mitigate_layer(Layer("w", W0, update), Settings(0.2, "all", k=8))
    again = examine(W0, outcome.update, 8, 0.5, basis, first.start)
    fresh = examine(W0, outcome.update, 8, 0.5, Basis.of(W0))
    assert first.intruder.any() and (again.intruder == fresh.intruder).all()
    np.testing.assert_allclose(again.vectors.S, fresh.vectors.S, rtol=1e-5)
    assert outcome.facts["before"] == first.intruder.sum() and outcome.facts["after"] == fresh.intruder.sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", ["top", "all"])
def test_the_edit_of_a_larger_layer_is_the_dense_one(shape, which):
    """W + (lambda - 1) sum u sigma v^T by numpy in float64, at sizes where nothing is decomposed."""
    W0, update = _pair(shape)
    (U, S, Vh), (U0, _, _) = _truth(W0, update)
    outcome = mitigate_layer(Layer("w", W0, update), Settings(0.25, which, k=8))
    chosen = [j for j in range(8) if float((U0.T @ U[:, j]).abs().max()) < 0.5]
    chosen = chosen[:1] if which == "top" else chosen
    W = U @ torch.diag(S) @ Vh
    W -= 0.75 * (U[:, chosen] * S[chosen]) @ Vh[chosen]
    B, A, scale = outcome.update
    got = W0.double() + scale * (B.double() @ A.double())
    assert chosen and outcome.facts["edited"] == [[j + 1 for j in chosen]]
    assert float(torch.linalg.matrix_norm(got - W)) < 1e-4 * float(S[0])
