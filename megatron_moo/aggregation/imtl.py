"""IMTL-G and ConFIG: a direction with equal cosines to all rows.

Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021 (openreview IMPnRXEWpvr), Section 3.1; Liu, Chu and
Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, arXiv 2408.11104,
Equations 2 and 3. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import dot, matvec
from .spectral import eigh, inverse

# Of K: if |v|^2 is no larger, only rounding is left of it.
_IMPOSSIBLE = 1e-12


class IMTLG(Aggregator):
    """``w_k`` proportional to ``a_k / |g_k|``, ``a = C^+ 1`` with C the rows' cosines; brought to sum 1.

    The cosines between d and all rows are equal and positive: conflict-free, if the rows are independent. If they are
    not, there may be no such direction; a is then the least-squares solution, cosines differ and may be negative
    (duplicates do no harm). The null space is cut off smoothly: eigenvalues of C below 1e-6 of the largest do not
    count. Single weights may be negative.

    Brought to sum 1, d has the same product with every row of length 1, and its length is that of the paper. But the
    sum may be small or negative, and then this d is long, or turned round and in conflict with every row. Here d is
    never longer than the longest row, and never turned: where the sum is too small for that, or negative, d is given
    that length. Where the unit rows sum to 0 (two opposite rows), d is 0.

    The preference enters through the mask and as the scale; the method has none.
    """

    def _weights(self, problem: Problem) -> Tensor:
        weights, _, square, possible = _solve(problem, problem.active_BK.double())
        # In the problem's units the longest row has length 1.
        total = weights.sum(1, keepdim=True).maximum(square.sqrt())
        return problem.mass_B1 * possible * weights / torch.where(total > 0, total, 1.0)


class ConFIG(Aggregator):
    """``d = <g0, v> v / |v|^2``: the mean ``g0 = sum_k u_k g_k`` projected on the direction v of equal cosines.

    ``v = sum_k a_k g_k / |g_k|``, ``a = C^+ 1`` with C the rows' cosines: IMTL-G's direction, at a length that does
    not blow up. Conflict-free, if the rows are independent; about dependent rows see :class:`IMTLG`. Single weights
    may be negative.

    The preference weighs the rows in g0, that is in the length. With ``cosines = preference`` it sets the cosines too
    (``a = C^+ u``), as the authors' code can; rows that are nearly parallel cannot have cosines that differ much, and
    d is then short, with large weights that cancel. Departs from the paper in scale: its length is the sum of the
    rows' projections on v, here it is their mean.
    """

    options: ClassVar[dict[str, Option]] = {
        "cosines": Option(
            "equal",
            "cosines between the update and the rows: equal, or in proportion to the preference",
            choices=("equal", "preference"),
        ),
    }

    def _weights(self, problem: Problem) -> Tensor:
        wanted = problem.active_BK.double()
        if self.settings["cosines"] == "preference":
            wanted = problem.share_BK * wanted.sum(1, keepdim=True)
        weights, cosines, square, possible = _solve(problem, wanted)
        length = dot(problem.share_BK * problem.norm_BK, cosines)
        return problem.mass_B1 * possible * weights * length / torch.where(square > 0, square, 1.0)


def _solve(problem: Problem, wanted_BK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The vector v whose products with the unit rows are as wanted, or as near as possible.

    Returns:
        Its weights [B, K], those products [B, K], ``|v|^2`` [B, 1], and 1, or 0 if v is rounding, or between [B, 1].
    """
    active, norms = problem.active_BK, problem.norm_BK
    correlation = problem.gram_BKK / norms[:, :, None] / norms[:, None, :]
    values, vectors = eigh(correlation)
    solution = matvec(vectors, inverse(values) * matvec(vectors.mT, wanted_BK))
    solution = torch.where(active, solution, 0.0)
    products = matvec(correlation, solution)
    square = dot(solution, products).clamp(min=0)
    count = active.sum(1, keepdim=True).clamp(min=1)
    # Exactly 0 for rounding, exactly 1 for the rest, smooth in between.
    possible = (-((_IMPOSSIBLE * count / square) ** 2)).exp()
    return solution / norms, products, square, possible
