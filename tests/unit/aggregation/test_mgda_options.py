"""MGDA's normalisations and caps, and the quadratic program with upper bounds."""

import numpy as np
import pytest
import torch

from megatron_moo.aggregation import build_aggregator, simplex, solve_simplex_qp
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size
from tests.unit.aggregation.test_mgda import DEGENERATE, count_steps

every_family = pytest.mark.parametrize("family", FAMILIES)


def fill(cost, upper):
    """argmin of cost'x over the simplex with x <= upper, of one block: the cheapest first."""
    x, left = np.zeros_like(cost), 1.0
    for k in np.argsort(cost):
        x[k] = min(upper[k], left)
        left -= x[k]
    return x


def least_ratio(products, scales, upper):
    """min of products'x / scales'x over the same x, by bisection; with products of a unit vector, a lower bound of
    ``|d| / scales'x``."""
    ratios = products / scales
    low, high = ratios.min(), ratios.max()
    for _ in range(120):
        middle = (low + high) / 2
        cost = products - middle * scales
        low, high = (middle, high) if cost @ fill(cost, upper) >= 0 else (low, middle)
    return low


def make_losses(k):
    return torch.logspace(-1, 1, k, dtype=torch.float64).flip(0)


@pytest.mark.parametrize("k", [1, 2, 5, 16])
@every_family
def test_capped_optimum(family, k):
    """Clipping and renormalising in place of the constrained optimum, or a certificate that accepts it."""
    gram = gramian(make_rows(family, k))
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt().numpy()
    for preference in (make_preference(k), torch.logspace(-3, 0, k, dtype=torch.float64)):
        share = preference / preference.sum()
        for cap in (1.001, 1.5, 4.0):
            upper = (cap * share).expand(B, k)
            solution = solve_simplex_qp(gram, None, share.expand(B, k), upper_BK=upper)
            weights = solution.weights_BK
            assert (weights >= 0).all() and (weights <= upper).all()
            assert torch.allclose(weights.sum(1), torch.ones(B, dtype=torch.float64), rtol=0, atol=1e-13)
            assert (solution.kkt_residual_B <= 1e-10).all()
            for b in range(B):
                w = weights[b].numpy().astype(np.longdouble)
                h = gram[b].numpy().astype(np.longdouble) @ w
                excess = 2 * h @ (w - fill(h, upper[b].numpy()))
                assert excess <= 1e-9 * (w @ h) + 1e-14 * (w @ lengths[b]) ** 2


@pytest.mark.parametrize("normalise", ["l2", "loss", "loss+"])
@every_family
def test_capped_and_normalised_optimum(family, normalise):
    """A cap on the scaled rows' weights, which the final ones break; or not the best direction within the caps."""
    if family == "very-uneven":
        pytest.skip("documented: scales that differ by 1e7")
    k = 6
    rows, preference, losses = make_rows(family, k), make_preference(k), make_losses(k)
    lengths = rows.norm(dim=2)
    scales = torch.ones(B, k).double() * (
        lengths if normalise == "l2" else losses if normalise == "loss" else lengths * losses
    )
    for cap in (1.01, 2.0, 50.0):
        aggregator = build_aggregator("mgda", normalise=normalise, cap=cap)
        weights = aggregator(gramian(rows), None, preference, losses_K=losses)
        assert (weights <= cap * preference * (1 + 1e-14)).all() and (weights >= 0).all()
        assert torch.allclose(weights.sum(1), torch.ones(B, dtype=torch.float64), rtol=0, atol=1e-8)
        assert (aggregator.kkt_residual_B <= 1e-8).all()
        d = combine(weights, rows)
        spread = (weights * scales).sum(1)
        for b in range(B):
            value = (d[b].norm() / spread[b]).item()
            products = (rows[b] @ d[b] / d[b].norm()).numpy()
            rounding = 1e-6 * (size(weights, rows)[b] / spread[b]).item()
            bound = max(0.0, least_ratio(products, scales[b].numpy(), (cap * preference).numpy()))
            assert value <= bound * (1 + 1e-6) + rounding


