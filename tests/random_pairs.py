"""Random pairs of matrices for the property tests of `compare`: every kind of spectrum and update that has bitten."""

import numpy as np
import torch

from intruder.spectrum import LowRank

SPECTRA = ("gaussian", "power", "low_rank", "clustered", "flat", "head", "steps", "ill")
UPDATES = ("low_rank", "planted", "spread", "dense", "zero", "outside", "shrink")


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def spectrum(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    index = np.arange(1, n + 1)
    sigma = {
        "gaussian": lambda: np.sort(rng.random(n))[::-1] + 0.05,
        "power": lambda: index ** -rng.uniform(0.2, 2.0),
        "low_rank": lambda: np.where(index <= max(1, n // rng.integers(2, 20)), index**-0.5, 0.0),
        "clustered": lambda: np.repeat(rng.random(n), rng.integers(2, 5))[:n] + 0.1,
        "flat": lambda: np.ones(n),
        "head": lambda: np.where(index < n / 8, 4 * index**-0.5, 0) + np.sort(rng.random(n))[::-1],
        "steps": lambda: np.where(index <= n // 4, 3.0, 1.0) + 10.0 ** rng.integers(-9, -1) * rng.random(n),
        "ill": lambda: np.geomspace(1, 10.0 ** -rng.integers(3, 14), n),
    }[kind]()
    return np.sort(sigma)[::-1] * 10.0 ** rng.integers(-2, 3)


def draw(seed: int, smallest: int = 2, largest: int = 512) -> dict:
    """One case: pretrained, change (a tensor or a LowRank), k, epsilon and the kinds it was made of."""
    rng = np.random.default_rng(seed)
    n = int(np.exp(rng.uniform(np.log(smallest), np.log(largest + 0.5))))
    m = p = n
    shape = rng.choice(["square", "tall", "wide"], p=[0.4, 0.3, 0.3])
    longer = min(int(n * rng.uniform(1, 3)) + 1, largest)
    m, p = (longer, n) if shape == "tall" else (n, longer) if shape == "wide" else (n, n)
    n = min(m, p)
    kind, update = str(rng.choice(SPECTRA)), str(rng.choice(UPDATES, p=[0.4, 0.15, 0.15, 0.1, 0.04, 0.08, 0.08]))
    sigma = spectrum(rng, kind, n)
    U, V = orthonormal(rng, m, n), orthonormal(rng, p, n)
    W0 = (U * sigma) @ V.T
    r = int(min(rng.integers(1, 17), n))
    strength = sigma[0] * 10.0 ** rng.uniform(-1.5, 1.0)
    if update == "low_rank":
        B, A = rng.standard_normal((m, r)) / m**0.5, rng.standard_normal((r, p)) / p**0.5
        A *= 10.0 ** rng.uniform(-1, 0, (r, 1))
    elif update == "planted":  # a pre-trained direction from the middle of the spectrum is lifted to the top
        chosen = rng.choice(n, r, replace=False)
        B = U[:, chosen] + rng.choice([0.0, 0.05, 0.3]) * orthonormal(rng, m, r)
        A = V[:, chosen].T
    elif update == "spread":  # a direction even over q pre-trained ones: its best cosine is 1 / sqrt(q) or near it
        q = int(min(rng.integers(2, 12), n))
        chosen = rng.choice(n, q, replace=False) if rng.random() < 0.5 else np.arange(q)
        B, A = U[:, chosen].sum(1, keepdims=True) / q**0.5, V[:, chosen].sum(1, keepdims=True).T / q**0.5
    elif update == "shrink":  # leading pre-trained directions are taken away
        B, A, strength = U[:, :r] * sigma[:r], -V[:, :r].T, rng.uniform(0.5, 1.0)
    elif update == "outside":
        extra = orthonormal(rng, m, n)[:, :r] if m == n else np.linalg.qr(np.c_[U, rng.standard_normal((m, r))])[0]
        B, A = extra[:, -min(r, extra.shape[1]) :][:, :r], orthonormal(rng, p, r).T
        B = B[:, : len(A)]
        A = A[: B.shape[1]]
    else:
        B, A = np.zeros((m, 1)), np.zeros((1, p))
    dtype = [torch.float32, torch.float64][int(rng.integers(2))]
    pretrained = torch.from_numpy(W0).to(dtype)
    change = LowRank(torch.from_numpy(B).to(dtype), torch.from_numpy(A.copy()).to(dtype), float(strength))
    if update == "dense":
        noise = rng.standard_normal((m, p)) * strength / (m**0.5 + p**0.5)
        change = torch.from_numpy(W0 + rng.choice([0.01, 0.1, 1.0]) * noise).to(dtype)
    elif rng.random() < 0.2:
        change = pretrained + float(strength) * (change.B @ change.A)
    k = int(rng.integers(1, n + 1)) if rng.random() < 0.15 else int(min(rng.integers(1, 13), n))
    return {
        "pretrained": pretrained,
        "change": change,
        "k": k,
        "epsilon": float(rng.uniform(0.05, 0.95)),
        "kind": f"{shape} {kind} {update} {str(dtype)[6:]} n={n}",
    }


def exact(case: dict) -> np.ndarray:
    """m_1..m_k by two decompositions of numpy in float64: the definition, written without the package."""
    W0, change = case["pretrained"].double().numpy(), case["change"]
    if isinstance(change, LowRank):
        W = W0 + change.scale * (change.B.double() @ change.A.double()).numpy()
    else:
        W = change.double().numpy()
    U0, U = (np.linalg.svd(matrix, full_matrices=False)[0] for matrix in (W0, W))
    return np.minimum(np.abs(U0.T @ U[:, : case["k"]]).max(0), 1.0)
