"""Least norm over lower bounds: min v'Gv subject to v >= l, batched, many bounds per Gramian, certified.

With ``x = v - l`` and ``y = Gv`` the optimum is ``x >= 0, y >= 0, x_i y_i = 0``. Its direction
``d = sum_i v_i g_i`` is the projection of ``sum_i l_i g_i`` onto the dual cone ``{d: <g_i, d> >= 0}``, and
``y_i = <g_i, d>``.

Three stages, each on what the ones before left open:

1. Block principal pivoting (Judice and Pires, Computers & Operations Research 21, 1994): guess who has
   ``y_i = 0``, solve for their x with one Cholesky factorisation, exchange all those whose x or y came out
   negative. Nearly always exact after a few steps. While the number of the negative does not fall, a few full
   exchanges are tried, then single ones.
2. Where pivoting cycles (dependent rows): Mehrotra's primal-dual interior-point method.
3. Pivoting again, from the interior point's guess.

The point with the least residual of all stages is kept. Rows are scaled to length 1 first, and each bound to a
largest entry of 1. Where looking is free, each step gathers the problems that are still open; elsewhere all run,
and closed ones stay as they are. The result is the same.

Shapes: B blocks, K objectives, M bounds per block; P = B M problems, or those of them in hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import interior
from .interior import matvec, missing_shift, prepare, room

# Stated bounds: in all at most 50 factorisations. Nearly all problems take 2-5 pivoting steps.
PIVOT_STEPS = 16
INTERIOR_STEPS = 30
POLISH_STEPS = 4
# The rows are taken to carry independent noise of 1e-6 of their length: about what float32 gradients carry.
RIDGE = 1e-12
_ENOUGH = 1e-15  # times K: a residual below it is rounding
_PATIENCE = 3  # full exchanges without progress
_TO_BOUNDARY = 0.995
# Of the matrices in hand at once. Small ones stay in a CPU's cache, few large ones fill an accelerator.
_ELEMENTS_CPU = 2**20
_ELEMENTS_DEVICE = 2**24


@dataclass(frozen=True)
class BoundedSolution:
    """Solutions of ``min v'Gv, v >= l`` for each block's bounds.

    Attributes:
        excess_BMK: ``x = v - l``, never negative; exactly zero where ``Gl >= 0`` already.
        kkt_residual_BM: ``max_i |min(x_i |g_i|, y_i / |g_i|)|`` relative to ``sum_i (|l_i| + x_i) |g_i|``, with
            y of the problem that was solved (ridge and shift included). Scale-free, zero at the optimum and
            nowhere else, computed from the result itself.
        shift_B: what was added to the diagonal, relative to it, beyond the ridge, because the matrix was not positive
            semidefinite; 0 for a Gramian.
    """

    excess_BMK: Tensor
    kkt_residual_BM: Tensor
    shift_B: Tensor


def solve_bounded_qp(
    gram_BKK: Tensor,
    lower_BMK: Tensor,
    active_BK: Tensor | None = None,
    *,
    ridge: float = RIDGE,
    pivot_steps: int = PIVOT_STEPS,
    interior_steps: int = INTERIOR_STEPS,
    polish_steps: int = POLISH_STEPS,
) -> BoundedSolution:
    """Minimise ``v'Gv`` subject to ``v >= l``, for M bounds l per block.

    Args:
        gram_BKK: Gramians [B, K, K], at any scale, of any rank. One that is not positive semidefinite is shifted by the
            smallest of a list of multiples of its diagonal, reported in ``shift_B``.
        lower_BMK: bounds [B, M, K], of any sign.
        active_BK: who takes part; default all. Others, and rows that are zero, have no excess and change nothing.
        ridge: multiple of the diagonal that is added to it. It bounds v where rows depend on each other:
            ``sum_i v_i^2 |g_i|^2 <= |sum_i l_i g_i|^2 / ridge + sum_i l_i^2 |g_i|^2``. With the default it does
            not decide between weights that give the same direction (that would be below rounding).
        pivot_steps, interior_steps, polish_steps: bounds of the stages. If a problem hits them all, the point with the
            least residual is returned, and its residual tells how good it is.
    """
    gram, active, _, _ = prepare(gram_BKK, active_BK, None)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    active = active & (diagonal > 0)
    lengths = torch.where(active, diagonal, 1.0).sqrt()
    gram = _correlations(gram, lengths, active, ridge)
    shift = missing_shift(gram)
    gram = gram + torch.diag_embed(shift.expand_as(lengths))

    lower = torch.where(active[:, None], lower_BMK.double() * lengths[:, None], 0.0)
    scale = lower.abs().amax(2, keepdim=True)
    lower = lower / torch.where(scale > 0, scale, 1.0)
    b, m, k = lower.shape
    block = torch.arange(b, device=gram.device).repeat_interleave(m)
    flat = lower.reshape(b * m, k)
    elements = _ELEMENTS_CPU if interior.may_look(flat) else _ELEMENTS_DEVICE
    count = max(1, elements // (k * k))
    steps = (pivot_steps, interior_steps, polish_steps)
    parts = [
        _solve(gram, block[i : i + count], flat[i : i + count], active, steps) for i in range(0, max(b * m, 1), count)
    ]
    excess, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    excess = excess.view(b, m, k) * scale / lengths[:, None]
    return BoundedSolution(excess, residual.view(b, m), torch.where(active.any(1), shift.squeeze(1), 0.0))


def _correlations(gram: Tensor, lengths: Tensor, active: Tensor, ridge: float) -> Tensor:
    """Gramian of the rows scaled to length 1, plus the ridge; the identity where inactive."""
    pair = active[:, :, None] & active[:, None, :]
    gram = torch.where(pair, gram / lengths[:, :, None] / lengths[:, None, :], 0.0)
    gram.diagonal(dim1=1, dim2=2).copy_(1 + ridge * active.double())
    return gram


class _Batch:
    """Problems in hand, with the best point of each so far.

    Attributes:
        gram_BKK: matrices of all blocks.
        block_P: which of them is whose.
        lower_PK: the bounds l.
        push_PK: ``q = Gl``, and 1 where inactive, so that those never move.
        active_PK: who takes part.
        x_PK: the best points.
        residual_P1: their residuals.
        done_P1: whose residual is small enough.
    """

    def __init__(self, gram_BKK: Tensor, block_P: Tensor, lower_PK: Tensor, active_BK: Tensor) -> None:
        self.gram_BKK, self.block_P, self.lower_PK = gram_BKK, block_P, lower_PK
        self.active_PK = active_BK[block_P]
        self.push_PK = torch.where(self.active_PK, matvec(gram_BKK[block_P], lower_PK), 1.0)
        self.enough = _ENOUGH * gram_BKK.shape[-1]
        self.x_PK = torch.zeros_like(lower_PK)
        self.residual_P1 = torch.full_like(lower_PK[:, :1], torch.inf)
        self.done_P1 = torch.zeros_like(self.residual_P1, dtype=torch.bool)

    def open(self) -> Tensor | slice | None:
        """Index of the problems to go on with; None if there are none."""
        if not interior.may_look(self.x_PK):
            return slice(None)
        todo = (~self.done_P1[:, 0]).nonzero()[:, 0]
        return todo if len(todo) else None

    def size(self, index: Tensor | slice, x: Tensor) -> Tensor:
        """Size of the terms that l and x sum up [P, 1]."""
        total = (self.lower_PK[index].abs() + x.abs()).sum(1, keepdim=True)
        return torch.where(total > 0, total, 1.0)

    def offer(self, index: Tensor | slice, x: Tensor, y: Tensor) -> None:
        """Take the points x with products y whose residual is the least yet."""
        residual = x.minimum(y).abs_().amax(1, keepdim=True) / self.size(index, x)
        # NaN is no improvement.
        old, done = self.residual_P1[index], self.done_P1[index]
        better = ~done & (residual < old)
        self.x_PK[index] = torch.where(better, x, self.x_PK[index])
        self.residual_P1[index] = torch.where(better, residual, old)
        self.done_P1[index] = done | (residual <= self.enough)


def _solve(
    gram_BKK: Tensor, block_P: Tensor, lower_PK: Tensor, active_BK: Tensor, steps: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Excess [P, K] and residual [P] of the scaled problems."""
    batch = _Batch(gram_BKK, block_P, lower_PK, active_BK)
    batch.offer(slice(None), batch.x_PK, batch.push_PK)
    free = _pivot(batch, batch.push_PK < 0, steps[0])
    free = _interior(batch, free, steps[1])
    _pivot(batch, free, steps[2])
    return torch.where(batch.active_PK, batch.x_PK, 0.0), batch.residual_P1[:, 0]


