"""Decompositions: reconstruction, orthogonality, factored updates, effective rank, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intruder import InputError
from intruder.spectrum import effective_rank, factored_svd, svd, working_precision

SHAPES = [(7, 7), (12, 5), (5, 12), (1, 6)]


def random_matrix(shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decomposition_gives_the_matrix_back(shape):
    """U diag(S) Vh = W with orthonormal columns of U and rows of Vh, S falling, thin shapes."""
    W = random_matrix(shape)
    U, S, Vh = svd(W)
    n = min(shape)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], n), (n,), (n, shape[1]))
    np.testing.assert_allclose(U * S @ Vh, W, atol=1e-12)
    np.testing.assert_allclose(U.T @ U, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(n), atol=1e-12)
    assert (S.diff() <= 0).all()
    np.testing.assert_allclose(S, np.linalg.svd(W.numpy(), compute_uv=False), atol=1e-12)


def test_the_rows_of_Vh_beyond_the_rank_are_annihilated():
    """For a matrix of rank r, W @ Vh[r:].T = 0: the rows of Vh, not its columns, are the right singular vectors."""
    W = random_matrix((9, 3)) @ random_matrix((3, 8), seed=1)
    np.testing.assert_allclose(W @ svd(W).Vh[3:].T, 0, atol=1e-12)


@pytest.mark.parametrize("m, r, p", [(12, 3, 9), (9, 3, 12), (8, 8, 8), (5, 7, 6)])
def test_the_factored_decomposition_equals_the_dense_one(m, r, p):
    """factored_svd(B, A, s) has the singular values of s B A and gives it back, also for r above a side."""
    B, A, scale = random_matrix((m, r), 2), random_matrix((r, p), 3), -2.5
    dense = scale * B.numpy() @ A.numpy()
    U, S, Vh = factored_svd(B, A, scale)
    q = min(m, r, p)
    assert S.shape == (q,)
    np.testing.assert_allclose(S, np.linalg.svd(dense, compute_uv=False)[:q], rtol=1e-10)
    np.testing.assert_allclose(U * S @ Vh, dense, atol=1e-10)
    np.testing.assert_allclose(U.T @ U, np.eye(q), atol=1e-12)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(q), atol=1e-12)


def test_a_zero_matrix_has_zero_singular_values_and_effective_rank_zero():
    """A zero update is decomposed without complaint and has no rank."""
    spectrum = svd(torch.zeros(4, 3))
    assert spectrum.S.tolist() == [0, 0, 0]
    assert effective_rank(spectrum.S) == 0.0
    assert factored_svd(torch.zeros(4, 2), torch.ones(2, 3)).S.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_to_float32(dtype):
    """A half-precision matrix is decomposed in float32, exactly as its float32 copy is."""
    W = random_matrix((6, 4), dtype=dtype)
    spectrum = svd(W)
    assert spectrum.U.dtype == spectrum.S.dtype == torch.float32
    torch.testing.assert_close(spectrum.S, svd(W.float()).S, rtol=0, atol=0)


def test_precision_follows_the_input_and_the_size():
    """float32 and float64 stay as they are; small matrices are worked on in float64, large ones in float32."""
    assert svd(torch.ones(3, 2)).S.dtype == torch.float32
    assert svd(torch.ones(3, 2, dtype=torch.float64)).S.dtype == torch.float64
    assert working_precision(torch.ones(1024, 1)).dtype == torch.float64
    assert working_precision(torch.ones(1025, 1025, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize(
    "matrix, words",
    [
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, math.inf]]), "infinity"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (np.ones((2, 2)), "ndarray"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(matrix, words):
    """NaN, infinity, vectors, empty, integer and complex tensors, and other types are refused by name."""
    with pytest.raises(InputError, match=words):
        svd(matrix)


def test_factors_that_do_not_fit_are_refused():
    """B of shape (m, r) and A of shape (r, p) must share r."""
    with pytest.raises(InputError, match=r"\(4, 2\).*\(3, 5\)"):
        factored_svd(torch.ones(4, 2), torch.ones(3, 5))


def test_effective_rank_of_known_spectra():
    """n equal values give n; one value gives 1; (1/2, 1/4, 1/4) gives exp(1.5 ln 2) = 2^1.5."""
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), factor=st.floats(1e-3, 1e3))
def test_effective_rank_lies_between_one_and_n_and_ignores_scale(values, factor):
    """1 <= erank <= n, the same after scaling, and equal to a sum written out by hand."""
    S = torch.tensor(values, dtype=torch.float64)
    total = math.fsum(values)
    by_hand = math.exp(-math.fsum(v / total * math.log(v / total) for v in values))
    assert effective_rank(S) == pytest.approx(by_hand, rel=1e-9)
    assert 1 - 1e-9 <= effective_rank(S) <= len(values) + 1e-9
    assert effective_rank(factor * S) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("S", [[], [[1.0]], [-1.0, 2.0], [math.nan]])
def test_numbers_that_are_no_singular_values_are_refused(S):
    """Nothing, a table, a negative value and NaN are refused."""
    with pytest.raises(InputError, match="S "):
        effective_rank(torch.tensor(S))
