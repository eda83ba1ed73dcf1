"""min b'w + r |Rw| over the simplex, batched: the program of CAGrad.

A few steps of block principal pivoting for most blocks: which weights are zero is guessed, the rest is a closed form.
The others go to an interior-point method. The norm is not smooth at zero and Newton's method on it fails where the rows
nearly cancel, so that one solves it as what it is, a program over a second-order cone: min b'w + r s with ``(s, Rw)``
in the cone, by a primal-dual method with Nesterov-Todd scaling and Mehrotra's corrector (the linear algebra of
Vandenberghe, "The CVXOPT linear and quadratic cone program solvers", 2010), all blocks in lock step. Its dual: max lam
such that ``z = b - lam - R'e >= 0`` and ``|e| <= r``. Hence for any such e, ``min_k (b - R'e)_k`` is a lower bound,
which certifies a solution.

The cone's dual pair is ``(s, y = Rw)`` and ``(r, e)``: the first entry of the dual is the constant r. Both
steps have the same length, because separate ones let the cone's pair leave the neighbourhood of the path and
creep. Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interior import Best, Solution, greatest, least, matvec, take, tame

# Stated bound. Typical: 10-20; worst seen over the tests' families, K up to 128: 45, and the bound itself (at a
# residual below 4e-12) where the mean is zero to rounding.
MAX_ITERATIONS = 60
# Before them, each with a factorisation as well: enough for independent rows (a test says so up to K = 16). An
# accelerator always runs all of them.
PIVOT_STEPS = 8
_RELATIVE = 1e-12  # of the sum of the terms: a gap below it is optimal
_ROUNDING = 1e-13  # of r sum_k w_k |R_k|: a gap below it is about rounding
_DAMPING = 1e-13
_TO_BOUNDARY = 0.99
_TINY = 1e-300


@dataclass
class _Program:
    root: Tensor  # R [B, K, K]
    pulled: Tensor  # R', laid out in memory as such
    gram: Tensor  # R'R
    newton: Tensor  # the same with the damping, and the identity where inactive
    norms: Tensor  # |R_k|
    b: Tensor
    r: Tensor
    ones: Tensor  # active, as numbers
    dummies: Tensor  # inactive, as numbers
    absent: Tensor  # 0, infinite where inactive
    centre: Tensor
    degree: Tensor  # active objectives + 1


@dataclass
class _Point:
    """An iterate. An inactive objective has w = 1, z = 0 and zeros in all data: it adds nothing and never moves.

    The cone's pair lies together, so that both get the same operations at once: ``head`` [B, 2, 1] is (s, r) and
    ``tail`` [B, 2, K] is (y, e).
    """

    w: Tensor
    z: Tensor
    head: Tensor
    tail: Tensor
    back: Tensor  # R'e
    lam: Tensor


def solve_simplex_norm(
    root_BKK: Tensor,
    linear_BK: Tensor,
    radius_B1: Tensor,
    active_BK: Tensor,
    centre_BK: Tensor,
    max_iterations: int = MAX_ITERATIONS,
    pivot_steps: int = PIVOT_STEPS,
) -> Solution:
    """Minimise ``b'w + r |Rw|`` over the simplex of each block's active objectives.

    Args:
        root_BKK: R, of full rank on the active objectives and zero in the columns of the others; of order 1
            in size.
        linear_BK: b.
        radius_B1: r > 0.
        active_BK: who takes part.
        centre_BK: positive on the active objectives, summing to 1 there: start and centre of the path.
        max_iterations, pivot_steps: bounds of the interior-point method and of the pivoting before it. If a block
            hits both, its best iterate is returned, and its gap tells how good it is.

    Returns:
        ``kkt_residual_B`` is the gap relative to ``|b|'w + r sum_k w_k |R_k|``, with R_k the columns of R.
        Blocks without active objectives get zeros.
    """
    program = whole = _program(root_BKK, linear_BK, radius_B1, active_BK, centre_BK)
    best = Best(centre_BK)
    y = matvec(root_BKK, centre_BK)
    _judge(program, best, centre_BK, y, matvec(program.pulled, -program.r * y / _norm(y).clamp(min=_TINY)))
    program = _pivot(program, best, pivot_steps)
    if not best.all_done():
        _follow_path(program, best, max_iterations)
    return _finish(whole, active_BK, *best.result())


def _program(root: Tensor, linear: Tensor, radius: Tensor, active: Tensor, centre: Tensor) -> _Program:
    norms = torch.linalg.vector_norm(root, dim=1)
    centre = tame(centre, active)
    pulled = root.mT.contiguous()
    gram = pulled @ root
    damping = torch.where(active, _DAMPING * norms**2 / torch.where(active, centre, 1.0), 1.0)
    return _Program(
        root=root.contiguous(),
        pulled=pulled,
        gram=gram,
        newton=gram + torch.diag_embed(damping),
        norms=norms,
        b=torch.where(active, linear, 0.0),
        r=radius.clamp(min=_TINY),
        ones=active.double(),
        dummies=(~active).double(),
        absent=torch.where(active, 0.0, torch.inf),
        centre=centre,
        degree=active.sum(1, keepdim=True) + 1.0,
    )


def _judge(program: _Program, best: Best, w: Tensor, y: Tensor, back: Tensor) -> None:
    """Offer points with ``y = Rw``, and what ``back = R'e`` proves of them."""
    curved = program.r * _norm(y)
    bound = (program.b - back + program.absent).amin(1, keepdim=True)
    tight = _dot(program.b.abs(), w) + curved
    enough = (_RELATIVE * tight).maximum(_ROUNDING * program.r * _dot(program.norms, w))
    best.offer(w, (_dot(program.b, w) + curved - bound).clamp(min=0), enough)