def _pivot(batch: _Batch, free_PK: Tensor, steps: int) -> Tensor:
    """Block principal pivoting from a guess of those whose x is free (y = 0); the guess it ended with."""
    k = free_PK.shape[1]
    fewest_P1 = torch.full_like(batch.residual_P1, k + 1)
    patience_P1 = torch.full_like(fewest_P1, _PATIENCE)
    last = torch.arange(k, device=free_PK.device)
    for _ in range(steps):
        if (index := batch.open()) is None:
            break
        gram, push, free = batch.gram_BKK[batch.block_P[index]], batch.push_PK[index], free_PK[index]
        x = _free_solution(gram, push, free)
        slack = batch.enough * batch.size(index, x)
        y = torch.where(free, 0.0, matvec(gram, x) + push)
        clipped = x.clamp(min=0)
        batch.offer(index, clipped, matvec(gram, clipped) + push)

        wrong = torch.where(free, x < -slack, y < -slack)
        count = wrong.sum(1, keepdim=True)
        fewest, patience = fewest_P1[index], patience_P1[index]
        fell = count < fewest
        fewest_P1[index] = torch.where(fell, count.to(fewest), fewest)
        patience_P1[index] = torch.where(fell, float(_PATIENCE), patience - 1)
        one = wrong & (last == torch.where(wrong, last, -1).amax(1, keepdim=True))
        change = torch.where(fell | (patience > 0), wrong, one)
        free_PK[index] = torch.where(batch.done_P1[index], free, free ^ change)
    return free_PK


