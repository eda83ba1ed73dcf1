"""FairGrad and Nash-MTL: an update whose gain every objective bargains for.

Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, arXiv 2402.15638, Equation 4; Navon et al.,
"Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017, Claim 3.1.

The equation is solved on rows of length 1: with C their correlation matrix and ``y_k = w_k |g_k|`` it reads ``y_k
z_k^a = t_k`` for ``z = Cy`` and ``t_k = u_k |g_k|^(1 - a)``. That is the weighted centre of a linear complementarity
problem, and the method that finds it an interior-point one:

- First the point with ``y_k z_k = 1`` for all k. It starts from ``y = z = 1``, where ``z = Cy`` does not hold yet.
- From there the products ``y_k z_k^a`` are brought down to t, which is scaled so that none has to rise.

Each step is Newton's, cut so that y and z stay positive and no product falls far below where the step wants it: a y_k
that once fell too low takes many steps to come back. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import Best, matvec, missing_shift, room, take

# Length of each row's noise, relative to the row: about what float32 gradients carry.
_NOISE = 1e-6
# Stated bound. Typical: 7-14. Worst over the tests' families, K up to 64, preferences that differ by up to 1e6: 41 for
# alpha from 0.5 to 2, 54 for 0.25, 94 for 5.
MAX_ITERATIONS = 100
_RELATIVE = 1e-12  # of z_k: an error below it is none
_ROUNDING = 1e-15  # of sum_j |C_kj| y_j: an error below it is rounding in Cy
_TO_BOUNDARY = 0.95
_LEAST_PRODUCT = 0.1  # of what the step wants
_CUTS = (1.0, 0.9, 0.8, 0.65, 0.5, 0.3, 0.15)
_FEASIBLE = 0.3  # z within this part of Cy: the first point is good enough
_STEEPEST = 2.0  # largest relative increase a step asks for


class FairGrad(Aggregator):
    """``w_k = u_k <g_k, d>^(-alpha)``, ``d = sum_k w_k g_k``, ``w > 0``; then w brought to sum 1.

    The solution minimises the convex ``|d|^2 / 2 - sum_k u_k^(1/alpha) w_k^(1 - 1/alpha) / (1 - 1/alpha)`` (a
    logarithm at alpha = 1). Among directions of its length d maximises the alpha-fair utility ``sum_k u_k x_k^(1 -
    alpha) / (1 - alpha)`` of the gains ``x_k = <g_k, d>``: alpha near 0 is the mean, 1 Nash bargaining, large alpha
    cares for the smallest gain.

    Every ``<g_k, d>`` is positive: conflict-free. Where that cannot be (Pareto-stationary rows), d vanishes. It acts
    without conflicts too. All weights are positive. Rows are taken to carry independent noise of 1e-6 of their
    length; with it a solution exists always and is unique, products may be negative by 1e-12 of the terms that d sums
    up, and d is about 1e-6 of the rows where they are stationary.

    Departures: the preference (the paper has none) multiplies the weights; the paper's w is scaled with the rows to
    the power ``-2 alpha / (1 + alpha)``, here it sums to 1.

    ``kkt_residual_B`` is the largest error of the equation ``<g_k, d> = (u_k / w_k)^(1/alpha)`` at a row, relative to
    the terms that ``<g_k, d>`` sums up.
    """

    options: ClassVar[dict[str, Option]] = {
        "alpha": Option(
            2.0, "how much the smallest gain counts: 1 is Nash-MTL, 0.25 nearly the mean", low=0.25, high=5.0
        ),
    }

    def _weights(self, problem: Problem) -> Tensor:
        alpha = self.settings.get("alpha", 1.0)
        active, norms = problem.active_BK, problem.norm_BK
        correlation = problem.gram_BKK / norms[:, :, None] / norms[:, None, :]
        share = torch.where(active, problem.share_BK, 1.0)
        y_BK, self.kkt_residual_B = solve_fairness(correlation, share.log() + (1 - alpha) * norms.log(), active, alpha)
        # Relative to the shortest row: no overflow, however short.
        shortest = torch.where(active, norms, torch.inf).amin(1, keepdim=True)
        weights = torch.where(active, y_BK * (shortest / norms), 0.0)
        total = weights.sum(1, keepdim=True)
        return problem.mass_B1 * weights / torch.where(total > 0, total, 1.0)


class NashMTL(FairGrad):
    """``w_k <g_k, d> = u_k``, ``w > 0``; then w brought to sum 1: :class:`FairGrad` with alpha = 1.

    Among directions of its length d maximises ``sum_k u_k log <g_k, d>``, the Nash bargaining solution (weighted by
    the preference). The direction does not change when a row is multiplied by a number, so no language counts more
    because its gradients are long. The rest holds as for :class:`FairGrad`; there is no cap on the length of d and no
    reuse of weights over steps (see the wrappers). The authors' code approximates the solution by a sequence of
    convex programs; here it is exact.
    """

    options: ClassVar[dict[str, Option]] = {}


@dataclass(frozen=True)
class _Program:
    root: Tensor  # R with RR' = C
    matrix: Tensor  # C
    size: Tensor  # |C|, entry by entry
    log_target: Tensor
    active: Tensor


@dataclass(frozen=True)
class _Iterate:
    y: Tensor
    z: Tensor
    product: Tensor  # Cy, which z is to become
    second: Tensor  # whether the products are on the way to their targets [B, 1]


def solve_fairness(
    correlation_BKK: Tensor,
    log_target_BK: Tensor,
    active_BK: Tensor,
    alpha: float,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """``y > 0`` with ``y_k (Cy)_k^alpha`` proportional to a target, and the error that is left.

    Args:
        correlation_BKK: correlation matrices C [B, K, K], zero where inactive; 1e-12 is added to the diagonal.
        log_target_BK: logarithms of the target.
        active_BK: who takes part.
        alpha: the exponent.
        max_iterations: bound. If a block hits it, its best iterate is returned.

    Returns:
        y [B, K], 1 for inactive objectives, and its error [B] relative to ``sum_j |C_kj| y_j``.
    """
    program = _program(correlation_BKK, log_target_BK, active_BK)
    one = torch.ones_like(log_target_BK)
    now = _Iterate(one, one, _product(program, one), torch.zeros_like(active_BK[:, :1]))
    best, part = Best(one), program
    _judge(best, part, now, alpha)
    for _ in range(max_iterations):
        if best.all_done():
            break
        keep = best.shrink()
        if keep is not None:
            part, now = take(part, keep), take(now, keep)
        now = _advance(part, _turn(part, now, alpha), alpha, best.done)
        _judge(best, part, now, alpha)
    y, _ = best.result()
    error, _ = _error(program, y, _product(program, y), alpha)
    return y, (error / matvec(program.size, y)).amax(1)


def _judge(best: Best, program: _Program, now: _Iterate, alpha: float) -> None:
    error, allowed = _error(program, now.y, now.product, alpha)
    gap = (error / allowed).amax(1, keepdim=True)
    best.offer(now.y, gap, torch.ones_like(gap))


def _program(correlation: Tensor, log_target: Tensor, active: Tensor) -> _Program:
    matrix = correlation + torch.diag_embed((~active).double() + _NOISE**2)
    shift = missing_shift(matrix)
    root, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(shift * matrix.diagonal(dim1=1, dim2=2)))
    matrix = root @ root.mT
    log_target = torch.where(active, log_target, -torch.inf)
    highest = log_target.amax(1, keepdim=True)
    log_target = torch.where(active, log_target - highest, 0.0)
    return _Program(root, matrix, matrix.abs(), log_target, active)


def _product(program: _Program, y: Tensor) -> Tensor:
    """``Cy``; through the root, which loses less where terms cancel."""
    return matvec(program.root, matvec(program.root.mT, y))


def _error(program: _Program, y: Tensor, product: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Distance of ``Cy`` from what the target makes of y, and how much of it is none."""
    wanted = ((program.log_target - y.log()) / alpha).exp()
    error = torch.where(program.active, (product - wanted).abs(), 0.0)
    return error, (_RELATIVE * wanted).maximum(_ROUNDING * matvec(program.size, y))


