"""CAGrad: the best worst-case improvement within a ball around the mean.

Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv 2110.14048,
Algorithm 1. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import matvec, missing_shift, norm
from .simplex_norm import solve_simplex_norm

# Length of each row's noise, relative to the row: about what float32 gradients carry.
_NOISE = 1e-6
_SMALLEST_SHARE = 1e-6


class CAGrad(Aggregator):
    """``max_d min_k <g_k, d>`` within ``|d - g0| <= c |g0|``, where ``g0 = sum_k u_k g_k``.

    By duality ``d = g0 + c |g0| g_w / |g_w|`` with ``g_w = sum_k w_k g_k`` and w minimising
    ``<g_w, g0> + c |g0| |g_w|`` over the simplex. At c = 0 it is the mean; larger c moves towards the worst-off
    objective. Not conflict-free: the ball may hold no direction that helps all. It moves away from the mean
    without conflicts too. With c < 1 the stationary points are those of the mean.

    Scale: the paper's d is about ``1 + c`` times the mean where objectives agree. ``rescale = linear`` (the
    default) divides by 1 + c, which is mean-like; ``quadratic`` divides by 1 + c^2, as the authors'
    multi-task code does; ``none`` is the paper's d.

    Where the best w gives ``g_w = 0`` (Pareto-stationary rows with a non-zero mean) the formula is 0/0 and the
    best d is not unique. The program is therefore solved as if every row carried independent noise of 1e-6 of
    its length (over the root of its share): the solution is unique, the weights bounded (by about
    1e6 c |g0| / |g|), and d about the best direction that is closest to g0. A Gramian that is not positive
    semidefinite is shifted as in MGDA.
    """

    options: ClassVar[dict[str, Option]] = {
        "c": Option(
            0.4,
            "radius of the ball around the mean, relative to its length",
            low=0.0,
            high=1.0,
            high_open=True,
        ),
        "rescale": Option(
            "linear",
            "divide by 1 + c (linear: the mean's scale), 1 + c^2 (quadratic: the authors' code) or 1 (none)",
            choices=("linear", "quadratic", "none"),
        ),
    }

    def _weights(self, problem: Problem) -> Tensor:
        c = self.settings["c"]
        if c == 0:
            return problem.preference_BK.clone()
        root, linear, radius = cagrad_program(problem, c)
        solution = solve_simplex_norm(root, linear, radius, problem.active_BK, problem.share_BK)
        self.kkt_residual_B = solution.kkt_residual_B
        length = norm(matvec(root, solution.weights_BK))
        pull = torch.where(length > 0, radius / torch.where(length > 0, length, 1.0), 0.0)
        scale = {"linear": 1 + c, "quadratic": 1 + c * c, "none": 1.0}[self.settings["rescale"]]
        return problem.mass_B1 * (problem.share_BK + pull * solution.weights_BK) / scale


def cagrad_program(problem: Problem, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """R [B, K, K] with ``R'R`` the Gramian with noise, ``b = R'R u`` [B, K] and ``r = c |Ru|`` [B, 1]."""
    active, share = problem.active_BK, problem.share_BK
    gram = problem.gram_BKK + torch.diag_embed((~active).double())
    diagonal = gram.diagonal(dim1=1, dim2=2)
    noise = _NOISE**2 / torch.where(active, share.clamp(min=_SMALLEST_SHARE), 1.0)
    gram = gram + torch.diag_embed(noise * diagonal)
    shift = missing_shift(gram)
    factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift * gram.diagonal(dim1=1, dim2=2)))
    root = torch.where(active[:, None, :], factor.mT, 0.0)
    mean = matvec(root, share)
    return root, matvec(root.mT, mean), c * norm(mean)