@pytest.mark.parametrize("normalise", ["none", "l2", "loss", "loss+"])
def test_cap_runs_from_the_mean_to_no_cap(normalise):
    """A cap in the wrong units: 1 must be the mean, and beyond the smallest share it must not bind."""
    k = 5
    gram, losses = gramian(make_rows("conflicting", k)), make_losses(k)
    preference = 3 * make_preference(k)  # its sum is a scale, not a part of the cap
    mask = torch.tensor([True, True, False, True, True]).expand(B, k)
    solve = lambda cap: build_aggregator("mgda", normalise=normalise, cap=cap)(  # noqa: E731
        gram, mask, preference, losses_K=losses
    )
    assert torch.equal(solve(1), torch.where(mask, preference, 0.0))
    share = torch.where(mask[0], preference, 0.0) / preference[mask[0]].sum()
    free = solve(0)
    assert torch.allclose(solve(1.0001 / share[mask[0]].min().item()), free, atol=1e-6)
    assert torch.allclose(solve(1 + 1e-9), solve(1), atol=1e-6)
    binding = solve(1.5)
    mass = preference[mask[0]].sum()
    assert (binding <= 1.5 * share * mass * (1 + 1e-14)).all() and (free > 1.5 * share * mass + 1e-3).any()
    assert torch.allclose(binding.sum(1), mass.expand(B), rtol=1e-12)


@pytest.mark.parametrize("normalise", ["none", "l2"])
@every_family
def test_objectives_below_their_cap_are_not_hurt(family, normalise):
    """The stated price of a cap: <g_k, d> >= |d|^2 (normalised: >= 0) only for those below it."""
    k, preference = 6, make_preference(6)
    rows = make_rows(family, k)
    weights = build_aggregator("mgda", cap=1.5, normalise=normalise)(gramian(rows), None, preference)
    d = combine(weights, rows)
    products = (rows @ d[:, :, None]).squeeze(2)
    bound = d.norm(dim=1)[:, None] ** 2 if normalise == "none" else 0.0
    slack = 1e-6 * rows.norm(dim=2) * size(weights, rows)[:, None]
    assert (products >= bound - slack)[weights < 1.5 * preference * (1 - 1e-6)].all()


