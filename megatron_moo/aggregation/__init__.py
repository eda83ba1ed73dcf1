"""Aggregators: from the Gramian of per-objective gradients to the weights of their combination.

This package needs torch alone, and no gradients: only their inner products. For rows ``g_1 .. g_K`` of one
block of parameters let ``G_ij = <g_i, g_j>``; a method maps G to weights w, and the combined gradient is ``d
= sum_k w_k g_k``. Many blocks are solved in one call, on the device of the input:

    >>> import torch
    >>> from megatron_moo.aggregation import build_aggregator
    >>> rows = torch.tensor([[[1.0, 0.0], [-0.5, 1.0]]])  # one block, two conflicting gradients of length 2
    >>> aggregator = build_aggregator("pcgrad")
    >>> weights = aggregator(rows @ rows.mT)
    >>> direction = (weights.float()[:, None, :] @ rows)[:, 0]
    >>> (rows @ direction[:, :, None]).squeeze(-1) >= 0  # conflicts with neither
    tensor([[True, True]])

``active_BK`` masks objectives per block, ``preference_K`` weighs them, ``generator`` feeds the methods that
draw random orders. The rules common to all methods (masks, scale, numbers, randomness) are in
:class:`Aggregator`; what each method computes and promises, in its class:

- ``mean``: :class:`Mean`, the preference-weighted mean
- ``mgda``: :class:`MGDA`, the least-norm point of the convex hull
- ``pcgrad``: :class:`PCGrad`, projection of conflicting parts
- ``cagrad``: :class:`CAGrad`, best worst case within a ball around the mean
- ``gradvac``: :class:`GradVac`, projection towards learned cosine targets; stateful
- ``upgrad``: :class:`UPGrad`, mean of projections on the cone that hurts nobody
- ``dualproj``: :class:`DualProj`, projection of the mean on that cone
- ``nash-mtl``: :class:`NashMTL`, the bargaining solution; ``fairgrad``: :class:`FairGrad`, alpha-fairness
- ``imtl-g``: :class:`IMTLG`, ``config``: :class:`ConFIG`, equal cosines with every row
- ``aligned-mtl``: :class:`AlignedMTL`, rows made orthogonal first
- ``random``: :class:`RandomWeights`; ``famo``: :class:`FAMO`, ``dwa``: :class:`DWA`, from losses: baselines

What goes around a method (:data:`WRAPPERS`): :class:`NoiseAware`, :class:`Capped`, :class:`Smoothed`,
:class:`Rescaled`, :class:`EveryNth`. A method of one's own subclasses :class:`Aggregator`; see
:func:`find_aggregator`.

The solvers can be used by themselves: :func:`solve_simplex_qp`, :func:`solve_simplex_norm`, :func:`solve_bounded_qp`.
"""

from __future__ import annotations

from .aligned import AlignedMTL
from .base import Aggregator, Option, Problem
from .bounded import BoundedSolution, solve_bounded_qp
from .cagrad import CAGrad
from .dualproj import DualProj
from .dwa import DWA
from .fairgrad import FairGrad, NashMTL
from .famo import FAMO
from .gradvac import GradVac
from .imtl import IMTLG, ConFIG
from .interior import Solution
from .mean import Mean
from .mgda import MGDA
from .noise import RowNoise, fold_rows
from .noise_aware import NoiseAware
from .pcgrad import PCGrad
from .random_weights import RandomWeights
from .registry import AGGREGATORS, ENTRY_POINTS, WRAPPERS, aggregator_options, build_aggregator, find_aggregator
from .simplex import solve_simplex_qp
from .simplex_norm import solve_simplex_norm
from .upgrad import UPGrad
from .wrapper import Wrapper, layers
from .wrappers import Capped, EveryNth, Rescaled, Smoothed

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "AlignedMTL",
    "BoundedSolution",
    "CAGrad",
    "Capped",
    "ConFIG",
    "DWA",
    "DualProj",
    "ENTRY_POINTS",
    "EveryNth",
    "FAMO",
    "FairGrad",
    "GradVac",
    "IMTLG",
    "MGDA",
    "Mean",
    "NashMTL",
    "NoiseAware",
    "Option",
    "PCGrad",
    "Problem",
    "RandomWeights",
    "Rescaled",
    "RowNoise",
    "Smoothed",
    "Solution",
    "UPGrad",
    "WRAPPERS",
    "Wrapper",
    "aggregator_options",
    "build_aggregator",
    "find_aggregator",
    "fold_rows",
    "layers",
    "solve_bounded_qp",
    "solve_simplex_norm",
    "solve_simplex_qp",
]
