"""The bound-constrained program: certified, equal to an independent solver, defined when it runs out of steps."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from megatron_moo.aggregation import bounded, interior
from megatron_moo.aggregation.bounded import RIDGE, solve_bounded_qp
from tests.unit.aggregation.families import FAMILIES, B, gramian, make_rows

TOLERANCE = 1e-11


def make_bounds(k, count, seed=0):
    """Bounds [B, M, K]: the unit ones first, then some of mixed sign."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(B, count, k, generator=generator, dtype=torch.float64)
    return torch.cat([torch.eye(k, dtype=torch.float64).expand(B, k, k)[:, :count], mixed], 1)


def kkt_residual(gram, lower, excess):
    """The documented residual, in extended precision and from scratch [B, M]."""
    gram, lower, excess = (t.numpy().astype(np.longdouble) for t in (gram, lower, excess))
    square = np.einsum("bii->bi", gram)
    gram = gram + RIDGE * np.einsum("bi,ij->bij", square, np.eye(gram.shape[1]))
    lengths = np.sqrt(square)[:, None]
    lengths = np.where(lengths > 0, lengths, 1)
    v = lower + excess
    y = np.einsum("bij,bmj->bmi", gram, v) / lengths
    assert (excess >= 0).all()
    size = ((np.abs(lower) + excess) * lengths).sum(2)
    return np.abs(np.minimum(excess * lengths, y)).max(2) / np.where(size > 0, size, 1)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimal(family, k):
    """A solver that stops early, or certifies itself wrongly."""
    gram, lower = gramian(make_rows(family, k)), make_bounds(k, min(k, 6))
    solution = solve_bounded_qp(gram, lower)
    exact = kkt_residual(gram, lower, solution.excess_BMK)
    assert exact.max() < TOLERANCE
    assert (solution.shift_B == 0).all()
    assert np.abs(solution.kkt_residual_BM.numpy() - exact).max() < 1e-13


@pytest.mark.parametrize("family", ["random", "conflicting", "rank-three", "duplicates", "ill-conditioned"])
def test_optimal_for_128_objectives(family):
    """Cycles of pivoting and loss of digits grow with K."""
    gram, lower = gramian(make_rows(family, 128))[:2], make_bounds(128, 2)[:2]
    solution = solve_bounded_qp(gram, lower)
    assert kkt_residual(gram, lower, solution.excess_BMK).max() < TOLERANCE


@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_nnls(family, k):
    """A certificate with a wrong sign would accept anything: compare with non-negative least squares on the rows."""
    rows, lower = make_rows(family, k)[:2], make_bounds(k, 3)[:2]
    excess = solve_bounded_qp(gramian(rows), lower).excess_BMK
    for matrix, bounds, found in zip(rows.numpy(), lower.numpy(), excess.numpy(), strict=True):
        # Unit rows: nnls has an absolute threshold.
        lengths = np.linalg.norm(matrix, axis=1)
        unit = matrix / lengths[:, None]
        for bound, x in zip(bounds * lengths, found * lengths, strict=True):
            reference = unit.T @ (bound + nnls(unit.T, -unit.T @ bound, maxiter=100 * k)[0])
            error = np.linalg.norm(unit.T @ (bound + x) - reference)
            # The noise that the rows are taken to carry has length 1e-6.
            assert error <= 1e-6 * (np.abs(bound) + x).sum()
            if family in ("random", "conflicting", "uneven", "aligned"):
                assert error <= 1e-9 * (np.abs(bound) + x).sum()


def test_two_objectives_closed_form():
    """Sign or index slips that only symmetric cases would hide."""
    rows = make_rows("random", 2)
    gram = gramian(rows)
    excess = solve_bounded_qp(gram, torch.eye(2, dtype=torch.float64).expand(B, 2, 2)).excess_BMK
    pull = (-gram[:, 0, 1]).clamp(min=0)
    assert torch.allclose(excess[:, 0, 1], pull / gram[:, 1, 1], rtol=1e-11, atol=0)
    assert torch.allclose(excess[:, 1, 0], pull / gram[:, 0, 0], rtol=1e-11, atol=0)
    assert (excess.diagonal(dim1=1, dim2=2) == 0).all()


