"""One call for the intruder dimensions of one matrix, with the route that decided each vector."""

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import torch

from .basis import Basis, BasisStore, StoredBasis, content_key, inside, outside
from .certified import LeadingSpace, can_certify, decide, leading_vectors
from .errors import InputError
from .intruders import check_epsilon, check_k
from .krylov import Product, frobenius
from .margins import cosine_margins, vector_errors
from .spectrum import LowRank, factored_svd, real_matrix, svd, working_precision
from .updated import leading_updated

METHODS = ("auto", "dense", "cached", "certified")
# n from which `auto` prefers the certified route: measured on a CPU (see `choose`), not on CUDA. There a decomposition
# of 4096 x 4096 is reported to take about 1 s, hence .15 s at 2048, and the small float64 problems of the certified
# route, which stay on the CPU, take about as long.
SMALLEST_CERTIFIED = 1025
SMALLEST_CERTIFIED_CUDA = 2048
LARGEST_SHARE = 16  # k up to n / 16: beyond it the block and the proofs cost more than they save
SPARE_MEMORY = 0.8  # of what is free may be used
ROUNDINGS = 16  # a decomposition is taken as exact for a matrix within 16 eps sigma_1
CALL = "call compare(pretrained, tuned_or_update, k=10, epsilon=0.5, method='auto')"


@dataclass(frozen=True)
class Comparison:
    """What is known of the k leading left singular vectors y_j of W = W0 + Delta W. numpy arrays of shape (k,).

    singular_values: of W. max_cosine: m_j = max_i |<x_i, y_j>|, or NaN where only a bound is proven. lower, upper:
    bounds on m_j within numerical error. intruder: m_j < epsilon. route: 'dense', 'cached' or 'certified', what decided
    the vector. borderline: the verdict could change within the numerical error (close to epsilon, or the vector or its
    match is one of an unresolved cluster of singular values). count: the number of intruders.
    """

    singular_values: np.ndarray
    max_cosine: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    intruder: np.ndarray
    route: np.ndarray
    borderline: np.ndarray
    count: int
    epsilon: float
    k: int


def compare(
    pretrained: torch.Tensor,
    tuned_or_update: torch.Tensor | LowRank,
    k: int = 10,
    epsilon: float = 0.5,
    method: str = "auto",
    basis: Basis | BasisStore | None = None,
    seed: int = 0,
) -> Comparison:
    """Which of the k leading left singular vectors y_j of W have max_i |<x_i, y_j>| < epsilon over *all* x_i of W0.

    `pretrained` is W0, shape (m, p); `tuned_or_update` is W of that shape, or a `LowRank` whose scale * B A is the
    update (it is multiplied out by the dense route only). Half precision is promoted to float32; TF32 is off inside.

    method: 'dense' decomposes both matrices (float64 if n = min(m, p) <= 1024, else float32). 'cached' uses the
    decomposition of W0 in `basis` (made here if absent), where a low-rank update leaves a diagonal matrix plus rank r.
    'certified' decomposes nothing: verdicts come with a proof (see `certificate`) or not at all. Whatever cached and
    certified leave undecided is decided by dense, and `route` says so. 'auto': see `choose`. `basis` is a `Basis` or a
    `BasisStore`. `seed` draws the random vectors of certified and cached; a verdict does not depend on it except with
    the probability stated in `certificate`.

    Raises InputError for an unknown method, epsilon outside (0, 1], k outside [1, n], shapes that do not fit, NaN or
    infinity, different devices, or a basis of another matrix.

    Source: Definition 3.1 and Algorithm 1 of arXiv 2410.21228.
    """
    epsilon, k = check_epsilon(epsilon), check_k(k)
    if method not in METHODS:
        raise InputError(f"method={method!r} was given; wanted one of {', '.join(METHODS)}; {CALL}")
    pretrained, change = _checked(pretrained, tuned_or_update)
    n = min(pretrained.shape)
    if k > n:
        raise InputError(f"k={k} was given for a matrix of shape {tuple(pretrained.shape)}; wanted 1 <= k <= {n}")
    key = content_key(pretrained) if isinstance(basis, BasisStore) and method in ("auto", "cached") else None
    if method == "auto":
        method = choose(pretrained, k, basis, key)
    with torch.no_grad(), _full_precision():
        if method == "cached":
            found = _from_store(pretrained, change, k, epsilon, basis, key, seed)
        elif method == "certified":
            found = _certified(pretrained, change, k, epsilon, seed)
        else:
            found = None
        if found is None or not found["decided"].all():
            dense = _dense(pretrained, change, k, epsilon)
            found = dense if found is None else _merge(found, dense)
    del found["decided"]
    return Comparison(**found, count=int(found["intruder"].sum()), epsilon=epsilon, k=k)