def _finish(program: _Program, active: Tensor, w: Tensor, gap: Tensor) -> Solution:
    present = active.any(1, keepdim=True)
    w = torch.where(active, w, 0.0)
    total = w.sum(1, keepdim=True)
    w = w / torch.where(total > 0, total, 1.0)
    gap = torch.where(present, gap, 0.0)
    value = _dot(program.b, w) + program.r * _norm(matvec(program.root, w))
    size = _dot(program.b.abs(), w) + program.r * _dot(program.norms, w)
    residual = gap / torch.where(size > 0, size, 1.0)
    return Solution(w, *(column.squeeze(1) for column in (value, gap, residual, torch.zeros_like(gap))))


def _pivot(program: _Program, best: Best, steps: int) -> _Program:
    """Solve, by guessing which weights are zero, what is easy; the program of the blocks that are left.

    The solution is that of ``z = Gx + b - lam``, ``x, z >= 0``, ``x'z = 0`` and ``|Rx| = r``, brought to sum 1. With a
    guess it is ``x = lam G^-1 1 - G^-1 b`` on the free weights, lam being the larger root of a quadratic. Where there
    is no root the face has no minimum, and lam is where ``|Rx|`` is least: that x has the direction in which the
    objective falls without end. All that is wrong with a guess is exchanged at once; what does not settle, and what
    rounding keeps from its certificate (rows that cancel), is left to the interior-point method.
    """
    active = program.ones > 0
    free = active & (program.b <= _dot(program.b, program.centre))  # who is worse off than average at the mean
    for _ in range(steps):
        if best.all_done():
            break
        keep = best.shrink()
        if keep is not None:
            program, active, free = (take(part, keep) for part in (program, active, free))
        mask = free.double()
        matrix = program.gram * (mask[:, :, None] * mask[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).add_(1.0 - mask)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        p, q = torch.linalg.solve_triangular(factor, torch.stack([mask, program.b * mask], 2), upper=False).unbind(2)
        # In the factor's coordinates Rx is tau p - q, with q made normal to p: no digits are lost to the quadratic.
        square = _dot(p, p)
        level = _dot(p, q) / square
        q = q - level * p
        least_length = _norm(q)
        left = (program.r - least_length) * (program.r + least_length)
        tau = (left.clamp(min=0.0) / square).sqrt()
        x = torch.linalg.solve_triangular(factor.mT, (tau * p - q)[..., None], upper=True).squeeze(2) * mask
        y = matvec(program.root, x)
        pull = matvec(program.pulled, y)
        total = x.sum(1, keepdim=True)
        valid = (left > 0) & (x.amin(1, keepdim=True) >= 0) & (total > 0)
        total = torch.where(valid, total, torch.nan)  # no offer
        _judge(program, best, x / total, y / total, pull * (-program.r / _norm(y)))
        z = pull + program.b - (level + tau)
        free = free ^ (active & torch.where(free, x < 0, z < 0))
    return program


def _follow_path(program: _Program, best: Best, max_iterations: int) -> None:
    """The interior-point method, on blocks that are left."""
    now = _start(program, program.ones > 0)
    for _ in range(max_iterations):
        if best.all_done():
            break
        keep = best.shrink()
        if keep is not None:
            program, now = take(program, keep), take(now, keep)
        now = _advance(program, now)
        _judge(program, best, now.w, now.tail[:, 0], now.back)


def _start(program: _Program, active: Tensor) -> _Point:
    """Strictly feasible: at the centre, the cone's pair half way in, z within a factor 2 of constant."""
    y = matvec(program.root, program.centre)
    length = _norm(y).clamp(min=_TINY)
    e = -0.5 * program.r * y / length
    back = matvec(program.pulled, e)
    slope = program.b - back
    low, high = least(slope, active), greatest(slope, active)
    spread = (high - low).maximum(0.1 * high.abs().maximum(low.abs()))
    lam = torch.where(active.any(1, keepdim=True), low - spread, 0.0)
    head, tail = torch.stack([1.5 * length, program.r], 1), torch.stack([y, e], 1)
    return _Point(torch.where(active, program.centre, 1.0), program.ones * (slope - lam), head, tail, back, lam)


def _advance(program: _Program, now: _Point) -> _Point:
    """One predictor-corrector step. A block that is done, or breaks down, may turn to NaN: see Best."""
    inside = _lorentz(now.head, now.tail).clamp(min=_TINY)
    newton = _Newton(program, now, inside)
    # The predictor, towards zero complementarity: its right-hand side does not depend on z and e.
    bend = newton.bend * program.r
    # lam is taken out of the right-hand sides: left to the multiplier of sum(dw) it would cost their last digits.
    level = program.ones * now.lam - program.b
    half_ones, half = newton.halves(
        torch.stack([program.ones, newton.eta_squared * (level - bend * newton.bent)], 2)
    ).unbind(2)
    dw, shift, turn, _ = newton.direction(half, half_ones, -program.r, -now.tail[:, 1] - bend * newton.v)
    t = dw / now.w  # then dz = -z (1 + t)
    cone = _cone_room(now.head, now.tail, shift, turn, inside)
    alpha = torch.maximum(-t, 1.0 + t).amax(1, keepdim=True).clamp(min=1.0).reciprocal().minimum(cone)
    products = now.w * now.z
    mu = (products.sum(1, keepdim=True) + _pair(now.head, now.tail)) / program.degree
    ahead = products * (1.0 + alpha * t) * (1.0 - alpha * (1.0 + t))
    head, tail = now.head + alpha[..., None] * shift, now.tail + alpha[..., None] * turn
    ahead = (ahead.sum(1, keepdim=True) + _pair(head, tail)) / program.degree
    sigma = (ahead / mu).clamp(0.0, 1.0) ** 3
    # Second-order terms, in the scaled space for the cone.
    goal = sigma * mu
    push = goal * (program.degree - 1.0) * program.centre / now.w + now.z * t * (1.0 + t)
    q0, fixed = newton.corrected(goal, shift, turn)
    half = newton.halves(
        (newton.eta_squared * (push + matvec(program.pulled, fixed) + now.back + level))[..., None]
    ).squeeze(2)
    dw, shift, turn, dlam = newton.direction(half, half_ones, q0, fixed)
    dz = push - now.z - newton.ratio * dw
    cone = _cone_room(now.head, now.tail, shift, turn, inside)
    shrinking = (dw / now.w).minimum(dz / (now.z + program.dummies)).amin(1, keepdim=True)
    alpha = _TO_BOUNDARY * cone.minimum((-shrinking).clamp(min=_TO_BOUNDARY).reciprocal())
    alpha = alpha.clamp(max=1.0)
    w = now.w + alpha * dw
    # y and R'e afresh: what the steps sum up to drifts.
    tail = torch.stack([matvec(program.root, w), now.tail[:, 1] + alpha * turn[:, 1]], 1)
    head = now.head + alpha[..., None] * shift
    return _Point(w, now.z + alpha * dz, head, tail, matvec(program.pulled, tail[:, 1]), now.lam + alpha * dlam)


class _Newton:
    """The Newton system at an iterate, factorised once for both directions, in the Nesterov-Todd scaling W of the
    cone's pair: ``W (r, e) = W^-1 (s, y)``.

    With s and the duals eliminated: ``(diag(z / w) + (G - 2 vv' / k) / eta^2) dw - dlam = right-hand side``,
    with ``v`` here ``R'v`` and ``k = 2 a^2 - 1``; and sum(dw) = 0. It is solved multiplied by eta^2.
    """

    def __init__(self, program: _Program, now: _Point, inside: Tensor) -> None:
        self.program, self.now = program, now
        root = inside.sqrt()
        scaled = now.tail / root
        gamma = ((1.0 + _pair(now.head / root, scaled)) / 2.0).sqrt()
        self.v = (scaled[:, 0] - scaled[:, 1]) / (2.0 * gamma)
        squared = _dot(self.v, self.v)
        self.a = (1.0 + squared).sqrt()
        k = 1.0 + 2.0 * squared
        self.turn, self.bend = 2.0 / k, 2.0 * self.a / k
        self.eta_squared = root[:, 0] / root[:, 1]
        self.eta = self.eta_squared.sqrt()
        self.ratio = now.z / now.w
        self.bent = matvec(program.pulled, self.v)
        outer = (self.bent * self.turn.sqrt())[..., None]
        matrix = torch.addcmul(program.newton, outer, outer.mT, value=-1.0)
        matrix.diagonal(dim1=1, dim2=2).add_(self.eta_squared * self.ratio)
        self.factor, _ = torch.linalg.cholesky_ex(matrix)

    def apply(self, p0: Tensor, p1: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``W p``, or ``W^-1 p``."""
        sign = -1.0 if inverse else 1.0
        factor = 1.0 / self.eta if inverse else self.eta
        along = _dot(self.v, p1)
        return factor * (self.a * p0 + sign * along), factor * (p1 + self.v * (sign * p0 + along / (1.0 + self.a)))

    def corrected(self, goal: Tensor, shift: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The cone's right-hand side q of the corrector, ``d(r, e) = q - W^-2 d(s, y)``: its first entry, and the
        part of de that does not depend on dw.

        In the scaled space the pair is one vector m, the predictor's steps are p and -m - p, and Mehrotra's
        right-hand side is ``m \\ (goal - m m + p (m + p)) = p - m + m \\ (goal + p p)``, products being the cone's.
        """
        p0, p1 = self.apply(shift[:, 0], turn[:, 0], inverse=True)
        m0, m1 = self.apply(self.program.r, self.now.tail[:, 1])
        target0 = goal + p0 * p0 + _dot(p1, p1)
        target1 = 2.0 * p0 * p1
        d0 = (m0 * target0 - _dot(m1, target1)) / _lorentz(m0, m1).clamp(min=_TINY)
        d1 = (target1 - m1 * d0) / m0
        q0, q1 = self.apply(d0 + p0 - m0, d1 + p1 - m1, inverse=True)
        return q0, q1 + (self.bend * q0) * self.v

    def halves(self, rhs_BKn: Tensor) -> Tensor:
        """Right-hand sides solved with the lower factor."""
        return torch.linalg.solve_triangular(self.factor, rhs_BKn, upper=False)

    def direction(
        self, half: Tensor, half_ones: Tensor, q0: Tensor, fixed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dw on sum(dw) = 0, d(s, r), d(y, e), and dlam, from the half-solved right-hand sides."""
        dlam = -_dot(half, half_ones) / _dot(half_ones, half_ones)
        half = (half + dlam * half_ones)[..., None]
        dw = torch.linalg.solve_triangular(self.factor.mT, half, upper=True).squeeze(2)
        dw = dw - self.now.w * dw.sum(1, keepdim=True)  # what rounding has left of the sum
        dy = matvec(self.program.root, dw)
        along = _dot(self.v, dy)
        ds = (0.5 * self.turn * self.eta_squared) * q0 + self.bend * along
        de = fixed - (dy - (self.turn * along) * self.v) / self.eta_squared
        return dw, torch.stack([ds, torch.zeros_like(ds)], 1), torch.stack([dy, de], 1), dlam / self.eta_squared


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products along the last axis, kept."""
    return (x * y).sum(-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    """Lengths along the last axis, kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _lorentz(head: Tensor, tail: Tensor) -> Tensor:
    """``head^2 - |tail|^2`` without cancellation near the cone's boundary."""
    length = _norm(tail)
    return (head - length) * (head + length)


def _pair(head: Tensor, tail: Tensor) -> Tensor:
    """Inner product of the two of a pair [B, 1]."""
    return head[:, 0] * head[:, 1] + _dot(tail[:, 0], tail[:, 1])


def _cone_room(head: Tensor, tail: Tensor, shift: Tensor, turn: Tensor, inside: Tensor) -> Tensor:
    """Largest a with both of ``(head, tail) + a (shift, turn)`` in the second-order cone, given the _lorentz of the
    point inside it [B, 1]; infinite if there is none."""
    quadratic = shift * shift - _dot(turn, turn)
    half = head * shift - _dot(tail, turn)
    discriminant = half * half - quadratic * inside
    denominator = discriminant.clamp(min=0.0).sqrt() - half
    crossing = (discriminant >= 0) & (denominator > 0)
    return torch.where(crossing, inside / torch.where(crossing, denominator, 1.0), torch.inf).amin(1)