def test_pinned():
    """A negative bound is a bound as well: v = 0 is free to be the optimum."""
    gram = torch.tensor([[[4.0, -1.0], [-1.0, 1.0]]])
    lower = torch.tensor([[[1.0, 0.0], [-1.0, -2.0], [1.0, -3.0]]])
    excess = solve_bounded_qp(gram, lower).excess_BMK
    expected = torch.tensor([[[0.0, 1.0], [1.0, 2.0], [0.0, 4.0]]], dtype=torch.float64)
    assert torch.allclose(excess, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_do_not_make_it_blow_up(family):
    """Dependent rows leave v open: without the ridge its components could be anything."""
    for k in (5, 16):
        gram = gramian(make_rows(family, k))
        lower = torch.eye(k, dtype=torch.float64).expand(B, k, k)
        v = lower + solve_bounded_qp(gram, lower).excess_BMK
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()[:, None]
        own = lengths.mT  # of the row that the bound names
        assert ((v * lengths / own).norm(dim=2) <= 1.01e6).all()


@pytest.mark.parametrize("steps", [(0, 30, 4), (0, 30, 0), (16, 0, 4)])
def test_stages_agree(steps):
    """A stage that never runs in practice and is wrong."""
    names = ("pivot_steps", "interior_steps", "polish_steps")
    for family in ("random", "conflicting", "uneven", "stationary"):
        rows = make_rows(family, 16)
        lower = make_bounds(16, 6)
        exact = solve_bounded_qp(gramian(rows), lower).excess_BMK
        other = solve_bounded_qp(gramian(rows), lower, **dict(zip(names, steps, strict=True)))
        assert (other.kkt_residual_BM < TOLERANCE).all()
        v, w = lower + exact, lower + other.excess_BMK
        scale = (v.abs() * rows.norm(dim=2)[:, None]).sum(2)
        assert (((v - w) @ rows).norm(dim=2) <= 1e-7 * scale).all()


def test_bound_of_steps_is_reported():
    """A solver that runs out of steps and returns its last point as if it were the answer."""
    gram, lower = gramian(make_rows("ill-conditioned", 16)), make_bounds(16, 6)
    for steps in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (2, 2, 1)):
        names = ("pivot_steps", "interior_steps", "polish_steps")
        loose = solve_bounded_qp(gram, lower, **dict(zip(names, steps, strict=True)))
        exact = kkt_residual(gram, lower, loose.excess_BMK)
        assert (loose.kkt_residual_BM > 1e-6).any() and loose.excess_BMK.isfinite().all()
        assert np.allclose(loose.kkt_residual_BM.numpy(), exact.astype(float), rtol=1e-6, atol=1e-13)
    none = solve_bounded_qp(gram, lower, pivot_steps=0, interior_steps=0, polish_steps=0)
    assert (none.excess_BMK == 0).all()


def test_pivoting_cycles_are_left():
    """Plain exchanges cycle on dependent rows; what they leave open must be solved, not returned."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 16, 8, generator=generator, dtype=torch.float64)
    lower = torch.eye(16, dtype=torch.float64).expand(40, 16, 16)
    pivots = solve_bounded_qp(gramian(rows), lower, interior_steps=0, polish_steps=0)
    assert (pivots.kkt_residual_BM > 1e-6).any()
    assert (solve_bounded_qp(gramian(rows), lower).kkt_residual_BM < TOLERANCE).all()


def test_indefinite_gramian_is_shifted_and_said_so():
    """Sums in float32 leave negative eigenvalues; an unguarded Cholesky would give NaN."""
    for family in ("rank-three", "duplicates", "opposite"):
        gram = gramian(make_rows(family, 16))
        gram = gram * (1 + 1e-6 * torch.randn(gram.shape, generator=torch.Generator().manual_seed(0)))
        solution = solve_bounded_qp(gram, make_bounds(16, 6))
        assert (solution.shift_B > 0).all() and (solution.shift_B <= 1e-4).all()
        assert (solution.kkt_residual_BM < TOLERANCE).all()


@pytest.mark.parametrize("family", ["random", "rank-three", "ill-conditioned", "few-dimensions"])
def test_batching_changes_nothing(family, monkeypatch):
    """Gathering, chunks, or the absence of both on accelerators must not show in the result."""
    gram, lower = gramian(make_rows(family, 8)), make_bounds(8, 4)
    together = solve_bounded_qp(gram, lower)
    monkeypatch.setattr(bounded, "_ELEMENTS_CPU", 8 * 8 * 5)
    chunks = solve_bounded_qp(gram, lower)
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    fixed = solve_bounded_qp(gram, lower)
    for other in (chunks, fixed):
        assert torch.equal(other.excess_BMK, together.excess_BMK)
        assert torch.equal(other.kkt_residual_BM, together.kkt_residual_BM)


def test_degenerate_input():
    """Zero rows, zero bounds, nobody active, no blocks: a division by zero."""
    gram = torch.zeros(3, 4, 4)
    gram[1] = torch.diag(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    gram[2] = torch.eye(4) - 0.5
    active = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    for lower in (torch.zeros(3, 2, 4), torch.ones(3, 2, 4), -torch.ones(3, 2, 4)):
        solution = solve_bounded_qp(gram, lower, active)
        assert solution.excess_BMK.isfinite().all() and (solution.kkt_residual_BM <= 1e-15).all()
        assert (solution.excess_BMK[[0, 2]] == 0).all() and (solution.excess_BMK[1, :, [0, 2]] == 0).all()
    assert torch.allclose(solution.excess_BMK[1, :, [1, 3]], torch.ones(2, 2, dtype=torch.float64), rtol=1e-14)
    assert solve_bounded_qp(gram[:0], torch.zeros(0, 2, 4)).excess_BMK.shape == (0, 2, 4)
