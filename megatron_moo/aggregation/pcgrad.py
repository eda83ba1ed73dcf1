"""PCGrad: project away the conflicting part of each gradient.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782, Algorithm 1.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Problem
from .order import visit_order


class PCGrad(Aggregator):
    """Each row loses its component against every row it conflicts with, in turn; then the weighted mean.

    For each i, over a random order of j != i: if ``<g_i', g_j> < 0`` then
    ``g_i' -= <g_i', g_j> / |g_j|^2 g_j``; ``d = sum_i u_i g_i'``. Held as coefficients
    ``g_i' = sum_k C_ik g_k`` this needs the Gramian only, and is exact.

    Without negative cosines it is the mean, exactly. With two objectives ``d`` conflicts with neither; with
    more, a later projection may bring back an earlier conflict: not conflict-free. Departs from the paper in
    scale: the paper sums over objectives, here the preference weighs them.
    """

    random = True

    def _weights(self, problem: Problem) -> Tensor:
        gram = problem.gram_BKK
        order = visit_order(*gram.shape[:2], problem.generator, gram.device)
        coefficients_BKK = surgery(gram, problem.active_BK, order)
        return (problem.preference_BK[:, None, :] @ coefficients_BKK).squeeze(1)


def surgery(gram_BKK: Tensor, active_BK: Tensor, order: Tensor) -> Tensor:
    """Coefficients C [B, K, K] of the projected rows, ``g_i' = sum_k C_ik g_k``.

    Args:
        gram_BKK: inner products, zero where inactive.
        active_BK: who takes part.
        order: for each row the others in the order of their visit [B, K, K-1].

    The rows i are independent, so step t of all rows and blocks is one batched operation.
    """
    b, k, _ = gram_BKK.shape
    rows = gram_BKK.reshape(b * k, k)
    products = rows.clone()  # <g_i', g_j>
    squares = gram_BKK.diagonal(dim1=1, dim2=2)
    inverse = torch.where(active_BK, 1 / torch.where(active_BK, squares, 1.0), 0.0).reshape(b * k)
    visits = order.reshape(b * k, k - 1).T.contiguous()
    first = torch.arange(b * k, device=rows.device) // k * k  # flat index of the block's first row
    flat = visits + first
    amounts = torch.zeros_like(visits, dtype=torch.float64)
    for t in range(k - 1):
        product = products.gather(1, visits[t][:, None]).squeeze(1)
        # Inactive rows and columns of the Gramian are zero: their products are 0 and nothing is added.
        amounts[t] = product.clamp(max=0).neg() * inverse[flat[t]]
        products.addcmul_(amounts[t][:, None], rows.index_select(0, flat[t]))
    coefficients = torch.eye(k, dtype=torch.float64, device=rows.device).repeat(b, 1, 1).reshape(b * k, k)
    return coefficients.scatter_(1, visits.T, amounts.T).reshape(b, k, k)
