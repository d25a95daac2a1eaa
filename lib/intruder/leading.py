"""The leading singular triplets of a tuned matrix together with the verdict on each, as cheap as they can be had."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .basis import Basis
from .comparison import SMALLEST_CERTIFIED, compare
from .krylov import Bidiagonalisation, Product
from .margins import cosine_margins
from .spectrum import LowRank, Spectrum, svd, working_precision
from .updated import Side, leading_updated

SMALLEST_KRYLOV = 96  # n from which a few vectors are cheaper than a decomposition
MOST_COLUMNS = 480  # of a Krylov basis
EXTRA_VECTORS = 8
EXACT = 1e-6  # residual of G u - sigma^2 u, as a share of sigma_1^2


class Examined(NamedTuple):
    """The verdicts on the leading vectors of W, (k,) bool; its triplets, or None if not asked for; a start for more."""

    intruder: np.ndarray
    vectors: Spectrum | None
    start: torch.Tensor | None


def basis_for(pretrained: torch.Tensor, store=None) -> Basis | Side | None:
    """What is to be known of W0 before its tuned versions are examined; None for a large matrix.

    From `store` (a BasisStore) the decomposition; else, for a matrix below the sizes of the certified route, one side.
    """
    if store is not None:
        return store.get(pretrained)
    if min(pretrained.shape) >= SMALLEST_CERTIFIED:
        return None
    return Side.of(pretrained) or Basis.of(pretrained)


def examine(
    pretrained: torch.Tensor,
    tuned: LowRank | torch.Tensor,
    depth: int,
    epsilon: float,
    basis: Basis | Side | None = None,
    start: torch.Tensor | None = None,
    vectors: bool = True,
) -> Examined:
    """Is u_j an intruder, j = 1 .. depth, and the leading `depth` triplets of W in float32; W = `tuned` or W0 + s B A.

    With a basis and a low-rank update, W is diagonal plus rank r (`updated`), and the cosines are the entries of its
    vectors; `start` is what an earlier call on a similar W gave. Where a verdict lies within the error, and in all
    other cases, `compare` gives them. Raises InputError for what `compare` refuses.
    """
    n = min(pretrained.shape)
    found = None
    if basis is not None and isinstance(tuned, LowRank) and n >= SMALLEST_KRYLOV and depth <= n // 8:
        found = leading_updated(basis, tuned, depth, exact=EXACT, start=start, pretrained=pretrained)
    if found is None or not bool(torch.isfinite(found.error).all()):
        whole = basis if isinstance(basis, Basis) else None
        verdicts = compare(pretrained, tuned, k=depth, epsilon=epsilon, basis=whole).intruder
        return Examined(verdicts, leading_triplets(pretrained, tuned, depth) if vectors else None, None)
    outside = (1 - found.inside.square().sum(0)).clamp(min=0)
    tall = pretrained.shape[0] > pretrained.shape[1]
    error = found.error.to(found.inside.device)
    lower, upper = cosine_margins(basis.S.double(), found.inside, outside, error, found.rounding, tall)
    verdicts = (upper < epsilon).numpy()
    if bool(((upper >= epsilon) & (lower < epsilon)).any()):
        whole = basis if isinstance(basis, Basis) else None
        verdicts = compare(pretrained, tuned, k=depth, epsilon=epsilon, basis=whole).intruder
    return Examined(verdicts, _triplets(pretrained, tuned, basis, found) if vectors else None, found.more)


def _triplets(pretrained: torch.Tensor, tuned: LowRank, basis: Basis | Side, found) -> Spectrum:
    """The triplets in the coordinates of W: one half from those of the basis, the other by a product with W."""
    B, A, S = tuned.B, tuned.A, found.sigma.float()
    if pretrained.shape[0] > pretrained.shape[1]:
        side = basis.Vh if isinstance(basis, Basis) else basis.vectors.mT
        V = (found.side.mT.to(side) @ side).mT.float()
        return Spectrum((pretrained @ V + tuned.scale * (B @ (A @ V))) / S, S, V.mT)
    side = basis.U if isinstance(basis, Basis) else basis.vectors
    rows = (found.side.mT.to(side) @ side.mT).float()
    Vh = (rows @ pretrained + tuned.scale * ((rows @ B) @ A)) / S[:, None]
    return Spectrum(rows.mT.contiguous(), S, Vh)


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
