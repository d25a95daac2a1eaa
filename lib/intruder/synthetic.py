"""Matrices whose number of intruder dimensions is known, and random updates matched to a given one. numpy only."""

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError

# An intruder is planted as an even mix of at least this many pre-trained vectors, so that its best match stays < 0.3.
SMALLEST_SPREAD = 20
# It enters with at least this multiple of the largest pre-trained singular value, so that it leads and stays even.
SMALLEST_STRENGTH = 5.0

_PLANTED_CALL = "call planted_intruders((128, 128), count=2, strength=10, seed=0)"
_NULL_CALL = "call matched_null(pretrained, update, seed=0)"


def planted_intruders(
    shape: tuple[int, int], count: int, strength: float = 10.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A pre-trained matrix and a tuned one with exactly `count` intruder dimensions, the leading ones.

    With (m, p) = `shape` and n = min(m, p): W0 = U diag(sigma) Vh with random orthonormal U and Vh and sigma falling
    geometrically from 10 to 0.01. The n pre-trained directions are dealt out to `count` groups; within group j

        W = W0 + sum_j lambda_j a_j b_j^T,   a_j = sum_{i in group j} s_i u_i / sqrt(q),   b_j likewise of the v_i,

    with random signs s_i, q = floor(n / count) directions in a group, and lambda_j = strength * sigma_1 * (1 + (count -
    j) / (4 count)). So the update has rank `count`, the new vectors a_j lie in the span of U but match no single u_i
    (their best match is about 1 / sqrt(q)), and every other tuned vector keeps one pre-trained vector with a cosine
    above 0.6. Hence count_intruders gives exactly `count` at epsilon = 0.3 and 0.5 for every k >= count, and
    min(k, count) for smaller k.

    Returns (pretrained, tuned), both float64 of the given shape; the same seed gives the same matrices.
    count = 0 gives two equal matrices. Raises InputError if count < 0, if a group would hold fewer than 20 directions
    (n < 20 count), or if strength < 5: below these the number of intruders is no longer certain.

    Source: our own construction; paper, section 4 and appendix A.3 (a strong direction outside the pre-trained ones).
    """
    rows, columns, n = _shape(shape, _PLANTED_CALL)
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
        raise InputError(f"count={count!r} was given; wanted a whole number >= 0; {_PLANTED_CALL}")
    if count and n // count < SMALLEST_SPREAD:
        raise InputError(
            f"count={count} was given for shape {tuple(shape)}; wanted count <= {n // SMALLEST_SPREAD} "
            f"(min(shape) / {SMALLEST_SPREAD}); {_PLANTED_CALL}"
        )
    if not strength >= SMALLEST_STRENGTH or not np.isfinite(strength):
        raise InputError(
            f"strength={strength!r} was given; wanted a finite multiple >= {SMALLEST_STRENGTH:g} of the largest "
            f"pre-trained singular value; {_PLANTED_CALL}"
        )
    rng = np.random.default_rng(seed)
    U, V = _random_orthonormal(rng, rows, n), _random_orthonormal(rng, columns, n)
    sigma = np.geomspace(10.0, 0.01, n)
    pretrained = (U * sigma) @ V.T
    tuned = pretrained.copy()
    for j in range(count):
        group = np.arange(j, n, count)[: n // count]
        mix = rng.choice([-1.0, 1.0], size=group.size) / np.sqrt(group.size)
        weight = strength * sigma[0] * (1 + (count - 1 - j) / (4 * count))
        tuned += weight * np.outer(U[:, group] @ mix, V[:, group] @ mix)
    return pretrained, tuned


def matched_null(pretrained: ArrayLike, update: ArrayLike, seed: int = 0) -> np.ndarray:
    """An update with the singular values of `update` and random directions: N = P diag(sigma(update)) Q^T.

    P and Q have independent Haar-distributed orthonormal columns. `pretrained` and `update` have the same shape (m, p);
    the pre-trained matrix is only checked, because a random direction needs none of it. Add the result to it and count:
    a count on a trained update means something only beside this one, since a random direction of enough strength is an
    intruder too. Returns float64, shape (m, p), with the Frobenius norm of the update; a zero update gives zeros.

    Raises InputError if the shapes differ, an array is not a matrix, or a value is NaN or infinite.

    Source: our own control; compare paper.md section 1.3 on what epsilon measures.
    """
    pretrained, update = np.asarray(pretrained, dtype=np.float64), np.asarray(update, dtype=np.float64)
    if pretrained.ndim != 2 or pretrained.shape != update.shape:
        raise InputError(
            f"pretrained has shape {pretrained.shape} and update has shape {update.shape}; wanted two matrices of the "
            f"same shape; {_NULL_CALL}"
        )
    if not (np.isfinite(pretrained).all() and np.isfinite(update).all()):
        raise InputError(f"pretrained or update holds NaN or infinity; wanted finite numbers; {_NULL_CALL}")
    return random_update(update.shape, np.linalg.svd(update, compute_uv=False), seed)


def random_update(shape: tuple[int, int], singular_values: ArrayLike, seed: int = 0) -> np.ndarray:
    """P diag(S) Q^T with Haar-distributed P, Q and the given singular values S; the heart of `matched_null`.

    `singular_values` has shape (r,) with r <= min(shape); zeros are dropped, so a low-rank update costs little.
    Returns float64 of the given shape. Raises InputError for a negative or non-finite value, or too many of them.
    """
    rows, columns, n = _shape(shape, _NULL_CALL)
    S = np.asarray(singular_values, dtype=np.float64)
    if S.ndim != 1 or S.size > n or not np.isfinite(S).all() or (S < 0).any():
        raise InputError(
            f"singular_values of shape {S.shape} were given for a matrix of shape {(rows, columns)}; wanted at most "
            f"{n} "
            f"finite values >= 0; {_NULL_CALL}"
        )
    S = S[S > 0]
    rng = np.random.default_rng(seed)
    if S.size == 0:
        return np.zeros((rows, columns))
    return (_random_orthonormal(rng, rows, S.size) * S) @ _random_orthonormal(rng, columns, S.size).T


def _random_orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Haar-distributed orthonormal columns: Q of a Gaussian matrix, signs fixed so that R has a positive diagonal."""
    Q, R = np.linalg.qr(rng.standard_normal((rows, columns)))
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)


def _shape(shape: tuple[int, int], call: str) -> tuple[int, int, int]:
    try:
        rows, columns = (int(side) for side in shape)
    except (TypeError, ValueError) as error:
        raise InputError(f"shape={shape!r} was given; wanted (rows, columns); {call}") from error
    if min(rows, columns) < 1:
        raise InputError(f"shape={shape!r} was given; wanted two positive whole numbers; {call}")
    return rows, columns, min(rows, columns)
