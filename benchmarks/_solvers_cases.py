"""Gramians for `solvers.py`, and how accurate an answer is.

Shapes: B blocks, K objectives, N elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

DESCRIPTION = (
    "float64 rows of N = 2K + 8 elements; n_k is normal with E|n_k|^2 = 1, c is one such vector for each block. Blocks "
    "take turns: independent (n_k), near-stationary (n_k - 0.9 mean_j n_j), two camps (n_k + c for even k, n_k - c for "
    "odd k), mostly aligned (n_k + c / 2). Every row is then multiplied by a length, log-uniform in [1, 10]"
)
# Two blocks of each family.
ACCURACY_BLOCKS = 8


@dataclass(frozen=True)
class Case:
    """Blocks of K objectives.

    Attributes:
        rows_BKN: the rows.
        gram_BKK: their inner products.
        losses_BK: positive numbers, for the methods that look at losses.
        references: solutions of programs, found once and kept (see :func:`accuracy`).
    """

    rows_BKN: Tensor
    gram_BKK: Tensor
    losses_BK: Tensor
    references: dict[str, np.ndarray] = field(default_factory=dict)


def make_case(objectives: int, blocks: int, seed: int) -> Case:
    """See ``DESCRIPTION``. The first blocks are the same however many there are."""
    k, n = objectives, 2 * objectives + 8
    generator = torch.Generator().manual_seed(1000 * seed + k)
    rows = torch.empty(blocks, k, n, dtype=torch.float64)
    losses = torch.empty(blocks, k, dtype=torch.float64)
    camp = 1 - 2 * (torch.arange(k) % 2)[:, None]
    for b in range(blocks):
        own = torch.randn(k, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
        common = torch.randn(n, generator=generator, dtype=torch.float64) / math.sqrt(n)
        family = (own, own - 0.9 * own.mean(0), own + camp * common, own + common / 2)[b % 4]
        rows[b] = family * 10 ** torch.rand(k, 1, generator=generator, dtype=torch.float64)
        losses[b] = 0.5 + torch.rand(k, generator=generator, dtype=torch.float64)
    return Case(rows, rows @ rows.mT, losses)


@dataclass(frozen=True)
class Answer:
    """One side's weights for the first blocks of a case [A, K]; ``scale`` brings CAGrad's to the paper's length."""

    weights_AK: Tensor
    scale: float = 1.0


