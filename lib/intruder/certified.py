"""The route without a decomposition of W0: leading vectors of W with a proven error, then a verdict on each of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .certificate import Bounds, empty_below, overlap_ceilings, reach, thresholds
from .krylov import Bidiagonalisation, Product, Ritz

RANDOM_VECTORS = 16  # Gaussian vectors beside the k tuned ones in the start block on W0
EXTRA_VECTORS = 8  # start block on W: k + 8 Gaussian vectors
FEWEST_BLOCKS = 3  # a smaller matrix is left to the dense route
MOST_COLUMNS = 480  # of a Krylov basis: memory and the small float64 problems stay far below one matrix
LARGEST_DEFECT = 1e-4  # of orthogonality; beyond it nothing is claimed


class Leading(NamedTuple):
    """Leading left singular vectors of W: sigma (k,) float64, U (m, k), and error (k,) float64.

    error_j >= |u_j - y_j| for the right sign of the true y_j, the j-th left singular vector; infinite where that vector
    could not be told from its neighbours or where the list above it may have a hole.
    """

    sigma: torch.Tensor
    U: torch.Tensor
    error: torch.Tensor


class Verdicts(NamedTuple):
    """matched, intruder (k,) bool, never both; lower <= max_i |<y_j, x_i>| <= upper; value NaN where not known."""

    matched: torch.Tensor
    intruder: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    value: torch.Tensor


def leading_vectors(
    operator: Product,
    k: int,
    seed: int = 0,
    wanted: float = 3e-3,
    perturbation: float = 0.0,
    separation: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> Leading:
    """The k leading left singular vectors of W by block Krylov from a random block, until the proven error is small.

    Stops when every error is at most `wanted`, or when `MOST_COLUMNS` basis vectors are used up: what is then unproven
    has an infinite error. The list is complete, and each vector separated, except with probability `FAILURE`
    (`certificate.reach`); `separation(Ritz values, k)`, if given, proves the gaps instead.
    `perturbation` is a spectral-norm bound on what the operator itself is known to: it enters the error as
    perturbation / gap. dtype and device follow `operator.matrix`.
    """
    n, _ = operator.sides
    block = k + EXTRA_VECTORS
    error = torch.full((k,), math.inf, dtype=torch.float64)
    best = (torch.zeros(k, dtype=torch.float64), operator.matrix.new_zeros(operator.shape[0], k), error)
    if n < FEWEST_BLOCKS * block or MOST_COLUMNS < FEWEST_BLOCKS * block:
        return Leading(*best)
    start = _gaussian(n, block, seed, operator.matrix)
    space = Bidiagonalisation(operator, start, MOST_COLUMNS // block)
    ceiling = 1.01 * space.norm + 1e-300
    limits = thresholds(block, n)
    stalled, floor_reached = math.inf, 0
    while space.advance(4 if space.steps == 0 else 2 if space.steps < 8 else 3):
        ritz = space.ritz()
        if float(ritz.sigma[0]) <= 0:
            break
        omega = ritz.V[:block].mT @ space.start_coefficients
        worst = float((ritz.residual[:k] / _gaps(ritz.sigma)[:k]).max())
        hopeless = worst > 0.05 and space.steps < space.most_steps
        floor_reached = floor_reached + 1 if worst > 0.5 * stalled and worst < 0.05 else 0
        stalled = min(stalled, worst)
        if hopeless:
            continue
        if separation is None:
            gap = _proven_gaps(Bounds(ritz, omega, space.rounding), ritz, k, limits, ceiling)
        else:
            gap = separation(ritz.sigma, k)
        error = _turn(ritz.residual[:k], space.rounding + perturbation, torch.minimum(gap, ritz.sigma[:k]))
        best = (ritz.sigma[:k], space.left_vectors(ritz, k), error)
        if float(error.max()) <= wanted or floor_reached >= 2:
            break
    if space.steps == 0 or space.defect() > LARGEST_DEFECT:
        best[2].fill_(math.inf)
    return Leading(best[0], best[1], best[2] + 16 * torch.finfo(start.dtype).eps)


def _gaps(sigma: torch.Tensor) -> torch.Tensor:
    """Distance of each Ritz value to the nearest other one and to 0."""
    steps = sigma[:-1] - sigma[1:]
    first = torch.cat([sigma[:1], steps])
    last = torch.cat([steps, sigma[-1:]])
    return torch.minimum(torch.minimum(first, last), sigma).clamp(min=1e-300)


def _proven_gaps(bounds: Bounds, ritz: Ritz, k: int, limits, ceiling: float) -> torch.Tensor:
    found = reach(bounds, ritz, list(range(k)), limits, ceiling)
    known = torch.cumprod((found.complete & (found.radius > 0)).long(), 0).bool()
    return torch.where(known, torch.minimum(found.below, found.above), 0.0)


def _turn(residual: torch.Tensor, rounding: float, gap: torch.Tensor) -> torch.Tensor:
    """Largest distance |r - y| between a Ritz vector, on either side, and the one singular vector it stands for.

    (l; s) / sqrt 2 has the residual rho = residual / sqrt 2 + rounding, and every eigenvalue of (0 A; A^T 0) but one is
    at least `gap` away (0 if unknown; at most sigma), so sin phi <= rho / (gap - rounding); on either side alone
    cos psi >= 2 cos phi - 1. Infinite beyond a right angle.
    """
    gap = (gap - rounding).clamp(min=1e-300)
    sine = ((residual / math.sqrt(2) + rounding) / gap).clamp(max=1.0)
    cosine = 2 * torch.sqrt(1 - sine.square()) - 1
    return torch.where(cosine > 0, torch.sqrt(2 - 2 * cosine.clamp(max=1.0)) + 1e-12, math.inf)


def decide(operator: Product, leading: Leading, epsilon: float, seed: int = 0) -> Verdicts:
    """Verdicts on the leading vectors of W against all left singular vectors of W0, from products with W0 alone.

    `operator` is that of W0. Intruder: the bound of `certificate.overlap_ceilings` stays below epsilon minus the error
    of u_j, over all singular values W0 can have. Matched: a Ritz vector of W0 that stands for exactly one singular
    vector overlaps with u_j by more than epsilon plus both errors. Anything else is left undecided.
    """
    n, _ = operator.sides
    k = len(leading.error)
    verdicts = Verdicts(
        torch.zeros(k, dtype=torch.bool),
        torch.zeros(k, dtype=torch.bool),
        torch.zeros(k, dtype=torch.float64),
        torch.ones(k, dtype=torch.float64),
        torch.full((k,), math.nan, dtype=torch.float64),
    )
    usable = torch.nonzero(leading.error < min(epsilon, 1.0)).flatten()
    block = len(usable) + RANDOM_VECTORS
    if not len(usable) or n < FEWEST_BLOCKS * block:
        return verdicts
    U = leading.U[:, usable.to(leading.U.device)]
    first = operator.transposed_times(U) if operator.tall else U
    omega = _gaussian(n, RANDOM_VECTORS, seed + 1, operator.matrix)
    space = Bidiagonalisation(operator, torch.cat([first, omega], 1), MOST_COLUMNS // block)
    run = _Decision(space, leading, usable, U, epsilon, verdicts, thresholds(RANDOM_VECTORS, n))
    while bool(run.pending.any()) and space.advance(6 if space.steps == 0 else 3):
        if space.defect() > LARGEST_DEFECT:
            break
        run.check()
    return verdicts


class _Decision:
    """One pass of checks after some more steps on W0."""

    def __init__(self, space, leading, usable, U, epsilon, verdicts, limits):
        self.space, self.usable, self.U, self.epsilon = space, usable, U, epsilon
        self.error, self.verdicts, self.limits = leading.error[usable], verdicts, limits
        self.pending = torch.ones(len(usable), dtype=torch.bool)
        self.ceiling = 1.01 * space.norm + 1e-300
        # u_j (or W0^T u_j) as it went into the start block, against what the orthonormal block holds of it
        self.slack = 4 * space.rounding if space.operator.tall else 16 * torch.finfo(U.dtype).eps

    def check(self) -> None:
        ritz = self.space.ritz()
        if float(ritz.sigma[0]) <= 0:
            return
        start = self.space.start_coefficients
        coefficients = ritz.V[: len(start)].mT @ start
        count = len(self.usable)
        random = Bounds(ritz, coefficients[:, count:], self.space.rounding)
        if self.space.operator.tall:
            overlaps = ritz.U.mT @ (self.space.P.mT @ self.U).double().cpu()
        else:
            overlaps = coefficients[:, :count]
        self._match(ritz, random, overlaps)
        self._exclude(ritz, random, coefficients[:, :count])

    def _match(self, ritz: Ritz, random: Bounds, overlaps: torch.Tensor) -> None:
        best, where = overlaps.abs().clamp(max=1.0).max(0)
        gaps = _gaps(ritz.sigma)[where]
        ready = self.pending & (best > self.epsilon + self.error) & (ritz.residual[where] < 0.3 * gaps)
        chosen = sorted(set(where[ready].tolist()))
        if not chosen:
            return
        found = reach(random, ritz, chosen, self.limits, self.ceiling)
        index = torch.tensor(chosen)
        gap = torch.minimum(torch.minimum(found.below, found.above), ritz.sigma[index])
        turns = _turn(ritz.residual[index], self.space.rounding, torch.where(found.radius > 0, gap, 0.0))
        for j in torch.nonzero(ready).flatten().tolist():
            sine = float(turns[chosen.index(int(where[j]))]) + 32 * torch.finfo(self.U.dtype).eps
            lower, upper = _turned(float(best[j]), sine)
            lower, upper = lower - float(self.error[j]), upper + float(self.error[j])
            if lower > self.epsilon:
                row = int(self.usable[j])
                rest = math.sqrt(max(0.0, 1 - lower * lower))  # what is left for every other x_i
                self.pending[j] = False
                self.verdicts.matched[row] = True
                self.verdicts.lower[row] = lower
                self.verdicts.upper[row] = min(1.0, max(upper, rest))
                if rest < lower:
                    self.verdicts.value[row] = best[j]

    def _exclude(self, ritz: Ritz, random: Bounds, coefficients: torch.Tensor) -> None:
        rows = torch.nonzero(self.pending).flatten()
        if not len(rows):
            return
        tall = self.space.operator.tall
        start = empty_below(random, ritz, self.limits[0]) if tall else 0.0
        limits = self.epsilon - self.error[rows]
        bounds = Bounds(ritz, coefficients[:, rows], self.space.rounding)
        proven, upper = overlap_ceilings(bounds, limits, start, self.ceiling, self.slack, divide=tall)
        for j, yes, bound in zip(rows.tolist(), proven.tolist(), upper.tolist(), strict=True):
            if yes:
                row = int(self.usable[j])
                self.pending[j] = False
                self.verdicts.intruder[row] = True
                self.verdicts.upper[row] = min(1.0, bound + float(self.error[j]))


def _turned(overlap: float, sine: float) -> tuple[float, float]:
    """Least and largest |<u, x>| if |<u, r>| = overlap and r lies within arcsin(sine) of +-x."""
    if not sine < 1:
        return 0.0, 1.0
    angle, turn = math.acos(min(overlap, 1.0)), math.asin(sine)
    return max(0.0, math.cos(min(angle + turn, math.pi / 2))), math.cos(max(angle - turn, 0.0))


def _gaussian(rows: int, columns: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)
