"""Seeded families of gradient rows, from harmless to degenerate, and a few helpers.

Shapes: B blocks, K objectives, N elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

B = 6


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _random(g, k):
    return _normal(g, B, k, 2 * k + 5)


def _conflicting(g, k):
    rows = _random(g, k)
    return rows - 0.9 * rows.mean(1, keepdim=True)


def _stationary(g, k):
    rows = _random(g, k)
    return rows - rows.mean(1, keepdim=True)


def _aligned(g, k):
    """No negative inner product."""
    return _random(g, k).abs()


def _nearly_equal(g, k):
    return 1e-3 * _random(g, k) + _normal(g, B, 1, 2 * k + 5)


def _rank_one(g, k):
    return _normal(g, B, k, 1) @ _normal(g, B, 1, 9)


def _rank_three(g, k):
    return _normal(g, B, k, 3) @ _normal(g, B, 3, 9)


def _duplicates(g, k):
    return _random(g, k)[:, torch.arange(k) // 2]


def _opposite(g, k):
    rows = _random(g, k)
    half = (k + 1) // 2
    return torch.cat([rows[:, :half], -rows[:, : k - half]], 1)


def _uneven(g, k):
    return _random(g, k) * torch.logspace(-4, 0, k, dtype=torch.float64)[:, None]


def _very_uneven(g, k):
    return _random(g, k) * torch.logspace(-7, 0, k, dtype=torch.float64)[:, None]


def _ill_conditioned(g, k):
    n = 2 * k + 5
    return _random(g, k) * torch.logspace(-6, 0, n, dtype=torch.float64)


def _few_dimensions(g, k):
    return _normal(g, B, k, max(2, k // 4)) + 1


FAMILIES: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "random": _random,
    "conflicting": _conflicting,
    "stationary": _stationary,
    "aligned": _aligned,
    "nearly-equal": _nearly_equal,
    "rank-one": _rank_one,
    "rank-three": _rank_three,
    "duplicates": _duplicates,
    "opposite": _opposite,
    "uneven": _uneven,
    "very-uneven": _very_uneven,
    "ill-conditioned": _ill_conditioned,
    "few-dimensions": _few_dimensions,
}


def make_rows(family: str, k: int, seed: int = 0) -> Tensor:
    """Rows [B, K, N] of a family."""
    return FAMILIES[family](torch.Generator().manual_seed(1000 * seed + k), k)


def gramian(rows: Tensor) -> Tensor:
    """Inner products [B, K, K]."""
    return rows @ rows.mT


def make_preference(k: int, seed: int = 0) -> Tensor:
    """An uneven preference [K] that sums to 1."""
    preference = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return preference / preference.sum()


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """The combined direction [B, N]."""
    return (weights[:, None, :] @ rows).squeeze(1)


def size(weights: Tensor, rows: Tensor) -> Tensor:
    """Size of the terms a direction sums up [B]: the yardstick for rounding."""
    return (weights.abs() * rows.norm(dim=2)).sum(1)
