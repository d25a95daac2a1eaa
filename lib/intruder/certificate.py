"""Proven bounds from a bidiagonalisation: where no singular value lies, how far one stands alone, what no x_i exceeds.

**The inequality.** Let (l, s, sigma) be a singular triplet of A, A s = sigma l, A^T l = sigma s, and z = P^T l,
w = S^T s, d = S_next^T s with the bases of `krylov`. Projecting the two relations gives, with zeta = (z; w) / sqrt 2,

    (H - sigma) zeta + (E C^T d; 0) / sqrt 2 = r,   H = (0 B; B^T 0),   |zeta|^2 + |d|^2 / 2 <= 1,   |r| <= rounding.

H has the eigenvalues +-sigma_l. So zeta is confined to a thin ellipsoid, and for every functional f and theta > 0

    |f^T zeta|^2 <= (1 + theta) f^T M(sigma)^-1 f,   M = min over d of I + d^T d + theta |.|^2 / e^2,   e >= |r|,

and the same with e = rounding + h holds for *every* sigma within h of the centre. A finite number of cells therefore
covers a whole interval of sigma: no grid is trusted between its points. For h, rounding -> 0 this is the block
Christoffel function. In the basis of H's eigenvectors M is a diagonal minus a matrix of rank b and is inverted without
cancellation.

**Lists that miss nothing.** A Krylov space may be blind to a direction. Its start block therefore holds N independent
Gaussian vectors Omega, drawn without sight of the matrix. With probability at least 1 - FAILURE, |Omega^T s|^2 >= t_1
for all n singular vectors s, and >= t_2 for all unit s in the span of any two neighbours. A cell whose bound on
|Omega^T s|^2 is under t_1 holds no singular value; a cell where the bound restricted to the complement of one Ritz
vector is under t_2 holds at most one. These replace an inertia count, which would cost a factorisation.

Source: `Christoffel function and Gauss quadrature`, Golub and Meurant; the block form and the two uses are ours.
"""

import math
from typing import NamedTuple

import torch

from .krylov import Ritz

