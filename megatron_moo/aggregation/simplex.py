"""The point of least norm in the convex hull of each block's rows: min w'Gw over the simplex, batched, exact.

A few steps of block principal pivoting for the easy blocks, then a primal-dual interior-point method with Mehrotra's
predictor and corrector, all blocks in lock step.
Notation: w the weights, lam the multiplier of sum(w) = 1, z >= 0 those of w >= 0, h = Gw. At the optimum
``h = lam + z`` and ``w z = 0``, so that every row of weight has the same product lam = w'Gw with the solution,
and the others a larger one. Weak duality gives ``w'Gw - min_k h_k >= (w'Gw - optimum) / 2`` for any feasible
w, which is how a solution is certified.

Three departures from the textbook:

- The path is centred at a given point c: ``w_k z_k = mu c_k``. Where the optimum is not unique (duplicate or
  dependent rows) the path ends near the optimal point that is most central with respect to c; for equal rows
  at c itself.
- A little of the diagonal is added to the Newton matrix, not to the problem: directions that neither G nor
  the barrier sees then stay where they are instead of following rounding.
- An inactive objective has w = 1, z = 0, and zeros in all data: it adds nothing to any sum and never moves.

Upper bounds (:mod:`.simplex_caps`) add slacks s, their multipliers y, and a term to h.

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
    take,
    tame,
)
from .simplex_caps import Augmented, Caps

# Stated bound. Typical: 8-20; worst seen over the tests' families, K up to 128: 33, and the bound itself (at a residual
# below 2e-11) where rows differ in length by 1e7. With upper bounds the same.
MAX_ITERATIONS = 50
PIVOTS = 6  # before them, each with a factorisation as well
_RELATIVE = 1e-12  # of the value: a gap below it is optimal
_ROUNDING = 1e-15  # of (sum_k w_k |g_k|)^2: a gap below it is rounding in h
_DAMPING = 1e-12
_TO_BOUNDARY = 0.995
_INDEPENDENT = 1e-5  # of a row's length
_SMALLEST_SLACK = 1e-16  # at the start, relative to the bound: bounds may leave a single point


@dataclass
class _Program:
    gram: Tensor  # zero where inactive
    newton: Tensor  # the same with the damping, and the identity where inactive
    lengths: Tensor
    ones: Tensor  # active, as numbers
    absent: Tensor  # 0, infinite where inactive
    dummies: Tensor  # inactive, as numbers; like the pairs below
    centre: Tensor
    caps: Caps | None


@dataclass
class _Iterate:
    """Primal and dual variables lie side by side, [B, K], or with bounds [B, 2K]: w and s, z and y."""

    primal: Tensor
    dual: Tensor
    lam: Tensor
    h: Tensor

    @property
    def w(self) -> Tensor:
        return self.primal[:, : self.h.shape[1]]


def solve_simplex_qp(
    gram_BKK: Tensor,
    active_BK: Tensor | None = None,
    centre_BK: Tensor | None = None,
    max_iterations: int = MAX_ITERATIONS,
    upper_BK: Tensor | None = None,
    unit_BK: Tensor | None = None,
) -> Solution:
    """Minimise ``w'Gw`` over the simplex of each block's active objectives, or over the part of it below bounds.

    Args:
        gram_BKK: Gramians [B, K, K], at any scale, of any rank. One that is not positive semidefinite beyond
            float64 rounding is shifted by the smallest of a list of multiples of its diagonal, reported in
            ``shift_B``.
        active_BK: who takes part; default all.
        centre_BK: non-negative point that decides ties (module docstring); default uniform.
        max_iterations: bound (and of the pivoting steps before, see ``PIVOTS``). If a block hits it, its best iterate
            is returned, and its gap tells how good it is.
        upper_BK: bounds, ``w <= upper``; default none. An objective whose bound is not positive does not take
            part. Bounds that sum to less than 1 are scaled up to sum to 1, and are then the solution.
        unit_BK: q > 0, which changes what is bounded: ``q_k w_k / sum_j q_j w_j <= upper_k``. These are the
            weights of rows that were multiplied by q before the Gramian was taken. Default 1.

    Returns:
        ``value_B`` is w'Gw; ``gap_B`` bounds half its excess over the optimum; ``kkt_residual_B`` is the gap
        relative to ``(sum_k w_k |g_k|)^2``. Blocks without active objectives get zeros.
    """
    if upper_BK is not None:
        active_BK = upper_BK > 0 if active_BK is None else active_BK & (upper_BK > 0)
    gram, active, centre, scale = prepare(gram_BKK, active_BK, centre_BK)
    shift = missing_shift(gram)
    shift = torch.where(shift > ROUNDING_SHIFT, shift, 0.0)
    caps = None if upper_BK is None else Caps.build(active, upper_BK, unit_BK)
    program = whole = _program(gram, active, centre, shift, caps)
    best = Best(centre)
    now = _start(program, active, centre, best)
    if caps is None:
        program, now = _pivot(program, now, best, min(PIVOTS, max_iterations))
    for _ in range(max_iterations):
        if best.all_done():
            break
        keep = best.shrink()
        if keep is not None:
            program, now = take(program, keep), take(now, keep)
        now = _advance(program, now)
        _judge(program, best, now.w, now.h)
    return _finish(whole, active, best.result()[0], scale[:, 0], shift)


def _program(gram: Tensor, active: Tensor, centre: Tensor, shift: Tensor, caps: Caps | None) -> _Program:
    """From a prepared Gramian, whose inactive diagonal is 1."""
    ones = active.double()
    path = tame(centre, active)
    pairs = 1 if caps is None else 2
    diagonal = gram.diagonal(dim1=1, dim2=2)
    lengths = (diagonal * (1 + shift)).sqrt() * ones
    damping = _DAMPING * lengths**2 / torch.where(active, path, 1.0)
    return _Program(
        gram=gram + torch.diag_embed(shift * diagonal * ones - (1 - ones)),
        newton=gram + torch.diag_embed(shift * diagonal * ones + damping),
        lengths=lengths,
        ones=ones,
        absent=torch.where(active, 0.0, torch.inf),
        dummies=(1 - ones).repeat(1, pairs),
        centre=path.repeat(1, pairs),
        caps=caps,
    )


def _gap(program: _Program, w: Tensor, h: Tensor) -> Tensor:
    """What weak duality leaves of doubt about feasible points [B, 1]."""
    if program.caps is not None:
        return program.caps.excess(w, h).clamp(min=0.0)
    return (dot(w, h) - (h + program.absent).amin(1, keepdim=True)).clamp(min=0.0)


def _judge(program: _Program, best: Best, w: Tensor, h: Tensor) -> None:
    if program.caps is not None:
        w = program.caps.clip(w)
        h = matvec(program.gram, w)
    enough = (_RELATIVE * dot(w, h)).maximum(_ROUNDING * dot(w, program.lengths) ** 2)
    best.offer(w, _gap(program, w, h), enough)


def _start(program: _Program, active: Tensor, centre: Tensor, best: Best) -> _Iterate:
    """Well centred: at the centre, with multipliers within a factor 2 of each other; with bounds, inside them."""
    caps = program.caps
    w = program.centre
    if caps is not None:
        w, centre = caps.inside(centre)
    _judge(program, best, centre, matvec(program.gram, centre))
    h = matvec(program.gram, w)
    low, high = least(h, active), greatest(h, active)
    spread = (high - low).maximum(0.1 * high.abs().maximum(low.abs())).maximum(1e-3 * dot(w, program.lengths**2))
    if caps is None:
        lam = torch.where(active.any(1, keepdim=True), low - spread, 0.0)
        return _Iterate(torch.where(active, w, 1.0), program.ones * (h - lam), lam, h)
    primal = torch.cat([w, caps.slack(w).maximum(_SMALLEST_SLACK * caps.upper)], 1) + program.dummies
    dual = spread * program.centre / primal
    z, y = dual.chunk(2, 1)
    return _Iterate(primal, dual, dot(w, h - z - caps.pull(y)), h)


def _pivot(program: _Program, now: _Iterate, best: Best, steps: int) -> tuple[_Program, _Iterate]:
    """Solve, by guessing which weights are zero, what is easy: blocks of clearly independent rows.

    The solution is that of ``Gx - 1 = y``, ``x, y >= 0``, ``x'y = 0``, brought to sum 1. All that is wrong with a
    guess is exchanged at once, a few times; guesses that do not settle are left to the interior-point method, and so
    are dependent rows, whose solutions are many.
    """
    free = program.ones > 0
    independent = None
    for _ in range(steps):
        if best.all_done():
            break
        keep = best.shrink()
        if keep is not None:
            program, now, free, independent = (take(part, keep) for part in (program, now, free, independent))
        mask = free.double()
        matrix = program.gram * mask[:, :, None] * mask[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(1.0 - mask)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if independent is None:  # what is left of each row beside those before it
            left = factor.diagonal(dim1=1, dim2=2) > _INDEPENDENT * program.lengths
            independent = left.all(1, keepdim=True) & (info == 0)[:, None]
        half = torch.linalg.solve_triangular(factor, mask[..., None], upper=False)
        x = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2) * mask
        w = x.clamp(min=0.0)
        total = w.sum(1, keepdim=True)
        w = torch.where(independent & (total > 0), w / total, torch.nan)  # no offer
        _judge(program, best, w, matvec(program.gram, w))
        y = matvec(program.gram, x) - program.ones
        free = free ^ torch.where(free, x < 0, y < 0)
    return program, now


def _advance(program: _Program, now: _Iterate) -> _Iterate:
    """One predictor-corrector step. A block that is done, or breaks down, may turn to NaN: see Best."""
    primal, dual = now.primal, now.dual
    newton = (_Newton if program.caps is None or program.caps.unit is None else Augmented)(program, now)
    step, _, _ = newton.direction(torch.zeros_like(primal))
    t = step / primal  # then the predictor's dual step is -dual (1 + t)
    alpha = torch.maximum(-t, 1.0 + t).amax(1, keepdim=True).clamp(min=1.0).reciprocal()
    products = primal * dual
    total = products.sum(1, keepdim=True)
    ahead = (products * (1.0 + alpha * t) * (1.0 - alpha * (1.0 + t))).sum(1, keepdim=True)
    sigma = torch.where(total > 0, ahead / total, 0.0).clamp(0.0, 1.0) ** 3
    # The second-order term belongs to the whole predictor; where a part of it is possible, so is that of the term.
    mu = total * (now.h.shape[1] / primal.shape[1])
    push = sigma * mu * program.centre / primal + alpha * dual * t * (1.0 + t)
    step, new_dual, dlam = newton.direction(push)
    ddual = new_dual - dual
    # One length for both: separate ones break down where the centre is uneven.
    shrinking = (step / primal).minimum(ddual / (dual + program.dummies)).amin(1, keepdim=True)
    alpha = _TO_BOUNDARY / (-shrinking).clamp(min=_TO_BOUNDARY)
    primal = primal + alpha * step
    h = matvec(program.gram, primal[:, : now.h.shape[1]])
    return _Iterate(primal, dual + alpha * ddual, now.lam + alpha * dlam, h)


class _Newton:
    """The Newton system at an iterate, factorised once for both directions, s and all duals eliminated:
    ``(G + diag(z / w) + C' diag(y / s) C) dw = right-hand side + dlam``, and sum(dw) = 0."""

    def __init__(self, program: _Program, now: _Iterate) -> None:
        self.caps, self.now = program.caps, now
        self.ratio = now.dual / now.primal
        matrix = program.newton.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(self.ratio if self.caps is None else sum(self.ratio.chunk(2, 1)))
        self.factor, _ = torch.linalg.cholesky_ex(matrix)
        # lam is taken out of the right-hand side: left to the multiplier of sum(dw) it would cost its last digits.
        self.level = program.ones * now.lam - now.h
        self.half_ones = self._half(program.ones)
        self.square = dot(self.half_ones, self.half_ones)

    def _half(self, rhs: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, rhs[..., None], upper=False).squeeze(-1)

    def direction(self, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step of the primal variables towards ``new dual = push - dual / primal * step``, the new dual, and dlam."""
        half = self._half(self.level + (push if self.caps is None else torch.sub(*push.chunk(2, 1))))
        dlam = -dot(half, self.half_ones) / self.square
        half = half + dlam * self.half_ones
        step = torch.linalg.solve_triangular(self.factor.mT, half[..., None], upper=True).squeeze(-1)
        step = step - self.now.w * step.sum(1, keepdim=True)  # what rounding has left of the sum
        if self.caps is not None:
            step = torch.cat([step, -step], 1)
        return step, push - self.ratio * step, dlam


def _finish(program: _Program, active: Tensor, w: Tensor, scale_B1: Tensor, shift_B1: Tensor) -> Solution:
    present = active.any(1, keepdim=True)
    w = torch.where(active, w, 0.0)
    total = w.sum(1, keepdim=True)
    w = w / torch.where(total > 0, total, 1.0)
    if program.caps is not None:
        w = program.caps.clip(w)
    h = matvec(program.gram, w)
    value = dot(w, h)
    gap = torch.where(present, _gap(program, w, h), 0.0)
    size = dot(w, program.lengths) ** 2
    residual = gap / torch.where(size > 0, size, 1.0)
    shift = torch.where(present, shift_B1, 0.0)
    columns = (value * scale_B1, gap * scale_B1, residual, shift)
    return Solution(w, *(column.squeeze(1) for column in columns))
