"""Parts that the batched interior-point solvers share.

Vectors are [B, K], scalars per block [B, 1]. Nothing here waits for the device; loops have fixed bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Candidates for what must be added to the diagonal of a matrix that should be positive semidefinite, relative
# to it: rounding in float64, in float32 sums, and whatever else the caller's sums have left. At 1 a
# correlation matrix is nearly, at K surely, diagonally dominant.
_SHIFTS = (0.0, 1e-13, 1e-11, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Relative to a uniform centre.
_SMALLEST_CENTRE = 0.1
# Done blocks are dropped once no more than this part of the blocks is left: dropping costs a copy of the others.
_WORTH_KEEPING = 0.75
# Up to here the matrix is semidefinite as far as float64 can tell.
ROUNDING_SHIFT = 1e-13


@dataclass(frozen=True)
class Solution:
    """A program's solution on the simplex, for each block.

    Attributes:
        weights_BK: non-negative, summing to 1 over the active objectives, zero elsewhere.
        value_B: the objective there, in the units of the input.
        gap_B: ``value - lower bound``, from weak duality: a certificate, whatever the solver did. Same units.
        kkt_residual_B: ``gap_B`` relative to the size of the terms that the objective sums (see the solver).
        shift_B: what was added to the diagonal of the Gramian, relative to it, because it was not positive
            semidefinite; 0 for a Gramian. Value and gap are those of the shifted problem.
    """

    weights_BK: Tensor
    value_B: Tensor
    gap_B: Tensor
    kkt_residual_B: Tensor
    shift_B: Tensor


class Best:
    """The best feasible point of each block so far, and which blocks are done.

    After :meth:`shrink` the attributes are those of the blocks still worked on; :meth:`result` has all.

    Attributes:
        w_BK: the points.
        gap: their certified gaps [B, 1].
        done: blocks whose gap is small enough [B, 1].
    """

    def __init__(self, start_BK: Tensor) -> None:
        self.w_BK = start_BK
        self.gap = torch.full_like(start_BK[:, :1], torch.inf)
        self.done = torch.zeros_like(self.gap, dtype=torch.bool)
        self._all: tuple[Tensor, Tensor] | None = None  # points and gaps of all blocks, once there are fewer here
        self._blocks: Tensor | None = None  # which of them are here

    def offer(self, w_BK: Tensor, gap: Tensor, enough: Tensor) -> None:
        """Take the points whose gap is the smallest yet; those with ``gap <= enough`` are done, and stay.

        A gap that is NaN is no offer: an iterate that broke down leaves the best one alone.
        """
        better = (gap < self.gap) & ~self.done
        self.w_BK, self.gap = torch.where(better, w_BK, self.w_BK), torch.where(better, gap, self.gap)
        self.done = self.done | (gap <= enough)

    def all_done(self) -> bool:
        """Whether to stop early; False wherever asking would make the host wait."""
        return may_look(self.gap) and bool(self.done.all())

    def shrink(self) -> Tensor | None:
        """Indices of the blocks worth keeping, once a part of them is done; None while all stay.

        Done blocks keep their points whatever is offered for them, so dropping them changes nothing. Where
        looking would make the host wait, nothing is dropped.
        """
        if not may_look(self.gap):
            return None
        keep = (~self.done[:, 0]).nonzero()[:, 0]
        if len(keep) == 1:  # a done one with it: matrix products of a single block may be rounded otherwise
            keep = torch.cat([keep, (keep + 1) % len(self.done)])
        if len(keep) > _WORTH_KEEPING * len(self.done):
            return None
        self._store()
        self._blocks = keep if self._blocks is None else self._blocks[keep]
        self.w_BK, self.gap, self.done = self.w_BK[keep], self.gap[keep], self.done[keep]
        return keep

    def result(self) -> tuple[Tensor, Tensor]:
        """Points and gaps of all blocks."""
        self._store()
        return self._all

    def _store(self) -> None:
        if self._blocks is None:
            self._all = self.w_BK.clone(), self.gap.clone()
        else:
            self._all[0][self._blocks], self._all[1][self._blocks] = self.w_BK, self.gap


def take(state: Any, blocks: Tensor) -> Any:
    """Some blocks of a dataclass of tensors, or of such dataclasses, or None; the block is the leading axis."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.index_select(0, blocks)
    return replace(state, **{field.name: take(getattr(state, field.name), blocks) for field in fields(state)})