def choose(pretrained: torch.Tensor, k: int, basis: Basis | BasisStore | None = None, key: str | None = None) -> str:
    """The route of method='auto' for W0 (m, p), by shape, device, free memory and what is cached.

    cached: a basis is given, or the store has it; or the store would keep it and memory is left to make it, since a
    store is given for many adapters of one base: it costs one decomposition once. dense: n is below the crossover of
    the device, or k > n / 16, and memory is left for both decompositions. Else certified. Where k is too large for
    certified to decide anything, dense.

    The crossover on a CPU, measured on the pairs of tests/benchmarks/compare_routes.py, seconds of one thread, dense
    and certified: .20 and .29 at 512, .47 and .16 at 768, 1.2 and .22 at 1024, 2.2 and .25 at 1536, 5.8 and .30 at
    2048. Up to 1024 dense is preferred all the same: it is in float64 and gives the value of every m_j, where certified
    gives many only a bound. `key` is `content_key(pretrained)` if known.
    """
    n = min(pretrained.shape)
    memory = free_memory(pretrained.device) * SPARE_MEMORY
    if isinstance(basis, Basis):
        return "cached"
    if basis is not None:
        if basis.holds(content_key(pretrained) if key is None else key):
            return "cached"
        if basis.would_keep(pretrained.shape) and (_dense_bytes(pretrained, 1) <= memory or not can_certify(n, k)):
            return "cached"
    smallest = SMALLEST_CERTIFIED_CUDA if pretrained.device.type == "cuda" else SMALLEST_CERTIFIED
    preferred = n < smallest or k > n // LARGEST_SHARE
    if not can_certify(n, k) or (preferred and _dense_bytes(pretrained, 2) <= memory):
        return "dense"
    return "certified"


