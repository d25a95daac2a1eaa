"""The route without a decomposition of W0: leading vectors of W with a proven error, then a verdict on each of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .certificate import Bounds, empty_below, overlap_ceilings, reach, thresholds
from .krylov import GROUP, SMALLEST_GROUPED, Bidiagonalisation, Product, Ritz

RANDOM_VECTORS = 16  # Gaussian vectors beside the k tuned ones in the start block on W0, at least
EXTRA_VECTORS = 8  # start block on W: k + 8 Gaussian vectors
FEWEST_EXTRA = 6  # that many are enough where it makes the block a multiple of `krylov.GROUP`
FEWEST_BLOCKS = 3  # a smaller matrix is left to the dense route
MOST_COLUMNS = 480  # of a Krylov basis: memory and the small float64 problems stay far below one matrix
LARGEST_DEFECT = 1e-4  # of orthogonality; beyond it nothing is claimed
LARGE = 2**23  # entries of a matrix
CLOSE = 1e-3  # an overlap this close to epsilon, and the error of u_j, is worth sharpening u_j


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


class LeadingSpace:
    """A block Krylov space from a random block, for the k leading left singular vectors of W and proven errors.

    The list is complete, and each vector separated, except with probability `FAILURE` (`certificate.reach`).
    `perturbation` is a spectral-norm bound on what the operator itself is known to: it enters the error as
    perturbation / gap. dtype and device follow `operator.matrix`.
    """

    def __init__(self, operator: Product, k: int, seed: int = 0, perturbation: float = 0.0):
        n, _ = operator.sides
        self.operator, self.k, self.perturbation = operator, k, perturbation
        self.block = block = _block(k + FEWEST_EXTRA, k + EXTRA_VECTORS, n)
        self.space = None
        if can_certify(n, k):
            start = _gaussian(n, block, seed, operator.matrix)
            self.space = Bidiagonalisation(operator, start, MOST_COLUMNS // block)
            self.ceiling = 1.01 * self.space.norm + 1e-300
            self.limits = thresholds(block, n)

    def solve(self, wanted: float = 3e-3) -> Leading:
        """Steps until every error is at most `wanted`, or until no step makes it smaller or `MOST_COLUMNS` are used.

        What is then unproven has an infinite error.
        """
        k, space = self.k, self.space
        sigma, U = torch.zeros(k, dtype=torch.float64), self.operator.matrix.new_zeros(self.operator.shape[0], k)
        error = torch.full((k,), math.inf, dtype=torch.float64)
        if space is None:
            return Leading(sigma, U, error)
        stalled, floor_reached, ritz = math.inf, 0, None
        while space.advance(4 if space.steps == 0 else 1):
            ritz = space.ritz()
            if float(ritz.sigma[0]) <= 0:
                return Leading(sigma, U, error)
            worst = float((ritz.residual[:k] / _gaps(ritz.sigma)[:k]).max())
            hopeless = worst > 0.05 and space.steps < space.most_steps
            floor_reached = floor_reached + 1 if worst > 0.5 * stalled and worst < 0.05 else 0
            stalled = min(stalled, worst)
            # The bound without the proof that the gaps are true costs nothing: the proof waits until it can succeed.
            rho = ritz.residual[:k] / math.sqrt(2) + space.rounding + self.perturbation
            hopeful = float(_turn(rho, 0.55 * _gaps(ritz.sigma)[:k] - space.rounding).max()) <= wanted
            if hopeless or not (hopeful or floor_reached >= 2 or space.steps == space.most_steps):
                continue
            error = _turn(rho, self._gaps(ritz) - space.rounding - self.perturbation)
            if float(error.max()) <= wanted or floor_reached >= 2:
                break
        if ritz is None or space.defect() > LARGEST_DEFECT:
            return Leading(sigma, U, torch.full_like(error, math.inf))
        U = space.left_vectors(ritz, k)
        return Leading(ritz.sigma[:k], U, error + 16 * torch.finfo(U.dtype).eps)

    def sharpen(self, chosen: torch.Tensor) -> Leading:
        """Only the vectors `chosen`, in their places, with errors that rest on residuals computed in float64.

        The errors of `solve` cannot fall below rounding / gap, where `rounding` is an allowance for what float32 loses;
        here, after some steps more, the residual is measured, and only the gap rests on the allowance.
        """
        k, space = self.k, self.space
        ritz = space.ritz()
        while float(ritz.residual[chosen].max()) > 0.1 * space.rounding and space.advance(2):
            ritz = space.ritz()
        there = chosen.to(self.operator.matrix.device)
        U, V = (side(ritz, k)[:, there].double() for side in (space.left_vectors, space.right_vectors))
        U, V = (torch.nn.functional.normalize(vectors, dim=0) for vectors in (U, V))
        sigma, rho = self.operator.residuals(U, V)
        gap = self._gaps(ritz)[chosen] - (sigma - ritz.sigma[chosen]).abs() - self.perturbation
        turn = _turn(rho + self.perturbation + 1e-14 * space.norm, gap)
        if space.defect() > LARGEST_DEFECT:
            turn.fill_(math.inf)
        error = torch.full((k,), math.inf, dtype=torch.float64)
        error[chosen] = turn + 1e-12
        result = Leading(ritz.sigma[:k].clone(), U.new_zeros(U.shape[0], k), error)
        result.sigma[chosen], result.U[:, chosen.to(U.device)] = sigma, U
        return result

    def _gaps(self, ritz: Ritz) -> torch.Tensor:
        """Proven distances of the k leading Ritz values from every singular value but their own, and from 0."""
        omega = ritz.V[: self.block].mT @ self.space.start_coefficients
        bounds = Bounds(ritz, omega, self.space.rounding)
        found = reach(bounds, ritz, list(range(self.k)), self.limits, self.ceiling)
        known = torch.cumprod((found.complete & (found.radius > 0)).long(), 0).bool()
        gap = torch.where(known, torch.minimum(found.below, found.above), 0.0)
        return torch.minimum(gap, ritz.sigma[: self.k])


def leading_vectors(
    operator: Product, k: int, seed: int = 0, wanted: float = 3e-3, perturbation: float = 0.0
) -> Leading:
    """The k leading left singular vectors of W until the proven error is at most `wanted`; see `LeadingSpace`."""
    return LeadingSpace(operator, k, seed, perturbation).solve(wanted)


def can_certify(n: int, k: int) -> bool:
    """Whether a matrix with n singular values has room for the Krylov spaces of k vectors."""
    return FEWEST_BLOCKS * _block(k + FEWEST_EXTRA, k + EXTRA_VECTORS, n) <= min(n, MOST_COLUMNS)


def _block(least: int, usual: int, n: int) -> int:
    """Columns of a start block: those that products with a large matrix are fastest with."""
    return least + -least % GROUP if n >= SMALLEST_GROUPED else usual


def _gaps(sigma: torch.Tensor) -> torch.Tensor:
    """Distance of each Ritz value to the nearest other one and to 0."""
    steps = sigma[:-1] - sigma[1:]
    first = torch.cat([sigma[:1], steps])
    last = torch.cat([steps, sigma[-1:]])
    return torch.minimum(torch.minimum(first, last), sigma).clamp(min=1e-300)


def _turn(rho: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Largest distance |r - y| between a Ritz vector, on either side, and the one singular vector it stands for.

    (l; s) / sqrt 2 has a residual of at most rho as an eigenvector of (0 A; A^T 0), and every eigenvalue but one is at
    least `gap` away (0 or less if unknown; at most sigma), so sin phi <= rho / gap; on either side alone
    cos psi >= 2 cos phi - 1. Infinite beyond a right angle.
    """
    sine = (rho / gap.clamp(min=1e-300)).clamp(max=1.0)
    cosine = 2 * torch.sqrt(1 - sine.square()) - 1
    return torch.where(cosine > 0, torch.sqrt(2 - 2 * cosine.clamp(max=1.0)) + 1e-12, math.inf)


