"""The leading singular triplets of a tuned matrix together with the verdict on each, as cheap as they can be had."""

from __future__ import annotations

import numpy as np
import torch

from .basis import Basis
from .compare import SMALLEST_CERTIFIED, compare
from .krylov import Bidiagonalisation, Product
from .spectrum import LowRank, Spectrum, factored_svd, svd, working_precision

SMALLEST_KRYLOV = 256  # n from which a few vectors are cheaper than a decomposition
MOST_COLUMNS = 480  # of a Krylov basis
EXTRA_VECTORS = 8
NEAR = 1e-3  # a cosine this close to epsilon is left to `compare`, which knows its error


def basis_for(pretrained: torch.Tensor, store=None) -> Basis | None:
    """The basis of W0 from `store` (a BasisStore), or made here for a small matrix; None where none is needed."""
    if store is not None:
        return store.get(pretrained)
    return Basis.of(pretrained) if min(pretrained.shape) < SMALLEST_CERTIFIED else None


def examine(
    pretrained: torch.Tensor, tuned: LowRank | torch.Tensor, depth: int, epsilon: float, basis: Basis | None = None
) -> tuple[np.ndarray, Spectrum]:
    """(is u_j an intruder, (depth,) bool; the leading `depth` triplets of W, float32), W = `tuned` or W0 + s B A.

    With a basis and a low-rank update, W is diagonal plus rank r, the vectors come from block Krylov in float64, until
    residual over gap is below 1e-4 for each, and the cosines are their entries. Where one lies within 1e-3 of epsilon,
    where that does not converge (close singular values), and in all other cases, `compare` gives the verdicts.
    Raises InputError for what `compare` refuses.
    """
    n = min(pretrained.shape)
    if basis is not None and isinstance(tuned, LowRank) and n >= SMALLEST_KRYLOV and depth <= n // 8:
        found = _in_basis(pretrained, tuned, depth, basis)
        if found is not None and float((found[0] - epsilon).abs().min()) > NEAR:
            return (found[0] < epsilon).numpy(), found[1]
    verdicts = compare(pretrained, tuned, k=depth, epsilon=epsilon, basis=basis).intruder
    return verdicts, leading_triplets(pretrained, tuned, depth)


def leading_triplets(pretrained: torch.Tensor, tuned: LowRank | torch.Tensor, depth: int) -> Spectrum:
    """The leading `depth` triplets of W: U (m, depth), S (depth,), Vh (depth, p), float32.

    By block Krylov without forming W where that converges, else by a decomposition.
    """
    shape = tuple(pretrained.shape)
    if min(shape) >= SMALLEST_KRYLOV and depth <= min(shape) // 8:
        if isinstance(tuned, LowRank):
            operator = Product(pretrained, shape, (tuned.scale * tuned.B).contiguous(), tuned.A.mT.contiguous())
        else:
            operator = Product(tuned, shape)
        found = _krylov(operator, depth, 1e-5)
        if found is not None:
            V = operator.transposed_times(found[0])
            S = torch.linalg.vector_norm(V, dim=0)
            return Spectrum(found[0], S, (V / S).mT)
    W = pretrained + tuned.scale * (tuned.B @ tuned.A) if isinstance(tuned, LowRank) else tuned
    U, S, Vh = svd(working_precision(W))
    return Spectrum(U[:, :depth].float(), S[:depth].float(), Vh[:depth].float())