def _dense_bytes(pretrained: torch.Tensor, decompositions: int) -> int:
    """About what decomposing needs beside W0: a copy of the matrix, U and Vh, and LAPACK's copy and workspace."""
    m, p = pretrained.shape
    n = min(m, p)
    size = 8 if n <= 1024 else 4
    return size * (decompositions * (m * p + m * n + n * p) + m * p + 5 * n * n)


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on the device: MemAvailable, free physical pages where that is not told; inf if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            return float(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _dense(pretrained: torch.Tensor, change: torch.Tensor | LowRank, k: int, epsilon: float) -> dict[str, np.ndarray]:
    before = svd(working_precision(pretrained))
    return _from_basis(before, svd(_tuned(pretrained, change)), k, epsilon, "dense")


def _tuned(pretrained: torch.Tensor, change: torch.Tensor | LowRank) -> torch.Tensor:
    """W in the working precision; a low-rank update is multiplied out in it."""
    if not isinstance(change, LowRank):
        return working_precision(change)
    W0 = working_precision(pretrained)
    return torch.addmm(W0, change.B.to(W0), change.A.to(W0), alpha=float(change.scale))


def _from_basis(before, after, k: int, epsilon: float, route: str) -> dict[str, np.ndarray]:
    """Verdicts from all of U0 and the leading vectors of a decomposition of W."""
    U = after.U[:, :k]
    tall = U.shape[0] > before.U.shape[1]
    cosines = (before.U.mT @ U).double()
    eps = torch.finfo(before.S.dtype).eps
    rounding = ROUNDINGS * eps * max(float(before.S[0]), float(after.S[0]))
    error = vector_errors(after.S, k, rounding, tall)
    return _verdicts(before.S, cosines, after.S[:k], error, rounding, tall, epsilon, route)


def _verdicts(S, cosines, sigma, error, rounding, tall, epsilon, route) -> dict[str, np.ndarray]:
    outside = (1 - cosines.square().sum(0)).clamp(min=0)
    lower, upper = cosine_margins(S, cosines, outside, error.to(cosines.device), rounding, tall)
    value = cosines.abs().amax(0).clamp(max=1.0).cpu()
    lower, upper = torch.minimum(lower, value), torch.maximum(upper, value)
    borderline = ((lower < epsilon) & (upper >= epsilon)).numpy()
    return {
        "singular_values": sigma.double().cpu().numpy(),
        "max_cosine": value.numpy(),
        "upper": upper.numpy(),
        "lower": lower.numpy(),
        "intruder": (value < epsilon).numpy(),
        "route": np.full(len(value), route, dtype="<U9"),
        "borderline": borderline,
        "decided": ~borderline,
    }


def _from_store(
    pretrained, change, k: int, epsilon: float, basis: Basis | BasisStore | None, key: str | None, seed: int
) -> dict[str, np.ndarray]:
    if not isinstance(basis, BasisStore):
        return _cached(pretrained, change, k, epsilon, _basis(pretrained, basis), seed)
    try:
        return _cached(pretrained, change, k, epsilon, basis.open(pretrained, key), seed)
    except OSError:  # another process made room in the folder while the file was read
        return _cached(pretrained, change, k, epsilon, Basis.of(pretrained, key), seed)


def _cached(
    pretrained, change, k: int, epsilon: float, basis: Basis | StoredBasis, seed: int
) -> dict[str, np.ndarray]:
    S = basis.S.double()
    m, p = pretrained.shape
    tall, n = m > p, len(S)
    eps = torch.finfo(basis.S.dtype).eps
    if isinstance(change, LowRank):
        if n >= 96 and k <= n // 8:
            found = leading_updated(basis, change, k)
            if found is None:
                return _undecided(k)
            error = found.error.clamp(max=1.0)
            return _verdicts(S, found.inside, found.sigma, error, found.rounding, tall, epsilon, "cached")
        operator = _in_basis(basis, change, (m, p))
        U, sigma, _ = torch.linalg.svd(operator.times(torch.eye(operator.shape[1]).to(S)), full_matrices=False)
    elif n < 96 or k > n // 8:
        U, sigma, _ = svd(working_precision(change))
    else:
        operator = Product(working_precision(change), (m, p))
        rounding = ROUNDINGS * eps * max(float(S[0]), float(operator.norm()) / n**0.5)
        sigma, U, error = leading_vectors(operator, k, seed, 1e-4, rounding)
        cosines = inside(basis, "U", U).double()
        found = _verdicts(S, cosines, sigma, error.clamp(max=1.0), rounding, tall, epsilon, "cached")
        found["decided"] &= torch.isfinite(error).numpy()
        return found
    rounding = ROUNDINGS * eps * max(float(S[0]), float(sigma[0]))
    error, U = vector_errors(sigma[:n], k, rounding, tall), U[:, :k]
    cosines = U[:n].double() if isinstance(change, LowRank) else inside(basis, "U", U).double()
    return _verdicts(S, cosines, sigma[:k], error, rounding, tall, epsilon, "cached")


def _undecided(k: int) -> dict[str, np.ndarray]:
    nothing = np.full(k, np.nan)
    found = dict.fromkeys(("singular_values", "max_cosine", "upper", "lower"), nothing)
    no = np.zeros(k, dtype=bool)
    return found | {"intruder": no, "borderline": no, "decided": no, "route": np.full(k, "cached", dtype="<U9")}


def _in_basis(basis: Basis | StoredBasis, change: LowRank, shape: tuple[int, int]) -> Product:
    """U0^T W V0 = diag(S) + U0^T B A V0, float64, with a row or column more for each direction outside the basis."""
    m, p = shape
    update = factored_svd(change.B.double(), change.A.double(), change.scale)
    root = update.S.sqrt()
    left, right = (update.U * root).to(basis.S), (update.Vh.mT * root).to(basis.S)
    rows, columns = inside(basis, "U", left), inside(basis, "Vh", right)
    more_rows = torch.linalg.qr(outside(basis, "U", left, rows).double()).R if m > p else rows[:0].double()
    more_columns = torch.linalg.qr(outside(basis, "Vh", right, columns).double()).R if p > m else rows[:0].double()
    rows, columns = torch.cat([rows.double(), more_rows]), torch.cat([columns.double(), more_columns])
    return Product(basis.S.double(), (len(rows), len(columns)), rows, columns)


def _certified(pretrained, change, k: int, epsilon: float, seed: int) -> dict[str, np.ndarray]:
    shape, norm = tuple(pretrained.shape), frobenius(pretrained)
    if isinstance(change, LowRank):
        update = factored_svd(change.B.double(), change.A.double(), change.scale)
        operator = Product(pretrained, shape, update.U * update.S, update.Vh.mT, norm)
    else:
        operator = Product(change, shape)
    space = LeadingSpace(operator, k, seed)
    leading = space.solve()
    verdicts = decide(Product(pretrained, shape, matrix_norm=norm), leading, epsilon, seed, space.sharpen)
    return {
        "singular_values": leading.sigma.numpy(),
        "max_cosine": verdicts.value.numpy(),
        "upper": verdicts.upper.numpy(),
        "lower": verdicts.lower.numpy(),
        "intruder": verdicts.intruder.numpy(),
        "route": np.full(k, "certified", dtype="<U9"),
        "borderline": np.zeros(k, dtype=bool),
        "decided": (verdicts.intruder | verdicts.matched).numpy(),
    }


def _merge(found: dict[str, np.ndarray], dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    decided = found["decided"]
    merged = {name: np.where(decided, found[name], dense[name]) for name in found}
    merged["singular_values"] = dense["singular_values"]
    return merged


def _basis(pretrained: torch.Tensor, basis: Basis | None) -> Basis:
    if basis is None:
        return Basis.of(pretrained, key="")  # thrown away after the call: its name is not needed
    n = min(pretrained.shape)
    if basis.U.shape != (pretrained.shape[0], n) or basis.Vh.shape != (n, pretrained.shape[1]):
        raise InputError(
            f"a basis with U of shape {tuple(basis.U.shape)} was given for a matrix of shape "
            f"{tuple(pretrained.shape)}; wanted the basis of that matrix; call Basis.of(pretrained)"
        )
    # A probe instead of the content's hash: it costs one product and sees any other matrix.
    probe = torch.ones(pretrained.shape[1], 1, dtype=basis.S.dtype, device=pretrained.device)
    probe[1::2] = -0.5
    basis = basis.to(pretrained.device)
    expected = pretrained.to(probe) @ probe
    actual = basis.U @ (basis.S[:, None] * (basis.Vh @ probe))
    if float((expected - actual).norm()) > 1e-3 * float(expected.norm()) + 1e-30:
        raise InputError("the basis given is not that of the pre-trained matrix; call Basis.of(pretrained)")
    return basis


def _checked(pretrained, change) -> tuple[torch.Tensor, torch.Tensor | LowRank]:
    pretrained = real_matrix(pretrained, "pretrained")
    shape = tuple(pretrained.shape)
    if isinstance(change, LowRank):
        B, A = real_matrix(change.B, "B"), real_matrix(change.A, "A")
        if B.shape[0] != shape[0] or A.shape[1] != shape[1] or B.shape[1] != A.shape[0]:
            raise InputError(
                f"B has shape {tuple(B.shape)}, A has shape {tuple(A.shape)} and the pre-trained matrix {shape}; "
                f"wanted (m, r), (r, p) and (m, p); {CALL}"
            )
        if not np.isfinite(float(change.scale)):
            raise InputError(f"scale={change.scale!r} was given; wanted a finite number; call LowRank(B, A, scale)")
        result, device = LowRank(B, A, float(change.scale)), {B.device, A.device}
    else:
        result = real_matrix(change, "tuned")
        device = {result.device}
        if tuple(result.shape) != shape:
            raise InputError(
                f"the tuned matrix has shape {tuple(result.shape)} and the pre-trained one {shape}; "
                f"wanted the same shape; {CALL}"
            )
        dtype = torch.promote_types(pretrained.dtype, result.dtype)
        pretrained, result = pretrained.to(dtype), result.to(dtype)
    if device != {pretrained.device}:
        raise InputError(f"the matrices lie on {pretrained.device} and {device}; wanted one device; {CALL}")
    return pretrained, result


@contextlib.contextmanager
def _full_precision():
    """Float32 products in float32: TF32 or bfloat16 passes would break every bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
