"""The leading singular vectors of W0 + s B A in the basis of W0, a diagonal plus a low-rank matrix, with proven error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .basis import Basis, StoredBasis, inside
from .spectrum import LowRank

EXTRA_VECTORS = 8
MOST_COLUMNS = 480  # of the space
PATIENCE = 6  # steps without halving the residuals after which the rest is left to others
ROUNDINGS = 16  # a decomposition is taken as exact for a matrix within 16 eps |.|


class Updated(NamedTuple):
    """The k leading singular triplets of W = W0 + s B A in the coordinates of W0's singular vectors, float64.

    sigma (k,). side (n, k): unit vectors on the smaller side of W: coordinates of u_j along x_1 .. x_n, or of v_j along
    the right vectors of W0 if W is tall. inside (n, k): <x_i, u_j>. error (k,): a bound on |u_j - y_j| for the true
    vector y_j, infinite where it could not be told from its neighbours. rounding: the norm of what W is known to.
    more (n, k + 8): the subspace the triplets were taken from, as a start for a similar matrix.
    """

    sigma: torch.Tensor
    side: torch.Tensor
    inside: torch.Tensor
    error: torch.Tensor
    rounding: float
    more: torch.Tensor


class Sides(NamedTuple):
    """G = W W^T (W^T W if W is tall) in the basis of W0: G = D^2 + Y X^T + X Y^T + X K X^T, float64.

    X (n, q) are the coordinates of the factor on the smaller side, L (n, q) those of the other factor inside the basis,
    Y = D L, and K (q, q) the Gram matrix of the whole of the other factor, of which L is a part unless W is square.
    """

    d: torch.Tensor
    X: torch.Tensor
    L: torch.Tensor
    Y: torch.Tensor
    K: torch.Tensor

    def times(self, Z: torch.Tensor) -> torch.Tensor:
        """G Z."""
        inner = self.X.mT @ Z
        result = self.d.square()[:, None] * Z
        result.addmm_(self.Y, inner)
        return result.addmm_(self.X, self.Y.mT @ Z + self.K @ inner)

    def trace(self) -> float:
        """|W|_F^2."""
        return float(self.d.square().sum() + 2 * (self.X * self.Y).sum() + (self.K * (self.X.mT @ self.X)).sum())

    def count_above(self, point: float) -> int:
        """How many eigenvalues of G exceed the point: exact by Sylvester's law of inertia; -1 where not certain.

        G - t = (D^2 - t) + Z M Z^T with Z = (X Y) and M = (K I; I 0), so with M^-1 = (0 I; I -K) of q positive and q
        negative eigenvalues, n_+(G - t) = #{ d_i^2 > t } + n_+(-M^-1 - Z^T (D^2 - t)^-1 Z) - q. Not certain if t lies
        within 1e-12 of a d_i, or an eigenvalue of the 2q by 2q matrix within 1e-11 of 0, relative to the largest.
        Source: the secular equation of the rank-one update (Golub 1973), in inertia form.
        """
        root, q = math.sqrt(point), self.X.shape[1]
        if q == 0:
            return int((self.d > root).sum())
        apart = (self.d - root) * (self.d + root)
        if float((self.d - root).abs().min()) <= 1e-12 * float(self.d[0]):
            return -1
        Z = torch.cat([self.X, self.Y], 1)
        small = -(Z.mT / apart) @ Z
        small[:q, q:].diagonal().sub_(1)
        small[q:, :q].diagonal().sub_(1)
        small[q:, q:] += self.K
        # A congruence leaves the inertia as it is; this one makes the entries pure numbers.
        small[:q, :q] *= root
        small[q:, q:] /= root
        values = torch.linalg.eigvalsh(small)
        if float(values.abs().min()) <= 1e-11 * float(values.abs().max()):
            return -1
        return int((self.d > root).sum()) + int((values > 0).sum()) - q


class Side(NamedTuple):
    """The singular values S (n,) of W0 and its singular vectors on the smaller side, the columns of `vectors` (n, n).

    float64, from the eigendecomposition of W0 W0^T (W0^T W0 if W0 is tall): half the work of a decomposition.
    `rounding` is the norm within which S and the vectors are exact, 16 eps sigma_1^2 / sigma_n.
    """

    vectors: torch.Tensor
    S: torch.Tensor
    rounding: float

    @classmethod
    def of(cls, pretrained: torch.Tensor) -> Side | None:
        """One side of W0, shape (m, p); None if sigma_n < 1e-6 sigma_1: squares then hide too much."""
        W0 = pretrained.double()
        values, vectors = torch.linalg.eigh(W0.mT @ W0 if W0.shape[0] > W0.shape[1] else W0 @ W0.mT)
        if not float(values[0]) > 1e-12 * float(values[-1]):
            return None
        S = values.flip(0).sqrt()
        eps = torch.finfo(torch.float64).eps
        return cls(vectors.flip(1), S, ROUNDINGS * eps * float(values[-1]) / float(S[-1]))


def leading_updated(
    basis: Basis | StoredBasis | Side,
    change: LowRank,
    k: int,
    wanted: float = 1e-4,
    exact: float = math.inf,
    start: torch.Tensor | None = None,
    pretrained: torch.Tensor | None = None,
) -> Updated | None:
    """The k leading triplets of W0 + s B A, k <= n / 8, or None where the iteration does not find them.

    Iterated from `start` (n, b), or the leading unit vectors, until every residual |G z - sigma^2 z| is below `wanted`
    times the distance to the next Ritz value and below `exact` sigma_1^2; then an inertia count proves that nothing
    above the k-th is missing. The error also covers `rounding`, 16 eps |W| in the precision of the basis: 2
    rounding / gap, as in `margins.vector_errors`. Where only one side of the basis is given, W0 itself must be.
    """
    sides, tall = in_basis(basis, change, pretrained)
    n = len(sides.d)
    eps = torch.finfo(basis.S.dtype).eps
    size = max(float(sides.d[0]), math.sqrt(max(sides.trace(), 0.0) / n))
    cancelled = torch.finfo(torch.float64).eps * float(sides.K.trace())  # |B| |A|, where B A may be smaller
    rounding = ROUNDINGS * (eps * size + cancelled) + (basis.rounding if isinstance(basis, Side) else 0.0)
    found = _leading(sides, k, wanted, exact, start)
    if found is None:
        return None
    theta, vectors, residual, above, below, more = found
    sigma = theta.sqrt()
    sine = residual / torch.minimum(above - theta, theta - below).clamp(min=1e-300)
    apart = torch.minimum(above.clamp(min=0).sqrt() - sigma, sigma - below.clamp(min=0).sqrt())
    cosines = vectors
    if tall:
        # u = W z / sigma leaves u's direction by tan(angle of z) sigma_1 / sigma at most
        sine = sine / (1 - sine.clamp(max=0.9).square()).sqrt() * (sigma[0] / sigma)
        apart = torch.minimum(apart, sigma)
        cosines = (sides.d[:, None] * vectors + sides.L @ (sides.X.mT @ vectors)) / sigma
    known = rounding + 2 * eps * theta[0] / sigma  # the second part: squares are what was added up
    error = math.sqrt(2) * sine + 2 * known / (apart - 2 * known).clamp(min=1e-300)
    return Updated(sigma, vectors, cosines, torch.where(error < 1, error, math.inf).cpu(), rounding, more)


def in_basis(
    basis: Basis | StoredBasis | Side, change: LowRank, pretrained: torch.Tensor | None = None
) -> tuple[Sides, bool]:
    """(G in factors, is W tall). What B or A hold outside the basis enters through K alone."""
    B, A = float(change.scale) * change.B.double(), change.A.double()
    tall, d = B.shape[0] > A.shape[1], basis.S.double()
    if isinstance(basis, Side):
        V, W0 = basis.vectors, pretrained.double()
        X = ((A if tall else B.mT) @ V).mT
        Y = ((B.mT @ W0 if tall else (W0 @ A.mT).mT) @ V).mT
        L = Y / d[:, None]
    else:
        left, right = inside(basis, "U", B).double(), inside(basis, "Vh", A.mT).double()
        X, L = (right, left) if tall else (left, right)
        Y = d[:, None] * L
    K = B.mT @ B if tall else A @ A.mT
    # Both factors of one size: a factor taken from one and given to the other changes nothing.
    sizes = float(torch.linalg.vector_norm(X)), math.sqrt(float(K.trace()))
    balance = math.sqrt(sizes[1] / sizes[0]) if min(sizes) > 0 else 1.0
    return Sides(d, X * balance, L / balance, Y / balance, K / balance**2), tall


def _leading(sides: Sides, k: int, wanted: float, exact: float, start: torch.Tensor | None):
    """(theta, vectors, residuals, above, below, more) of the k leading eigenvectors of G, or None.

    Rayleigh-Ritz on a space that grows by (D^2 - theta_j)^-1 times the residual of each Ritz vector that has not
    converged (generalised Davidson): G is a diagonal plus little, so these are nearly the missing parts. The diagonal
    may be blind to a direction; then the count fails, and random vectors are added.
    """
    n, top = len(sides.d), float(sides.d[0])
    block, most = k + EXTRA_VECTORS, min(MOST_COLUMNS, n)
    squares = sides.d.square()
    generator = torch.Generator().manual_seed(0)
    if start is None or start.shape[1] < block:
        start = torch.eye(n, block, dtype=torch.float64, device=sides.d.device)
    X = torch.linalg.qr(start[:, :block]).Q
    # Vectors are rows: a few rows times many are several times faster than many columns times a few.
    Q, GQ, H = X.new_empty(most, n), X.new_empty(most, n), X.new_empty(most, most)
    size, step, best, last = 0, 0, math.inf, 0
    while True:
        new, both = slice(size, size + X.shape[1]), slice(0, size + X.shape[1])
        Q[new], GQ[new] = X.mT, sides.times(X).mT
        H[both, new] = Q[both] @ GQ[new].mT
        H[new, both] = H[both, new].mT
        size, step = new.stop, step + 1
        theta, Z = torch.linalg.eigh(H[both, both])
        theta, Z = theta.flip(0)[:block], Z.flip(1)[:, :block].mT
        more = (Z @ Q[both]).mT
        vectors = more[:, :k]
        skew = float((vectors.mT @ vectors - torch.eye(k).to(vectors)).abs().max())
        if skew > 1e-10:
            return None
        remainder = (Z[:k] @ GQ[both]).mT - vectors * theta[:k]
        floor = (16 * torch.finfo(torch.float64).eps + k * skew) * theta[0]
        residual = torch.linalg.vector_norm(remainder, dim=0) + floor
        steps = theta[:k] - theta[1 : k + 1]
        gap = torch.minimum(steps, torch.cat([steps.new_full((1,), math.inf), steps[:-1]])).clamp(min=1e-300)
        left = residual / torch.minimum(wanted * gap, exact * theta[:1])
        worst = float(left.max())
        best, last = (worst, step) if worst < 0.5 * best else (best, last)
        stalled = step > last + PATIENCE or size + block > most
        if worst <= 1 or stalled:
            found = _complete(sides, theta, residual, k)
            if found is not None and (found[0] == k or stalled):
                return theta[:k].clamp(min=1e-300), vectors, residual, found[1], found[2], more
            if stalled:
                return None
            X = remainder[:, :0]
        else:
            todo = left > 1
            apart = squares[:, None] - theta[:k][todo]
            near = (1e-3 * gap[todo]).clamp(min=1e-12 * top * top + 1e-300)
            X = _outside(remainder[:, todo] / torch.where(apart.abs() < near, near.copysign(apart), apart), Q[both])
        if not X.shape[1]:
            noise = torch.randn(n, EXTRA_VECTORS, generator=generator, dtype=torch.float64).to(Q)
            X = _outside(sides.times(noise), Q[both])
        if not X.shape[1]:
            return None


def _outside(X: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal vectors that span the columns of X together with the orthonormal rows; none for what they hold."""
    X = X / torch.linalg.vector_norm(X, dim=0).clamp(min=1e-300)
    for _ in range(2):
        X, R = torch.linalg.qr(X - ((rows @ X).mT @ rows).mT)
        X = X[:, R.diagonal().abs() > 1e-7]
    return X


def _complete(sides: Sides, theta: torch.Tensor, residual: torch.Tensor, k: int):
    """(how many leading Ritz values are proven, above (k,), below (k,)): up to there the list misses nothing.

    j eigenvalues lie one to one within |residuals|_F of the j leading Ritz values. If the count says that no other
    exceeds the middle between Ritz values j and j + 1, then what is above and below each of them is known.
    """
    for j in range(k, 0, -1):
        middle = (float(theta[j - 1]) + max(float(theta[j]), 0.0)) / 2
        spread = float(torch.linalg.vector_norm(residual[:j]))
        if not float(theta[j - 1]) - spread > middle > 0:
            continue
        if sides.count_above(middle) == j:
            nothing = theta.new_zeros(k - j)
            above = torch.cat([theta.new_full((1,), math.inf), theta[: j - 1] - spread, nothing])
            below = torch.cat([theta[1:j] + spread, theta.new_full((1,), middle), theta.new_full((k - j,), math.inf)])
            return j, above, below
    return None
