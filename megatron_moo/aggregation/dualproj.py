"""DualProj: the direction closest to the mean that hurts nobody.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv 1706.08840, Equation 11.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from torch import Tensor

from .base import Aggregator, Problem
from .bounded import solve_bounded_qp


class DualProj(Aggregator):
    """``min_d |d - g0|`` subject to ``<g_k, d> >= 0`` for all k, where ``g0 = sum_k u_k g_k``.

    In weights: ``v`` minimises ``v'Gv`` over ``v >= u``.

    Conflict-free. Where the mean conflicts with no row it is the mean, exactly, whether or not the rows conflict with
    each other; weights are never below the preference. Where only 0 conflicts with nobody, d is 0. In general d has
    product 0 with some rows: it does nothing for them.

    Noise, and what it means for large weights, as in UPGrad. Departs from the paper in scope: there a new task's
    gradient is projected against those of the old tasks, here the mean against all rows.
    """

    def _weights(self, problem: Problem) -> Tensor:
        solution = solve_bounded_qp(problem.gram_BKK, problem.share_BK[:, None], problem.active_BK)
        self.kkt_residual_B = solution.kkt_residual_BM[:, 0]
        return problem.preference_BK + problem.mass_B1 * solution.excess_BMK[:, 0]
