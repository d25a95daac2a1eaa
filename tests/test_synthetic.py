"""Matrices with a known number of intruders, and the matched random null."""

import numpy as np
import pytest

from intruder import InputError
from intruder.synthetic import matched_null, planted_intruders, random_update


def matches(W0: np.ndarray, W: np.ndarray) -> np.ndarray:
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    U = np.linalg.svd(W, full_matrices=False)[0]
    return np.abs(U0.T @ U).max(axis=0)


@pytest.mark.parametrize("shape", [(60, 60), (120, 60), (60, 128)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("strength", [5.0, 10.0, 1000.0])
def test_planted_intruders_are_exactly_the_leading_ones(shape, count, strength):
    """At epsilon 0.3 and 0.5 the first `count` tuned vectors are intruders and no other one is, whatever k is."""
    for seed in range(3):
        m = matches(*planted_intruders(shape, count, strength=strength, seed=seed))
        assert (m[:count] < 0.3).all()
        assert (m[count:] > 0.55).all()


def test_planted_matrices_have_the_rank_and_the_spectrum_they_say():
    """W0 has singular values falling geometrically from 10 to 0.01, and the update has rank `count`."""
    W0, W = planted_intruders((80, 64), count=3, seed=1)
    np.testing.assert_allclose(np.linalg.svd(W0, compute_uv=False), np.geomspace(10, 0.01, 64), rtol=1e-9)
    assert np.linalg.matrix_rank(W - W0) == 3
    again = planted_intruders((80, 64), count=3, seed=1)
    np.testing.assert_array_equal(W, again[1])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"shape": (30, 30), "count": 2}, "count=2.*count <= 1"),
        ({"shape": (30, 30), "count": -1}, "count=-1"),
        ({"shape": (30, 30), "count": 1, "strength": 1.0}, "strength=1.0"),
        ({"shape": (30, 30), "count": 1, "strength": float("nan")}, "strength=nan"),
        ({"shape": (0, 30), "count": 0}, r"shape=\(0, 30\)"),
        ({"shape": 30, "count": 0}, "shape=30"),
    ],
)
def test_matrices_whose_answer_would_not_be_certain_are_refused(arguments, words):
    """Too many intruders for the size, or one too weak, is an error that names the value."""
    with pytest.raises(InputError, match=words):
        planted_intruders(**arguments)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_null_has_the_singular_values_of_the_update(shape, rank):
    """The null keeps every singular value, hence the Frobenius norm and the rank, and changes the directions."""
    rng = np.random.default_rng(rank)
    update = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    null = matched_null(np.zeros(shape), update, seed=4)
    sigma = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(null, compute_uv=False), sigma, atol=1e-10 * sigma[0])
    assert np.linalg.norm(null) == pytest.approx(np.linalg.norm(update))
    assert not np.allclose(null, update)
    np.testing.assert_array_equal(null, matched_null(np.zeros(shape), update, seed=4))
    assert not np.allclose(null, matched_null(np.zeros(shape), update, seed=5))


def test_the_directions_of_the_null_are_uniform():
    """Haar directions: the mean of 2000 null directions is near 0, and each coordinate has second moment 1 / n."""
    n = 6
    left = np.stack([random_update((n, n), [1.0], seed)[:, :1] for seed in range(2000)])[:, :, 0]
    outer = np.stack([random_update((n, n), [1.0], seed) for seed in range(2000)])
    assert np.abs(outer.mean(axis=0)).max() < 0.02
    np.testing.assert_allclose((outer**2).mean(axis=0), 1 / n**2, atol=0.006)
    assert abs(np.sign(left[:, 0]).mean()) < 0.07


def test_a_strong_random_update_is_an_intruder_too():
    """The null is a control, not a zero: a strong random direction also has a low best match."""
    W0, W = planted_intruders((64, 64), count=1, seed=2)
    assert matches(W0, W0 + matched_null(W0, W - W0, seed=3))[0] < 0.5


def test_a_zero_update_has_a_zero_null():
    """No update, no null."""
    assert not matched_null(np.ones((3, 4)), np.zeros((3, 4)), seed=0).any()


@pytest.mark.parametrize(
    "pretrained, update, words",
    [
        (np.ones((3, 4)), np.ones((4, 3)), r"\(3, 4\).*\(4, 3\)"),
        (np.ones(3), np.ones(3), "shape"),
        (np.ones((2, 2)), np.full((2, 2), np.nan), "NaN"),
    ],
)
def test_a_null_of_what_is_no_update_is_refused(pretrained, update, words):
    """Different shapes, vectors and NaN are refused."""
    with pytest.raises(InputError, match=words):
        matched_null(pretrained, update, seed=0)


def test_singular_values_that_cannot_be_are_refused():
    """Too many, negative or NaN singular values are refused."""
    for values in ([1.0] * 4, [-1.0], [float("nan")]):
        with pytest.raises(InputError, match="singular_values"):
            random_update((3, 5), values, seed=0)
