"""A weight before and after fine-tuning, and what each kind of adapter does to it."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import InputError
from .spectrum import LowRank, svd, working_precision


class MatrixPair(NamedTuple):
    """One weight before and after: float32, shape (out, in). `update` is tuned - pretrained where the factors give it.

    Where the update is low rank, `update` = scale * B A in float32 and `tuned` = `pretrained` + `update`; otherwise
    `update` is None and the difference of the two matrices carries the rounding of float32.
    """

    name: str
    pretrained: torch.Tensor
    tuned: torch.Tensor
    update: torch.Tensor | None = None


class Change(NamedTuple):
    """One weight and what fine-tuning did to it, not yet added up; float32, shape (out, in).

    Exactly one of the two is set: `factors` where the update of the true pre-trained matrix is low rank (tuned =
    pretrained + scale * B A), else `tuned`, the tuned matrix itself.
    """

    name: str
    pretrained: torch.Tensor
    tuned: torch.Tensor | None = None
    factors: LowRank | None = None

    def pair(self) -> MatrixPair:
        """Both matrices; a low-rank update is multiplied out."""
        if self.factors is None:
            return MatrixPair(self.name, self.pretrained, self.tuned)
        update = lora_update(*self.factors)
        return MatrixPair(self.name, self.pretrained, self.pretrained + update, update)


@dataclass(frozen=True)
class PairSource:
    """A pair that has not been read yet: its name, its shape (out, in), how it was tuned, and the calls that read it.

    `read_pretrained()` reads W0, and `change(W0)` what the tuned side makes of it, so that several tuned models of one
    base can share one reading: two sources of equal `place` have the same W0. `kind`: "full", "whole"
    (modules_to_save), or the kind of adapter: "lora", "rslora", "dora", "pissa", "olora", "adalora", "vera". `rank` is
    the rank of the update, or None where it is not low.
    """

    name: str
    shape: tuple[int, int]
    read_pretrained: Callable[[], torch.Tensor]
    change: Callable[[torch.Tensor], Change]
    place: Hashable
    kind: str = "full"
    rank: int | None = None

    def load_change(self) -> Change:
        """Read the pre-trained matrix and the factors of a low-rank update, or the tuned matrix."""
        return self.change(self.read_pretrained())

    def load(self) -> MatrixPair:
        """Read both matrices."""
        return self.load_change().pair()


def lora_scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The factor s of the update s * B A: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def lora_update(B: torch.Tensor, A: torch.Tensor, scale: float) -> torch.Tensor:
    """The dense update scale * B A in float32: B of shape (out, r), A of shape (r, in), any floating-point dtype."""
    return scale * (B.detach().float() @ A.detach().float())


def dora_change(name: str, pretrained: torch.Tensor, factors: LowRank, magnitude: torch.Tensor) -> Change:
    """DoRA: W = diag(m / |V|_rows) V with V = W0 + s B A and the trained magnitude m, shape (out,).

    The norms are taken anew from V, as PEFT does, so the length of each row of W is m. The update has full rank.
    Raises InputError if a row of V is zero: its direction is not defined.
    Source: Liu et al. 2024 (DoRA), equation 5; row norms in the (out, in) orientation, as in PEFT 0.21.
    """
    V = pretrained + lora_update(*factors)
    norms = torch.linalg.vector_norm(V, dim=1)
    if (norms == 0).any():
        raise InputError(f"{name}: a row of W0 + s B A is zero; wanted rows with a direction (DoRA)")
    return Change(name, pretrained, tuned=(magnitude.float().reshape(-1) / norms)[:, None] * V)


def pissa_change(name: str, pretrained: torch.Tensor, factors: LowRank) -> Change:
    """PiSSA: W = (W0 - s B0 A0) + s B A, where s B0 A0 is the best rank-r approximation of the true W0.

    PEFT moves the r leading singular triplets of W0 into the adapter and keeps the residual as the base. Against the
    true W0 the update is s [B, -B0] [A; A0], of rank at most 2 r; that is what is returned.
    Raises InputError for a scale that is not positive. Source: Meng et al. 2024; PEFT 0.21 `pissa_init`.
    """
    B, A, scale = factors
    rank = A.shape[0]
    if scale <= 0 or rank > min(pretrained.shape):
        raise InputError(f"{name}: PiSSA with scale {scale} and rank {rank}; wanted scale > 0 and a rank that fits")
    U, S, Vh = (part.float() for part in svd(working_precision(pretrained)))
    root = (S[:rank] / scale).sqrt()
    return _subtract(name, pretrained, factors, U[:, :rank] * root, root[:, None] * Vh[:rank])


def olora_change(name: str, pretrained: torch.Tensor, factors: LowRank) -> Change:
    """OLoRA: W = (W0 - s Q_r R_r) + s B A with W0 = Q R; the update against the true W0 is s [B, -Q_r] [A; R_r].

    Raises InputError if the rank does not fit. Source: Buyukakyuz 2024; PEFT 0.21 `olora_init`.
    """
    rank = factors.A.shape[0]
    if rank > min(pretrained.shape):
        raise InputError(f"{name}: OLoRA of rank {rank} on shape {tuple(pretrained.shape)}; wanted a rank that fits")
    Q, R = (part.float() for part in torch.linalg.qr(working_precision(pretrained)))
    return _subtract(name, pretrained, factors, Q[:, :rank], R[:rank])


def _subtract(name: str, pretrained: torch.Tensor, factors: LowRank, B0: torch.Tensor, A0: torch.Tensor) -> Change:
    B, A, scale = factors
    both = LowRank(torch.cat([B.float(), -B0], dim=1), torch.cat([A.float(), A0]), scale)
    return Change(name, pretrained, factors=both)
