"""DWA: more weight for losses that fall slowly.

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704, Equation 7.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Option, Problem
from .history import LossHistory, weighted


class DWA(LossHistory):
    """``w_k`` proportional to ``u_k exp(r_k / T)``, ``r_k = l_k(t - 1) / l_k(t - 2)``; brought to sum 1.

    l_k(t) is the loss over an epoch in the paper, here the mean of ``window`` of the objective's own losses, one per
    step in which it is present. Until two windows are full, ``r_k = 1``. Gradients are not looked at, so that masks
    alone make blocks differ; not conflict-free. The preference (the paper has none) multiplies the weights. A loss
    that is not above 0 makes no ratio: ``r_k = 1``.

    State, each [B, K]: the sum and number of losses in the window that is being filled, the means of the last one and
    the one before (0: none yet).
    """

    options: ClassVar[dict[str, Option]] = {
        "temperature": Option(2.0, "T: the larger, the more equal the weights", low=0.0, low_open=True),
        "window": Option(20.0, "losses that one of the compared means is taken over", low=1.0),
    }
    state_keys = ("sum_BK", "count_BK", "last_BK", "before_BK")

    def _weights(self, problem: Problem) -> Tensor:
        state = self._recall(problem)
        self._state = self._follow(state, problem)
        last, before = state["last_BK"], state["before_BK"]  # of the steps before this one, as in the paper
        known = (last > 0) & (before > 0)
        ratio = torch.where(known, last / torch.where(known, before, 1.0), 1.0) / self.settings["temperature"]
        highest = torch.where(problem.active_BK, ratio, -torch.inf).amax(1, keepdim=True)
        return weighted(problem, torch.where(problem.active_BK, ratio - highest, 0.0).exp())

    def _follow(self, state: dict[str, Tensor], problem: Problem) -> dict[str, Tensor]:
        """The state with this step's losses."""
        seen = problem.active_BK & problem.losses_BK.isfinite()
        total = state["sum_BK"] + torch.where(seen, problem.losses_BK, 0.0)
        count = state["count_BK"] + seen
        full = count >= self.settings["window"]
        return {
            "sum_BK": torch.where(full, 0.0, total),
            "count_BK": torch.where(full, 0.0, count),
            "last_BK": torch.where(full, total / count.clamp(min=1), state["last_BK"]),
            "before_BK": torch.where(full, state["last_BK"], state["before_BK"]),
        }
