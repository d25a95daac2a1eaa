"""The definition: max cosines and the count of Algorithm 1, against hand loops and matrices whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intruder import InputError, count_intruders, max_cosines
from intruder.synthetic import planted_intruders


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def left_vectors(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, full_matrices=False)[0]


def count_by_hand(W0: np.ndarray, W: np.ndarray, epsilon: float, k: int) -> int:
    """Algorithm 1 word by word: for each of the k leading tuned vectors, look at every pre-trained one."""
    U0, U = left_vectors(W0), left_vectors(W)
    total = 0
    for j in range(k):
        cosines = [abs(sum(a * b for a, b in zip(U0[:, i], U[:, j], strict=True))) for i in range(U0.shape[1])]
        if all(cosine < epsilon for cosine in cosines):
            total += 1
    return total


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    seed=st.integers(0, 999),
    epsilon=st.sampled_from([0.3, 0.6, 0.9]),
)
def test_counting_is_algorithm_1_word_by_word(rows, columns, seed, epsilon):
    """On random matrices of any shape, every k gives the number that the loop of Algorithm 1 gives."""
    rng = np.random.default_rng(seed)
    W0 = rng.standard_normal((rows, columns))
    W = W0 + rng.standard_normal((rows, columns))
    m = max_cosines(left_vectors(W0), left_vectors(W))
    for k in range(1, min(rows, columns) + 1):
        assert count_intruders(m, epsilon, k) == count_by_hand(W0, W, epsilon, k)


def test_an_unchanged_matrix_has_no_intruder():
    """W = W0, W = 3 W0 and W = -W0 give m_j >= 1 - 1e-12 for every j: no intruder at any epsilon below that."""
    W0 = np.random.default_rng(1).standard_normal((12, 20))
    for factor in (1.0, 3.0, -1.0):
        m = max_cosines(left_vectors(W0), left_vectors(factor * W0))
        assert m.min() >= 1 - 1e-12
        assert m.max() <= 1
        assert count_intruders(m, 0.999, 12) == 0


@settings(max_examples=15, deadline=None)
@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_the_sign_of_a_singular_vector_does_not_matter(signs, seed):
    """Flipping the sign of any x_i or y_j leaves every m_j as it is: the cosine is taken in absolute value."""
    X, Y = orthonormal(8, 6, seed), orthonormal(8, 6, seed + 1)
    expected = max_cosines(X, Y)
    np.testing.assert_array_equal(max_cosines(X * signs, Y), expected)
    np.testing.assert_array_equal(max_cosines(X, Y * signs), expected)


def test_a_vector_opposite_to_a_pretrained_one_is_not_an_intruder():
    """y = -x_2 has m = 1, not 0."""
    X = np.eye(4)[:, :3]
    assert max_cosines(X, -X[:, [1]]).tolist() == [1.0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(2, 10))
def test_the_maximum_runs_over_all_pretrained_vectors_in_any_order(seed, n):
    """Permuting the pre-trained vectors leaves m_j as it is; permuting the tuned ones permutes m_j."""
    X, Y = orthonormal(n, n, seed), orthonormal(n, n, seed + 1)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(max_cosines(X[:, order], Y), max_cosines(X, Y), atol=1e-15)
    np.testing.assert_allclose(max_cosines(X, Y[:, order]), max_cosines(X, Y)[order], atol=1e-15)


def test_a_vector_aligned_with_a_mid_spectrum_one_is_not_an_intruder():
    """An update that lifts x_20 to the top of the spectrum brings nothing new; against the top 10 it would seem to."""
    n, k = 32, 10
    U, V = orthonormal(n, n, 2), orthonormal(n, n, 3)
    W0 = (U * np.linspace(5, 1, n)) @ V.T
    W = W0 + 50 * np.outer(U[:, 19], V[:, 19])
    U0, Ut = left_vectors(W0), left_vectors(W)
    assert count_intruders(max_cosines(U0, Ut), 0.5, k) == 0
    assert count_intruders(max_cosines(U0[:, :k], Ut[:, :k]), 0.5, k) == 1


def test_left_and_right_vectors_give_different_counts_on_a_rectangular_matrix():
    """An update whose left vector is new and whose right vector is old is an intruder on the left side only."""
    m, p = 24, 16
    U, V = orthonormal(m, m, 4), orthonormal(p, p, 5)
    W0 = (U[:, :p] * np.linspace(4, 1, p)) @ V.T
    new_left = W0 + 100 * np.outer(U[:, p], V[:, 0])
    new_right = W0.T + 100 * np.outer(V[:, 0], U[:, p])
    assert count_intruders(max_cosines(left_vectors(W0), left_vectors(new_left)), 0.5, 5) == 1
    assert count_intruders(max_cosines(left_vectors(W0.T), left_vectors(new_left.T)), 0.5, 5) == 0
    assert count_intruders(max_cosines(left_vectors(W0.T), left_vectors(new_right)), 0.5, 5) == 0


def test_a_tuned_vector_can_leave_the_span_of_a_tall_matrix():
    """With out > in, a direction orthogonal to all n pre-trained vectors has m = 0."""
    basis = orthonormal(10, 5, 6)
    assert max_cosines(basis[:, :4], basis[:, 4:])[0] < 1e-12


@pytest.mark.parametrize("n", [2, 3, 16, 768])
def test_the_floor_is_one_over_root_n(n):
    """Against a full basis m_j cannot fall below 1 / sqrt(n), and an even mix of all x_i reaches it."""
    even = np.full((n, 1), 1 / math.sqrt(n))
    assert max_cosines(np.eye(n), even)[0] == pytest.approx(1 / math.sqrt(n), abs=1e-12)
    random = orthonormal(n, 1, n)
    assert max_cosines(np.eye(n), random)[0] >= 1 / math.sqrt(n)


def test_a_random_direction_scores_twelve_hundredths_at_768():
    """The mean of max |cos| of random unit vectors against a basis of 768 is 0.12 (paper.md section 1.3)."""
    vectors = np.random.default_rng(7).standard_normal((768, 200))
    vectors /= np.linalg.norm(vectors, axis=0)
    assert max_cosines(np.eye(768), vectors).mean() == pytest.approx(0.12, abs=0.005)


def test_a_match_equal_to_epsilon_is_not_an_intruder():
    """The comparison is strict: m = epsilon does not count, the next smaller number does."""
    assert count_intruders([0.5, 0.75, 0.25], 0.5, 3) == 1
    assert count_intruders([np.nextafter(0.5, 0), 0.5], 0.5, 2) == 1
    assert count_intruders([1.0, 1.0], 1, 2) == 0


def test_a_float32_match_is_compared_as_the_number_it_holds():
    """float32(0.3) is above 0.3 and float32(0.7) is below 0.7; the comparison is made in float64."""
    assert count_intruders(np.array([0.3], dtype=np.float32), 0.3, 1) == 0
    assert count_intruders(np.array([0.7], dtype=np.float32), 0.7, 1) == 1


@settings(max_examples=25, deadline=None)
@given(m=st.lists(st.floats(0, 1), min_size=1, max_size=12), epsilon=st.floats(0.01, 0.99))
def test_the_count_grows_with_epsilon_and_with_k(m, epsilon):
    """The count never falls when epsilon or k grows, and each step of k adds 0 or 1."""
    counts = [count_intruders(m, epsilon, k) for k in range(1, len(m) + 1)]
    steps = [counts[0], *(b - a for a, b in zip(counts, counts[1:], strict=False))]
    assert set(steps) <= {0, 1}
    assert count_intruders(m, min(1.0, epsilon + 0.01), len(m)) >= counts[-1]


@pytest.mark.parametrize("epsilon", [0.3, 0.5])
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_a_planted_intruder_is_counted_once(epsilon, k):
    """A strong rank-one update spread evenly over the pre-trained vectors is exactly one intruder."""
    W0, W = planted_intruders((64, 64), count=1, seed=k)
    assert count_intruders(max_cosines(left_vectors(W0), left_vectors(W)), epsilon, k) == 1


@pytest.mark.parametrize("epsilon", [0, -0.1, 1.01, float("nan"), float("inf"), "half", None])
def test_epsilon_outside_zero_to_one_is_refused(epsilon):
    """epsilon must satisfy 0 < epsilon <= 1; the message names the value."""
    with pytest.raises(InputError, match=rf"epsilon={epsilon!r}.*0 < epsilon <= 1"):
        count_intruders([0.2, 0.9], epsilon, 1)


@pytest.mark.parametrize("k", [0, -1, 3, 1.5, "2", None, True])
def test_k_outside_one_to_n_is_refused(k):
    """k must be a whole number from 1 to n; the message names the value."""
    with pytest.raises(InputError, match=f"k={k!r}"):
        count_intruders([0.2, 0.9], 0.5, k)


@pytest.mark.parametrize(
    "m, words",
    [
        ([0.1, float("nan")], "NaN"),
        ([[0.1, 0.2]], "shape"),
        ([], "shape"),
        ([-0.9], "-0.9"),
        ([1.5], "1.5"),
        (["a"], "max_cosine"),
    ],
)
def test_a_vector_of_matches_that_cannot_be_one_is_refused(m, words):
    """NaN, a table, nothing, a signed cosine, a value above 1 and text are refused."""
    with pytest.raises(InputError, match=words):
        count_intruders(m, 0.5, 1)


@pytest.mark.parametrize(
    "X, Y, words",
    [
        (np.eye(4), np.eye(5), r"\(4, 4\).*\(5, 5\)"),
        (np.ones(4), np.eye(4), r"pretrained_U has shape \(4,\)"),
        (np.eye(4), np.eye(4)[:, :0], r"tuned_U has shape \(4, 0\)"),
        (2 * np.eye(4), np.eye(4), "column 0 of pretrained_U has length 2"),
        (np.eye(4), np.full((4, 1), np.nan), "tuned_U holds NaN"),
        (np.eye(4)[:2], np.eye(2), "more columns than rows"),
        (np.eye(4) * 1j, np.eye(4), "complex"),
    ],
)
def test_arrays_that_are_not_singular_vectors_are_refused(X, Y, words):
    """Other shapes, NaN, columns that are not of unit length: each refused with the name of the argument."""
    with pytest.raises(InputError, match=words):
        max_cosines(X, Y)


def test_float32_vectors_are_accepted_and_compared_in_float64():
    """Singular vectors from a float32 decomposition give float64 cosines close to those of float64."""
    W0, W = planted_intruders((40, 30), count=1, seed=3)
    exact = max_cosines(left_vectors(W0), left_vectors(W))
    single = max_cosines(left_vectors(W0.astype(np.float32)), left_vectors(W.astype(np.float32)))
    assert single.dtype == np.float64
    np.testing.assert_allclose(single, exact, atol=1e-3)
