"""Upper bounds for :mod:`.simplex`: ``q_k w_k <= u_k sum_j q_j w_j``, with q = 1 simply ``w_k <= u_k``.

As slacks ``s = C w >= 0`` with ``C = u q' - diag(q)`` and multipliers y >= 0. A solution is certified as without
bounds, by the minimum of the linearisation h'v over all feasible v. With q = 1 that is a sort: the objectives are
filled up to their bounds, those of the smallest h first. Otherwise the feasible v are the points ``n x / n'x`` with
``n = 1 / q`` and ``x <= u`` in the simplex, and the minimum is a ratio's, found by Dinkelbach's iteration: for any
lam, ``lam + min_x n'(h - lam) x / (least n'x)`` is a lower bound if the second term is negative, lam itself if not.
(The multipliers would certify too, but in a corner they lose their digits before w has all of its own.)

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interior import dot

# A bound above 1 never binds; this is where it is cut, so that infinity is allowed.
_NO_BOUND = 2.0
_INSIDE = 1e-12  # relative: a point outside by this much is inside but for rounding
_RATIO_STEPS = 2


@dataclass
class Caps:
    """Bounds of each block; zeros where inactive.

    Attributes:
        upper: u [B, K], summing to at least 1 over the active objectives.
        unit: q [B, K], at most 1; None for 1.
        matrix: C [B, K, K]; None without q.
    """

    upper: Tensor
    unit: Tensor | None
    matrix: Tensor | None

    @classmethod
    def build(cls, active_BK: Tensor, upper_BK: Tensor, unit_BK: Tensor | None) -> Caps:
        """From the caller's bounds, those with no room scaled up."""
        upper = torch.where(active_BK, upper_BK.double().clamp(max=_NO_BOUND), 0.0)
        total = upper.sum(1, keepdim=True)
        upper = torch.where(total < 1 - _INSIDE, upper / _positive(total), upper)
        if unit_BK is None:
            return cls(upper, None, None)
        unit = torch.where(active_BK, unit_BK.double(), 0.0)
        largest = unit.amax(1, keepdim=True)
        unit = unit / _positive(largest)
        return cls(upper, unit, upper[:, :, None] * unit[:, None, :] - torch.diag_embed(unit))

    def slack(self, w_BK: Tensor) -> Tensor:
        """``C w``, for w that sums to 1."""
        return self.upper - w_BK if self.unit is None else self.change(w_BK)

    def change(self, dw_BK: Tensor) -> Tensor:
        """``C dw``, for dw that sums to 0."""
        if self.unit is None:
            return -dw_BK
        moved = self.unit * dw_BK
        return self.upper * moved.sum(1, keepdim=True) - moved

    def pull(self, y_BK: Tensor) -> Tensor:
        """``C'y``."""
        along = dot(self.upper, y_BK) - y_BK
        return along * (self.upper > 0) if self.unit is None else self.unit * along

    def inside(self, centre_BK: Tensor) -> tuple[Tensor, Tensor]:
        """A point strictly inside, if there is one, and one to offer: the centre, or where it is out of bounds the
        point at the same part of every bound."""
        inner = self.upper if self.unit is None else self.upper * self._stretch()
        total = inner.sum(1, keepdim=True)
        inner = inner / _positive(total)
        scaled = centre_BK if self.unit is None else self.unit * centre_BK
        fits = (scaled <= (1 + _INSIDE) * self.upper * scaled.sum(1, keepdim=True)).all(1, keepdim=True)
        centre = torch.where(fits, centre_BK, inner)
        return (inner + centre) / 2, centre

    def excess(self, w_BK: Tensor, h_BK: Tensor) -> Tensor:
        """``h'w - min h'v`` over all feasible v, from above [B, 1]."""
        if self.unit is None:
            return ((w_BK - self._fill(h_BK)) * h_BK).sum(1, keepdim=True)
        stretch = self._stretch()
        ratio = value = dot(h_BK, w_BK)
        for _ in range(_RATIO_STEPS):
            x = self._fill(stretch * (h_BK - ratio)) * stretch
            total = x.sum(1, keepdim=True)
            ratio = ratio.minimum(dot(x, h_BK) / _positive(total))
        cost = stretch * (h_BK - ratio)
        missing = dot(cost, self._fill(cost)).clamp(max=0)
        floor = dot(stretch, self._fill(stretch))
        return value - ratio - missing / _positive(floor)

    def _stretch(self) -> Tensor:
        """n [B, K]."""
        return torch.where(self.unit > 0, 1.0 / _positive(self.unit), 0.0)

    def _fill(self, cost_BK: Tensor) -> Tensor:
        """argmin of ``cost'x`` over ``x <= u`` in the simplex."""
        order = cost_BK.argsort(1)
        upper = self.upper.gather(1, order)
        room = (1 - (upper.cumsum(1) - upper)).clamp(min=0)
        return torch.zeros_like(upper).scatter(1, order, upper.minimum(room))

    def clip(self, w_BK: Tensor) -> Tensor:
        """The same point but for what rounding has put above a bound: that goes to where there is room."""
        x = w_BK * (self.upper > 0) if self.unit is None else w_BK * self.unit
        x = (x / _positive(x.sum(1, keepdim=True))).minimum(self.upper)
        spare = x * (self.upper - x)  # nothing to those that have nothing: their rows may be long
        missing = (1.0 - x.sum(1, keepdim=True)).clamp(min=0.0)
        x = (x + spare * (missing / _positive(spare.sum(1, keepdim=True)))).minimum(self.upper)
        if self.unit is None:
            return x
        w = x * self._stretch()
        return w / _positive(w.sum(1, keepdim=True))


