"""Gradient Vaccine: raise each pair's cosine to a target that follows its history.

Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
Models", ICLR 2021, arXiv 2010.05874. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .order import visit_order

# A row whose square fell below this part of the original one was removed by the surgery; what is left is
# rounding, and its cosines mean nothing.
_REMOVED = 1e-12
# sqrt(1 - t^2) divides: a target of 1 asks for infinitely much of g_j. This one for about 22 |g_i'| / |g_j| at right
# angles, 45 at most.
_HIGHEST_TARGET = 0.999


class GradVac(Aggregator):
    """PCGrad with a cosine target per pair and block instead of 0, the running mean of the cosines seen.

    For each i, over a random order of j != i, with ``c = cos(g_i', g_j)`` and target ``t_ij``: if ``c < t_ij``
    then ``g_i' += |g_i'| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j``, after which the
    cosine is ``t_ij``; then ``t_ij <- (1 - beta) t_ij + beta c``; ``d = sum_i u_i g_i'``.

    No-op for pairs at or above their targets. Not conflict-free, and it acts on rows without conflict too,
    once targets are positive. Equal to PCGrad at ``beta = 0, target = 0`` with the same order. Departures:
    the preference weighs the rows (the paper sums them); targets used in the formula are held within +-0.999;
    pairs of which one is inactive, or was removed by an earlier projection, leave their target alone.
    """

    options: ClassVar[dict[str, Option]] = {
        "beta": Option(0.01, "step of the running mean that the cosine targets follow", low=0.0, high=1.0),
        "target": Option(0.0, "cosine target of every pair at the start", low=-0.999, high=0.999),
    }
    state_keys = ("target_BKK",)
    stateful = True
    random = True

    def _weights(self, problem: Problem) -> Tensor:
        self._check_state(problem)
        gram = problem.gram_BKK
        target = self._state.get("target_BKK", torch.full_like(gram, self.settings["target"]))
        order = visit_order(*gram.shape[:2], problem.generator, gram.device)
        coefficients, target = vaccinate(gram, problem.active_BK, order, target.to(gram), self.settings["beta"])
        self._state = {"target_BKK": target}
        return (problem.preference_BK[:, None, :] @ coefficients).squeeze(1)


def vaccinate(
    gram_BKK: Tensor, active_BK: Tensor, order: Tensor, target_BKK: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Coefficients C [B, K, K] of the corrected rows (``g_i' = sum_k C_ik g_k``) and the new targets [B, K,
    K].

    Args:
        gram_BKK: inner products, zero where inactive.
        active_BK: who takes part.
        order: for each row the others in the order of their visit [B, K, K-1].
        target_BKK: cosine targets.
        beta: step of their running mean.
    """
    b, k, _ = gram_BKK.shape
    rows = gram_BKK.reshape(b * k, k)
    products = rows.clone()  # <g_i', g_j>
    active = active_BK.reshape(b * k)
    original = gram_BKK.diagonal(dim1=1, dim2=2).reshape(b * k)
    square = original.clone()  # |g_i'|^2, carried along
    norms = torch.where(active, original, 1.0).sqrt()
    visits = order.reshape(b * k, k - 1).T.contiguous()
    flat = visits + torch.arange(b * k, device=rows.device) // k * k
    goals = target_BKK.reshape(b * k, k).gather(1, visits.T).T.contiguous()
    norms_j, active_j = norms[flat], active[flat]
    amounts, targets = torch.zeros_like(goals), torch.zeros_like(goals)
    for t in range(k - 1):
        product = products.gather(1, visits[t][:, None]).squeeze(1)
        seen = active & active_j[t] & (square > _REMOVED * original)
        length = torch.where(seen, square, 1.0).sqrt()
        cosine = (product / (length * norms_j[t])).clamp(-1, 1)
        goal = goals[t].clamp(-_HIGHEST_TARGET, _HIGHEST_TARGET)
        rest = (1 - goal * goal).sqrt()
        amount = length * (goal * (1 - cosine * cosine).sqrt() - cosine * rest) / (norms_j[t] * rest)
        amount = torch.where(seen & (cosine < goal), amount, 0.0)
        square = (square + amount * (2 * product + amount * norms_j[t] ** 2)).clamp(min=0)
        products.addcmul_(amount[:, None], rows.index_select(0, flat[t]))
        amounts[t] = amount
        targets[t] = torch.where(seen, (1 - beta) * goals[t] + beta * cosine, goals[t])
    coefficients = torch.eye(k, dtype=torch.float64, device=rows.device).repeat(b, 1, 1).reshape(b * k, k)
    coefficients.scatter_(1, visits.T, amounts.T)
    updated = target_BKK.reshape(b * k, k).scatter(1, visits.T, targets.T)
    return coefficients.reshape(b, k, k), updated.reshape(b, k, k)
