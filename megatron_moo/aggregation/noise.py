"""What several gradient rows per objective tell of the noise in their Gramian.

Model: row r of objective k is the sum ``s_r`` of n_r samples' gradients; ``s_r / n_r`` has mean ``m_k`` and covariance
``S_k / n_r``, independent of every other row. The objective's gradient is ``g_k = sum_r s_r / n_k``, with
``n_k = sum_r n_r``, and its noise has covariance ``C_k = S_k / n_k``. Hence, for ``G_ij = <g_i, g_j>``:

- ``E G_kk = |m_k|^2 + tr C_k``: noise makes squares too large. Off the diagonal nothing is biased.
- ``Var G_ij = m_j' C_i m_j + m_i' C_j m_i + tr(C_i C_j)`` for i != j.

The products of the rows hold unbiased estimates of both, whatever the noise's distribution. Rows are brought to one
variance, ``y_r = s_r / sqrt(n_r)``, and P removes every objective's mean from them (weighted by ``sqrt(n_r)``). What is
left of objective k has no mean: ``R_k - 1`` contrasts of covariance ``S_k``. Their squares give ``tr C_k``, their
products with ``g_j``

    ``one_ij  ~  m_j' C_i m_j + tr(C_i C_j)``     noise of i against gradient j
    ``both_ij ~  tr(C_i C_j)``                    noise of i against noise of j

and ``one_ij + one_ji - both_ij`` the variance. (Kept apart, since the difference can be negative, its parts cannot.)

Shapes: B blocks, K objectives, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import interior


@dataclass(frozen=True)
class RowNoise:
    """Noise of the inner products of one step.

    Attributes:
        bias_BK: what noise adds to each square ``G_kk``, an unbiased estimate of ``tr C_k``.
        one_BKK: unbiased estimate of ``g_j``'s part in the variance of ``G_ij``: noise of i (rows) against the
            gradient j (columns). Not symmetric; the diagonal means nothing.
        both_BKK: unbiased estimate of ``tr(C_i C_j)``, noise against noise. The diagonal means nothing.
        freedom_BK: contrasts these rest on, ``R_k - 1``; 0 where an objective has a single row or one that is not
            finite, and then its estimates are 0 and mean nothing.
        count_K: samples of each objective in this step, n_k.
    """

    bias_BK: Tensor
    one_BKK: Tensor
    both_BKK: Tensor
    freedom_BK: Tensor
    count_K: Tensor

    @property
    def variance_BKK(self) -> Tensor:
        """Unbiased estimate of the variance of ``G_ij``, i != j, and so at times negative.

        NaN where i or j has no contrast, and on the diagonal.
        """
        known = self.freedom_BK > 0
        pairs = known[:, :, None] & known[:, None, :]
        pairs = pairs & ~torch.eye(known.shape[1], dtype=torch.bool, device=known.device)
        return torch.where(pairs, self.one_BKK + self.one_BKK.mT - self.both_BKK, torch.nan)

    def divided_by(self, scale_B11: Tensor) -> RowNoise:
        """The same for a Gramian divided by ``scale_B11`` [B, 1, 1]."""
        square = scale_B11 * scale_B11
        return RowNoise(
            self.bias_BK / scale_B11[:, :, 0],
            self.one_BKK / square,
            self.both_BKK / square,
            self.freedom_BK,
            self.count_K,
        )


@torch.no_grad()
def fold_rows(gram_BRR: Tensor, objective_R: Tensor, count_R: Tensor, objectives: int) -> tuple[Tensor, RowNoise]:
    """Gramian of the objectives [B, K, K] and its noise, from the products of their rows; in float64.

    Args:
        gram_BRR: inner products of the rows' sums ``s_r`` [B, R, R], any floating dtype.
        objective_R: objective id of each row, in [0, K).
        count_R: samples (tokens, micro-batches) in each row, n_r; a row with none counts as absent.
        objectives: K.

    Returns:
        The Gramian of ``g_k = sum_r s_r / n_k``, the objectives' means over their samples. Products of a row that is
        not finite are NaN for its objective, and spoil no other. Objectives without rows are zero.

    Raises:
        ValueError: for shapes that do not fit, and for ids out of range on the CPU.
    """
    _check(gram_BRR, objective_R, count_R, objectives)
    count_R = count_R.to(gram_BRR.device, torch.float64)
    present_R = count_R > 0
    ids_K = torch.arange(objectives, device=count_R.device)
    member_RK = ((objective_R.to(count_R.device)[:, None] == ids_K) & present_R[:, None]).double()
    count_K = member_RK.mT @ torch.where(present_R, count_R, 0.0)
    finite_BRR = gram_BRR.isfinite() | ~(present_R[:, None] & present_R)
    broken_BKK = member_RK.mT @ (~finite_BRR).double() @ member_RK > 0

    scale_R = torch.where(present_R, count_R, 1.0).rsqrt() * present_R
    y_BRR = torch.where(gram_BRR.isfinite(), gram_BRR.double(), 0.0) * scale_R[:, None] * scale_R
    per_sample_K = torch.where(count_K > 0, 1 / count_K.clamp(min=1e-300), 0.0)
    unit_RK = member_RK * count_R.clamp(min=0).sqrt()[:, None] * per_sample_K.sqrt()
    mean_RK = unit_RK * per_sample_K.sqrt()  # g_k = sum_r mean_rk y_r
    purge_RR = torch.diag(present_R.double()) - unit_RK @ unit_RK.mT  # P

    purged_BRR = purge_RR @ y_BRR
    within_BRR = purged_BRR @ purge_RR
    freedom_K = (member_RK.sum(0) - 1).clamp(min=0)
    # From sums over an objective's contrasts of covariance S_k to one of covariance C_k.
    contrast_K = torch.where(freedom_K > 0, per_sample_K / freedom_K.clamp(min=1), 0.0)
    noise = RowNoise(
        bias_BK=within_BRR.diagonal(dim1=1, dim2=2).clamp(min=0) @ member_RK * contrast_K,
        one_BKK=member_RK.mT @ (purged_BRR @ mean_RK).square() * contrast_K[:, None],
        both_BKK=member_RK.mT @ within_BRR.square() @ member_RK * contrast_K[:, None] * contrast_K,
        freedom_BK=torch.where(broken_BKK.diagonal(dim1=1, dim2=2), 0.0, freedom_K),
        count_K=count_K,
    )
    return torch.where(broken_BKK, torch.nan, mean_RK.mT @ y_BRR @ mean_RK), noise


def _check(gram_BRR: Tensor, objective_R: Tensor, count_R: Tensor, objectives: int) -> None:
    if gram_BRR.dim() != 3 or gram_BRR.shape[1] != gram_BRR.shape[2]:
        raise ValueError(f"gram_BRR must have shape [B, R, R], found {list(gram_BRR.shape)}")
    rows = gram_BRR.shape[1]
    for label, value in (("objective_R", objective_R), ("count_R", count_R)):
        if list(value.shape) != [rows]:
            raise ValueError(f"{label} must have one entry per row, [{rows}], found {list(value.shape)}")
    if (
        interior.may_look(objective_R)
        and rows
        and not 0 <= int(objective_R.min()) <= int(objective_R.max()) < objectives
    ):
        raise ValueError(
            f"objective_R must be ids in [0, {objectives}), found {int(objective_R.min())} to {int(objective_R.max())}"
        )
