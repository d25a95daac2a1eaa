"""Block Golub-Kahan bidiagonalisation of a matrix that is only multiplied with, fully reorthogonalised."""

import math
from typing import NamedTuple

import torch

GROUP = 16  # columns that a product with a large matrix is fastest with, or a multiple of them
SMALLEST_GROUPED = 512  # smaller side of a matrix from which that is worth some copies
CHUNK = 512  # rows converted to float64 at a time


class Product(NamedTuple):
    """The operator A of a weight matrix W = matrix + left right^T, turned so that its larger side comes first.

    W has shape (m, p). If W is tall (m > p), A = W and the side of n = min(m, p) entries holds right singular vectors;
    otherwise A = W^T and that side holds left singular vectors. Every singular vector of the n-side counts: a tall A
    has no singular vector for the part of its larger space that it does not reach. `matrix` of one dimension is a
    diagonal, padded with zero rows or columns to `shape`. `left` (m, q) and `right` (p, q) are an optional update of
    low rank, which is never multiplied out; they may be kept in float64 beside a float32 matrix. `matrix_norm`, if
    known, spares `norm` a pass.
    """

    matrix: torch.Tensor
    shape: tuple[int, int]
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    matrix_norm: float | None = None

    @property
    def tall(self) -> bool:
        return self.shape[0] > self.shape[1]

    @property
    def sides(self) -> tuple[int, int]:
        """(n, M): the smaller and the larger side."""
        return min(self.shape), max(self.shape)

    def to_large(self, X: torch.Tensor) -> torch.Tensor:
        """A X, from the n-side to the other."""
        return self.times(X) if self.tall else self.transposed_times(X)

    def to_small(self, Y: torch.Tensor) -> torch.Tensor:
        """A^T Y, back to the n-side."""
        return self.transposed_times(Y) if self.tall else self.times(Y)

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """W X."""
        result = self._diagonal(X, self.shape[0]) if self.matrix.ndim == 1 else times_few(self.matrix, X)
        return result if self.left is None else result.addmm_(self.left.to(X), self.right.to(X).mT @ X)

    def transposed_times(self, Y: torch.Tensor) -> torch.Tensor:
        """W^T Y."""
        result = self._diagonal(Y, self.shape[1]) if self.matrix.ndim == 1 else times_few(self.matrix.mT, Y)
        return result if self.left is None else result.addmm_(self.right.to(Y), self.left.to(Y).mT @ Y)

    def _diagonal(self, X: torch.Tensor, rows: int) -> torch.Tensor:
        result = X.new_zeros(rows, X.shape[1])
        result[: len(self.matrix)] = self.matrix[:, None] * X[: len(self.matrix)]
        return result

    def residuals(self, U: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma, rho), each (k,) float64 on the CPU, of approximate unit singular vectors U (m, k) and V (p, k) of W.

        sigma_j = u_j^T W v_j and rho_j^2 = (|W v_j - sigma_j u_j|^2 + |W^T u_j - sigma_j v_j|^2) / 2, the residual of
        (u_j; v_j) / sqrt 2 as an eigenvector of (0 W; W^T 0). One pass in float64, `CHUNK` rows at a time.
        """
        U, V = U.double(), V.double()
        WV, WtU = U.new_empty(U.shape), V.new_zeros(V.shape)
        for first in range(0, self.shape[0], CHUNK):
            rows = slice(first, first + CHUNK)
            part = self.matrix[rows].double()
            WV[rows] = times_few(part, V)
            WtU += times_few(part.mT, U[rows])
        if self.left is not None:
            left, right = self.left.double(), self.right.double()
            WV += left @ (right.mT @ V)
            WtU += right @ (left.mT @ U)
        sigma = (U * WV).sum(0)
        squared = (WV - sigma * U).square().sum(0) + (WtU - sigma * V).square().sum(0)
        return sigma.cpu(), (squared / 2).sqrt().cpu()

    def norm(self) -> float:
        """An upper bound on the Frobenius norm: |matrix|_F + |left right^T|_F."""
        total = frobenius(self.matrix) if self.matrix_norm is None else self.matrix_norm
        if self.left is not None:
            R_left = torch.linalg.qr(self.left.double(), mode="r").R
            R_right = torch.linalg.qr(self.right.double(), mode="r").R
            total += float(torch.linalg.matrix_norm(R_left @ R_right.mT))
        return total


def times_few(matrix: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """matrix @ X for few columns, filled up with zeros to a multiple of `GROUP` if the matrix is large and on the CPU.

    The products of MKL with the transpose of a 4096 x 4096 matrix took 89, 363, 18, 27 and 24 ms for 8, 10, 16, 26 and
    32 columns.
    """
    missing = -X.shape[1] % GROUP
    few = X.shape[1] == 1 or min(matrix.shape) < SMALLEST_GROUPED
    if not missing or few or matrix.device.type != "cpu":
        return matrix @ X
    return (matrix @ torch.nn.functional.pad(X, (0, missing)))[:, : X.shape[1]]


def frobenius(matrix: torch.Tensor) -> float:
    """Frobenius norm, row by row in the matrix's dtype unless its squares might leave the range of that dtype."""
    rows = torch.linalg.vector_norm(matrix, dim=-1).double()
    total = float(torch.linalg.vector_norm(rows))
    if 1e-12 < total < 1e12:
        return total
    return float(torch.linalg.vector_norm(matrix.double()))


