"""How many singular values of a diagonal plus a low-rank matrix exceed x: exact, from one small symmetric matrix."""

import torch

from .krylov import Product


def count_above(operator: Product, points: torch.Tensor) -> torch.Tensor:
    """#{ sigma_j(W) > x } for each x > 0 of `points`, W = diag(d) + L R^T of q-rank update; -1 where not certain.

    The eigenvalues of H = (0 W; W^T 0) are +-sigma_j and zeros. H is block diagonal (2 x 2 blocks of d_i) plus
    (L 0; 0 R) C (L 0; 0 R)^T with C = (0 I; I 0), so by Sylvester's law of inertia and two Schur complements

        #{ sigma_j > x } = #{ d_i > x } + n_-(X(x)) - q,
        X(x) = ( -sum x l_i l_i^T / (x^2 - d_i^2)        I - sum d_i l_i r_i^T / (x^2 - d_i^2) )
               (  symmetric                             -sum x r_i r_i^T / (x^2 - d_i^2)       ),

    2q by 2q, with d_i = 0 for rows and columns beyond the diagonal. `operator.matrix` is the diagonal (float64, not
    negative), `left` and `right` are L and R. The count is not certain, and -1, if x lies within 1e-12 d_1 of a d_i or
    an eigenvalue of X is within 1e-11 of 0, relative to the largest.

    Source: the secular equation of the rank-one update (Golub 1973), in inertia form.
    """
    d, points = operator.matrix, points.to(operator.matrix)
    left, right = operator.left, operator.right
    q, count = left.shape[1], len(points)
    squared = points[:, None].square() - d.square()
    apart = (points[:, None] - d).abs().amin(1) > 1e-12 * d[0]
    squared = torch.where(squared == 0, 1e-300, squared)
    blocks = []
    for factor in (left, right):
        weights = torch.cat([points[:, None] / squared, (1 / points)[:, None].expand(-1, len(factor) - len(d))], 1)
        outer = (factor[:, :, None] * factor[:, None, :]).reshape(len(factor), -1)
        blocks.append(-(weights @ outer).reshape(count, q, q))
    cross = (left[: len(d), :, None] * right[: len(d), None, :]).reshape(len(d), -1)
    corner = torch.eye(q).to(d) - ((d / squared) @ cross).reshape(count, q, q)
    X = torch.cat([torch.cat([blocks[0], corner], 2), torch.cat([corner.mT, blocks[1]], 2)], 1)
    X = torch.where(apart[:, None, None], X, 0.0)
    eigenvalues = torch.linalg.eigvalsh(X)
    sizes = eigenvalues.abs()
    certain = apart & (sizes.amin(1) > 1e-11 * sizes.amax(1))
    above = (d > points[:, None]).sum(1) + (eigenvalues < 0).sum(1) - q
    return torch.where(certain, above, -1).cpu()


def leading_gaps(operator: Product, sigma: torch.Tensor, k: int) -> torch.Tensor:
    """For approximate leading singular values `sigma` (more than k of them, falling): proven gaps, (k,); 0 if unproven.

    If exactly j + 1 singular values exceed the midpoint between sigma_j and sigma_{j+1} for every j up to the last,
    each interval between midpoints holds one, and none but its own lies within half the distance to a neighbour.
    """
    k_known = min(k, len(sigma) - 1)
    middle = (sigma[:k_known] + sigma[1 : k_known + 1]) / 2
    positive = middle > 0
    counts = count_above(operator, middle.clamp(min=1e-300))
    right = torch.cumprod(((counts == torch.arange(1, k_known + 1)) & positive).long(), 0).bool()
    below = (sigma[:k_known] - sigma[1 : k_known + 1]) / 2
    above = torch.cat([below.new_full((1,), float("inf")), below[:-1]])
    gaps = torch.zeros(k, dtype=torch.float64)
    gaps[:k_known] = torch.where(right, torch.minimum(below, above), 0.0)
    return gaps