def matvec(matrix_BKK: Tensor, x_BK: Tensor) -> Tensor:
    """Product per block [B, K]."""
    return torch.bmm(matrix_BKK, x_BK.unsqueeze(2)).squeeze(2)


def dot(x_BK: Tensor, y_BK: Tensor) -> Tensor:
    """Inner product per block [B, 1]."""
    return (x_BK * y_BK).sum(1, keepdim=True)


def norm(x_BK: Tensor) -> Tensor:
    """Length per block [B, 1]."""
    return torch.linalg.vector_norm(x_BK, dim=1, keepdim=True)


def least(x_BK: Tensor, active_BK: Tensor) -> Tensor:
    """Smallest active entry per block [B, 1]; infinite if there is none."""
    return torch.where(active_BK, x_BK, torch.inf).amin(1, keepdim=True)


def greatest(x_BK: Tensor, active_BK: Tensor) -> Tensor:
    """Largest active entry per block [B, 1]; minus infinity if there is none."""
    return torch.where(active_BK, x_BK, -torch.inf).amax(1, keepdim=True)


def room(x_BK: Tensor, step_BK: Tensor) -> Tensor:
    """Largest a with ``x + a step >= 0`` for positive x, per block [B, 1]; infinite if there is none."""
    return torch.where(step_BK < 0, -x_BK / step_BK, torch.inf).amin(1, keepdim=True)


def may_look(x: Tensor) -> bool:
    """Whether looking at values is free. An accelerator would make the host wait, so all iterations run there."""
    return x.device.type == "cpu"


def prepare(
    gram_BKK: Tensor, active_BK: Tensor | None, centre_BK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gramian in float64, mask, centre, and the scale [B, 1, 1] that was divided out.

    The Gramian's active diagonal is at most 1, the rest is that of the identity. The centre sums to 1 over the
    active objectives; the default is uniform.
    """
    gram = gram_BKK.double()
    if active_BK is None:
        active_BK = torch.ones(gram.shape[:2], dtype=torch.bool, device=gram.device)
    if centre_BK is None:
        centre_BK = active_BK.double()
    centre = torch.where(active_BK, centre_BK.double(), 0.0)
    total = centre.sum(1, keepdim=True)
    centre = centre / torch.where(total > 0, total, 1.0)
    pair = active_BK[:, :, None] & active_BK[:, None, :]
    gram = torch.where(pair, gram, 0.0)
    scale = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    scale = torch.where(scale > 0, scale, 1.0)
    gram = (gram + gram.mT) / (2 * scale) + torch.diag_embed((~active_BK).double())
    return gram, active_BK, centre, scale


def tame(centre_BK: Tensor, active_BK: Tensor) -> Tensor:
    """The centre with its small entries raised [B, K]: a path around a point next to a face takes long."""
    count = active_BK.sum(1, keepdim=True).clamp(min=1)
    raised = torch.where(active_BK, centre_BK.maximum(_SMALLEST_CENTRE / count), 0.0)
    total = raised.sum(1, keepdim=True)
    return raised / torch.where(total > 0, total, 1.0)


def missing_shift(gram_BKK: Tensor) -> Tensor:
    """Smallest of a fixed list of relative diagonal shifts that makes each matrix positive definite [B, 1].

    Values up to ``ROUNDING_SHIFT`` mean that it is semidefinite to rounding.
    """
    diagonal = gram_BKK.diagonal(dim1=1, dim2=2)
    shift = torch.full_like(diagonal[:, :1], float(gram_BKK.shape[1]))
    found = torch.zeros_like(shift, dtype=torch.bool)
    for candidate in _SHIFTS:
        _, info = torch.linalg.cholesky_ex(gram_BKK + torch.diag_embed(candidate * diagonal))
        definite = (info == 0)[:, None]
        shift = torch.where(definite & ~found, candidate, shift)
        found = found | definite
        if may_look(gram_BKK) and bool(found.all()):
            break
    return shift
