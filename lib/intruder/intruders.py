"""The paper's definition and nothing else: max cosines (Definition 3.1) and the count (Algorithm 1). numpy only."""

import math
import operator

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError

# Columns must have unit length within this. float32 singular vectors are within 1e-6, half-precision ones within 1e-3.
NORM_TOLERANCE = 1e-3

_MAX_COSINES_CALL = "call max_cosines(pretrained_U, tuned_U) with the U of two thin singular value decompositions"
_COUNT_CALL = "call count_intruders(max_cosine, epsilon=0.5, k=10)"


def max_cosines(pretrained_U: ArrayLike, tuned_U: ArrayLike) -> np.ndarray:
    """Best match of each tuned left singular vector among all pre-trained ones: m_j = max_i |<x_i, y_j>|.

    x_i are the columns of `pretrained_U`, shape (m, n); y_j are the columns of `tuned_U`, shape (m, k). Pass *all*
    n = min(out, in) pre-trained vectors of the thin decomposition: the maximum of Definition 3.1 runs over all of them,
    not over the leading k. `tuned_U` may hold all n tuned vectors or the leading ones only. The absolute value is there
    because singular vectors are determined only up to sign (paper, Fig. 2 caption, and the authors' code).

    Both arrays are converted to float64 and so are the inner products; the result is float64, shape (k,), in [0, 1]
    (values above 1 by rounding are set to 1).

    What the numbers mean: if the x_i span the whole space (out <= in), m_j cannot fall below 1/sqrt(n), and a random
    direction has m_j of about sqrt(2 ln n / n): 0.12 at n = 768 (measured). If the matrix is tall (out > in), the x_i
    span only n of the m dimensions, y_j may leave that span and m_j can fall to 0.

    Raises InputError if an array is not two-dimensional, is empty, holds NaN or infinity, has more columns than rows,
    has a column whose length differs from 1 by more than 1e-3, or if the two numbers of rows differ.
    Degenerate case: if singular values coincide, their vectors are one arbitrary basis of a subspace, and m_j depends
    on which basis the decomposition returned.

    Source: Definition 3.1 and Algorithm 1 of arXiv 2410.21228.
    """
    X = _unit_columns(pretrained_U, "pretrained_U")
    Y = _unit_columns(tuned_U, "tuned_U")
    if X.shape[0] != Y.shape[0]:
        raise InputError(
            f"pretrained_U has shape {X.shape} and tuned_U has shape {Y.shape}; wanted the same number of rows, that "
            "is "
            f"two matrices of the same shape; {_MAX_COSINES_CALL}"
        )
    return np.minimum(np.abs(X.T @ Y).max(axis=0), 1.0)


def count_intruders(max_cosine: ArrayLike, epsilon: float = 0.5, k: int = 10) -> int:
    """Number of intruder dimensions of one matrix: #{ j <= k : m_j < epsilon }.

    `max_cosine` is the vector (m_1, m_2, ...) from `max_cosines`, shape (n,), in the order of falling singular values
    of the tuned matrix. The comparison is strict: m_j equal to epsilon is not an intruder. It is made in float64 with
    the value that is stored, so a float32 record is compared as the number it holds. Returns a Python int in [0, k].

    Raises InputError if `max_cosine` is not one vector, is empty, holds NaN or a value outside [0, 1], if epsilon is
    not in (0, 1], or if k is not a whole number in [1, n]. The model's total is the sum over its matrices.

    Source: Algorithm 1 of arXiv 2410.21228; the paper's defaults are epsilon = 0.5, k = 10.
    """
    values = _as_float64(max_cosine, "max_cosine", _COUNT_CALL)
    if values.ndim != 1 or values.size == 0:
        raise InputError(
            f"max_cosine has shape {values.shape}; wanted the vector of one matrix, shape (n,) with n >= 1; "
            f"{_COUNT_CALL}"
        )
    if not np.isfinite(values).all():
        raise InputError(f"max_cosine holds NaN or infinity; wanted finite values in [0, 1]; {_COUNT_CALL}")
    if values.min() < 0 or values.max() > 1 + NORM_TOLERANCE:
        raise InputError(
            f"max_cosine runs from {values.min():.6g} to {values.max():.6g}; wanted absolute cosines in [0, 1] "
            f"as max_cosines returns them; {_COUNT_CALL}"
        )
    epsilon = check_epsilon(epsilon)
    k = check_k(k)
    if k > values.size:
        raise InputError(
            f"k={k} was given for {values.size} singular vectors; wanted 1 <= k <= {values.size}; {_COUNT_CALL}"
        )
    return int(np.count_nonzero(values[:k] < epsilon))


def check_epsilon(epsilon: float) -> float:
    """Return epsilon as a float, or raise InputError unless 0 < epsilon <= 1."""
    try:
        value = float(epsilon)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise InputError(
            f"epsilon={epsilon!r} was given; wanted a number with 0 < epsilon <= 1, for example epsilon=0.5"
        )
    return value


def check_k(k: int) -> int:
    """Return k as an int, or raise InputError unless k is a whole number and at least 1."""
    try:
        value = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        value = 0
    if value < 1:
        raise InputError(f"k={k!r} was given; wanted a whole number k >= 1, for example k=10")
    return value


def _as_float64(values: ArrayLike, name: str, call: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if np.iscomplexobj(array):
            raise TypeError("complex values")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of real numbers ({error}); {call}") from error


def _unit_columns(U: ArrayLike, name: str) -> np.ndarray:
    array = _as_float64(U, name, _MAX_COSINES_CALL)
    if array.ndim != 2 or array.size == 0:
        raise InputError(
            f"{name} has shape {array.shape}; wanted a two-dimensional array with one singular vector per column; "
            f"{_MAX_COSINES_CALL}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; wanted finite numbers; {_MAX_COSINES_CALL}")
    if array.shape[1] > array.shape[0]:
        raise InputError(
            f"{name} has shape {array.shape}, more columns than rows; wanted left singular vectors as columns; "
            f"{_MAX_COSINES_CALL}"
        )
    lengths = np.linalg.norm(array, axis=0)
    worst = int(np.argmax(np.abs(lengths - 1)))
    if abs(lengths[worst] - 1) > NORM_TOLERANCE:
        raise InputError(
            f"column {worst} of {name} has length {lengths[worst]:.6g}; wanted length 1 within {NORM_TOLERANCE:g}; "
            f"{_MAX_COSINES_CALL}"
        )
    return array