def _positive(x: Tensor) -> Tensor:
    """x, or 1 where it is zero, for divisions."""
    return torch.where(x > 0, x, 1.0)


class Augmented:
    """The Newton system of :mod:`.simplex` for bounds with q, factorised once for both directions.

    Only z is eliminated. With the slacks too, as without q, the large ``y / s`` of bounds that bind would not stay on
    the diagonal, and their rounding would swamp G. In dw, the new y and dlam:
    ``(G + diag(z / w)) dw - C'y - dlam = right-hand side``, ``C dw + (s / y) y = (s / y) push``, sum(dw) = 0;
    rows and columns scaled to order 1.
    """

    def __init__(self, program: Any, now: Any) -> None:
        self.caps, self.now = program.caps, now
        k = now.h.shape[1]
        self.ratio = now.dual / now.primal
        scale = (1.0 + self.ratio).rsqrt()
        self.scale_w, self.scale_y = scale[:, :k], (self.ratio.sqrt() * scale)[:, k:]
        coupling = -self.scale_y[:, :, None] * self.caps.matrix * self.scale_w[:, None, :]
        matrix = torch.zeros(len(scale), 2 * k + 1, 2 * k + 1, dtype=scale.dtype, device=scale.device)
        matrix[:, :k, :k] = program.newton * self.scale_w[:, :, None] * self.scale_w[:, None, :]
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal[:, :k] += self.ratio[:, :k] * self.scale_w**2
        diagonal[:, k : 2 * k] = -(scale[:, k:] ** 2)
        matrix[:, k : 2 * k, :k], matrix[:, :k, k : 2 * k] = coupling, coupling.mT
        ones = program.ones * self.scale_w
        matrix[:, 2 * k, :k] = matrix[:, :k, 2 * k] = -ones
        self.factor = torch.linalg.lu_factor_ex(matrix)[:2]
        self.level = program.ones * now.lam - now.h

    def direction(self, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step of the primal variables towards ``new dual = push - dual / primal * step``, the new dual, and dlam."""
        k = self.level.shape[1]
        ratio = self.ratio[:, k:]
        of_w = (self.level + push[:, :k]) * self.scale_w
        # (s / y) push, scaled: s / y alone may overflow.
        of_s = -push[:, k:] / ratio.sqrt() * (1.0 + ratio).rsqrt()
        of_s = torch.where(ratio > 0, of_s, 0.0)
        rhs = torch.cat([of_w, of_s, torch.zeros_like(push[:, :1])], 1)
        solved = torch.linalg.lu_solve(*self.factor, rhs[..., None]).squeeze(-1)
        dw, y, dlam = solved[:, :k] * self.scale_w, solved[:, k:-1] * self.scale_y, solved[:, -1:]
        dw = dw - self.now.w * dw.sum(1, keepdim=True)  # what rounding has left of the sum
        ds = torch.where(ratio > 0, (push[:, k:] - y) / _positive(ratio), 0.0)
        step = torch.cat([dw, ds], 1)
        return step, torch.cat([push[:, :k] - self.ratio[:, :k] * dw, y], 1), dlam
