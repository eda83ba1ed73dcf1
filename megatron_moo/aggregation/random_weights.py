"""Random weights: the litmus test that a method must pass.

Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022, arXiv
2111.10603, Section 3. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Problem
from .order import draw


class RandomWeights(Aggregator):
    """``w_k`` proportional to ``u_k exp(x_k)``, x standard normal and new at each call; brought to sum 1.

    The softmax of the paper, weighted by the preference. It knows nothing of the gradients: whatever a method gains
    over the mean, this may gain as well, through noise alone. The average of the weights over many calls is close to
    the preference, and equal to it where the preference is uniform. Without a generator it is the mean. Not
    conflict-free.
    """

    random = True

    def _weights(self, problem: Problem) -> Tensor:
        if problem.generator is None:
            return problem.preference_BK.clone()
        blocks, k = problem.share_BK.shape
        normal = draw(torch.randn, blocks, (k,), problem.generator).to(problem.share_BK.device, non_blocking=True)
        weights = problem.share_BK * (normal - normal.amax(1, keepdim=True)).exp()
        total = weights.sum(1, keepdim=True)
        return problem.mass_B1 * weights / torch.where(total > 0, total, 1.0)
