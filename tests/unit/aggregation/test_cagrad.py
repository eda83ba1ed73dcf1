"""CAGrad against duality in row space, a scalar minimisation, and scipy; its solver's two stages against each other."""

import itertools

import numpy as np
import pytest
import torch

from megatron_moo.aggregation import build_aggregator, interior, simplex_norm, solve_simplex_norm
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows
from tests.unit.aggregation.test_mgda import DEGENERATE, count_steps


def unscaled(rows, preference, c):
    """The paper's d, its mean g0, and the hull weights recovered from the result."""
    aggregator = build_aggregator("cagrad", c=c, rescale="none")
    weights = aggregator(gramian(rows), None, preference)
    pull = weights - preference
    hull = pull / pull.sum(1, keepdim=True)
    return combine(weights, rows), combine(preference.expand(B, -1), rows), hull, aggregator


@pytest.mark.parametrize("k", [2, 3, 8, 64])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("stationary", "opposite")])
def test_optimal_by_duality(family, k):
    """Any d in the ball and any w bracket the optimum: min_k <g_k, d> <= optimum <= <g_w, g0> + c |g0| |g_w|."""
    rows, preference = make_rows(family, k), make_preference(k)
    rows = rows / rows.norm(dim=2).amax(1)[:, None, None]
    for c in (0.1, 0.4, 0.95):
        d, g0, hull, aggregator = unscaled(rows, preference, c)
        radius = c * g0.norm(dim=1)
        assert ((d - g0).norm(dim=1) <= radius * (1 + 1e-5)).all()
        assert (hull >= -1e-12).all()
        g_w = combine(hull, rows)
        lower = (rows @ d[:, :, None]).squeeze(2).amin(1)
        upper = (g_w * g0).sum(1) + radius * g_w.norm(dim=1)
        assert (upper - lower <= 1e-5 * radius).all()
        assert (aggregator.kkt_residual_B <= 1e-8).all()


