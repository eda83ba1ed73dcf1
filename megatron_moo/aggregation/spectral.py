"""Eigenvalues of batches of small symmetric matrices, and what to do with those that are nearly zero.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the largest eigenvalue: one below it does not count. Sums in float32 leave 1e-7, float64 resolves it to 1e-10.
DEPENDENT = 1e-6
# A negative eigenvalue is rounding in the Gramian. Positive ones of that size are rounding too.
_ABOVE_ROUNDING = 10.0
# Of a matrix: its entries mean no more.
_ROUNDING = 1e-16


def eigh(matrix_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, K], in any order, and eigenvectors [B, K, K], as columns.

    LAPACK's on the CPU. On an accelerator ``torch.linalg.eigh`` makes the host wait for its error code, so
    :func:`jacobi_eigh` is used there.
    """
    if matrix_BKK.device.type == "cpu":
        return torch.linalg.eigh(matrix_BKK)
    return jacobi_eigh(matrix_BKK)


def jacobi_eigh(matrix_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`eigh`, by a fixed number of sweeps of Jacobi rotations.

    Half of the rows and columns is rotated against the other half at a time, pair by pair; then all but the first
    move on by one place, so that after K - 1 rotations (a sweep) every pair has met once and all are back in place.
    """
    k = matrix_BKK.shape[1]
    n = k + k % 2  # odd sizes get a row and column of zeros, which never mixes with the others
    work = torch.nn.functional.pad(matrix_BKK, (0, n - k, 0, n - k))
    vectors = torch.eye(n, dtype=work.dtype, device=work.device).expand_as(work)
    place = torch.arange(n, device=work.device)
    left, right = place[: n // 2], place[n // 2 :].flip(0)
    moved = torch.where(place > 0, place % max(n - 1, 1) + 1, 0)
    rounding = _ROUNDING * torch.linalg.matrix_norm(work)[:, None]
    # Convergence is quadratic at the end; the sweeps before grow with log K.
    for _ in range((n - 1) * (7 + math.ceil(math.log2(n)))):
        diagonal, off = work.diagonal(dim1=1, dim2=2), work[:, left, right]
        # Rounding in a null space would turn it over and over, and what is left outside with it.
        off = torch.where(off.abs() > rounding, off, 0.0)
        half = (diagonal[:, right] - diagonal[:, left]) / 2
        size = half.abs() + torch.hypot(half, off)
        tangent = torch.where(half < 0, -off, off) / torch.where(size > 0, size, 1.0)
        cosine = (1 + tangent * tangent).rsqrt()
        sine = tangent * cosine
        rotation = torch.zeros_like(work)
        rotation[:, left, moved[left]] = cosine
        rotation[:, left, moved[right]] = sine
        rotation[:, right, moved[left]] = -sine
        rotation[:, right, moved[right]] = cosine
        work = rotation.mT @ work @ rotation
        vectors = vectors @ rotation
    return work.diagonal(dim1=1, dim2=2)[:, :k], vectors[:, :k, :k]


def presence(values_BK: Tensor) -> Tensor:
    """How much each eigenvalue counts [B, K], from 0 to 1: ``1 - exp(-(l / t)^4)``.

    t is 1e-6 of the largest eigenvalue, or more where negative ones betray a less precise Gramian. From
    2.5 t on it is 1 to rounding; divided by l it still vanishes at 0. Smooth, so that weights do not jump where an
    eigenvalue crosses the threshold.
    """
    largest = values_BK.amax(1, keepdim=True)
    noise = values_BK.amin(1, keepdim=True).neg().clamp(min=0)
    limit = (DEPENDENT * largest).maximum(_ABOVE_ROUNDING * noise)
    return -(-((values_BK.clamp(min=0) / torch.where(limit > 0, limit, 1.0)) ** 4)).expm1()


def inverse(values_BK: Tensor) -> Tensor:
    """``presence / l`` [B, K]: the reciprocal eigenvalues, 0 for those that do not count."""
    positive = values_BK > 0
    return torch.where(positive, presence(values_BK) / torch.where(positive, values_BK, 1.0), 0.0)
