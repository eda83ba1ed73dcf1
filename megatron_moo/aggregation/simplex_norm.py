"""min b'w + r |Rw| over the simplex, batched: the program of CAGrad.

The norm is not smooth at zero and Newton's method on it fails where the rows nearly cancel, so this is solved
as what it is, a program over a second-order cone: min b'w + r s with ``(s, Rw)`` in the cone, by a
primal-dual method with Nesterov-Todd scaling and Mehrotra's corrector (the linear algebra of Vandenberghe,
"The CVXOPT linear and quadratic cone program solvers", 2010), all blocks in lock step. Its dual: max lam such
that ``z = b - lam - R'e >= 0`` and ``|e| <= r``. Hence for any such e, ``min_k (b - R'e)_k`` is a lower
bound, which certifies a solution.

The cone's dual pair is ``(s, y = Rw)`` and ``(r, e)``: the first entry of the dual is the constant r. Both
steps have the same length, because separate ones let the cone's pair leave the neighbourhood of the path and
creep. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interior import Best, Solution, dot, greatest, least, matvec, norm, room, tame

# Stated bound. Typical: 10-20; worst seen over the tests' families, K up to 64: 47, and the bound itself (at a residual
# below 2e-11) where the mean is zero to rounding.
MAX_ITERATIONS = 60
_RELATIVE = 1e-12  # of the sum of the terms: a gap below it is optimal
_ROUNDING = 1e-13  # of r sum_k w_k |R_k|: a gap below it is about rounding
_DAMPING = 1e-13
_TO_BOUNDARY = 0.99
_TINY = 1e-300


@dataclass
class _Program:
    root: Tensor  # R [B, K, K]
    gram: Tensor  # R'R
    b: Tensor
    r: Tensor
    active: Tensor
    ones: Tensor  # active, as numbers
    centre: Tensor
    degree: Tensor  # active objectives + 1

    def transposed(self, y_BK: Tensor) -> Tensor:
        return matvec(self.root.mT, y_BK)


@dataclass
class _Point:
    """An iterate, or a step between two."""

    w: Tensor
    s: Tensor
    y: Tensor
    z: Tensor
    e: Tensor
    lam: Tensor


def solve_simplex_norm(
    root_BKK: Tensor,
    linear_BK: Tensor,
    radius_B1: Tensor,
    active_BK: Tensor,
    centre_BK: Tensor,
    max_iterations: int = MAX_ITERATIONS,
) -> Solution:
    """Minimise ``b'w + r |Rw|`` over the simplex of each block's active objectives.

    Args:
        root_BKK: R, of full rank on the active objectives and zero in the columns of the others; of order 1
            in size.
        linear_BK: b.
        radius_B1: r > 0.
        active_BK: who takes part.
        centre_BK: positive on the active objectives, summing to 1 there: start and centre of the path.
        max_iterations: bound. If a block hits it, its best iterate is returned, and its gap tells how good it
            is.

    Returns:
        ``kkt_residual_B`` is the gap relative to ``|b|'w + r sum_k w_k |R_k|``, with R_k the columns of R.
        Blocks without active objectives get zeros.
    """
    program = _Program(
        root=root_BKK,
        gram=root_BKK.mT @ root_BKK + torch.diag_embed((~active_BK).double()),
        b=torch.where(active_BK, linear_BK, 0.0),
        r=radius_B1.clamp(min=_TINY),
        active=active_BK,
        ones=active_BK.double(),
        centre=tame(centre_BK, active_BK),
        degree=active_BK.sum(1, keepdim=True) + 1.0,
    )
    norms = torch.linalg.vector_norm(root_BKK, dim=1)
    best = Best(centre_BK)

    def judge(w: Tensor, y: Tensor, e: Tensor) -> None:
        curved = program.r * norm(y)
        bound = least(program.b - program.transposed(e), active_BK)
        tight = dot(program.b.abs(), w) + curved
        enough = (_RELATIVE * tight).maximum(_ROUNDING * program.r * dot(norms, w))
        best.offer(w, (dot(program.b, w) + curved - bound).clamp(min=0), enough)

    y = matvec(root_BKK, centre_BK)
    judge(centre_BK, y, -program.r * y / norm(y).clamp(min=_TINY))
    now = _start(program)
    for _ in range(max_iterations):
        if best.all_done():
            break
        now = _advance(program, now, best.done)
        judge(now.w, now.y, now.e)
    return _finish(program, best, norms)


def _finish(program: _Program, best: Best, norms: Tensor) -> Solution:
    present = program.active.any(1, keepdim=True)
    w = torch.where(program.active, best.w_BK, 0.0)
    gap = torch.where(present, best.gap, 0.0)
    value = dot(program.b, w) + program.r * norm(matvec(program.root, w))
    size = dot(program.b.abs(), w) + program.r * dot(norms, w)
    residual = gap / torch.where(size > 0, size, 1.0)
    return Solution(w, *(column.squeeze(1) for column in (value, gap, residual, torch.zeros_like(gap))))


def _start(program: _Program) -> _Point:
    """Strictly feasible: at the centre, the cone's pair half way in, z within a factor 2 of constant."""
    y = matvec(program.root, program.centre)
    length = norm(y).clamp(min=_TINY)
    e = -0.5 * program.r * y / length
    slope = program.b - program.transposed(e)
    low, high = least(slope, program.active), greatest(slope, program.active)
    spread = (high - low).maximum(0.1 * high.abs().maximum(low.abs()))
    lam = torch.where(program.active.any(1, keepdim=True), low - spread, 0.0)
    z = torch.where(program.active, slope - lam, 1.0)
    return _Point(program.centre, 1.5 * length, y, z, e, lam)


