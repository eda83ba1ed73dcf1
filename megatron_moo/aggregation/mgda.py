"""MGDA: the point of least norm in the convex hull of the gradients.

Desideri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes Rendus
Mathematique 350, 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
arXiv 1810.04650, whose code has the normalisations. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .simplex import solve_simplex_qp

# A loss below this fraction of its block's largest counts as that: rows are divided by losses.
_SMALLEST_LOSS = 1e-6


class MGDA(Aggregator):
    """``w = argmin w'Gw`` over the simplex, times the active preference; solved exactly, not by Frank-Wolfe.

    ``<g_k, d> >= |d|^2`` for every active k: conflict-free, and d vanishes only at Pareto-stationary points.
    The preference enters through the mask, as the scale, where the optimum is not unique, and through ``cap``;
    otherwise MGDA has none.

    *Normalisation.* Short rows dominate. ``normalise`` divides each row by a scale n_k: its length (``l2``), its
    loss (``loss``) or loss times length (``loss+``). The least-norm point of the scaled rows' hull is written in
    the original rows and its weights brought back to sum 1. Conflict-free as well: ``<g_k, d> >= 0``. (The code of
    Sener and Koltun applies the scaled problem's weights to the raw rows, which is not.) The larger the scale, the
    larger the weight. Losses should be positive. One below 1e-6 of its block's largest, negative ones too, counts as
    that; one that is not finite as the largest; where none is positive all count as 1.

    *Cap.* With ``cap >= 1`` no weight exceeds cap times the objective's share of the active preference. At 1 this
    is the mean, from 1 / (smallest share) on no cap; 0 means none. It is the exact optimum of ``|d| / sum_k w_k
    n_k`` within the caps (without normalisation n = 1: of ``|d|``), not a clipping, and it holds for the final
    weights. Its price: only objectives below their cap keep the promise ``<g_k, d> >= |d|^2`` (normalised:
    ``>= 0``). An objective at its cap may be hurt, and d may be nonzero at Pareto-stationary points.
    """

    options: ClassVar[dict[str, Option]] = {
        "normalise": Option(
            "none",
            "divide rows before solving by: none, their length (l2), their loss (loss) or both (loss+)",
            choices=("none", "l2", "loss", "loss+"),
        ),
        "cap": Option(0.0, "largest weight relative to the preference, at least 1; 0 for no cap", low=0.0),
    }

    def __init__(self, **options: float | str) -> None:
        """Take the options.

        Raises:
            ValueError: for bad options; for a cap between 0 and 1, which no weights that sum to 1 can keep.
        """
        super().__init__(**options)
        self.needs_losses = self.settings["normalise"] in ("loss", "loss+")
        if 0 < self.settings["cap"] < 1:
            raise ValueError(
                f"MGDA option 'cap' must be 0 (no cap) or at least 1 (weights could not sum to 1 otherwise), "
                f"found {self.settings['cap']:g}; use 1 for the mean"
            )

    def _weights(self, problem: Problem) -> Tensor:
        cap = self.settings["cap"]
        if cap == 1:
            self.kkt_residual_B = torch.zeros_like(problem.mass_B1[:, 0])
            return problem.preference_BK.clone()
        gram, active, share = problem.gram_BKK, problem.active_BK, problem.share_BK
        upper = cap * share if cap else None
        if self.settings["normalise"] == "none":
            solution = solve_simplex_qp(gram, active, share, upper_BK=upper)
            self.kkt_residual_B = solution.kkt_residual_B
            return problem.mass_B1 * solution.weights_BK
        scale = self._scale(problem)
        gram = gram / (scale[:, :, None] * scale[:, None, :])
        # Relative to the smallest scale: no overflow, however short the row.
        smallest = torch.where(active, scale, torch.inf).amin(1, keepdim=True)
        unit = torch.where(active, smallest / scale, 1.0)
        solution = solve_simplex_qp(gram, active, share, upper_BK=upper, unit_BK=unit)
        self.kkt_residual_B = solution.kkt_residual_B
        weights = solution.weights_BK * unit
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        if upper is not None:
            weights = weights.minimum(upper)  # the last bit
        return problem.mass_B1 * weights

    def _scale(self, problem: Problem) -> Tensor:
        """What the rows are divided by [B, K]; 1 for inactive ones."""
        kind, active, losses = self.settings["normalise"], problem.active_BK, problem.losses_BK
        scale = problem.norm_BK
        if kind == "l2":
            return scale
        assert losses is not None  # needs_losses
        known = active & losses.isfinite()
        largest = torch.where(known, losses, 0.0).amax(1, keepdim=True)
        relative = torch.where(known, losses / torch.where(largest > 0, largest, 1.0), 1.0).clamp(min=_SMALLEST_LOSS)
        relative = torch.where(active & (largest > 0), relative, 1.0)
        return relative if kind == "loss" else relative * scale