def test_cap_may_hurt_and_may_move_at_stationary_points():
    """Documented: e1 (short) against -10 e1 (long). Uncapped d = 0; capped, the long row wins."""
    rows = torch.tensor([[[1.0, 0.0], [-10.0, 0.0]]], dtype=torch.float64)
    free, capped = (combine(build_aggregator("mgda", cap=cap)(gramian(rows)), rows) for cap in (0, 1.5))
    assert free.norm() < 1e-9
    assert torch.allclose(capped, torch.tensor([[0.75 - 2.5, 0.0]], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("normalise", ["l2", "loss", "loss+"])
def test_normalised_is_the_scaled_rows_hull(normalise):
    """Losses that multiply instead of divide, or weights of the scaled rows applied to the raw ones."""
    k = 5
    rows, losses = make_rows("random", k), make_losses(k)
    scales = {"l2": rows.norm(dim=2), "loss": losses.expand(B, k), "loss+": rows.norm(dim=2) * losses}[normalise]
    weights = build_aggregator("mgda", normalise=normalise)(gramian(rows), losses_K=losses)
    scaled = rows / scales[..., None]
    expected = combine(build_aggregator("mgda")(gramian(scaled)), scaled)
    found = combine(weights, rows)
    assert torch.allclose(found / found.norm(dim=1)[:, None], expected / expected.norm(dim=1)[:, None], atol=1e-8)
    assert torch.allclose(weights.sum(1), torch.ones(B, dtype=torch.float64))


def test_larger_loss_has_larger_weight():
    """Pinned: orthogonal unit rows with losses n have weights in proportion to n."""
    losses = torch.tensor([1.0, 2.0, 5.0])
    for normalise in ("loss", "loss+"):
        weights = build_aggregator("mgda", normalise=normalise)(torch.eye(3)[None], losses_K=losses)
        assert torch.allclose(weights, losses.double() / 8, atol=1e-10)


@pytest.mark.parametrize("normalise", ["loss", "loss+"])
def test_losses_that_are_not_positive(normalise):
    """A division by zero or by a negative loss, and a NaN that spreads to others."""
    gram, solve = torch.eye(3)[None], build_aggregator("mgda", normalise=normalise)
    nan, inf = torch.nan, torch.inf
    for losses, expected in (
        ([2.0, 0.0, 2.0], [0.5, 0.0, 0.5]),
        ([2.0, -3.0, 2.0], [0.5, 0.0, 0.5]),
        ([2.0, nan, 1.0], [0.4, 0.4, 0.2]),
        ([2.0, inf, 1.0], [0.4, 0.4, 0.2]),
        ([0.0, -1.0, nan], [1 / 3, 1 / 3, 1 / 3]),
    ):
        weights = solve(gram, losses_K=torch.tensor(losses))
        assert torch.allclose(weights[0], torch.tensor(expected, dtype=torch.float64), atol=1e-5), losses
    scaled = [solve(gram, losses_K=scale * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)) for scale in (1e-9, 1e9)]
    assert torch.allclose(*scaled, rtol=1e-9)
    mask = torch.tensor([[True, True, False]])  # the loss of one who is absent is not the largest
    weights = solve(gram, mask, losses_K=torch.tensor([1.0, 1.0, 1e9]))
    assert torch.allclose(weights, torch.tensor([[1 / 3, 1 / 3, 0.0]], dtype=torch.float64))


def test_option_errors():
    """Losses that are silently taken as equal; a cap that no weights can keep."""
    for normalise, needed in (("none", False), ("l2", False), ("loss", True), ("loss+", True)):
        assert build_aggregator("mgda", normalise=normalise).needs_losses is needed
    with pytest.raises(ValueError, match="losses_K"):
        build_aggregator("mgda", normalise="loss")(torch.eye(2)[None])
    for cap in (0.5, 1 - 1e-12):
        with pytest.raises(ValueError, match="cap.*at least 1"):
            build_aggregator("mgda", cap=cap)
    with pytest.raises(ValueError, match="cap"):
        build_aggregator("mgda", cap=-1)


def test_bounds_that_leave_no_room():
    """Bounds below 1 in sum, zero or infinite: NaN, or weights that do not sum to 1."""
    gram = gramian(make_rows("random", 4))
    upper = torch.tensor([0.1, 0.2, 0.1, 0.1], dtype=torch.float64).expand(B, 4)
    pinned = solve_simplex_qp(gram, upper_BK=upper)
    assert torch.allclose(pinned.weights_BK, upper / 0.5, atol=1e-12) and (pinned.kkt_residual_B < 1e-12).all()
    some = torch.tensor([0.0, 1.0, torch.inf, 0.3], dtype=torch.float64).expand(B, 4)
    bounded = solve_simplex_qp(gram, upper_BK=some)
    alone = solve_simplex_qp(gram[:, 1:, 1:], upper_BK=some[:, 1:])
    assert (bounded.weights_BK[:, 0] == 0).all()
    assert torch.allclose(bounded.weights_BK[:, 1:], alone.weights_BK, atol=1e-8)
    assert (solve_simplex_qp(gram, upper_BK=torch.zeros(B, 4)).weights_BK == 0).all()
    free = solve_simplex_qp(gram)
    assert torch.allclose(solve_simplex_qp(gram, upper_BK=torch.ones(B, 4)).value_B, free.value_B, rtol=1e-9)


@pytest.mark.parametrize("family", DEGENERATE)
def test_many_capped_objectives(family, monkeypatch):
    """128 objectives, a third of them at their cap."""
    k = 128
    gram, upper = gramian(make_rows(family, k))[:2], 2 * make_preference(k).expand(2, k)
    steps = count_steps(monkeypatch, simplex)
    solution = solve_simplex_qp(gram, upper_BK=upper)
    assert len(steps) <= simplex.MAX_ITERATIONS and (solution.weights_BK <= upper).all()
    assert (solution.kkt_residual_B <= 1e-11).all()


def test_capped_float32_sums():
    """Sums in float32 leave negative eigenvalues: NaN, or caps that do not hold."""
    for family in ("rank-three", "duplicates", "stationary"):
        gram = gramian(make_rows(family, 16).float())
        for normalise in ("none", "l2"):
            aggregator = build_aggregator("mgda", cap=2, normalise=normalise)
            weights = aggregator(gram)
            assert (weights <= 2 / 16).all() and torch.allclose(weights.sum(1), torch.ones(B).double())
            assert (aggregator.kkt_residual_B < 1e-8).all()