def _advance(program: _Program, now: _Point, done: Tensor) -> _Point:
    """One predictor-corrector step; finished blocks stay."""
    newton = _Newton(program, now)
    scaling, ones = newton.scaling, program.ones
    affine = newton.direction(-ones * now.z, -program.r, -now.e)
    alpha = _joint_step(program, now, affine).clamp(max=1)
    mu = _complementarity(program, now) / program.degree
    ahead = _complementarity(program, _moved(now, affine, alpha)) / program.degree
    sigma = (ahead / mu).clamp(0, 1) ** 3
    # Second-order terms, in the scaled space for the cone.
    weight = program.centre * (program.degree - 1)
    push = ones * (-now.z + (sigma * mu * weight - affine.w * affine.z) / newton.w)
    p0, p1 = scaling.apply(affine.s, affine.y, inverse=True)
    q0, q1 = scaling.apply(torch.zeros_like(program.r), affine.e)
    m0, m1 = scaling.apply(program.r, now.e)
    target0 = sigma * mu - m0 * m0 - dot(m1, m1) - p0 * q0 - dot(p1, q1)
    target1 = -2 * m0 * m1 - p0 * q1 - q0 * p1
    d0 = (m0 * target0 - dot(m1, target1)) / _lorentz(m0, m1).clamp(min=_TINY)
    d1 = (target1 - m1 * d0) / m0
    step = newton.direction(push, *scaling.apply(d0, d1, inverse=True))
    alpha = (_TO_BOUNDARY * _joint_step(program, now, step)).clamp(max=1)
    sound = ~done & newton.sound & (step.w.isfinite() & step.e.isfinite()).all(1, keepdim=True)
    new = _moved(now, step, alpha)
    w = new.w / new.w.sum(1, keepdim=True)
    y = matvec(program.root, w)  # afresh: what the steps sum up to drifts
    pairs = ((w, now.w), (new.s, now.s), (y, now.y), (new.z, now.z), (new.e, now.e), (new.lam, now.lam))
    return _Point(*(torch.where(sound, after, before) for after, before in pairs))


