"""How far rounding can move a cosine: bounds from the singular values' spacings, and so what is borderline."""

import math

import torch


def cosine_margins(
    S: torch.Tensor, cosines: torch.Tensor, outside: torch.Tensor, error: torch.Tensor, rounding: float, tall: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lower, upper), each (k,): the range of m_j = max_i |<y_j, x_i>| under perturbations of W0 of norm `rounding`.

    `S` (n,) are the singular values of W0 in falling order, `cosines` (n, k) the inner products <x_i, u_j>,
    `outside` (k,) the squared length of u_j outside span{x_i}, `error` (k,) a bound on |u_j - y_j|. A perturbation of
    norm rounding mixes x_i with x_i' by at most about rounding / |sigma_i - sigma_i'|. Vectors closer than 2 rounding
    are one cluster, of which any orthonormal basis may have been returned: its largest member can be the whole
    projection, and cannot be less than projection / sqrt(size). Farther ones add at most the root of
    sum (rounding / distance)^2 cos^2 (summed over doubling distances). If W0 is tall, directions outside
    the span count as singular value 0.

    First-order perturbation theory with the constants of LAPACK's backward error in mind: an estimate of what another
    library or device would return, not a proof. Float64.
    """
    S, mass = S.double(), cosines.double().square()
    low_to_high = S.flip(0).contiguous()
    total = torch.cat([mass.new_zeros(1, mass.shape[1]), mass.flip(0).cumsum(0)])
    rounding = max(rounding, 1e-300)

    def within(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.searchsorted(low_to_high, low_to_high - distance)
        last = torch.searchsorted(low_to_high, low_to_high + distance, right=True)
        return (total[last] - total[first]).clamp(min=0), last - first

    near, size = within(2 * rounding)
    far, inner, distance = torch.zeros_like(near), near, 2 * rounding
    if len(S) > 1:  # nothing comes nearer than the closest two: so far the sums stay what they are
        closest = float((low_to_high[1:] - low_to_high[:-1]).min())
        distance = max(distance, 2.0 ** math.floor(math.log2(closest / rounding)) * rounding if closest > 0 else 0.0)
    while distance < float(S[0]):
        if distance > 1e6 * rounding:  # the rest, wherever it lies
            far += (total[-1] - inner).clamp(min=0) * (rounding / distance) ** 2
            break
        grown, _ = within(2 * distance)
        far += (grown - inner).clamp(min=0) * (rounding / distance) ** 2
        inner, distance = grown, 2 * distance
    floor = torch.ones(len(S), dtype=torch.bool, device=S.device)
    if tall:  # a null vector may take in any direction outside the span
        floor = low_to_high > 2 * rounding
        leak = (rounding / low_to_high.clamp(min=rounding)).square()[:, None] * outside.double()
        near = torch.where(floor[:, None], near, near + outside.double())
        far = torch.where(floor[:, None], far + leak, far)
    far = far.sqrt()
    upper = (near.sqrt() + far).amax(0) + error
    at_least = near.sqrt() / size.clamp(min=1).sqrt()[:, None] - far
    lower = torch.where(floor[:, None], at_least, 0.0).amax(0) - error
    return lower.clamp(0, 1).cpu(), upper.clamp(0, 1).cpu()


def vector_errors(S: torch.Tensor, k: int, rounding: float, tall: bool) -> torch.Tensor:
    """Bounds (k,) on the distance of the k leading left singular vectors from those of a matrix `rounding` away.

    2 rounding / gap, with the gap to the neighbouring singular values and, for a tall matrix, to 0; at most 1.
    """
    S = S.double().cpu()
    steps = S[:-1] - S[1:]
    infinite = S.new_full((1,), math.inf)
    gap = torch.minimum(torch.cat([infinite, steps]), torch.cat([steps, infinite]))[:k]
    if tall:
        gap = torch.minimum(gap, S[:k])
    return (2 * rounding / gap.clamp(min=1e-300)).clamp(max=1.0)