FAILURE = 1e-9  # of one matrix, for all statements about it together
CELLS = 6000  # cells of one search before a vector is left undecided
SAFETY = 1.0001  # on every computed bound: rounding of the small float64 problems, measured below 1e-7
RADII = (0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # of the distance to the nearest Ritz value, tried
MOST_PIECES = 200  # cells between two of 17 marks in the search for empty ranges
NARROWEST, WIDEST = 0.0005, 0.05  # smallest and largest theta where a bound is compared with epsilon^2
WINDOW, EMPTY = 1.0, 0.3  # theta where one is compared with a threshold of the Gaussian vectors


class Reach(NamedTuple):
    """What is proven about the singular values nearest to Ritz value number l.

    Exactly one lies within `radius` of it, and no other within `below` under it or `above` over it (both >= radius).
    radius = 0 if that could not be proven.
    """

    radius: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor
    complete: torch.Tensor  # (count,) bool: nothing is hidden between this Ritz value's window and the one above it


def thresholds(vectors: int, n: int) -> tuple[float, float]:
    """(t_1, t_2) for N Gaussian vectors in n dimensions, each failing with probability below FAILURE / 2.

    P(chi^2_N < t) <= (t/2)^(N/2) / Gamma(N/2 + 1), and for the smaller eigenvalue of a 2 x 2 Wishart matrix of N
    degrees of freedom P(lambda < t) <= (2t)^((N-1)/2) Gamma((N+1)/2) / Gamma(N), each times n for the union.
    """
    log_p = math.log(FAILURE / (2 * n))
    single = 2 * math.exp((log_p + math.lgamma(vectors / 2 + 1)) / (vectors / 2))
    pair = 0.5 * math.exp((log_p + math.lgamma(vectors) - math.lgamma((vectors + 1) / 2)) / ((vectors - 1) / 2))
    return single, pair


class Bounds:
    """Evaluates f^T M(x)^-1 f for many cells (centre x, half-width h) at once; float64 on the CPU.

    `functionals` (K, q) are coefficients of w = S^T s in the basis of right Ritz vectors: f^T s = functionals^T V^T w.
    """

    def __init__(self, ritz: Ritz, functionals: torch.Tensor, rounding: float):
        # A larger e only loosens a bound; below 3e-6 sigma_1 its weights would fall under the rounding of float64.
        self.floor = max(rounding, 3e-6 * float(ritz.sigma[0]))
        self.sigma, self.f = ritz.sigma, functionals
        _, self.c, Vh = torch.linalg.svd(ritz.C)
        self.g = ritz.last.mT @ Vh.mT / math.sqrt(2)  # (K, b): what each Ritz vector feels of the part not yet seen
        self.count, self.block = self.g.shape
        self._gg = (self.g[:, :, None] * self.g[:, None, :]).reshape(self.count, -1)
        self._gf = (self.g[:, :, None] * self.f[:, None, :]).reshape(self.count, -1)

    def _parts(self, x, h, theta, without):
        e = ((self.floor + h) / theta.sqrt())[:, None]
        near, far = self.sigma[None] - x[:, None], -self.sigma[None] - x[:, None]
        near_total, far_total = e.square() + near.square(), e.square() + far.square()
        inner = e.square() / near_total
        odd = e * near / near_total
        outer = inner
        if without is not None:  # the eigenvector of H for +sigma_l is left out: zeta is orthogonal to it
            rows = torch.arange(len(x))
            outer, odd = inner.clone(), odd.clone()
            inner[rows, without] = 1.0
            outer[rows, without] = 0.0
            odd[rows, without] = 0.0
        mirror = e.square() / far_total
        gamma = self.c / torch.sqrt(e.square() + self.c.square())
        middle = ((inner + mirror) @ self._gg).reshape(-1, self.block, self.block)
        middle = gamma[:, :, None] * middle * gamma[:, None, :]
        middle.diagonal(dim1=1, dim2=2).add_(e.square() / (e.square() + self.c.square()))
        coupling = ((odd - e * far / far_total) @ self._gf).reshape(-1, self.block, self.f.shape[1]) * gamma[:, :, None]
        factor, failed = torch.linalg.cholesky_ex(middle)
        solved = torch.linalg.solve_triangular(factor, coupling, upper=False)
        return outer + mirror, solved, failed != 0

    def each(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Upper bounds on |f_j^T s|^2, shape (cells, q), for every singular vector s with sigma within h of x."""
        # The narrower the cell the smaller a theta it can afford: the factor 1 + theta is what a true overlap loses.
        theta = (20 * h / self.sigma[0]).clamp(NARROWEST, WIDEST)
        weights, solved, failed = self._parts(x, h, theta, None)
        bound = (weights @ self.f.square() + solved.square().sum(1)) * ((1 + theta) * SAFETY)[:, None]
        return torch.where(failed[:, None], math.inf, bound)

    def joint(
        self, x: torch.Tensor, h: torch.Tensor, without: torch.Tensor | None = None, theta: float = WINDOW
    ) -> torch.Tensor:
        """Upper bounds on |F^T s|^2 = sum_j |f_j^T s|^2, shape (cells,); `without`: Ritz vectors s is orthogonal to."""
        weights, solved, failed = self._parts(x, h, torch.full_like(h, theta), without)
        gram = (weights @ self._ff()).reshape(len(x), self.f.shape[1], -1) + solved.mT @ solved
        bound = _largest(gram) * ((1 + theta) * SAFETY)
        return torch.where(failed | ~torch.isfinite(bound), math.inf, bound)

    def promising(self, x: torch.Tensor, limit: float, theta: float = WINDOW) -> torch.Tensor:
        """A half-width h at which `joint` at x may well stay under the limit: only the choice of cells rests on it."""
        weights = 1 / ((self.sigma[None] - x[:, None]).square() + self.floor**2)
        gram = (weights @ self._ff()).reshape(len(x), self.f.shape[1], -1)
        return (0.4 * theta / (1 + theta) * limit / _largest(gram)).sqrt() - self.floor

    def _ff(self) -> torch.Tensor:
        return (self.f[:, :, None] * self.f[:, None, :]).reshape(self.count, -1)


def _largest(gram: torch.Tensor) -> torch.Tensor:
    """A bound on the largest eigenvalue of positive semi-definite matrices: |G^16|_F^(1/16), q^(1/32) off at most."""
    scale = torch.linalg.matrix_norm(gram).clamp(min=1e-300)
    power = gram / scale[:, None, None]
    for _ in range(4):
        power = power @ power
    return scale * torch.linalg.matrix_norm(power).pow(1 / 16)


def reach(bounds: Bounds, ritz: Ritz, indices: list[int], limits: tuple[float, float], ceiling: float) -> Reach:
    """How far each of the Ritz values `indices` stands alone; `bounds` holds Omega, `limits` its (t_1, t_2).

    `ceiling` is at least sigma_1(A). A window of the trial radii is proven to hold at most one singular value, and the
    residual that it holds one; cells whose width grows with the distance then push the empty range outwards, to just
    over half of the distance to the next Ritz value on either side (above the first: to the ceiling).
    """
    sigma, single, pair = ritz.sigma, *limits
    chosen = torch.as_tensor(indices, dtype=torch.int64)
    values = sigma[chosen]
    upper = torch.where(chosen > 0, sigma[(chosen - 1).clamp(min=0)], math.inf) - values
    lower = values - torch.where(chosen + 1 < len(sigma), sigma[(chosen + 1).clamp(max=len(sigma) - 1)], 0.0)
    gap = torch.minimum(torch.minimum(upper, lower), 0.5 * values)
    fractions = torch.tensor(RADII, dtype=torch.float64)
    trial = gap[:, None] * fractions
    size = trial.numel()
    joint = bounds.joint(
        values[:, None].expand(-1, len(RADII)).reshape(size),
        trial.reshape(size),
        chosen[:, None].expand(-1, len(RADII)).reshape(size),
    ).reshape(trial.shape)
    # The pair (P U_l, S V_l) / sqrt 2 has the residual residual_l / sqrt 2 as an approximate eigenvector.
    holds_one = trial >= 1.5 * (ritz.residual[chosen, None] / math.sqrt(2) + bounds.floor)
    radius = torch.where((joint < pair) & holds_one, trial, 0.0).amax(1)
    above = _push(bounds, values, radius, torch.where(chosen > 0, 0.55 * upper, ceiling - values), single, 1)
    below = _push(bounds, values, radius, torch.minimum(0.55 * lower, 0.99 * values), single, -1)
    place = {index: position for position, index in enumerate(indices)}
    complete = torch.zeros(len(indices), dtype=torch.bool)
    for position, index in enumerate(indices):
        if index == 0:
            reached = above[position] >= 0.999 * (ceiling - values[position])
            complete[position] = bool(radius[position] > 0) and bool(reached)
        elif index - 1 in place:
            other = place[index - 1]
            if radius[position] > 0 and radius[other] > 0 and above[position] + below[other] >= upper[position]:
                complete[position] = True
                above[position] = upper[position] - radius[other]
                below[other] = upper[position] - radius[position]
    return Reach(radius, below, above, complete)


def _push(bounds: Bounds, values, radius, far, single: float, sign: int) -> torch.Tensor:
    """Distance from each Ritz value, on one side, up to which single-vector cells join without a hole; >= radius."""
    paths, owners = [], []
    for owner, (value, start, end) in enumerate(zip(values.tolist(), radius.tolist(), far.tolist(), strict=True)):
        if 0 < start < end:
            distances = torch.logspace(math.log10(start), math.log10(end), 17, dtype=torch.float64)
            paths.append((value + sign * distances, 0.1 * distances))
            owners.append(owner)
    result = radius.clone()
    for owner, end in zip(owners, _joined(bounds, paths, single), strict=True):
        result[owner] = max(float(radius[owner]), sign * (end - float(values[owner])))
    return result


def _joined(
    bounds: Bounds, paths: list[tuple[torch.Tensor, torch.Tensor]], single: float, theta: float = WINDOW
) -> list[float]:
    """For each path of marks, with the widest half-width at each: up to where cells without a singular value join."""
    centres, halves, owners, ends = [], [], [], []
    for owner, (marks, widest) in enumerate(paths):
        halfwidths = torch.minimum(bounds.promising(marks, single, theta), widest)
        marks, halfwidths = marks.tolist(), torch.minimum(halfwidths[:-1], halfwidths[1:]).tolist()
        for start, end, half in zip(marks, marks[1:], halfwidths, strict=False):
            pieces = math.ceil(abs(end - start) / (2 * half)) if half > 0 else MOST_PIECES + 1
            if pieces > MOST_PIECES:
                break
            step = (end - start) / pieces
            for piece in range(pieces):
                centres.append(start + (piece + 0.5) * step)
                halves.append(abs(step) / 2 * (1 + 1e-12))
                owners.append(owner)
                ends.append(start + (piece + 1) * step)
    reached = [float(marks[0]) for marks, _ in paths]
    if centres:
        x, h = torch.tensor(centres, dtype=torch.float64), torch.tensor(halves, dtype=torch.float64)
        stopped = set()
        for owner, free, end in zip(owners, (bounds.joint(x, h, theta=theta) < single).tolist(), ends, strict=True):
            if not free:
                stopped.add(owner)
            elif owner not in stopped:
                reached[owner] = end
    return reached


def empty_below(bounds: Bounds, ritz: Ritz, single: float) -> float:
    """The largest tried x such that no singular value of A lies in [0, x]; 0 if none could be proven."""
    marks = torch.linspace(0.0, 0.98 * float(ritz.sigma[-1]), 33, dtype=torch.float64)
    if not bool(bounds.joint(marks[:1], marks.new_full((1,), 1e-9 * float(marks[-1])), theta=EMPTY) < single):
        return 0.0
    return _joined(bounds, [(marks, torch.full_like(marks, math.inf))], single, EMPTY)[0]


def overlap_ceilings(
    bounds: Bounds, limits: torch.Tensor, start: float, ceiling: float, slack: float, divide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(proven, upper): is |<u_j, x_i>| < limits_j for every x_i with sigma_i in [start, ceiling], and the bound itself.

    `bounds` holds the functionals of the u_j; with `divide` they are those of W^T u_j, so that |<u_j, x_i>| is
    |<W^T u_j, v_i>| / sigma_i. `slack` is added to each functional (its own rounding). Interval bisection: a cell that
    fails for a vector still in question is halved, down to the rounding of the relations; then the vector is given up.
    """
    count = len(limits)
    upper, pending = torch.zeros(count, dtype=torch.float64), limits > 0
    ends = bounds.sigma[(bounds.sigma > start) & (bounds.sigma < ceiling)].flip(0)
    edges = torch.cat([ends.new_tensor([start]), ends, ends.new_tensor([ceiling])])
    if divide and start <= 0:
        return torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.float64)

    def evaluate(x, h):
        values = bounds.each(x, h).sqrt() + slack
        return values / (x - h)[:, None] if divide else values

    # At the Ritz values themselves first: this finds nearly all vectors that no refinement can settle.
    pending &= (evaluate(ends, torch.zeros_like(ends)) < limits).all(0) if len(ends) else pending
    low, high, spent = edges[:-1], edges[1:], 0
    while len(low) and bool(pending.any()):
        spent += len(low)
        if spent > CELLS:
            pending[:] = False
            break
        x, h = (low + high) / 2, (high - low) / 2
        values = evaluate(x, h)
        fails = (values >= limits) & pending
        pending &= ~(fails & (h < bounds.floor)[:, None]).any(0)
        split = (fails & pending).any(1)
        upper = torch.maximum(upper, torch.where(split[:, None], 0.0, values).amax(0))
        low, high, x = low[split], high[split], x[split]
        low, high = torch.cat([low, x]), torch.cat([x, high])
    return pending, torch.where(pending, upper, 1.0).clamp(max=1.0)
