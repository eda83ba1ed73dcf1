"""FairGrad and Nash-MTL: the equation holds, for every family, preference and alpha; and what follows from it."""

import numpy as np
import pytest
import torch

from megatron_moo.aggregation import fairgrad
from megatron_moo.aggregation.fairgrad import FairGrad, NashMTL, solve_fairness
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size

ALPHAS = (0.25, 1.0, 2.0, 5.0)
EXTREME = torch.logspace(-6, 0, 64, dtype=torch.float64)


def unit_gramian(rows):
    unit = rows / rows.norm(dim=2, keepdim=True)
    return unit @ unit.mT


def equation_error(gram, weights, preference, alpha):
    """Largest error of ``(Gw)_k = c (u_k / w_k)^(1/alpha)`` [B], in extended precision, relative to the terms of Gw.

    c undoes the normalisation of w; it is the one that fits the rows best where the products are not rounding. The
    Gramian has the stated noise: 1e-12 of its diagonal.
    """
    gram, weights = gram.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    gram = gram + 1e-12 * np.eye(gram.shape[1]) * gram
    products = np.einsum("bij,bj->bi", gram, weights)
    terms = np.einsum("bij,bj->bi", np.abs(gram), weights)
    wanted = (preference.numpy().astype(np.longdouble) / weights) ** (1 / np.longdouble(alpha))
    # w'Gw = c sum_k w_k (u_k / w_k)^(1/alpha), a sum of positive terms.
    scale = (weights * products).sum(1) / (weights * wanted).sum(1)
    return (np.abs(products - scale[:, None] * wanted) / terms).max(1)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_equation(family, k):
    """A solver that stops early, or that reports a residual of some other equation."""
    rows = make_rows(family, k)
    for preference in (torch.full((k,), 1 / k, dtype=torch.float64), make_preference(k), EXTREME[-k:]):
        for alpha in ALPHAS if k < 64 else (2.0,):
            aggregator = FairGrad(alpha=alpha)
            weights = aggregator(gramian(rows), None, preference)
            assert (aggregator.kkt_residual_B < 1e-11).all()
            if rows.any():  # K = 1 and stationary: nobody is active
                assert (weights > 0).all()
                assert torch.allclose(weights.sum(1), preference.sum().expand(B), rtol=1e-12)
                # More than the residual: the scale is found from products that may be rounding.
                assert (equation_error(gramian(rows), weights, preference, alpha) < 1e-9).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_nash_is_fairgrad_of_one(family):
    """Two implementations that drift apart."""
    gram, preference = gramian(make_rows(family, 6)), make_preference(6)
    nash = NashMTL()
    assert nash.options == {} and torch.equal(nash(gram, None, preference), FairGrad(alpha=1)(gram, None, preference))


def test_two_objectives_closed_form():
    """Nash's weights of two objectives are in inverse proportion to the lengths, whatever the angle."""
    rows = make_rows("random", 2)
    inverse = 1 / rows.norm(dim=2)
    weights = NashMTL()(gramian(rows))
    torch.testing.assert_close(weights, inverse / inverse.sum(1, keepdim=True), rtol=1e-10, atol=0)


def test_pinned():
    """Orthogonal rows: ``w_k |g_k|^2 = (u_k / w_k)^(1/alpha)``, so ``w_k`` goes with ``(u_k |g_k|^-2a)^(1/(1+a))``."""
    preference = make_preference(3)
    squares = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    for alpha in ALPHAS:
        expected = (preference * squares**-alpha) ** (1 / (1 + alpha))
        weights = FairGrad(alpha=alpha)(torch.diag(squares)[None], None, preference)
        torch.testing.assert_close(weights[0], expected / expected.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_conflict_free_and_still_where_stationary(family, alpha):
    """An update that hurts a language, or a step where no direction helps all."""
    for k in (2, 5, 16):
        rows = make_rows(family, k)
        weights = FairGrad(alpha=alpha)(gramian(rows), None, make_preference(k))
        direction = combine(weights, rows)
        products = (rows @ direction[..., None])[..., 0] / rows.norm(dim=2)
        assert (products >= -1e-11 * size(weights, rows)[:, None]).all()
        if family in ("stationary", "opposite") and k % 2 == 0:
            assert (direction.norm(dim=1) <= 2e-6 * k * size(weights, rows)).all()


def test_nash_does_not_look_at_lengths():
    """A language that counts more because its gradients are long."""
    rows = make_rows("conflicting", 5)
    lengths = torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]
    one, other = (combine(NashMTL()(gramian(r)), r) for r in (rows, rows * lengths))
    assert (torch.nn.functional.cosine_similarity(one, other, dim=1) > 1 - 1e-12).all()


