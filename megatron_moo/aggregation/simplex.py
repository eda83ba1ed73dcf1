"""The point of least norm in the convex hull of each block's rows: min w'Gw over the simplex, batched, exact.

A primal-dual interior-point method with Mehrotra's predictor and corrector, all blocks in lock step.
Notation: w the weights, lam the multiplier of sum(w) = 1, z >= 0 those of w >= 0, h = Gw. At the optimum
``h = lam + z`` and ``w z = 0``, so that every row of weight has the same product lam = w'Gw with the solution,
and the others a larger one. Weak duality gives ``w'Gw - min_k h_k >= (w'Gw - optimum) / 2`` for any feasible
w, which is how a solution is certified.

Two departures from the textbook:

- The path is centred at a given point c: ``w_k z_k = mu c_k``. Where the optimum is not unique (duplicate or
  dependent rows) the path ends near the optimal point that is most central with respect to c; for equal rows
  at c itself.
- A little of the diagonal is added to the Newton matrix, not to the problem: directions that neither G nor
  the barrier sees then stay where they are instead of following rounding.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interior import (
    ROUNDING_SHIFT,
    Best,
    Solution,
    dot,
    greatest,
    least,
    matvec,
    missing_shift,
    prepare,
    room,
    tame,
)

# Stated bound. Typical: 8-20; worst seen over the tests' families, K up to 64: 33, and the bound itself (at a residual
# below 2e-12) where rows differ in length by 1e8.
MAX_ITERATIONS = 50
_RELATIVE = 1e-12  # of the value: a gap below it is optimal
_ROUNDING = 1e-15  # of (sum_k w_k |g_k|)^2: a gap below it is rounding in h
_DAMPING = 1e-12
_TO_BOUNDARY = 0.995


@dataclass
class _Iterate:
    w: Tensor
    z: Tensor
    lam: Tensor
    h: Tensor


def solve_simplex_qp(
    gram_BKK: Tensor,
    active_BK: Tensor | None = None,
    centre_BK: Tensor | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Solution:
    """Minimise ``w'Gw`` over the simplex of each block's active objectives.

    Args:
        gram_BKK: Gramians [B, K, K], at any scale, of any rank. One that is not positive semidefinite beyond
            float64 rounding is shifted by the smallest of a list of multiples of its diagonal, reported in
            ``shift_B``.
        active_BK: who takes part; default all.
        centre_BK: non-negative point that decides ties (module docstring); default uniform.
        max_iterations: bound. If a block hits it, its best iterate is returned, and its gap tells how good it
            is.

    Returns:
        ``value_B`` is w'Gw; ``gap_B`` bounds half its excess over the optimum; ``kkt_residual_B`` is the gap
        relative to ``(sum_k w_k |g_k|)^2``. Blocks without active objectives get zeros.
    """
    gram, active, centre, scale = prepare(gram_BKK, active_BK, centre_BK)
    shift = missing_shift(gram)
    shift = torch.where(shift > ROUNDING_SHIFT, shift, 0.0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    gram = gram + torch.diag_embed(shift * diagonal)
    lengths = torch.where(active, (diagonal * (1 + shift)).sqrt(), 0.0)
    best = Best(centre)

    def judge(w: Tensor, h: Tensor) -> None:
        value = dot(w, h)
        enough = (_RELATIVE * value).maximum(_ROUNDING * dot(w, lengths) ** 2)
        best.offer(w, (value - least(h, active)).clamp(min=0), enough)

    judge(centre, matvec(gram, centre))
    path = tame(centre, active)
    now = _start(gram, active, path, lengths)
    for _ in range(max_iterations):
        if best.all_done():
            break
        now = _advance(gram, active, path, now, best.done)
        judge(now.w, now.h)
    return _finish(gram, active, best.w_BK, lengths, scale[:, 0], shift)


def _start(gram: Tensor, active: Tensor, centre: Tensor, lengths: Tensor) -> _Iterate:
    """At the centre, with multipliers within a factor 2 of each other: well centred."""
    h = matvec(gram, centre)
    low, high = least(h, active), greatest(h, active)
    spread = (high - low).maximum(0.1 * high.abs().maximum(low.abs())).maximum(1e-3 * dot(centre, lengths**2))
    lam = torch.where(active.any(1, keepdim=True), low - spread, 0.0)
    return _Iterate(centre, torch.where(active, h - lam, 1.0), lam, h)


def _advance(gram: Tensor, active: Tensor, centre: Tensor, now: _Iterate, done: Tensor) -> _Iterate:
    """One predictor-corrector step; finished blocks stay."""
    w = torch.where(active, now.w, 1.0)  # a dummy for divisions: inactive entries never move
    ratio = torch.where(active, now.z / w, 0.0)
    damping = _DAMPING * gram.diagonal(dim1=1, dim2=2) / torch.where(active, centre, 1.0)
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ratio + damping))
    ones = active.double()
    residual = torch.where(active, now.h - now.lam - now.z, 0.0)

    def direction(push: Tensor, solved_ones: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Newton step towards ``w z + z dw + w dz = w (z + push)``, on sum(dw) = 0."""
        solved = torch.cholesky_solve((push - residual)[..., None], factor).squeeze(-1)
        dlam = -solved.sum(1, keepdim=True) / solved_ones.sum(1, keepdim=True)
        dw = solved + dlam * solved_ones
        dw = dw - now.w * dw.sum(1, keepdim=True)  # what rounding has left of the sum
        return dw, push - ratio * dw, dlam

    solved_ones = torch.cholesky_solve(ones[..., None], factor).squeeze(-1)
    dw, dz, _ = direction(-ones * now.z, solved_ones)
    mu = dot(now.w, ones * now.z)
    alpha = room(w, dw).minimum(room(now.z, dz)).clamp(max=1)
    ahead = dot(now.w + alpha * dw, ones * (now.z + alpha * dz))
    sigma = torch.where(mu > 0, ahead / mu, 0.0).clamp(0, 1) ** 3
    # The second-order term belongs to the whole predictor; where a part of it is possible, so is that of the term.
    push = ones * (-now.z + (sigma * mu * centre - alpha * dw * dz) / w)
    dw, dz, dlam = direction(push, solved_ones)
    # One length for both: separate ones break down where the centre is uneven.
    alpha = (_TO_BOUNDARY * room(w, dw).minimum(room(now.z, dz))).clamp(max=1)
    sound = ~done & (info == 0)[:, None] & dw.isfinite().all(1, keepdim=True) & dlam.isfinite()
    w_new = now.w + alpha * dw
    w_new = torch.where(sound, w_new / w_new.sum(1, keepdim=True), now.w)
    z_new = torch.where(sound & active, now.z + alpha * dz, now.z)
    return _Iterate(w_new, z_new, torch.where(sound, now.lam + alpha * dlam, now.lam), matvec(gram, w_new))


def _finish(gram: Tensor, active: Tensor, w: Tensor, lengths: Tensor, scale_B1: Tensor, shift_B1: Tensor) -> Solution:
    present = active.any(1, keepdim=True)
    w = torch.where(active, w, 0.0)
    h = matvec(gram, w)
    value = dot(w, h)
    gap = torch.where(present, (value - least(h, active)).clamp(min=0), 0.0)
    size = dot(w, lengths) ** 2
    residual = gap / torch.where(size > 0, size, 1.0)
    shift = torch.where(present, shift_B1, 0.0)
    columns = (value * scale_B1, gap * scale_B1, residual, shift)
    return Solution(w, *(column.squeeze(1) for column in columns))