def _in_basis(pretrained, tuned: LowRank, depth: int, basis: Basis) -> tuple[torch.Tensor, Spectrum] | None:
    """(best matches (depth,), triplets) from U0^T W V0 = diag(S) + U0^T (s B A) V0, or None without convergence."""
    m, p = pretrained.shape
    U0, V0 = basis.U, basis.Vh.mT
    update = factored_svd(tuned.B.double(), tuned.A.double(), tuned.scale)
    left, right = update.U * update.S, update.Vh.mT
    # A few rows times a matrix: twice as fast as the matrix times a few columns.
    inner_left, inner_right = (left.mT.to(U0) @ U0).mT.double(), (right.mT.to(V0) @ V0).mT.double()
    # A tall W has directions outside span(U0), a wide one outside span(V0): coordinates of their own, no cosine.
    rows, columns = inner_left, inner_right
    if m > p:
        rows = torch.cat([rows, torch.linalg.qr(left - U0.double() @ inner_left).R])
    elif p > m:
        columns = torch.cat([columns, torch.linalg.qr(right - V0.double() @ inner_right).R])
    operator = Product(basis.S.double(), (len(rows), len(columns)), rows, columns)
    found = _one_sided(operator, depth)
    if found is None:
        return None
    U, S = found
    cosines = U[: len(basis.S)].abs().amax(0).clamp(max=1.0)
    B, A = tuned.B, tuned.A
    if m > p:
        V = ((operator.transposed_times(U) / S).mT.to(V0) @ basis.Vh).mT.float()
        vectors = (pretrained @ V + tuned.scale * (B @ (A @ V))) / S.to(V)
        return cosines.cpu(), Spectrum(vectors, S.float(), V.mT)
    rows = (U.mT.to(U0) @ U0.mT).float()
    Vh = (rows @ pretrained + tuned.scale * ((rows @ B) @ A)) / S.to(rows)[:, None]
    return cosines.cpu(), Spectrum(rows.mT.contiguous(), S.float(), Vh)


def _one_sided(operator: Product, depth: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(U (m, depth), S (depth,)) of an operator that is cheap to multiply with, float64, or None without convergence.

    Block Krylov space of W W^T with Rayleigh-Ritz on W^T Q. Stops when each |W W^T u_j - sigma_j^2 u_j| is below 1e-4
    times the gap of sigma_j^2 to its neighbours (their estimates, the one below the last included) and 1e-6 sigma_1^2.
    """
    rows, columns = operator.shape
    block = depth + EXTRA_VECTORS
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, block, generator=generator, dtype=torch.float64).to(operator.matrix)
    most = MOST_COLUMNS // block
    Q, T, G = (
        X.new_zeros(rows, most * block),
        X.new_zeros(columns, most * block),
        X.new_zeros(most * block, most * block),
    )
    for step in range(most):
        old, new, both = slice(0, step * block), slice(step * block, (step + 1) * block), slice(0, (step + 1) * block)
        for _ in range(2):
            X = torch.linalg.qr(X - Q[:, old] @ (Q[:, old].mT @ X)).Q
        Q[:, new], T[:, new] = X, operator.transposed_times(X)
        G[both, new] = T[:, both].mT @ T[:, new]
        G[new, both] = G[both, new].mT
        X = operator.times(T[:, new])
        if step >= 3 and step % 2:
            theta, Z = torch.linalg.eigh(G[both, both])
            theta, Z = theta.flip(0)[: depth + 1], Z.flip(1)[:, :depth]
            U = Q[:, both] @ Z
            residual = torch.linalg.vector_norm(operator.times(T[:, both] @ Z) - U * theta[:depth], dim=0)
            below = theta[:-1] - theta[1:]
            gap = torch.minimum(below, torch.cat([below.new_full((1,), torch.inf), below[:-1]]))
            if bool((residual <= torch.minimum(1e-4 * gap, 1e-6 * theta[0])).all()):
                return U, theta[:depth].sqrt()
    return None


def _krylov(operator: Product, depth: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(U (m, depth), S (depth,)) whose residuals are all below tolerance * sigma_1, or None."""
    n, _ = operator.sides
    block = depth + EXTRA_VECTORS
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64).to(operator.matrix)
    space = Bidiagonalisation(operator, start, MOST_COLUMNS // block)
    while space.advance(6 if space.steps == 0 else 3):
        ritz = space.ritz()
        if float(ritz.residual[:depth].max()) <= tolerance * float(ritz.sigma[0]):
            return space.left_vectors(ritz, depth), ritz.sigma[:depth].to(start)
    return None
