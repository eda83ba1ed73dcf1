"""MGDA and its quadratic program: exact, certified, defined when it is not."""

import itertools

import numpy as np
import pytest
import torch

from megatron_moo.aggregation import build_aggregator, interior, simplex, solve_simplex_qp
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size


def certified_excess(gram, weights):
    """Upper bounds, in extended precision, of w'Gw - optimum and of what rounding of G leaves undetermined.

    By convexity f(v) >= f(w) + 2 (Gw)'(v - w), hence optimum >= 2 min_k (Gw)_k - w'Gw.
    """
    gram, weights = gram.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    products = np.einsum("bij,bj->bi", gram, weights)
    value = np.einsum("bi,bi->b", weights, products)
    lengths = np.sqrt(np.einsum("bii->bi", gram))
    return 2 * (value - products.min(1)), value, np.einsum("bi,bi->b", weights, lengths) ** 2


DEGENERATE = ("rank-one", "rank-three", "duplicates", "opposite", "uneven", "very-uneven", "ill-conditioned")


def count_steps(monkeypatch, module):
    """A list that grows by one with every step of the solver."""
    steps, advance = [], module._advance
    monkeypatch.setattr(module, "_advance", lambda *state: steps.append(1) or advance(*state))
    return steps


@pytest.mark.parametrize("k", [2, 3, 5, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_within_1e9_of_the_optimum(family, k):
    """An inexact solver: Frank-Wolfe at its usual settings overshoots by a third at K = 64."""
    for preference in (None, make_preference(k), torch.logspace(-6, 0, k, dtype=torch.float64)):
        gram = gramian(make_rows(family, k))
        aggregator = build_aggregator("mgda")
        weights = aggregator(gram, None, preference)
        weights = weights / weights.sum(1, keepdim=True)
        assert (weights >= 0).all()
        excess, value, rounding = certified_excess(gram, weights)
        # Below 1e-14 of the rows' squares the float64 Gramian itself is rounding.
        assert (excess <= 1e-9 * value + 1e-14 * rounding).all(), (excess / value).max()
        assert (aggregator.kkt_residual_B <= 1e-9).all()


@pytest.mark.parametrize("family", DEGENERATE)
def test_many_objectives(family, monkeypatch):
    """Rank-deficient and ill-conditioned Gramians of 128 objectives: loss of digits, or a bound that is no bound."""
    gram = gramian(make_rows(family, 128))[:2]
    steps = count_steps(monkeypatch, simplex)
    solution = solve_simplex_qp(gram, None, make_preference(128).expand(2, -1))
    assert len(steps) <= (simplex.MAX_ITERATIONS if family == "very-uneven" else 35)
    excess, value, rounding = certified_excess(gram, solution.weights_BK)
    assert (excess <= 1e-9 * value + 1e-14 * rounding).all()
    assert (solution.kkt_residual_B <= 1e-11).all()


def brute_force(gram):
    """Least norm over the simplex by trying every support [B]."""
    gram = gram.numpy()
    best = np.full(len(gram), np.inf)
    for count in range(1, gram.shape[1] + 1):
        for support in itertools.combinations(range(gram.shape[1]), count):
            for b, matrix in enumerate(gram[:, support][:, :, support]):
                bordered = np.block([[matrix, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
                solution = np.linalg.lstsq(bordered, np.r_[np.zeros(count), 1.0], rcond=None)[0][:count]
                if (solution >= -1e-12).all() and abs(solution.sum() - 1) < 1e-9:
                    best[b] = min(best[b], solution @ matrix @ solution)
    return best


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family):
    """A certificate that is computed wrongly would accept anything."""
    gram = gramian(make_rows(family, 5))
    solution = solve_simplex_qp(gram)
    scale = gram.diagonal(dim1=1, dim2=2).amax(1).numpy()
    assert (
        np.abs(solution.value_B.numpy() - brute_force(gram)) <= 1e-9 * solution.value_B.numpy() + 1e-13 * scale
    ).all()


def test_two_objectives_closed_form():
    """Sign or index slips that only symmetric cases would hide."""
    rows = make_rows("random", 2)
    gram = gramian(rows)
    a, b, c = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    first = ((c - b) / (a + c - 2 * b)).clamp(0, 1)
    weights = build_aggregator("mgda")(gram)
    assert torch.allclose(weights, torch.stack([first, 1 - first], 1), rtol=1e-9, atol=1e-11)


def test_pinned():
    """Orthogonal rows of lengths 1, 2, 3: weights go with 1 / length^2."""
    weights = build_aggregator("mgda")(torch.diag(torch.tensor([1.0, 4.0, 9.0]))[None])
    assert torch.allclose(weights, torch.tensor([[36.0, 9.0, 4.0]], dtype=torch.float64) / 49, atol=1e-11)


@pytest.mark.parametrize("normalise", ["none", "l2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conflict_free_and_balanced(family, normalise):
    """A direction that hurts a language: MGDA promises <g_k, d> >= |d|^2 (none: over raw rows, l2: over unit ones)."""
    for k in (2, 5, 16):
        rows = make_rows(family, k)
        weights = build_aggregator("mgda", normalise=normalise)(gramian(rows))
        direction = combine(weights, rows)
        products = (rows @ direction[:, :, None]).squeeze(2)
        bound = direction.norm(dim=1) ** 2 if normalise == "none" else torch.zeros(B)
        slack = 1e-7 * rows.norm(dim=2) * size(weights, rows)[:, None]
        assert (products >= bound[:, None] - slack).all()


@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_recognises_stationary_rows(normalise):
    """Steps at a Pareto-stationary point."""
    for family in ("stationary", "opposite"):
        for k in (2, 6, 16):
            rows = make_rows(family, k)
            weights = build_aggregator("mgda", normalise=normalise)(gramian(rows))
            assert (combine(weights, rows).norm(dim=1) <= 1e-6 * rows.norm(dim=2).amax(1)).all()


def test_ties_go_by_preference():
    """Duplicated rows: an arbitrary split would make logged weights jump between steps."""
    rows = make_rows("random", 4)[:, [0, 0, 1, 1, 1, 2, 3]]
    preference = make_preference(7)
    weights = build_aggregator("mgda")(gramian(rows), None, preference)
    for group in ([0, 1], [2, 3, 4]):
        total = weights[:, group].sum(1, keepdim=True)
        share = preference[group] / preference[group].sum()
        assert torch.allclose(weights[:, group], total * share, rtol=0, atol=1e-4)


def test_normalised_solution_ignores_lengths():
    """With l2 the direction is that of the unit rows' hull, whatever the rows' lengths."""
    rows = make_rows("random", 5)
    lengths = torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]
    aggregator = build_aggregator("mgda", normalise="l2")
    one, other = (combine(aggregator(gramian(r)), r) for r in (rows, rows * lengths))
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=1)
    assert (cosine > 1 - 1e-9).all()
    assert torch.allclose(aggregator(gramian(rows * lengths)).sum(1), torch.ones(B, dtype=torch.float64))


def test_bound_of_iterations_is_reported():
    """A solver that runs out of iterations and returns its last iterate as if it were the answer."""
    gram = gramian(make_rows("ill-conditioned", 16))
    loose = solve_simplex_qp(gram, max_iterations=3)
    exact = solve_simplex_qp(gram)
    assert torch.allclose(loose.weights_BK.sum(1), torch.ones(B, dtype=torch.float64))
    assert (loose.kkt_residual_B > 1e-6).any() and (exact.kkt_residual_B < 1e-12).all()
    assert (loose.value_B - 2 * loose.gap_B <= exact.value_B * (1 + 1e-9)).all()
    none = solve_simplex_qp(gram, max_iterations=0)
    assert torch.allclose(none.weights_BK, torch.full_like(none.weights_BK, 1 / 16))


@pytest.mark.parametrize("k", [3, 16, 128])
@pytest.mark.parametrize("capped", [False, True])
def test_gap_is_true_at_the_bound(k, capped):
    """A certificate that holds only at the optimum: after three steps it would say that the answer is good."""
    for family in ("random", "ill-conditioned", "uneven"):
        gram = gramian(make_rows(family, k))[:3]
        upper = 2 * make_preference(k).expand(3, k) if capped else None
        exact = solve_simplex_qp(gram, upper_BK=upper)
        gaps = []
        for steps in (0, 3, 6):
            loose = solve_simplex_qp(gram, max_iterations=steps, upper_BK=upper)
            assert (loose.value_B >= exact.value_B * (1 - 1e-9)).all()
            assert (loose.value_B - 2 * loose.gap_B <= exact.value_B * (1 + 1e-9)).all()
            if capped:
                assert (loose.weights_BK <= upper).all()
            gaps.append(loose.gap_B)
        assert (gaps[1] <= gaps[0]).all() and (gaps[2] <= gaps[1]).all()  # the best iterate, not the last


@pytest.mark.parametrize("k", [5, 16, 33])
@pytest.mark.parametrize("options", [{}, {"cap": 2.0}, {"cap": 2.0, "normalise": "l2"}])
def test_dropping_finished_blocks_changes_nothing(k, options, monkeypatch):
    """The CPU drops blocks that are done, an accelerator does not: indices that slip, or weights that depend on it."""
    gram = torch.cat([gramian(make_rows(family, k)) for family in FAMILIES])
    aggregator = build_aggregator("mgda", **options)
    dropping, residual = aggregator(gram), aggregator.kkt_residual_B
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    assert torch.equal(aggregator(gram), dropping)
    assert torch.equal(aggregator.kkt_residual_B, residual)


def test_indefinite_gramian_is_shifted_and_said_so():
    """Sums in float32 leave negative eigenvalues; an unguarded Cholesky would give NaN."""
    for family in ("rank-three", "duplicates", "stationary"):
        gram = gramian(make_rows(family, 16).float()).double()
        gram = gram * (1 + 1e-6 * torch.randn(gram.shape, generator=torch.Generator().manual_seed(0)))
        gram = (gram + gram.mT) / 2
        solution = solve_simplex_qp(gram)
        assert (solution.shift_B > 0).all() and (solution.shift_B <= 1e-4).all()
        assert (solution.kkt_residual_B < 1e-9).all()
        for name in ("mgda", "cagrad"):
            assert build_aggregator(name)(gram).isfinite().all()
    assert (solve_simplex_qp(gramian(make_rows("rank-three", 16))).shift_B == 0).all()


def test_never_worse_than_torchjd():
    """Frank-Wolfe with many iterations approaches the optimum from above."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    for family in ("random", "conflicting", "uneven"):
        gram = gramian(make_rows(family, 5))
        reference = torchjd.MGDAWeighting(epsilon=1e-6, max_iters=2000)
        theirs = torch.stack([reference(matrix) for matrix in gram])
        ours = build_aggregator("mgda")(gram)
        value = lambda w, gram=gram: (w * (gram @ w[..., None]).squeeze(-1)).sum(1)  # noqa: E731
        assert (value(ours) <= value(theirs) * (1 + 1e-9)).all()
        assert torch.allclose(value(ours), value(theirs), rtol=0.02)


def test_torchjd_stops_early():
    """Where it is no oracle: Frank-Wolfe at its own settings, above the optimum by more than a percent."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    gram = gramian(make_rows("conflicting", 64))
    value = lambda w: (w * (gram @ w[..., None]).squeeze(-1)).sum(1)  # noqa: E731
    theirs = torch.stack([torchjd.MGDAWeighting()(matrix) for matrix in gram])
    assert (value(theirs) > 1.01 * value(build_aggregator("mgda")(gram))).all()
