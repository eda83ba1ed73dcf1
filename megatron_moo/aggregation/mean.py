"""The plain mean: the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Aggregator, Generators, Problem
from .noise import RowNoise


class Mean(Aggregator):
    """``w = u`` on active objectives: the preference-weighted mean, bit for bit the numbers given.

    The baseline of every comparison, to be tuned as hard as the rest. The Gramian is not looked at. Linear
    scalarisation; not conflict-free.
    """

    def _problem(
        self,
        gram_BKK: Tensor,
        active_BK: Tensor,
        preference_BK: Tensor,
        generator: Generators,
        losses_BK: Tensor | None,
        noise: RowNoise | None,
    ) -> Problem:
        # No rescaling and no look at the rows: "off is identical" includes rows that are zero or not finite.
        self.nonfinite_BK = torch.zeros_like(active_BK)
        mass = preference_BK.sum(1, keepdim=True)
        share = preference_BK / torch.where(mass > 0, mass, 1.0)
        return Problem(gram_BKK, active_BK, preference_BK, share, mass, generator, losses_BK, noise)

    def _weights(self, problem: Problem) -> Tensor:
        return problem.preference_BK.clone()
