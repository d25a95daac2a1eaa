"""Edits of one weight matrix that scale chosen singular directions, kept in factors: exact, or cut to a rank."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch

from .errors import InputError
from .spectrum import LowRank, Spectrum
from .synthetic import random_update

WHICH = ("top", "all")
CONTROLS = ("neighbour", "norm-matched", "random")
RANKS = ("grow", "keep")


class Plan(NamedTuple):
    """What to do to one matrix: which vectors decide it (0-based j), what is added, and the factor on the update.

    The edited matrix is W0 + factor * (W - W0) + E with E = `added` (scale 1), or None for nothing added. `norm` is
    the Frobenius norm of the paper's edit of these intruders, which the controls match where they can.
    """

    indices: list[int]
    added: LowRank | None
    factor: float
    norm: float


def check_scale(scale: float) -> float:
    """Return lambda as a float, or raise InputError unless it is finite and not negative."""
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(
            f"scale={scale!r} was given; wanted a finite lambda >= 0: 0 removes an intruder, 1 changes "
            "nothing, for example --scale 0.75"
        )
    return value


def check_choice(name: str, value: str | None, choices: tuple[str, ...], optional: bool = False) -> None:
    """InputError unless `value` is one of `choices` (or None where that is allowed)."""
    if value not in choices and not (optional and value is None):
        raise InputError(f"{name}={value!r} was given; wanted one of {', '.join(choices)}")


def plan(
    vectors: Spectrum,
    intruder: np.ndarray,
    update_norm: float,
    scale: float,
    k: int,
    which: str = "top",
    control: str | None = None,
    name: str = "",
    seed: int = 0,
) -> Plan | None:
    """The edit (lambda - 1) sum_{i in I} u_i sigma_i v_i^T of a tuned W, or a control for it; None if I is empty.

    `vectors` holds the leading triplets of W, at least k of them, `intruder` the verdict on each. I is the first
    intruder among the leading k (`which` = "top", as in the paper), or all of them. Controls:

    neighbour      the same for the vectors that are no intruders and whose sigma is nearest (by ratio) to each i in I
    norm-matched   W0 + c (W - W0) with |1 - c| |W - W0|_F = |edit|_F and the sign of 1 - lambda; c is not let below 0
    random         the same singular values along random orthonormal directions (seeded by `name` and `seed`)

    Raises InputError if there are fewer matched vectors than the neighbours that are needed, naming the matrix.
    Source: paper, section on causal interventions; norm-matched and random are our controls.
    """
    S = vectors.S.double().cpu().numpy()
    chosen = [int(j) for j in np.flatnonzero(intruder[:k])]
    chosen = chosen[:1] if which == "top" else chosen
    if not chosen or scale == 1:
        return None
    norm = abs(scale - 1) * float(np.sqrt(np.square(S[chosen]).sum()))
    if control == "norm-matched":
        share = norm / update_norm if update_norm > 0 else 0.0
        return Plan(chosen, None, max(1 - math.copysign(share, 1 - scale), 0.0), norm)
    if control == "random":
        shape = (vectors.U.shape[0], vectors.Vh.shape[1])
        digest = hashlib.sha256(f"random control {seed}:{name}".encode()).digest()
        directions = _factored_random(shape, abs(scale - 1) * S[chosen], int.from_bytes(digest[:8], "big"))
        left, right = (torch.from_numpy(part).to(vectors.U) for part in directions)
        return Plan(chosen, LowRank(math.copysign(1, scale - 1) * left, right, 1.0), 1.0, norm)
    targets = _neighbours(S, intruder, chosen, name) if control == "neighbour" else chosen
    weights = (scale - 1) * vectors.S[targets]
    root = weights.abs().sqrt()
    return Plan(
        targets,
        LowRank(vectors.U[:, targets] * (root * weights.sign()), root[:, None] * vectors.Vh[targets], 1.0),
        1.0,
        norm,
    )


def grow(update: LowRank, added: LowRank) -> LowRank:
    """s B A + E as one update of rank r + q and the same scale s: [B, L / c] and [A; R / c'] with c c' = s. Exact.

    E = L R (scale 1) of rank q; sqrt |s| is divided out of both sides, the sign of s out of L. The old columns of B and
    rows of A are kept as they are. Raises InputError for s = 0, where no factor can carry E.
    """
    B, A, scale = update
    if scale == 0:
        raise InputError("the adapter's scale is 0 (lora_alpha = 0); wanted an adapter that does something")
    root = math.sqrt(abs(scale))
    left, right = added.B * (math.copysign(1, scale) / root), added.A / root
    return LowRank(torch.cat([B, left.to(B)], 1), torch.cat([A, right.to(A)]), scale)


def keep(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """(the best rank-`rank` approximation of s B A with the same s, the Frobenius norm of what it discards).

    Two thin QR decompositions and one SVD of size at most (columns of B) squared, in float64; the singular values are
    split evenly between B and A.
    """
    B, A, scale = update
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    root = S[:rank].sqrt()
    cut = LowRank((Q_B @ (U[:, :rank] * root)).to(B), (root[:, None] * (Vh[:rank] @ Q_A.mT)).to(A), scale)
    return cut, abs(scale) * float(torch.linalg.vector_norm(S[rank:]))


def low_rank_norm(update: LowRank) -> float:
    """The Frobenius norm of s B A from the two Gram matrices of r by r, in float64."""
    B, A = update.B.double(), update.A.double()
    square = float(((B.mT @ B) * (A @ A.mT)).sum())
    return abs(update.scale) * math.sqrt(max(square, 0.0))


def _neighbours(S: np.ndarray, intruder: np.ndarray, chosen: list[int], name: str) -> list[int]:
    free = [int(j) for j in np.flatnonzero(~np.asarray(intruder, dtype=bool)) if S[j] > 0]
    if len(free) < len(chosen):
        raise InputError(
            f"{name} has {len(free)} matched vectors among the {len(S)} leading ones and {len(chosen)} "
            "neighbours are needed; wanted a smaller k or epsilon, or --control norm-matched"
        )
    targets = []
    for i in chosen:
        nearest = min(free, key=lambda j: (abs(math.log(S[j] / S[i])), j))
        free.remove(nearest)
        targets.append(nearest)
    return targets


def _factored_random(shape: tuple[int, int], singular_values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(L, R) with L R = P diag(S) Q^T, P and Q random with orthonormal columns: small calls of `random_update`."""
    q = len(singular_values)
    identity = np.ones(q)
    P = random_update((shape[0], q), identity, seed)
    Q = random_update((q, shape[1]), identity, seed + 1)
    root = np.sqrt(singular_values)
    return P * root, root[:, None] * Q
