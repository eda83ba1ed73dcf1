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

The solvers can be used by themselves: :func:`solve_simplex_qp`, :func:`solve_simplex_norm`.
"""

from __future__ import annotations

from .base import Aggregator, Option, Problem
from .cagrad import CAGrad
from .gradvac import GradVac
from .interior import Solution
from .mean import Mean
from .mgda import MGDA
from .pcgrad import PCGrad
from .simplex import solve_simplex_qp
from .simplex_norm import solve_simplex_norm

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "gradvac": GradVac,
}


def build_aggregator(name: str, **options: float | str) -> Aggregator:
    """The method ``name`` with its options.

    Raises:
        ValueError: for a name or option that does not exist, or a value that breaks the option's rule.
    """
    return _method(name)(**options)


def aggregator_options(name: str) -> dict[str, Option]:
    """The options of method ``name``, each with its default and help.

    Raises:
        ValueError: for a name that does not exist.
    """
    return dict(_method(name).options)


def _method(name: str) -> type[Aggregator]:
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}; known: {', '.join(AGGREGATORS)}")
    return AGGREGATORS[name]


__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "CAGrad",
    "GradVac",
    "MGDA",
    "Mean",
    "Option",
    "PCGrad",
    "Problem",
    "Solution",
    "aggregator_options",
    "build_aggregator",
    "solve_simplex_norm",
    "solve_simplex_qp",
]
