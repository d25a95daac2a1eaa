"""The bounds hold: against full decompositions, on spectra chosen to break them; the random thresholds, by chance."""

import math

import numpy as np
import pytest
import torch

from intruder.certificate import (
    SAFETY,
    Bounds,
    empty_below,
    overlap_ceilings,
    reach,
    thresholds,
)
from intruder.krylov import Bidiagonalisation, Product

RANDOM = 12


def gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(name: str, rows: int = 150, columns: int = 110) -> torch.Tensor:
    n = min(rows, columns)
    index = torch.arange(1, n + 1, dtype=torch.float64)
    sigma = {
        "power": 5 / index**0.7,
        "bulk and head": torch.where(index < 12, 9 / index.sqrt(), 0) + torch.linspace(1, 0.2, n).double(),
        "pairs": 5 / torch.div(index + 1, 2, rounding_mode="floor") ** 0.7,
        "near pairs": 5 / torch.div(index + 1, 2, rounding_mode="floor") ** 0.7 * (1 + 1e-7 * (index % 2)),
        "gap": torch.where(index < 30, 5 - 0.1 * index, 0.5 + 0.001 * index).sort(descending=True).values,
        "deficient": torch.where(index < 80, 5 / index**0.5, 0.0),
    }[name]
    U, V = torch.linalg.qr(gaussian(rows, n, 1)).Q, torch.linalg.qr(gaussian(columns, n, 2)).Q
    return (U * sigma) @ V.T


NAMES = ("power", "bulk and head", "pairs", "near pairs", "gap", "deficient")


def analysed(name: str, steps: int, shape: tuple[int, int] = (110, 110)):
    """A space on W with three fixed vectors u and twelve Gaussian ones, and the true left vectors and values."""
    W = matrix(name, *shape)
    operator = Product(W, shape)
    n, _ = operator.sides
    X, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    mixed = X[:, [0, 5, 6]] + torch.stack([X[:, 20], X[:, 6], X[:, 30:60].sum(1) / 4], 1)
    u = torch.linalg.qr(mixed).Q
    omega = gaussian(n, RANDOM, 4)
    first = W.T @ u if operator.tall else u
    space = Bidiagonalisation(operator, torch.cat([first, omega], 1), steps)
    space.advance(steps)
    ritz = space.ritz()
    coefficients = ritz.V[: RANDOM + 3].T @ space.start_coefficients
    vectors = Vh.T if operator.tall else X
    return space, ritz, coefficients, u, omega, X, sigma, vectors