class Ritz(NamedTuple):
    """The small problem after s block steps: B = U diag(sigma) V^T, K = s b, and what couples it to the rest.

    With orthonormal S (n-side) and P (M-side): A S = P B and A^T P = S B^T + S_next C E^T, E the last b columns of the
    identity. sigma (K,) falls; U, V (K, K); last = E^T U (b, K); residual (K,) = |C E^T U_l|, so that
    |A^T P U_l - sigma_l S V_l| = residual_l and A S V_l = sigma_l P U_l. All float64 on the CPU.
    """

    sigma: torch.Tensor
    U: torch.Tensor
    V: torch.Tensor
    C: torch.Tensor
    last: torch.Tensor
    residual: torch.Tensor


class Bidiagonalisation:
    """Block Golub-Kahan bidiagonalisation of A from a start block on its n-side, all products in the block's dtype.

    After s steps `S` (n, s b) and `P` (M, s b) are orthonormal and A S = P B, A^T P = S B^T + S_next C E^T up to
    rounding; the coefficients of B are measured by projection on *all* earlier blocks, not assumed to vanish.
    Two passes over the matrix and a full reorthogonalisation of either side a step. `start` (n, b) is orthonormalised
    in float64; `start_coefficients` (b, b) holds start = S_1 start_coefficients.

    `rounding` bounds the spectral norm of what the two relations leave out: 4 eps |W|_F, eps the unit of the dtype, and
    the measured difference between the two sets of coefficients, which loss of orthogonality would show. The first is
    the usual size of accumulated rounding (about .4 eps |W|_F for one product) ten times over, not the worst case
    sqrt(n) eps |W|_F; the tests measure it.
    """

    def __init__(self, operator: Product, start: torch.Tensor, most_steps: int):
        n, M = operator.sides
        self.operator, self.block = operator, start.shape[1]
        self.most_steps = min(most_steps, n // self.block - 1)
        columns = max(self.most_steps, 0) * self.block
        self._S = start.new_zeros(n, columns + self.block)
        self._P = start.new_zeros(M, columns)
        self._B = torch.zeros(columns, columns, dtype=torch.float64)
        self._C = torch.zeros(self.block, self.block, dtype=torch.float64)
        Q, R = torch.linalg.qr(start.double())
        self._S[:, : self.block] = Q.to(start.dtype)
        self.start_coefficients = R.cpu()
        self.steps = 0
        self.norm = operator.norm()
        self._rounding = 4 * torch.finfo(start.dtype).eps * self.norm
        self._deviation = self._defect = 0.0
        self._seen = 0, 0  # columns of S and P that `_defect` covers
        self._generator = torch.Generator().manual_seed(0)

    @property
    def size(self) -> int:
        return self.steps * self.block

    @property
    def S(self) -> torch.Tensor:
        return self._S[:, : self.size]

    @property
    def P(self) -> torch.Tensor:
        return self._P[:, : self.size]

    @property
    def rounding(self) -> float:
        return self._rounding + math.sqrt(self._deviation)

    def advance(self, steps: int) -> bool:
        """Up to `steps` block steps more; False if there was no room for any."""
        before = self.steps
        while self.steps < min(before + steps, self.most_steps):
            old, new = slice(0, self.size), slice(self.size, self.size + self.block)
            # By the relations X has components along the last block alone, known from the step before.
            expected = torch.zeros(old.stop, self.block, dtype=torch.float64)
            expected[-self.block :] = self._C.mT[: old.stop]
            Q, above, diagonal = self._orthonormal(self.operator.to_large(self._S[:, new]), self._P[:, old], expected)
            self._P[:, new] = Q
            self._B[old, new], self._B[new, new] = above, diagonal
            self._deviation += float((above - expected).square().sum())
            expected = self._B[new, : new.stop].mT
            expected = torch.cat([torch.zeros_like(expected[: -self.block]), expected[-self.block :]])
            Q, below, self._C = self._orthonormal(self.operator.to_small(Q), self._S[:, : new.stop], expected)
            self._deviation += float((below - self._B[new, : new.stop].mT).square().sum())
            self._S[:, new.stop : new.stop + self.block] = Q
            self.steps += 1
        return self.steps > before

    def _orthonormal(self, X: torch.Tensor, basis: torch.Tensor, expected: torch.Tensor):
        """Q, c, R with X = basis c + Q R, Q orthonormal and orthogonal to the basis, also where X lies in its span.

        `expected` is what c is but for rounding, zero above its last block; c and R are float64 on the CPU.
        """
        last = slice(max(basis.shape[1] - self.block, 0), basis.shape[1])
        X = X - basis[:, last] @ expected[last].to(X)
        first = basis.mT @ X
        X -= basis @ first
        Q, R = torch.linalg.qr(X)
        smallest, largest = float(R.diagonal().abs().min()), float(R.abs().max())
        if first.numel():
            largest = max(largest, float(expected.abs().max()), float(first.abs().max()))
        c = expected + first.double().cpu()
        if smallest <= 4 * self._rounding:
            # An exhausted direction: noise below the stated rounding gives the new vectors a direction of their own.
            noise = torch.randn(X.shape, generator=self._generator, dtype=torch.float64).to(X)
            X += noise * (0.05 * self._rounding / math.sqrt(X.shape[0] * X.shape[1]))
            Q, R = torch.linalg.qr(X - basis @ (basis.mT @ X))
            Q, again = torch.linalg.qr(Q - basis @ (basis.mT @ Q))
            R = again @ R
        elif smallest > 0.02 * largest:
            return Q, c, R.double().cpu()  # little was cancelled: one full projection after the expected one is enough
        third = basis.mT @ Q
        Q, again = torch.linalg.qr(Q - basis @ third)
        return Q, c + (third @ R).double().cpu(), (again @ R).double().cpu()

    def ritz(self) -> Ritz:
        """Singular values and vectors of B, with the residuals of the Ritz triplets."""
        B = self._B[: self.size, : self.size]
        U, sigma, Vh = torch.linalg.svd(B)
        last = U[-self.block :]
        return Ritz(sigma, U, Vh.mT, self._C, last, torch.linalg.vector_norm(self._C @ last, dim=0))

    def defect(self) -> float:
        """Largest entry of |S^T S - I| and |P^T P - I| with the next block included; small if nothing went wrong."""
        ends = self.size + self.block, self.size
        for basis, start, end in zip((self._S, self._P), self._seen, ends, strict=True):
            if end > start:
                gram = basis[:, start:end].mT @ basis[:, :end]
                gram[:, start:].diagonal().sub_(1)
                self._defect = max(self._defect, float(gram.abs().max()))
        self._seen = ends
        return self._defect

    def left_vectors(self, ritz: Ritz, count: int) -> torch.Tensor:
        """The leading `count` left Ritz vectors of W, shape (m, count), in the working dtype."""
        side, small = (self.P, ritz.U) if self.operator.tall else (self.S, ritz.V)
        return side @ small[:, :count].to(side)

    def right_vectors(self, ritz: Ritz, count: int) -> torch.Tensor:
        """The leading `count` right Ritz vectors of W, shape (p, count), in the working dtype."""
        side, small = (self.S, ritz.V) if self.operator.tall else (self.P, ritz.U)
        return side @ small[:, :count].to(side)