def decide(
    operator: Product,
    leading: Leading,
    epsilon: float,
    seed: int = 0,
    sharpen: Callable[[torch.Tensor], Leading] | None = None,
) -> Verdicts:
    """Verdicts on the leading vectors of W against all left singular vectors of W0, from products with W0 alone.

    `operator` is that of W0. Intruder: the bound of `certificate.overlap_ceilings` stays below epsilon minus the error
    of u_j, over all singular values W0 can have. Matched: a Ritz vector of W0 that stands for exactly one singular
    vector overlaps with u_j by more than epsilon plus both errors. Anything else is left undecided. `sharpen(indices)`,
    if given, is called once, for the u_j whose overlap is so close to epsilon that only a smaller error can settle it.
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
    block = _block(len(usable) + RANDOM_VECTORS, len(usable) + RANDOM_VECTORS, n)
    if not len(usable) or n < FEWEST_BLOCKS * block:
        return verdicts
    U = leading.U[:, usable.to(leading.U.device)]
    first = operator.transposed_times(U) if operator.tall else U
    omega = _gaussian(n, block - len(usable), seed + 1, operator.matrix)
    space = Bidiagonalisation(operator, torch.cat([first, omega], 1), MOST_COLUMNS // block)
    between = 1 if operator.matrix.numel() > LARGE else 2  # a step costs more than a check, or less
    run = _Decision(space, leading, usable, U, epsilon, verdicts, thresholds(omega.shape[1], n))
    while bool(run.pending.any()) and space.advance(6 if space.steps == 0 else between):
        if space.defect() > LARGEST_DEFECT:
            break
        run.check()
        close = usable[run.pending & run.close]
        if sharpen is not None and len(close):
            run.sharpen(sharpen(close))
            sharpen = None
            run.check()
    return verdicts


class _Decision:
    """One pass of checks after some more steps on W0."""

    def __init__(self, space, leading, usable, U, epsilon, verdicts, limits):
        self.space, self.usable, self.U, self.epsilon = space, usable, U, epsilon
        self.error, self.verdicts, self.limits = leading.error[usable], verdicts, limits
        self.pending = torch.ones(len(usable), dtype=torch.bool)
        self.close = torch.zeros(len(usable), dtype=torch.bool)  # overlaps with a Ritz vector by about epsilon
        self.ceiling = 1.01 * space.norm + 1e-300
        # u_j (or W0^T u_j) as it went into the start block, against what the orthonormal block holds of it
        self.slack = 4 * space.rounding if space.operator.tall else 16 * torch.finfo(U.dtype).eps

    def sharpen(self, better: Leading) -> None:
        """The u_j stay; their errors become the distance to better vectors plus the errors of those."""
        U, other = self.U.double(), better.U[:, self.usable.to(better.U.device)].double()
        apart = torch.minimum((U - other).norm(dim=0), (U + other).norm(dim=0)).cpu()
        self.error = torch.minimum(self.error, apart + better.error[self.usable])

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
        converged = ritz.residual[where] < 0.3 * _gaps(ritz.sigma)[where]
        self.close = converged & ((best - self.epsilon).abs() <= self.error + CLOSE)
        ready = self.pending & (best > self.epsilon + self.error) & converged
        chosen = sorted(set(where[ready].tolist()))
        if not chosen:
            return
        found = reach(random, ritz, chosen, self.limits, self.ceiling)
        index = torch.tensor(chosen)
        gap = torch.minimum(torch.minimum(found.below, found.above), ritz.sigma[index])
        rho = ritz.residual[index] / math.sqrt(2) + self.space.rounding
        turns = _turn(rho, torch.where(found.radius > 0, gap, 0.0) - self.space.rounding)
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