@pytest.mark.parametrize("shape", [(110, 110), (150, 110), (110, 150)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_no_singular_vector_exceeds_its_bound(name, shape, steps):
    """For every true sigma_i, at its own place and anywhere in a cell that holds it, |f^T s_i|^2 <= the bound."""
    space, ritz, coefficients, *_, sigma, vectors = analysed(name, steps, shape)
    start = space.S[:, : space.block] @ space.start_coefficients
    values = (vectors.T @ start).square()
    bounds = Bounds(ritz, coefficients, space.rounding)
    for width in (0.0, 1e-4, 0.05):
        h = torch.full_like(sigma, width)
        for shift in (0.0, -0.9, 0.9):
            bound = bounds.each((sigma + shift * h).clamp(min=0), h)
            assert bool((values <= bound + 1e-9 * start.square().sum(0)).all())
        assert bool((values[:, 3:].sum(1) <= RANDOM * bounds.each(sigma, h)[:, 3:].sum(1)).all())
        together = Bounds(ritz, coefficients[:, 3:], space.rounding).joint(sigma, h)
        assert bool((values[:, 3:].sum(1) <= together + 1e-9).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_allowance_for_float64_is_ample(name):
    """f^T M^-1 f in 80-bit numbers, with M written out and solved by elimination, differs by a hundredth of SAFETY."""
    _, ritz, coefficients, *_ = analysed(name, 4)
    bounds = Bounds(ritz, coefficients, 0.0)
    x = torch.tensor([0.0, 0.3, 1.0, float(ritz.sigma[0]), float(ritz.sigma[1]) * (1 + 1e-9)], dtype=torch.float64)
    h = torch.tensor([0.0, 1e-6, 1e-3, 0.0, 1e-7], dtype=torch.float64) * float(ritz.sigma[0])
    got = bounds.each(x, h)
    theta = (20 * h / ritz.sigma[0]).clamp(0.0005, 0.05)
    sigma, g, c, f = (part.numpy().astype(np.longdouble) for part in (ritz.sigma, bounds.g, bounds.c, bounds.f))
    for cell in range(len(x)):
        centre, t = np.longdouble(float(x[cell])), np.longdouble(float(theta[cell]))
        e = (np.longdouble(bounds.floor) + np.longdouble(float(h[cell]))) / np.sqrt(t)
        # In H's eigenvectors: the values +-sigma; zeta's functional is (f; f), the coupling (g; -g) c.
        values = np.concatenate([sigma - centre, -sigma - centre])
        coupling = np.concatenate([g, -g]) * c
        functional = np.concatenate([f, f])
        # min over d of |d|^2 + |Lambda zeta + coupling d|^2 / e^2 + |zeta|^2
        inner = np.eye(len(c), dtype=np.longdouble) + coupling.T @ coupling / e**2
        cross = (values[:, None] * coupling) / e**2
        M = np.diag(1 + values**2 / e**2) - cross @ solve(inner, cross.T)
        exact = (functional * solve(M, functional)).sum(0)
        ratio = got[cell].numpy() / ((1 + t) * exact)
        np.testing.assert_allclose(ratio.astype(float), SAFETY, rtol=(SAFETY - 1) / 100)


def solve(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A^-1 b by elimination with pivots, in the precision given."""
    A, b = A.copy(), b.copy()
    for j in range(len(A)):
        pivot = j + int(np.abs(A[j:, j]).argmax())
        A[[j, pivot]], b[[j, pivot]] = A[[pivot, j]], b[[pivot, j]]
        factors = A[j + 1 :, j] / A[j, j]
        A[j + 1 :] -= factors[:, None] * A[j]
        b[j + 1 :] -= factors[:, None] * b[j]
    for j in reversed(range(len(A))):
        b[j] = (b[j] - A[j, j + 1 :] @ b[j + 1 :]) / A[j, j]
    return b


@pytest.mark.parametrize("shape", [(110, 110), (150, 110), (110, 150)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_reach_counts_like_the_full_spectrum(name, shape, steps):
    """A proven window holds exactly one true singular value, the proven distances no other, the list is complete."""
    space, ritz, coefficients, _, _, _, sigma, _ = analysed(name, steps, shape)
    bounds = Bounds(ritz, coefficients[:, 3:], space.rounding)
    indices = list(range(12))
    found = reach(bounds, ritz, indices, thresholds(RANDOM, 110), 1.01 * space.norm)
    whole = True
    for l, value in enumerate(ritz.sigma[:12].tolist()):
        radius, below, above = (float(part[l]) for part in (found.radius, found.below, found.above))
        whole &= bool(found.complete[l])
        if radius > 0:
            inside = (sigma - value).abs() <= radius
            assert int(inside.sum()) == 1
            assert int(((sigma > value - below) & (sigma < value + above)).sum()) == 1
            if whole:
                assert int((sigma > value + radius).sum()) == l


def test_reach_proves_the_leading_values_of_an_easy_spectrum():
    """With a head that Krylov resolves, the first windows are proven: the test above is not vacuous."""
    space, ritz, coefficients, *_ = analysed("bulk and head", 6)
    found = reach(
        Bounds(ritz, coefficients[:, 3:], space.rounding),
        ritz,
        [0, 1, 2, 3],
        thresholds(RANDOM, 110),
        1.01 * space.norm,
    )
    assert bool((found.radius > 0).all()) and bool(found.complete.all())


@pytest.mark.parametrize("name", ["pairs", "near pairs"])
def test_a_pair_is_never_taken_for_one(name):
    """Two equal, or nearly equal, singular values never pass as a window with one."""
    space, ritz, coefficients, *_, sigma, _ = analysed(name, 6)
    found = reach(
        Bounds(ritz, coefficients[:, 3:], space.rounding), ritz, list(range(8)), thresholds(RANDOM, 110), 99.0
    )
    for l in range(8):
        if float(found.radius[l]) > 0:
            assert int(((sigma - ritz.sigma[l]).abs() <= float(found.radius[l])).sum()) == 1


def test_empty_range_below_the_spectrum():
    """Below the smallest singular value a range is proven empty, unless the matrix is deficient."""
    space, ritz, coefficients, *_, sigma, _ = analysed("gap", 6, (150, 110))
    edge = empty_below(Bounds(ritz, coefficients[:, 3:], space.rounding), ritz, thresholds(RANDOM, 110)[0])
    assert 0 < edge < float(sigma[-1])
    space, ritz, coefficients, *_ = analysed("deficient", 6, (150, 110))
    assert empty_below(Bounds(ritz, coefficients[:, 3:], space.rounding), ritz, thresholds(RANDOM, 110)[0]) == 0


@pytest.mark.parametrize("shape", [(110, 110), (150, 110)])
@pytest.mark.parametrize("name", NAMES)
def test_ceilings_lie_above_every_overlap(name, shape):
    """overlap_ceilings claims |<u_j, x_i>| < limit only if no x_i of the full decomposition reaches it."""
    space, ritz, coefficients, u, _, X, sigma, _ = analysed(name, 5, shape)
    largest = (X.T @ u).abs().amax(0)
    tall = shape[0] > shape[1]
    start = 0.9 * float(sigma[-1]) if tall else 0.0
    bounds = Bounds(ritz, coefficients[:, :3], space.rounding)
    for limit in (0.05, 0.2, 0.5, 0.8, 0.99):
        limits = torch.full((3,), limit, dtype=torch.float64)
        proven, upper = overlap_ceilings(bounds, limits, start, 1.01 * space.norm, 1e-9, divide=tall)
        assert not bool((proven & (largest >= limit)).any())
        assert bool((largest <= upper + 1e-9).all())


def test_thresholds_against_chance():
    """t_1 and t_2 at a failure of one in a hundred fail no more often than that in 20,000 draws; both shrink with n."""
    draws = gaussian(20_000 * 2, 9, 0).reshape(20_000, 2, 9)
    single = 2 * math.exp((math.log(0.01) + math.lgamma(9 / 2 + 1)) / (9 / 2))
    assert float((draws[:, 0].square().sum(1) < single).double().mean()) < 0.01
    pair = 0.5 * math.exp((math.log(0.01) + math.lgamma(9) - math.lgamma(5)) / 4)
    smallest = torch.linalg.eigvalsh(draws @ draws.mT)[:, 0]
    assert 0.0001 < float((smallest < pair).double().mean()) < 0.01
    assert thresholds(16, 100)[0] > thresholds(16, 10_000)[0] > 0
    assert thresholds(16, 100)[1] > thresholds(8, 100)[1] > 0
