"""Singular value decompositions on any device, of a matrix or of a factored update, and the effective rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .errors import InputError


class Spectrum(NamedTuple):
    """Thin singular value decomposition W = U diag(S) Vh.

    U has shape (m, n), S has shape (n,) in falling order, Vh has shape (n, p) with the right singular vectors as its
    *rows*. The sign of each pair (U[:, i], Vh[i]) is arbitrary, and vectors of equal singular values are an arbitrary
    basis of their subspace.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


class LowRank(NamedTuple):
    """A low-rank update Delta W = scale * B A that is kept in factors: B has shape (m, r) and A has shape (r, p)."""

    B: torch.Tensor
    A: torch.Tensor
    scale: float = 1.0


def svd(matrix: torch.Tensor) -> Spectrum:
    """Thin singular value decomposition W = sum_i sigma_i u_i v_i^T, sigma_1 >= sigma_2 >= ... >= 0.

    `matrix` is a real tensor of shape (m, p); n = min(m, p). It is decomposed on its own device in its own precision if
    that is float32 or float64. float16 and bfloat16 are converted to float32 first, because the decomposition does not
    exist in half precision. The result has that dtype and device.

    Raises InputError if the matrix is not a two-dimensional real floating-point tensor, is empty, or holds NaN or
    infinity. A zero matrix has S = 0 and an arbitrary orthonormal U and Vh.

    Source: Algorithm 1, step 1, of arXiv 2410.21228 (the authors use the thin decomposition in float32).
    """
    matrix = real_matrix(matrix, "matrix")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(U, S, Vh)


def factored_svd(B: torch.Tensor, A: torch.Tensor, scale: float = 1.0) -> Spectrum:
    """Thin singular value decomposition of the low-rank update scale * B A without forming it.

    B has shape (m, r) and A has shape (r, p). With B = Q_B R_B and A^T = Q_A R_A (two thin QR decompositions),
    scale * B A = Q_B (scale * R_B R_A^T) Q_A^T, and the middle matrix is at most r by r. Returns q = min(m, r, p)
    singular values with U of shape (m, q) and Vh of shape (q, p); dtype and device as in `svd`. For LoRA,
    scale = alpha / r.

    Raises InputError for what `svd` refuses, and if the inner dimensions of B and A differ. A zero factor gives S = 0.

    Source: paper, section 2 (LoRA update Delta W = (alpha / r) B A).
    """
    B, A = real_matrix(B, "B"), real_matrix(A, "A")
    if B.shape[1] != A.shape[0]:
        raise InputError(
            f"B has shape {tuple(B.shape)} and A has shape {tuple(A.shape)}; wanted (m, r) and (r, p) with the same r; "
            "call factored_svd(B, A, scale)"
        )
    dtype = torch.promote_types(B.dtype, A.dtype)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = svd(float(scale) * (R_B @ R_A.mT))
    return Spectrum(Q_B @ U, S, Vh @ Q_A.mT)


def above_rounding(S: torch.Tensor, shape: Sequence[int], stored: torch.Tensor | None = None) -> torch.Tensor:
    """The singular values S (falling) of an update of shape (m, p) that are above the rounding of float32.

    Cut: eps max(m, p) sigma_1, with eps = 2^-23, the rounding of a float32 product B A. If the update is the difference
    of two matrices of which `stored` is one, also eps (sqrt m + sqrt p) rms(stored), a bound on the spectral norm of the
    rounding of the stored entries. Without the cut an update of rank r would seem to have full rank. Zeros give none.
    """
    rows, columns = shape
    eps = torch.finfo(torch.float32).eps
    floor = eps * max(rows, columns) * float(S[0])
    if stored is not None:
        floor += eps * (rows**0.5 + columns**0.5) * float(stored.float().square().mean().sqrt())
    return S[floor < S]


def effective_rank(S: torch.Tensor) -> float:
    """Effective rank exp(H) with p_i = sigma_i / sum_j sigma_j and H = -sum_i p_i ln p_i (0 ln 0 = 0).

    `S` holds singular values, shape (n,), in any order; computed in float64. The result lies in [1, number of non-zero
    values]: n equal values give n, one non-zero value gives 1. All zeros give 0.0: an update that is absent has no
    rank.

    Raises InputError if S is not one vector, is empty, or holds NaN, infinity or a negative value.

    Source: Roy and Vetterli 2007; used in the paper's section on effective rank.
    """
    values = torch.as_tensor(S).detach().to(torch.float64)
    if values.ndim != 1 or values.numel() == 0:
        raise InputError(f"S has shape {tuple(values.shape)}; wanted singular values of shape (n,); call svd(matrix).S")
    if not torch.isfinite(values).all() or bool((values < 0).any()):
        raise InputError("S holds NaN, infinity or a negative value; wanted singular values; call svd(matrix).S")
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return float(torch.exp(torch.special.entr(p).sum()))


def working_precision(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the precision it is decomposed in: float64 if its smaller side is at most 1024, else float32.

    Cosines of neighbouring trailing vectors are sensitive to rounding, and float64 costs little at these sizes.
    """
    return matrix.detach().to(torch.float64 if min(matrix.shape, default=0) <= 1024 else torch.float32)


def real_matrix(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """The matrix, half precision promoted to float32; InputError unless it is a finite, real, non-empty matrix."""
    if not isinstance(matrix, torch.Tensor):
        raise InputError(
            f"{name} is a {type(matrix).__name__}; wanted a torch tensor; call torch.as_tensor({name}) first"
        )
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise InputError(f"{name} has shape {tuple(matrix.shape)}; wanted a matrix of shape (out, in), not empty")
    if not matrix.dtype.is_floating_point:
        raise InputError(f"{name} has dtype {matrix.dtype}; wanted real floating point; call {name}.float() first")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    # One pass without a copy; a norm that overflows says nothing yet.
    if not torch.isfinite(torch.linalg.vector_norm(matrix)) and not torch.isfinite(matrix).all():
        raise InputError(f"{name} of shape {tuple(matrix.shape)} holds NaN or infinity; wanted finite numbers")
    return matrix.detach()
