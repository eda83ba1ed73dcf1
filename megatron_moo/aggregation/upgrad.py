"""UPGrad: make every gradient harmless to all others, then take the mean.

Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, Equation 3 and Proposition 1.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Problem
from .bounded import solve_bounded_qp


class UPGrad(Aggregator):
    """``d = sum_k u_k p(g_k)``, p the projection onto ``{d: <g_i, d> >= 0 for all i}``.

    In weights: ``sum_k u_k v_k``, where ``v_k`` minimises ``v'Gv`` over ``v >= e_k``.

    Conflict-free. Without negative inner products it is the mean, exactly; weights are never below the preference. Rows
    add in proportion to their length, as in the mean. Where only 0 conflicts with nobody (a positive combination of the
    rows vanishes), d is 0. With two objectives it is PCGrad.

    Weights are not bounded by the preference: rows that nearly cancel, or differ much in length, get large ones. The
    rows are taken to carry independent noise of 1e-6 of their length, which bounds them; it brings conflicts of up to
    1e-12 of the terms that d sums up. Where rows depend on each other d is determined, the weights are not: one of the
    choices that give d is returned.
    """

    def _weights(self, problem: Problem) -> Tensor:
        active, preference, norms = problem.active_BK, problem.preference_BK, problem.norm_BK
        # Projection is homogeneous: rows of length 1 are projected, and scaled back.
        gram = problem.gram_BKK / norms[:, :, None] / norms[:, None, :]
        solution = solve_bounded_qp(gram, torch.diag_embed(active.double()), active)
        self.kkt_residual_B = solution.kkt_residual_BM.amax(1)
        excess = ((preference * norms)[:, None] @ solution.excess_BMK).squeeze(1)
        return preference + excess / norms