class _Scaling:
    """Nesterov-Todd scaling W of the cone's pair: ``W (r, e) = W^-1 (s, y)``."""

    def __init__(self, r: Tensor, now: _Point) -> None:
        primal = _lorentz(now.s, now.y).clamp(min=_TINY).sqrt()
        dual = _lorentz(r, now.e).clamp(min=_TINY).sqrt()
        x1, e1 = now.y / primal, now.e / dual
        gamma = ((1 + now.s / primal * (r / dual) + dot(x1, e1)) / 2).sqrt()
        self.v = (x1 - e1) / (2 * gamma)
        self.a = (1 + dot(self.v, self.v)).sqrt()
        self.eta_squared = primal / dual

    def apply(self, p0: Tensor, p1: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``W p``, or ``W^-1 p``."""
        sign = -1 if inverse else 1
        eta = self.eta_squared.sqrt()
        factor = 1 / eta if inverse else eta
        along = dot(self.v, p1)
        return factor * (self.a * p0 + sign * along), factor * (p1 + self.v * (sign * p0 + along / (1 + self.a)))


class _Newton:
    """The Newton system at an iterate, factorised once for both directions.

    With s and the duals eliminated: ``(diag(z / w) + (G - 2 vv' / k) / eta^2) dw - dlam = right-hand side``,
    with ``v`` here ``R'v`` and ``k = 2 a^2 - 1``; and sum(dw) = 0.
    """

    def __init__(self, program: _Program, now: _Point) -> None:
        self.program, self.now = program, now
        self.scaling = scaling = _Scaling(program.r, now)
        self.k = 2 * scaling.a**2 - 1
        self.w = torch.where(program.active, now.w, 1.0)  # a dummy for divisions: inactive entries never move
        self.ratio = program.ones * now.z / self.w
        bent = program.transposed(scaling.v)
        eta_squared = scaling.eta_squared
        curvature = (program.gram - (2 / self.k)[..., None] * bent[:, :, None] * bent[:, None, :]) / eta_squared[
            ..., None
        ]
        diagonal = program.gram.diagonal(dim1=1, dim2=2) / torch.where(program.active, program.centre, 1.0)
        damping = _DAMPING * diagonal / eta_squared
        self.factor, info = torch.linalg.cholesky_ex(curvature + torch.diag_embed(self.ratio + damping))
        self.sound = (info == 0)[:, None]
        self.residual = program.ones * (program.b - now.lam - now.z - program.transposed(now.e))
        self.solved_ones = torch.cholesky_solve(program.ones[..., None], self.factor).squeeze(-1)

    def direction(self, push: Tensor, q0: Tensor, q1: Tensor) -> _Point:
        """Step with ``dz = push - (z / w) dw`` and ``d(r, e) = q - W^-2 d(s, y)``, the first entry of which
        is 0."""
        program, scaling, k = self.program, self.scaling, self.k
        a, v, eta_squared = scaling.a, scaling.v, scaling.eta_squared
        fixed = q1 + (2 * a * q0 / k) * v
        rhs = push + program.transposed(fixed) - self.residual
        solved = torch.cholesky_solve(rhs[..., None], self.factor).squeeze(-1)
        dlam = -solved.sum(1, keepdim=True) / self.solved_ones.sum(1, keepdim=True)
        dw = solved + dlam * self.solved_ones
        dw = dw - self.now.w * dw.sum(1, keepdim=True)  # what rounding has left of the sum
        dy = matvec(program.root, dw)
        along = dot(v, dy)
        ds = (eta_squared * q0 + 2 * a * along) / k
        de = fixed - (dy - (2 / k) * along * v) / eta_squared
        return _Point(dw, ds, dy, push - self.ratio * dw, de, dlam)


def _lorentz(x0: Tensor, x1: Tensor) -> Tensor:
    """``x0^2 - |x1|^2`` without cancellation near the cone's boundary [B, 1]."""
    length = norm(x1)
    return (x0 - length) * (x0 + length)


def _cone_room(x0: Tensor, x1: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Largest a with ``x + a d`` in the second-order cone, for x inside it [B, 1]."""
    quadratic, inside = d0 * d0 - dot(d1, d1), _lorentz(x0, x1)
    half = x0 * d0 - dot(x1, d1)
    discriminant = half * half - quadratic * inside
    denominator = discriminant.clamp(min=0).sqrt() - half
    crossing = (discriminant >= 0) & (denominator > 0)
    return torch.where(crossing, inside / torch.where(crossing, denominator, 1.0), torch.inf)


def _joint_step(program: _Program, now: _Point, step: _Point) -> Tensor:
    w = torch.where(program.active, now.w, 1.0)
    primal = room(w, step.w).minimum(_cone_room(now.s, now.y, step.s, step.y))
    dual = room(now.z, step.z).minimum(_cone_room(program.r, now.e, torch.zeros_like(program.r), step.e))
    return primal.minimum(dual)


def _complementarity(program: _Program, at: _Point) -> Tensor:
    return dot(at.w, program.ones * at.z) + at.s * program.r + dot(at.y, at.e)


def _moved(now: _Point, step: _Point, alpha: Tensor) -> _Point:
    return _Point(
        now.w + alpha * step.w,
        now.s + alpha * step.s,
        now.y + alpha * step.y,
        now.z + alpha * step.z,
        now.e + alpha * step.e,
        now.lam + alpha * step.lam,
    )
