"""MGDA: the point of least norm in the convex hull of the gradients.

Desideri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes Rendus
Mathematique 350, 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
arXiv 1810.04650. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .simplex import solve_simplex_qp


class MGDA(Aggregator):
    """``w = argmin w'Gw`` over the simplex, times the active preference; solved exactly, not by Frank-Wolfe.

    ``<g_k, d> >= |d|^2`` for every active k: conflict-free, and d vanishes only at Pareto-stationary points.
    Short rows dominate: with ``normalise = l2`` the hull is that of the rows scaled to length 1, its
    least-norm point is written in the original rows and its weights brought back to sum 1; conflict-free as
    well. (The code of Sener and Koltun applies the normalised problem's weights to the raw rows, which is
    not.) The preference enters through the mask, as the scale, and where the optimum is not unique; otherwise
    MGDA has none.
    """

    options: ClassVar[dict[str, Option]] = {
        "normalise": Option("none", "scale rows to length 1 before solving: none or l2", choices=("none", "l2")),
    }

    def _weights(self, problem: Problem) -> Tensor:
        gram = problem.gram_BKK
        norms = problem.norm_BK
        if unit := self.settings["normalise"] == "l2":
            gram = gram / (norms[:, :, None] * norms[:, None, :])
        solution = solve_simplex_qp(gram, problem.active_BK, problem.share_BK)
        self.kkt_residual_B = solution.kkt_residual_B
        weights = solution.weights_BK
        if unit:
            # Relative to the shortest row: no overflow, however short.
            shortest = torch.where(problem.active_BK, norms, torch.inf).amin(1, keepdim=True)
            weights = torch.where(problem.active_BK, weights * (shortest / norms), 0.0)
            total = weights.sum(1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        return problem.mass_B1 * weights