def _free_solution(gram: Tensor, push: Tensor, free: Tensor) -> Tensor:
    """x with ``(Gx + q)_i = 0`` for the free i and ``x_i = 0`` for the others [P, K]."""
    mask = free.to(gram)
    matrix = gram * mask[:, :, None]
    matrix *= mask[:, None, :]
    matrix.diagonal(dim1=1, dim2=2).add_(1 - mask)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return _solve_factored(factor, -push * mask)


def _solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    # Two triangular solves: on the CPU several times faster than cholesky_solve.
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)


def _interior(batch: _Batch, free_PK: Tensor, steps: int) -> Tensor:
    """Mehrotra's method on the open problems; the guess of the free that its last points suggest."""
    x_PK = torch.ones_like(batch.x_PK)
    y_PK = torch.zeros_like(x_PK)
    started = False
    for _ in range(steps):
        if (index := batch.open()) is None:
            break
        gram, push = batch.gram_BKK[batch.block_P[index]], batch.push_PK[index]
        if not started:
            y_PK[index] = (matvec(gram, x_PK[index]) + push).clamp(min=1)
            started = True
        x, y = _advance(gram, push, x_PK[index], y_PK[index])
        batch.offer(index, x, matvec(gram, x) + push)
        keep = batch.done_P1[index]
        x_PK[index], y_PK[index] = torch.where(keep, x_PK[index], x), torch.where(keep, y_PK[index], y)
        free_PK[index] = torch.where(keep, free_PK[index], x > y)
    return free_PK


def _advance(gram: Tensor, push: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One predictor-corrector step; none where it would not be sound."""
    ratio = y / x
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ratio))
    miss = matvec(gram, x) + push - y

    def direction(target: Tensor) -> tuple[Tensor, Tensor]:
        """Newton step towards ``Gx + q = y`` and ``x y + x dy + y dx = x target``."""
        dx = _solve_factored(factor, target - y - miss)
        return dx, target - y - ratio * dx

    dx, dy = direction(torch.zeros_like(y))
    alpha = room(x, dx).minimum(room(y, dy)).clamp(max=1)
    mu = (x * y).mean(1, keepdim=True)
    sigma = (((x + alpha * dx) * (y + alpha * dy)).mean(1, keepdim=True) / mu).clamp(0, 1) ** 3
    dx, dy = direction((sigma * mu - alpha * dx * dy) / x)
    # One length for both: then what is missing shrinks with it.
    alpha = (_TO_BOUNDARY * room(x, dx).minimum(room(y, dy))).clamp(max=1)
    x_new, y_new = x + alpha * dx, y + alpha * dy
    sound = (info == 0)[:, None] & ((x_new > 0) & (y_new > 0) & x_new.isfinite() & y_new.isfinite()).all(
        1, keepdim=True
    )
    return torch.where(sound, x_new, x), torch.where(sound, y_new, y)
