"""UPGrad and DualProj: conflict-free, nothing without conflict, and equal to what the papers say."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from megatron_moo.aggregation import interior
from megatron_moo.aggregation.dualproj import DualProj
from megatron_moo.aggregation.pcgrad import PCGrad
from megatron_moo.aggregation.upgrad import UPGrad
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size

both = pytest.mark.parametrize("method", [UPGrad, DualProj])
every_family = pytest.mark.parametrize("family", FAMILIES)


def products(rows, weights):
    """Inner products of each row, scaled to length 1, with the direction [B, K]."""
    return (rows @ combine(weights, rows)[..., None]).squeeze(-1) / rows.norm(dim=2)


def projection(rows, vector):
    """The point of the dual cone of the rows [K, N] closest to a vector [N]."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return vector + unit.T @ nnls(unit.T, -vector, maxiter=1000)[0]


@both
@every_family
def test_conflict_free(method, family):
    """A direction that hurts a language, or a residual that does not know of it."""
    for k in (2, 5, 16, 64):
        for preference in (None, make_preference(k), torch.logspace(-6, 0, k, dtype=torch.float64)):
            rows = make_rows(family, k)
            aggregator = method()
            weights = aggregator(gramian(rows), None, preference)
            # 1e-12 is the noise that rows are taken to carry; below 1e-15 the sum itself is rounding.
            assert (products(rows, weights) >= -3e-12 * size(weights, rows)[:, None]).all()
            assert (aggregator.kkt_residual_B < 1e-12).all()
            assert (weights >= (1 / k if preference is None else preference)).all()
            if k == 64:
                break


@both
def test_nothing_without_conflict(method):
    """A method that changes the mean where nobody is hurt: bit for bit the preference."""
    for family in ("aligned", "nearly-equal"):
        for k in (2, 7, 32):
            preference = 3 * make_preference(k)
            weights = method()(gramian(make_rows(family, k)), None, preference)
            assert torch.equal(weights, preference.expand(B, k))


def test_dualproj_keeps_a_harmless_mean():
    """Rows conflict but their mean hurts nobody: DualProj does nothing, UPGrad acts."""
    rows = torch.tensor([[[1.0, 0.0], [-0.1, 1.0]]], dtype=torch.float64)
    mean = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert torch.equal(DualProj()(gramian(rows)), mean)
    assert (UPGrad()(gramian(rows)) > mean).all()


@every_family
def test_projects_rows_or_their_mean(family):
    """The papers' definitions by non-negative least squares on the rows, preferences uneven."""
    k = 5
    rows, preference = make_rows(family, k)[:3], make_preference(k)
    gram = gramian(rows)
    references = {UPGrad: [], DualProj: []}
    for matrix in rows.numpy():
        u = preference.numpy()
        references[UPGrad].append(sum(u[i] * projection(matrix, matrix[i]) for i in range(k)))
        references[DualProj].append(projection(matrix, u @ matrix))
    for method, reference in references.items():
        weights = method()(gram, None, preference)
        error = (combine(weights, rows) - torch.tensor(np.array(reference))).norm(dim=1)
        assert (error <= 1e-6 * size(weights, rows)).all(), error / size(weights, rows)


@both
def test_recognises_stationary_rows(method):
    """Steps where a positive combination of the rows vanishes: no other direction than 0 helps everybody."""
    for family in ("stationary", "opposite"):
        for k in (2, 6, 16):
            rows = make_rows(family, k)
            weights = method()(gramian(rows))
            assert (combine(weights, rows).norm(dim=1) <= 1e-6 * size(weights, rows)).all()


def test_half_stationary_rows_may_move():
    """Pareto stationary by two of three rows: d need not be 0, but must not touch those two."""
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0]]], dtype=torch.float64)
    for method in (UPGrad, DualProj):
        direction = combine(method()(gramian(rows)), rows)
        assert direction[0, 1] > 0.1 and abs(direction[0, 0]) < 1e-11


