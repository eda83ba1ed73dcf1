"""What methods share that look at losses alone: a history per block and objective.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Problem


class LossHistory(Aggregator):
    """Base of methods whose state is a few numbers per block and objective, all zero at the start.

    Losses are those of the step's own batch, before the update. One that is not finite is left out: the objective's
    state stays as if it were absent.
    """

    stateful = True
    needs_losses = True

    def _recall(self, problem: Problem) -> dict[str, Tensor]:
        """The state for this problem's blocks, on its device.

        Raises:
            ValueError: if it is for other blocks or objectives.
        """
        self._check_state(problem)
        like = problem.share_BK
        none_yet = torch.zeros_like(like)
        return {key: self._state.get(key, none_yet).to(like) for key in self.state_keys}


def weighted(problem: Problem, factor_BK: Tensor) -> Tensor:
    """``u_k f_k``, brought to the sum of the preference; f is positive where active."""
    active = problem.active_BK
    highest = torch.where(active, factor_BK, 0.0).amax(1, keepdim=True)
    weights = problem.share_BK * torch.where(active, factor_BK / torch.where(highest > 0, highest, 1.0), 0.0)
    total = weights.sum(1, keepdim=True)
    return problem.mass_B1 * weights / torch.where(total > 0, total, 1.0)
