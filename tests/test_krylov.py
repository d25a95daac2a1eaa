"""The bidiagonalisation keeps its two relations and its orthogonality, also where the matrix is exhausted."""

import pytest
import torch
from random_pairs import draw

from intruder.krylov import Bidiagonalisation, Product, frobenius, times_few
from intruder.spectrum import LowRank

BLOCK = 7


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(operator: Product) -> torch.Tensor:
    """A in float64, multiplied out."""
    columns = torch.eye(operator.sides[0], dtype=torch.float64)
    double = [part.double() if isinstance(part, torch.Tensor) else part for part in operator]
    return Product(*double).to_large(columns)


@pytest.mark.parametrize("shape", [(40, 40), (70, 30), (30, 70)])
def test_product_is_the_matrix_and_its_update(shape):
    """to_large and to_small multiply with W0 + left right^T, turned so that the n-side comes first."""
    m, p = shape
    W0, left, right = gaussian(m, p), gaussian(m, 3, 1), gaussian(p, 3, 2)
    operator, W = Product(W0, shape, left, right), W0 + left @ right.T
    A = W if m > p else W.T
    X, Y = gaussian(operator.sides[0], 2, 3), gaussian(operator.sides[1], 2, 4)
    torch.testing.assert_close(operator.to_large(X), A @ X)
    torch.testing.assert_close(operator.to_small(Y), A.T @ Y)
    assert operator.norm() >= float(torch.linalg.matrix_norm(W)) * (1 - 1e-12)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)])
def test_product_of_a_padded_diagonal(shape):
    """A one-dimensional matrix is a diagonal with rows or columns of zeros up to the shape."""
    diagonal = torch.arange(1.0, min(shape) - 1.0).double()
    full = torch.zeros(shape, dtype=torch.float64)
    full[: len(diagonal), : len(diagonal)] = torch.diag(diagonal)
    operator = Product(diagonal, shape)
    torch.testing.assert_close(operator.times(torch.eye(shape[1], dtype=torch.float64)), full)
    torch.testing.assert_close(operator.transposed_times(torch.eye(shape[0], dtype=torch.float64)), full.T)


@pytest.mark.parametrize("columns", [1, 5, 16, 20])
def test_few_columns_are_filled_up_and_cut_again(columns):
    """times_few is the product, for both orientations and above the size from which it adds columns of zeros."""
    W = gaussian(600, 520)
    torch.testing.assert_close(times_few(W, gaussian(520, columns, 1)), W @ gaussian(520, columns, 1))
    torch.testing.assert_close(times_few(W.mT, gaussian(600, columns, 1)), W.T @ gaussian(600, columns, 1))


@pytest.mark.parametrize("shape", [(700, 90), (90, 700), (600, 600)])
def test_residuals_are_those_of_float64(shape):
    """sigma and rho of float32 weights with a float64 update, computed in parts, equal those of the whole matrix."""
    m, p = shape
    operator = Product(gaussian(m, p, 0, torch.float32), shape, gaussian(m, 2, 1), gaussian(p, 2, 2))
    W = operator.matrix.double() + operator.left @ operator.right.T
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sigma, rho = operator.residuals(U[:, :3], Vh[:3].T)
    torch.testing.assert_close(sigma, S[:3])
    assert float(rho.max()) < 1e-11 * float(S[0])
    turned = torch.nn.functional.normalize(U[:, :1] + 1e-3 * U[:, 1:2], dim=0)
    sigma, rho = operator.residuals(turned, Vh[:1].T)
    Hu = torch.cat([W @ Vh[:1].T - sigma * turned, W.T @ turned - sigma * Vh[:1].T])
    assert float(rho) == pytest.approx(float(Hu.norm()) / 2**0.5, rel=1e-9)


def cases():
    random = gaussian(120, 90)
    low = gaussian(100, 12) @ gaussian(12, 100, 1)
    clustered = torch.linalg.qr(gaussian(90, 90)).Q * torch.repeat_interleave(torch.linspace(3, 1, 9), 10)
    headed = gaussian(90, 140) + 50 * gaussian(90, 1, 2) @ gaussian(1, 140, 3)
    return {"random": random, "low rank": low, "clustered": clustered, "orthogonal": clustered / 2, "headed": headed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(cases()))
def test_the_relations_hold_within_the_stated_rounding(name, dtype):
    """A S = P B and A^T P = S B^T + S_next C E^T within `rounding`, and both bases are orthonormal: at every depth."""
    W = cases()[name].to(dtype)
    operator = Product(W, tuple(W.shape))
    space = Bidiagonalisation(operator, gaussian(operator.sides[0], BLOCK, 9, dtype), 30)
    A = dense(operator)
    while space.advance(3):
        size = space.size
        S, P, B = space.S.double(), space.P.double(), space._B[:size, :size]
        left_out = A.T @ P - S @ B.T
        left_out[:, -BLOCK:] -= space._S[:, size : size + BLOCK].double() @ space._C
        assert float(torch.linalg.matrix_norm(A @ S - P @ B, 2)) <= space.rounding
        assert float(torch.linalg.matrix_norm(left_out, 2)) <= space.rounding
        assert space.defect() < 100 * torch.finfo(dtype).eps
    assert space.size + BLOCK <= operator.sides[0]
    assert space.steps == operator.sides[0] // BLOCK - 1


def test_ritz_values_find_the_leading_singular_values():
    """After a few steps the leading Ritz values and vectors are singular values and left singular vectors of W."""
    W = cases()["random"]
    W = W + 30 * gaussian(120, 4, 5) @ torch.diag(torch.tensor([1.0, 0.7, 0.5, 0.3]).double()) @ gaussian(4, 90, 6)
    space = Bidiagonalisation(Product(W, tuple(W.shape)), gaussian(90, BLOCK, 9), 30)
    space.advance(8)
    ritz = space.ritz()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(ritz.sigma[:4], S[:4], rtol=1e-10, atol=0)
    cosines = (space.left_vectors(ritz, 4) * U[:, :4]).sum(0).abs()
    assert float(cosines.min()) > 1 - 1e-10
    assert float(ritz.residual[:4].max()) < 1e-4


def test_frobenius_survives_extreme_scales():
    """The norm is right where squares of float32 would vanish or overflow."""
    matrix = gaussian(8, 5, dtype=torch.float32)
    for scale in (1e-30, 1.0, 1e30):
        expected = float(torch.linalg.vector_norm(matrix.double())) * scale
        assert frobenius(matrix * scale) == pytest.approx(expected, rel=1e-5)


def test_a_zero_matrix_has_no_directions():
    """Nothing is divided by zero: all Ritz values of the zero matrix are zero."""
    space = Bidiagonalisation(Product(torch.zeros(60, 60), (60, 60)), gaussian(60, BLOCK, 1, torch.float32), 4)
    space.advance(2)
    assert float(space.ritz().sigma.abs().max()) < 1e-30


def test_the_case_generator_repeats_itself():
    """The same seed draws the same case, so a failing number can be looked at again."""
    first, second = draw(7), draw(7)
    assert first["kind"] == second["kind"] and first["epsilon"] == second["epsilon"]
    assert torch.equal(first["pretrained"], second["pretrained"])
    assert isinstance(first["change"], (LowRank, torch.Tensor))