@both
@every_family
def test_permutation_and_scale(method, family):
    """A solver that favours the first objective, or an absolute threshold."""
    k = 7
    rows, preference = make_rows(family, k), make_preference(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    weights = method()(gramian(rows), None, preference)
    direction, yardstick = combine(weights, rows), size(weights, rows)
    permuted = method()(gramian(rows[:, order]), None, preference[order])
    assert ((combine(permuted, rows[:, order]) - direction).norm(dim=1) <= 1e-8 * yardstick).all()
    for scale in (1e-8, 1e8):
        scaled = method()(gramian(scale * rows), None, preference)
        assert ((combine(scaled, rows) - direction).norm(dim=1) <= 1e-8 * yardstick).all()
    assert torch.equal(method()(gramian(rows) * 2.0**-80, None, preference), weights)


def test_linear_under_scaling():
    """The paper's property: d is linear in each row's scale, so that length counts as it does in the mean."""
    rows = make_rows("conflicting", 6)
    one, other = (0.5 + torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).unbind()
    direction = [combine(UPGrad()(gramian(c * rows)), c * rows) for c in (one, other, one + 3 * other)]
    assert torch.allclose(direction[0] + 3 * direction[1], direction[2], rtol=0, atol=1e-9)


@both
def test_masks(method):
    """An absent language that enters as a zero row, or a preference not renormalised."""
    rows, preference = make_rows("conflicting", 6), 2 * make_preference(6)
    gram, kept = gramian(rows), [1, 2, 5]
    mask = torch.zeros(B, 6, dtype=torch.bool)
    mask[:, kept] = True
    gram[:, 0] = torch.nan
    weights = method()(gram, mask, preference)
    alone = method()(gram[:, kept][:, :, kept], None, preference[kept])
    assert torch.allclose(weights[:, kept], alone, rtol=1e-9, atol=0)
    assert (weights[:, [0, 3, 4]] == 0).all()
    assert (method()(gram, mask & False) == 0).all()


@every_family
def test_upgrad_is_pcgrad_for_two(family):
    """With two rows one projection resolves all conflict, so that both methods are the same."""
    rows = make_rows(family, 2)
    ours, theirs = (method()(gramian(rows), None, make_preference(2)) for method in (UPGrad, PCGrad))
    assert torch.allclose(ours, theirs, rtol=1e-11, atol=0)


def test_pinned():
    """Rows (2, 0) and (-1, 1): worked out by hand."""
    gram = torch.tensor([[[4.0, -2.0], [-2.0, 2.0]]])
    # (2, 0) + (-1, 1) = (1, 1) and (-1, 1) + (1, 0) = (0, 1).
    expected = torch.tensor([[0.75, 1.0]], dtype=torch.float64)
    assert torch.allclose(UPGrad()(gram), expected, rtol=1e-11)
    # The mean (0.5, 0.5) conflicts with neither; with preference 1 : 9 it is (-0.7, 0.9) and becomes (0, 0.9).
    assert torch.equal(DualProj()(gram), torch.full((1, 2), 0.5, dtype=torch.float64))
    uneven = DualProj()(gram, None, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert torch.allclose(uneven, torch.tensor([[0.45, 0.9]], dtype=torch.float64), rtol=1e-11)


@both
def test_same_where_looking_is_not_free(method, monkeypatch):
    """The CPU drops solved problems and an accelerator does not: they must agree."""
    gram = torch.cat([gramian(make_rows(family, 4)) for family in FAMILIES])
    early = method()(gram)
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    assert torch.equal(method()(gram), early)


def torchjd_weights(method, gram, **settings):
    """torchjd's weighting with its own projector, in which NNLS replaces the GPL solver."""
    linalg = pytest.importorskip("torchjd.linalg")
    aggregation = pytest.importorskip("torchjd.aggregation")

    class Projector(linalg.QuadprogProjector):
        _REQUIRED_DEPS = []

        def _project_weight_vector(self, u, G):  # noqa: N803
            root = np.linalg.cholesky(G).T
            return u + nnls(root, -root @ u)[0]

    weighting = {UPGrad: aggregation.UPGradWeighting, DualProj: aggregation.DualProjWeighting}[method]
    preference = make_preference(gram.shape[1])
    theirs = weighting(preference, projector=Projector(**settings))
    return torch.stack([theirs(matrix) for matrix in gram])


@both
@pytest.mark.parametrize("family", ["random", "conflicting", "aligned", "nearly-equal"])
def test_equals_torchjd_without_its_thresholds(method, family):
    """Another reading of the preference: u_k weighs the projection of row k, or of the mean."""
    rows = make_rows(family, 5)
    theirs = torchjd_weights(method, gramian(rows), norm_eps=0.0, reg_eps=0.0 if family != "nearly-equal" else 1e-12)
    ours = method()(gramian(rows), None, make_preference(5))
    assert ((combine(ours, rows) - combine(theirs, rows)).norm(dim=1) <= 1e-6 * size(ours, rows)).all()


@both
def test_where_torchjd_errs(method):
    """Not to be copied: 1e-4 added to the diagonal leaves conflicts, and a trace below 1e-4 turns all into the mean."""
    rows = make_rows("stationary", 5)
    weights, theirs = method()(gramian(rows), None, make_preference(5)), torchjd_weights(method, gramian(rows))
    worst, their_worst = ((products(rows, w) / size(w, rows)[:, None]).amin() for w in (weights, theirs))
    assert worst > -3e-12 and their_worst < -1e-6
    rows = make_rows("conflicting", 5)
    rows = rows - 0.05 * rows.mean(1, keepdim=True)
    small = 1e-4 * rows
    theirs = torchjd_weights(method, gramian(small))
    assert torch.equal(theirs, make_preference(5).expand(B, 5))
    weights = [method()(gramian(r), None, make_preference(5)) for r in (rows, small)]
    assert torch.allclose(*weights, rtol=1e-9) and (weights[0] > theirs).any()