def _turn(program: _Program, now: _Iterate, alpha: float) -> _Iterate:
    """Towards the target, for blocks whose first point is good enough; scaled so that no product has to rise."""
    close = ((now.z - now.product).abs() <= _FEASIBLE * now.z).all(1, keepdim=True)
    turn = close & ~now.second
    rise = torch.where(program.active, program.log_target - now.y.log() - alpha * now.z.log(), -torch.inf)
    factor = (rise.amax(1, keepdim=True) / (1 + alpha)).exp()
    factor = torch.where(turn & program.active, factor, 1.0)
    return _Iterate(factor * now.y, factor * now.z, factor * now.product, now.second | turn)


def _advance(program: _Program, now: _Iterate, alpha: float, done: Tensor) -> _Iterate:
    """One Newton step; finished blocks stay."""
    y, z = now.y, now.z
    power = torch.where(now.second, torch.full_like(y[:, :1], alpha), 1.0)
    missing = torch.where(now.second, program.log_target, 0.0) - y.log() - power * z.log()
    # What falls follows the product, which is linear where y or z alone falls; what rises its logarithm.
    wish = torch.where(missing < 0, missing.expm1(), missing.clamp(max=_STEEPEST))
    wish = torch.where(program.active, wish, 0.0)
    ratio = z / (power * y)
    factor, info = torch.linalg.cholesky_ex(program.matrix + torch.diag_embed(ratio))
    rise = z * wish / power
    dy = torch.cholesky_solve((rise + z - now.product)[..., None], factor).squeeze(-1)
    dz = rise - ratio * dy
    dy, dz = torch.where(program.active, dy, 0.0), torch.where(program.active, dz, 0.0)
    step = (_TO_BOUNDARY * room(y, dy).minimum(room(z, dz))).clamp(max=1)
    step = _cut(step, dy / y, dz / z, power, wish)
    sound = ~done & (info == 0)[:, None] & (dy.sum(1, keepdim=True) + dz.sum(1, keepdim=True)).isfinite()
    y = torch.where(sound, y + step * dy, y)
    z = torch.where(sound, z + step * dz, z)
    return _Iterate(y, z, _product(program, y), now.second)


def _cut(step: Tensor, dy: Tensor, dz: Tensor, power: Tensor, wish: Tensor) -> Tensor:
    """The longest of some parts of the step after which every product is near what was wished, or more."""
    steps = torch.cat([cut * step for cut in _CUTS], 1)[:, None, :]
    gain = (steps * dy[..., None]).log1p() + power[..., None] * (steps * dz[..., None]).log1p()
    least = (steps * wish.clamp(max=0)[..., None]).log1p() + math.log(_LEAST_PRODUCT)
    good = (gain >= least).all(1)
    first = good.to(torch.int8).argmax(1, keepdim=True)
    first = torch.where(good.any(1, keepdim=True), first, len(_CUTS) - 1)
    return steps[:, 0].gather(1, first)
