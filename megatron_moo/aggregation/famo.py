"""FAMO: balance the rates at which losses fall, from the losses alone.

Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, arXiv 2306.03792, Algorithm 1.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Option, Problem
from .history import LossHistory, weighted

# Added to every loss, as in the authors' code: a loss of 0 would get all the weight.
_SMALLEST_LOSS = 1e-8
# Adam's, as in the authors' code.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class FAMO(LossHistory):
    """``w_k`` proportional to ``u_k z_k / l_k``, ``z = softmax(x)``, l the losses; brought to sum 1.

    The gradient of ``sum_k z_k log l_k``, up to its scale. The logits x follow the losses: where ``log l_k`` fell by
    ``p_k`` since the last step, Adam takes a step down the gradient ``z_k (p_k - sum_j z_j p_j) + gamma x_k``. An
    objective that falls faster than the others loses weight. Gradients are not looked at, so that masks alone make
    blocks differ; not conflict-free.

    Departures: the paper measures ``p_k`` on one batch, before and after the update. That costs another forward pass;
    here it is the difference between the batches of two steps, noise included. An objective that is absent keeps its
    logit and Adam's moments, and is compared with its last loss when it is back; z is that of the objectives present.
    The preference (the paper has none) multiplies the weights. Losses are taken to be above 0, with least possible
    value 0; a negative one counts as 0.

    State, each [B, K]: logit, the two moments and the number of Adam's steps, and the last loss (0: none yet).
    """

    options: ClassVar[dict[str, Option]] = {
        "lr": Option(0.025, "learning rate of the logits", low=0.0),
        "gamma": Option(0.01, "decay of the logits towards equal weights", low=0.0),
    }
    state_keys = ("logit_BK", "mean_BK", "square_BK", "steps_BK", "loss_BK")

    def _weights(self, problem: Problem) -> Tensor:
        state = self._recall(problem)
        seen = problem.active_BK & problem.losses_BK.isfinite()
        loss = torch.where(seen, problem.losses_BK, 1.0).clamp(min=0) + _SMALLEST_LOSS
        state = self._follow(state, loss, seen)
        self._state = state | {"loss_BK": torch.where(seen, loss, state["loss_BK"])}
        # A loss that is not known counts as the last one, or as the mean of the others.
        known = self._state["loss_BK"]
        others = torch.where(seen, loss, 0.0).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        loss = torch.where(known > 0, known, torch.where(others > 0, others, 1.0))
        return weighted(problem, _softmax(self._state["logit_BK"], problem.active_BK) / loss)

    def _follow(self, state: dict[str, Tensor], loss: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """One step of Adam on the logits of the objectives whose progress is known."""
        moving = seen & (state["loss_BK"] > 0)
        progress = torch.where(moving, state["loss_BK"], 1.0).log() - torch.where(moving, loss, 1.0).log()
        z = _softmax(state["logit_BK"], moving)
        gradient = z * (progress - (z * progress).sum(1, keepdim=True)) + self.settings["gamma"] * state["logit_BK"]
        steps = state["steps_BK"] + 1
        mean = _BETA1 * state["mean_BK"] + (1 - _BETA1) * gradient
        square = _BETA2 * state["square_BK"] + (1 - _BETA2) * gradient**2
        length = (square / (1 - _BETA2**steps)).sqrt() + _EPSILON
        logit = state["logit_BK"] - self.settings["lr"] * mean / (1 - _BETA1**steps) / length
        new = {"logit_BK": logit, "mean_BK": mean, "square_BK": square, "steps_BK": steps}
        return state | {key: torch.where(moving, value, state[key]) for key, value in new.items()}


def _softmax(logits: Tensor, active: Tensor) -> Tensor:
    """Softmax over the active objectives, 0 elsewhere."""
    highest = torch.where(active, logits, -torch.inf).amax(1, keepdim=True)
    powers = torch.where(active, (logits - torch.where(active.any(1, keepdim=True), highest, 0.0)).exp(), 0.0)
    total = powers.sum(1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0)