def test_larger_alpha_raises_the_smallest_gain():
    """An exponent that is turned round."""
    rows = make_rows("random", 6)
    gains = []
    for alpha in ALPHAS:
        direction = combine(FairGrad(alpha=alpha)(gramian(rows)), rows)
        products = (rows @ direction[..., None])[..., 0] / direction.norm(dim=1, keepdim=True)
        gains.append(products.amin(1) / products.amax(1))
    assert all((more > less).all() for less, more in zip(gains, gains[1:], strict=False))


def test_float32_gramians():
    """Negative eigenvalues of a Gramian summed in float32: NaN from Cholesky, or weights that follow them."""
    for family in FAMILIES:
        rows = make_rows(family, 16)
        noise = 1 + 1e-6 * torch.randn(B, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gram = gramian(rows) * (noise + noise.mT) / 2
        aggregator = FairGrad()
        weights = aggregator(gram)
        assert weights.isfinite().all() and (weights > 0).all()
        assert (aggregator.kkt_residual_B < 1e-2).all()  # of the Gramian as it is, without the shift


def test_bound_of_iterations_is_reported():
    """A solver that runs out of iterations and returns its last iterate as if it were the answer."""
    unit = unit_gramian(make_rows("ill-conditioned", 16))
    active = torch.ones(B, 16, dtype=torch.bool)
    target = EXTREME[-16:].log().expand(B, 16)
    y, error = solve_fairness(unit, target, active, 2.0, max_iterations=3)
    assert (y > 0).all() and (error > 1e-6).any()
    assert (solve_fairness(unit, target, active, 2.0)[1] < 1e-11).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bound_of_iterations_is_rarely_met(alpha, monkeypatch):
    """A solver that got slower: the bound is 100 iterations."""
    steps = []
    advance = fairgrad._advance
    monkeypatch.setattr(fairgrad, "_advance", lambda *arguments: steps.append(1) or advance(*arguments))
    for family in set(FAMILIES) - {"uneven", "very-uneven", "opposite", "ill-conditioned"}:
        steps.clear()
        FairGrad(alpha=alpha)(gramian(make_rows(family, 16)), None, EXTREME[-16:])
        assert len(steps) <= 60


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_agrees_with_torchjd(alpha):
    """An equation that is ours alone. Theirs is solved by scipy's least squares, well enough for rows of length 1."""
    weighting = pytest.importorskip("torchjd.aggregation").FairGradWeighting
    pytest.importorskip("scipy")
    for family in ("random", "aligned", "conflicting"):
        rows = make_rows(family, 4)
        gram = gramian(rows / rows.norm(dim=2, keepdim=True))
        theirs = torch.stack([weighting(alpha=alpha)(matrix) for matrix in gram])
        uniform = torch.full((4,), 0.25, dtype=torch.float64)
        accurate = torch.from_numpy(equation_error(gram, theirs, uniform, alpha).astype(float)) < 1e-8
        assert accurate.any()
        theirs = theirs / theirs.sum(1, keepdim=True)
        torch.testing.assert_close(FairGrad(alpha=alpha)(gram)[accurate], theirs[accurate], rtol=1e-6, atol=1e-6)


def test_where_torchjd_is_not_accurate():
    """Its solver starts from uniform weights and has absolute tolerances: small gradients stop it far too early."""
    weighting = pytest.importorskip("torchjd.aggregation").FairGradWeighting
    pytest.importorskip("scipy")
    gram = 1e-12 * gramian(make_rows("conflicting", 4))
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    theirs = torch.stack([weighting(alpha=2.0)(matrix) for matrix in gram])
    ours = FairGrad(alpha=2)(gram)
    assert (equation_error(gram, ours, uniform, 2.0) < 1e-11).all()
    assert (equation_error(gram, theirs, uniform, 2.0) > 1e-3).any()