@pytest.mark.parametrize("family", ["random", "conflicting", "aligned", "uneven"])
def test_two_objectives_by_bisection(family):
    """An independent solution to 1e-8: with two objectives the program is convex in one variable."""
    rows, preference, c = make_rows(family, 2), make_preference(2), 0.5
    gram = gramian(rows)
    root = c * torch.einsum("i,bij,j->b", preference, gram, preference).sqrt()

    def objective(x):
        w = torch.stack([x, 1 - x], 1)
        h = (gram @ w[..., None]).squeeze(-1)
        return (h * preference).sum(1) + root * (w * h).sum(1).sqrt()

    low, high = torch.zeros(B, dtype=torch.float64), torch.ones(B, dtype=torch.float64)
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        left = objective(a) < objective(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    _, _, hull, _ = unscaled(rows, preference, c)
    found, best = objective(hull[:, 0].clamp(0, 1)), objective((low + high) / 2)
    assert (found <= best + 1e-8 * best.abs()).all()


def test_not_worse_than_scipy():
    """Local optimum or wrong objective."""
    optimize = pytest.importorskip("scipy.optimize")
    k, c = 6, 0.4
    preference = make_preference(k)
    for family in ("random", "conflicting"):
        rows = make_rows(family, k)
        _, _, hull, _ = unscaled(rows, preference, c)
        for gram, w in zip(gramian(rows).numpy(), hull.numpy(), strict=True):
            u = preference.numpy()
            r = c * np.sqrt(u @ gram @ u)
            value = lambda w, gram=gram, u=u, r=r: w @ gram @ u + r * np.sqrt(w @ gram @ w)  # noqa: E731
            constraint = {"type": "eq", "fun": lambda w: w.sum() - 1}
            theirs = optimize.minimize(
                value, u, bounds=[(0, 1)] * k, constraints=constraint, options={"ftol": 1e-14, "maxiter": 500}
            )
            assert value(w) <= theirs.fun + 1e-8 * abs(theirs.fun)


def test_pinned():
    """Orthogonal rows of lengths 1 and 2: the first is worst off all over the ball, so d moves along it alone."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    weights = build_aggregator("cagrad", rescale="none")(gramian(rows))
    assert weights[0].tolist() == pytest.approx([0.5 + 0.4 * np.hypot(0.5, 1.0), 0.5], rel=1e-9)


def test_c_zero_is_the_mean_and_rescale_divides():
    """Scale conventions: linear 1 + c, quadratic 1 + c^2, none 1."""
    gram, preference = gramian(make_rows("conflicting", 4)), make_preference(4)
    assert torch.equal(build_aggregator("cagrad", c=0)(gram, None, preference), preference.expand(B, 4))
    plain = build_aggregator("cagrad", c=0.5, rescale="none")(gram, None, preference)
    for rescale, divisor in (("linear", 1.5), ("quadratic", 1.25)):
        scaled = build_aggregator("cagrad", c=0.5, rescale=rescale)(gram, None, preference)
        assert torch.allclose(scaled * divisor, plain, rtol=1e-14)
    default = build_aggregator("cagrad", c=0.5)(gram, None, preference)
    assert torch.allclose(default * 1.5, plain, rtol=1e-14)


def test_small_c_approaches_the_mean():
    """A discontinuity at c = 0, which is treated by itself."""
    rows, preference = make_rows("random", 5), make_preference(5)
    d, g0, _, _ = unscaled(rows, preference, 1e-4)
    assert ((d - g0).norm(dim=1) <= 1.001e-4 * g0.norm(dim=1)).all()


def test_stationary_rows_with_a_mean():
    """0 / 0 in the formula: rows e1, -e1, e2 have g_w = 0; the best d closest to the mean is the mean, e2 / 3."""
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for scale in (1e-8, 1.0, 1e8):
        weights = build_aggregator("cagrad", rescale="none")(gramian(scale * rows))
        assert torch.allclose(combine(weights, rows), torch.tensor([[0.0, 1 / 3]], dtype=torch.float64), atol=1e-4)


def test_stationary_families_are_bounded():
    """Weights that explode where rows cancel."""
    for family in ("stationary", "opposite"):
        for k in (2, 5, 16):
            rows, preference = make_rows(family, k), make_preference(k)
            weights = build_aggregator("cagrad", rescale="none")(gramian(rows), None, preference)
            g0 = combine(preference.expand(B, k), rows)
            d = combine(weights, rows)
            slack = 1e-6 * rows.norm(dim=2).amax(1)
            assert ((d - g0).norm(dim=1) <= 0.4 * g0.norm(dim=1) * (1 + 1e-5) + slack).all()


def test_not_conflict_free():
    """Documented: a row against which the whole ball points stays in conflict."""
    rows = torch.tensor([[[1.0, 0.0], [-0.1, 0.0]]], dtype=torch.float64)
    d = combine(build_aggregator("cagrad")(gramian(rows)), rows)
    assert (rows[0, 1] @ d[0]) < 0


@pytest.mark.parametrize("family", [name for name in DEGENERATE if name != "opposite"])
def test_many_objectives(family, monkeypatch):
    """Rank-deficient and ill-conditioned Gramians of 128 objectives: loss of digits, or a bound that is no bound."""
    k = 128
    rows, preference = make_rows(family, k)[:2], make_preference(k)
    rows = rows / rows.norm(dim=2).amax(1)[:, None, None]
    steps = count_steps(monkeypatch, simplex_norm)
    aggregator = build_aggregator("cagrad", rescale="none")
    d = combine(aggregator(gramian(rows), None, preference), rows)
    assert len(steps) <= 45 < simplex_norm.MAX_ITERATIONS
    assert (aggregator.kkt_residual_B <= 1e-11).all()
    g0 = combine(preference.expand(2, k), rows)
    assert ((d - g0).norm(dim=1) <= 0.4 * g0.norm(dim=1) * (1 + 1e-5)).all()


def program(family, k, c=0.4, count=3):
    """A program of the solver as CAGrad has it, the Gramian regularised by itself."""
    gram = gramian(make_rows(family, k))[:count]
    gram = gram / gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None] + 1e-9 * torch.eye(k, dtype=torch.float64)
    root = torch.linalg.cholesky(gram).mT
    share = make_preference(k).expand(count, k)
    radius = c * (root @ share[..., None]).squeeze(2).norm(dim=1, keepdim=True)
    return root, (gram @ share[..., None]).squeeze(2), radius, torch.ones(count, k, dtype=torch.bool), share


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_find_the_same_optimum(family):
    """A closed form that is wrong on a face, and a certificate that is wrong with it: only the other stage tells."""
    for k, c in itertools.product((2, 5, 16), (0.05, 0.4, 0.95)):
        arguments = program(family, k, c, B)
        root, linear, radius = arguments[:3]
        found, reference = solve_simplex_norm(*arguments), solve_simplex_norm(*arguments, pivot_steps=0)
        w = found.weights_BK
        assert (w >= 0).all() and torch.allclose(w.sum(1), torch.ones(B, dtype=torch.float64), rtol=1e-14)
        size = (w * (linear.abs() + radius * root.norm(dim=1))).sum(1)
        value = (w * linear).sum(1) + radius[:, 0] * (root @ w[..., None]).squeeze(2).norm(dim=1)
        assert ((found.value_B - value).abs() <= 1e-14 * size).all()
        assert ((value - reference.value_B).abs() <= found.gap_B + reference.gap_B + 1e-14 * size).all()
        assert (found.kkt_residual_B <= 1e-11).all()


@pytest.mark.parametrize("family", ["random", "conflicting", "aligned", "nearly-equal", "uneven"])
def test_pivoting_settles_independent_rows(family, monkeypatch):
    """A guess that goes round in circles: answers stay right, and every step of a run takes ten times as long."""
    steps = count_steps(monkeypatch, simplex_norm)
    for k in (1, 2, 4, 8, 16):
        aggregator = build_aggregator("cagrad")
        active = torch.rand(B, k, generator=torch.Generator().manual_seed(k)) < 0.8
        for mask in (None, active):
            aggregator(gramian(make_rows(family, k)), mask, make_preference(k))
            assert (aggregator.kkt_residual_B <= 1e-12).all()
    assert not steps


@pytest.mark.parametrize("k", [3, 16, 128])
def test_gap_is_true_at_the_bound(k):
    """A certificate that holds only at the optimum: after three steps it would say that the answer is good."""
    for family in ("random", "ill-conditioned", "uneven"):
        arguments = program(family, k)
        exact = solve_simplex_norm(*arguments)
        assert (exact.kkt_residual_B <= 1e-11).all()
        gaps = []
        for steps, pivots in ((0, 0), (3, 0), (6, 0), (0, 1), (0, 2)):
            loose = solve_simplex_norm(*arguments, max_iterations=steps, pivot_steps=pivots)
            assert torch.allclose(loose.weights_BK.sum(1), torch.ones(3, dtype=torch.float64))
            assert (loose.value_B >= exact.value_B - 1e-10).all()
            assert (loose.value_B - loose.gap_B <= exact.value_B + 1e-10).all()
            gaps.append(loose.gap_B)
        assert (gaps[1] <= gaps[0]).all() and (gaps[2] <= gaps[1]).all() and (gaps[1] > 1e-9).any()
        start = solve_simplex_norm(*arguments, max_iterations=0, pivot_steps=0)
        assert torch.allclose(start.weights_BK, arguments[-1])


@pytest.mark.parametrize("k", [5, 16, 33])
def test_dropping_finished_blocks_changes_nothing(k, monkeypatch):
    """The CPU drops blocks that are done, an accelerator does not: indices that slip, or weights that depend on it."""
    gram = torch.cat([gramian(make_rows(family, k)) for family in FAMILIES])
    aggregator = build_aggregator("cagrad")
    dropping, residual = aggregator(gram), aggregator.kkt_residual_B
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    assert torch.equal(aggregator(gram), dropping)
    assert torch.equal(aggregator.kkt_residual_B, residual)