def accuracy(
    method: str, case: Case, answers: Mapping[str, Answer], settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """For each side ``kkt``, ``excess`` (None where they mean nothing) and ``cosine``, means over the blocks.

    ``worst_cosine`` is the smallest of all blocks. Objectives count alike (no preference).
    """
    measure = _MEASURES.get(method)
    count = {len(answer.weights_AK) for answer in answers.values()}.pop()
    gram = case.gram_BKK[:count].numpy()
    weights = {side: answer.scale * answer.weights_AK.numpy() for side, answer in answers.items()}
    measured = measure(case, gram, weights, settings) if measure else {}
    result = {}
    for side, w_AK in weights.items():
        cosines = _cosines(gram, w_AK).min(1)
        kkt, excess = measured.get(side, (None, None))
        result[side] = {
            "kkt": None if kkt is None else float(np.mean(kkt)),
            "excess": None if excess is None else float(np.mean(excess)),
            "cosine": float(cosines.mean()),
            "worst_cosine": float(cosines.min()),
        }
    return result


Measured = dict[str, tuple[np.ndarray | None, np.ndarray | None]]
_Measure = Callable[[Case, np.ndarray, dict[str, np.ndarray], Mapping[str, Any]], Measured]


def _mgda(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """Gap ``w'Gw - min_k (Gw)_k`` and excess, relative to w'Gw.

    By convexity no point of the simplex is below ``2 min_k (Gw)_k - w'Gw``, for any w in it. The excess is over this
    bound of an independent solution: scipy's active-set least squares.
    """

    def certify(w_AK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products = _times(gram, w_AK)
        return (w_AK * products).sum(1), products.min(1)

    value, least = certify(_reference("hull", case, len(gram)))
    bound = 2 * least - value
    found: Measured = {}
    for side, w_AK in weights.items():
        value, least = certify(w_AK / w_AK.sum(1, keepdims=True))
        found[side] = (value - least) / value, (value - bound) / value
    return found


def _cagrad(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """Gap and excess of the dual ``f(w) = w'Gu + c |g0| |g_w|``, relative to the size of its terms.

    f is convex and ``f(w) = w'f'(w)``: no point of the simplex is below ``min_k f'(w)_k``, for any w in it. The excess
    is over the best such bound of all sides.
    """
    mean = np.full(gram.shape[:2], 1 / gram.shape[1])
    radius = settings["c"] * np.sqrt((mean * _times(gram, mean)).sum(1, keepdims=True))
    terms = {}
    for side, w_AK in weights.items():
        w_AK = np.maximum(w_AK - mean, 0)  # the combined weights are u + p w
        w_AK = w_AK / w_AK.sum(1, keepdims=True)
        length = np.sqrt((w_AK * _times(gram, w_AK)).sum(1, keepdims=True))
        slope = _times(gram, mean) + radius * _times(gram, w_AK) / length
        linear = (w_AK * _times(gram, mean)).sum(1)
        terms[side] = linear + (radius * length)[:, 0], slope.min(1), np.abs(linear) + (radius * length)[:, 0]
    best = np.max([bound for _, bound, _ in terms.values()], axis=0)
    return {side: ((value - bound) / size, (value - best) / size) for side, (value, bound, size) in terms.items()}


def _dualproj(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """The worst of ``v >= u``, ``Gv >= 0`` and ``(v - u)'Gv = 0``, and the excess of v'Gv over scipy's, relative."""
    share = 1 / gram.shape[1]
    best = _reference("projected mean", case, len(gram))
    optimum = (best * _times(gram, best)).sum(1)
    found: Measured = {}
    for side, v_AK in weights.items():
        products = _times(gram, v_AK)
        value = (v_AK * products).sum(1)
        gap = np.abs(((v_AK - share) * products).sum(1)) / value
        found[side] = np.maximum(_infeasible(gram, v_AK), gap), value / optimum - 1
    return found


def _upgrad(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """The worst of ``v >= u`` and ``Gv >= 0`` (K programs summed: no more to see), and ``|d - d*| / |d*|``."""
    best = _reference("projected rows", case, len(gram))
    length = np.sqrt((best * _times(gram, best)).sum(1))
    found: Measured = {}
    for side, v_AK in weights.items():
        off = v_AK - best
        found[side] = _infeasible(gram, v_AK), np.sqrt(np.maximum((off * _times(gram, off)).sum(1), 0)) / length
    return found


def _fair(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """How far ``(Gw)_k w_k^(1/alpha)``, which must be one number, spreads around its mean."""
    power = 1 / settings.get("alpha", 1.0)
    return {side: (_spread(_times(gram, w_AK) * np.maximum(w_AK, 0) ** power), None) for side, w_AK in weights.items()}


def _impartial(case: Case, gram: np.ndarray, weights: dict[str, np.ndarray], settings: Mapping[str, Any]) -> Measured:
    """How far the cosines of d with the rows, which must be equal, spread around their mean."""
    return {side: (_spread(_cosines(gram, w_AK)), None) for side, w_AK in weights.items()}


_MEASURES: dict[str, _Measure] = {
    "mgda": _mgda,
    "cagrad": _cagrad,
    "dualproj": _dualproj,
    "upgrad": _upgrad,
    "nash-mtl": _fair,
    "fairgrad": _fair,
    "imtl-g": _impartial,
    "config": _impartial,
}


def above(gram_KK: np.ndarray, lower_K: np.ndarray) -> np.ndarray:
    """argmin of v'Gv over ``v >= lower``, by scipy's active-set least squares, for a positive definite G."""
    root = np.linalg.cholesky(gram_KK).T
    extra, _ = nnls(root, -root @ lower_K, maxiter=50 * len(lower_K))
    return lower_K + extra


def _reference(program: str, case: Case, count: int) -> np.ndarray:
    if program not in case.references:
        gram = case.gram_BKK[:count].numpy()
        k = gram.shape[1]
        # One length for the whole block: weights and relative numbers do not change.
        gram = gram / np.einsum("bii->b", gram)[:, None, None]
        solve = {
            "hull": _hull,
            "projected mean": lambda g: above(g, np.full(k, 1 / k)),
            "projected rows": lambda g: sum(above(g, row) for row in np.eye(k) / k),
        }[program]
        case.references[program] = np.stack([solve(matrix) for matrix in gram])
    return case.references[program]


def _hull(gram_KK: np.ndarray) -> np.ndarray:
    """argmin of w'Gw over the simplex: the direction of ``argmin x'Gx + (1'x - 1)^2`` over ``x >= 0``."""
    k = len(gram_KK)
    matrix = np.vstack([np.linalg.cholesky(gram_KK).T, np.ones(k)])
    x, _ = nnls(matrix, np.r_[np.zeros(k), 1.0], maxiter=50 * k)
    return x / x.sum()


def _times(gram: np.ndarray, w_AK: np.ndarray) -> np.ndarray:
    return np.einsum("bij,bj->bi", gram, w_AK)


def _cosines(gram: np.ndarray, w_AK: np.ndarray) -> np.ndarray:
    """Cosines of d with every row [A, K]; 0 where d is."""
    products = _times(gram, w_AK)
    length = np.sqrt(np.maximum((w_AK * products).sum(1, keepdims=True), 0))
    return products / (np.where(length > 0, length, np.inf) * np.sqrt(np.einsum("bii->bi", gram)))


def _infeasible(gram: np.ndarray, v_AK: np.ndarray) -> np.ndarray:
    """How far v is below u, relative to u, or the worst conflict, whichever is worse; 0 if neither."""
    share = 1 / gram.shape[1]
    return np.maximum(1 - v_AK.min(1) / share, -_cosines(gram, v_AK).min(1)).clip(min=0)


def _spread(x_AK: np.ndarray) -> np.ndarray:
    mean = x_AK.mean(1, keepdims=True)
    return np.abs(x_AK / np.where(mean != 0, mean, np.inf) - 1).max(1)
