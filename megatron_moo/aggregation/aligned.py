"""Aligned-MTL: make the rows orthogonal and of one length before they are added.

Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv 2305.19000, Algorithm 1.
Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import matvec
from .spectral import eigh, inverse, presence


class AlignedMTL(Aggregator):
    """``w = sqrt(l) V L^(-1/2) V'u``, with ``G = V L V'`` and l the smallest eigenvalue.

    ``sqrt(l) V L^(-1/2) V' J`` is the nearest matrix to J, up to its scale, whose rows are orthogonal and of length
    sqrt(l); d is its mean, weighted by the preference. Not conflict-free: ``<g_k, d>`` is ``sqrt(l) (G^(1/2) u)_k``,
    and a square root of a Gramian may have negative entries. It acts without conflicts too. Its step is short: with
    ``scale = min`` (the paper's) every component is shrunk to the smallest, and d has the length ``sqrt(l) |u|``,
    which goes to zero as rows become dependent. ``scale = median`` and ``rmse`` take the median (the lower of two)
    and the mean of the eigenvalues for l, as the authors' code offers; d is then longer. For equal rows, or
    orthogonal ones of one length, it is the mean.

    Eigenvalues below 1e-6 of the largest (as a row 1000 times shorter than the others gives), or below ten times what
    negative ones show to be rounding, do not count, neither in d nor for l. They fade out smoothly: l is ``1 / max_i
    (p_i / l_i)`` with p falling from 1 to 0, so the weights are continuous for ``min`` and ``rmse``. Still, rows that
    become dependent first shorten d towards 0, until the smallest eigenvalue is dropped and the next one takes its
    place.
    """

    options: ClassVar[dict[str, Option]] = {
        "scale": Option(
            "min",
            "eigenvalue that all components are brought to: min (the paper), median, or rmse (the mean)",
            choices=("min", "median", "rmse"),
        ),
    }

    def _weights(self, problem: Problem) -> Tensor:
        values, vectors = eigh(problem.gram_BKK)
        inverses, present = inverse(values), presence(values)
        if self.settings["scale"] == "min":
            largest = inverses.amax(1, keepdim=True)
            factors = (inverses / torch.where(largest > 0, largest, 1.0)).sqrt()
        elif self.settings["scale"] == "median":
            factors = (_median(values, present) * inverses).sqrt()
        else:
            total = present.sum(1, keepdim=True)
            mean = (present * values).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
            factors = (mean * inverses).sqrt()
        weights = matvec(vectors, factors * matvec(vectors.mT, problem.share_BK))
        return problem.mass_B1 * torch.where(problem.active_BK, weights, 0.0)


def _median(values_BK: Tensor, present_BK: Tensor) -> Tensor:
    """The lower median of the values, each counted as much as it is present [B, 1]."""
    ordered, order = values_BK.sort(1)
    below = present_BK.gather(1, order).cumsum(1)
    index = (below < below[:, -1:] / 2).sum(1, keepdim=True)
    return ordered.gather(1, index).clamp(min=0)
