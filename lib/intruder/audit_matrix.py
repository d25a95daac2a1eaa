"""What the audit says about one matrix: its intruders, their energy, the rank of the update, the null expectation."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from .changes import Change
from .comparison import compare
from .spectrum import above_rounding, effective_rank, factored_svd


def audit_matrix(change: Change, k: int, epsilon: float, device: str = "cpu", store=None) -> dict:
    """The entry of audit.json for one matrix; see `audit`. `change` has the factors of Delta W or the tuned matrix."""
    W0 = change.pretrained.to(device)
    factors, tuned = change.factors, change.tuned
    if factors is not None:
        factors = factors._replace(B=factors.B.to(device), A=factors.A.to(device))
        S = factored_svd(factors.B.float(), factors.A.float(), factors.scale).S
        rank = int(factors.B.shape[1])
    else:
        tuned = tuned.to(device)
        # Checkpoints in half precision differ by more than this rounding where they differ at all.
        S = above_rounding(torch.linalg.svdvals(tuned.float() - W0.float()), W0.shape, stored=tuned)
        rank = len(S)
    found = compare(W0, tuned if factors is None else factors, k=k, epsilon=epsilon, basis=store)
    energy = np.asarray(found.singular_values, dtype=np.float64) ** 2
    return {
        "name": change.name,
        "shape": [int(side) for side in W0.shape],
        "count": int(found.count),
        "max_cosine": _numbers(found.max_cosine),
        "lower": _numbers(found.lower),
        "upper": _numbers(found.upper),
        "singular_values": _numbers(found.singular_values),
        "intruder": [bool(hit) for hit in found.intruder],
        "route": [str(route) for route in found.route],
        "borderline": [bool(near) for near in found.borderline],
        "energy_share": float(energy[np.asarray(found.intruder)].sum() / energy.sum()) if energy.sum() > 0 else 0.0,
        "rank": rank,
        "effective_rank": effective_rank(S) if len(S) else 0.0,
        "null_expectation": null_expectation(*W0.shape),
    }


@functools.cache
def null_expectation(rows: int, columns: int) -> float:
    """E max_{i <= n} |<x_i, u>| for n = min(m, p) orthonormal x_i in R^m and u uniform on the unit sphere. Exact.

    A Gaussian g in R^m is |g| u with |g| and u independent, so the expectation is E max_{i <= n} |g_i| / E |g| with
    E |g| = sqrt(2) Gamma((m + 1) / 2) / Gamma(m / 2) and E max |g_i| = integral of 1 - erf(t / sqrt 2)^n over t >= 0.
    About sqrt(2 ln n / m): 0.12 at 768 x 768, 0.06 at 4096 x 4096.
    """
    n = min(rows, columns)
    t = np.linspace(0.0, 12.0, 4801)
    beyond = 1 - np.array([math.erf(value / math.sqrt(2)) for value in t]) ** n
    length = math.sqrt(2) * math.exp(math.lgamma((rows + 1) / 2) - math.lgamma(rows / 2))
    return min(float(np.trapezoid(beyond, t)) / length, 1.0)


def _numbers(values) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in np.asarray(values, dtype=np.float64)]
