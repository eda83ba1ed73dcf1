"""PCGrad and Gradient Vaccine against plain loops over gradients, and against torchjd with the same orders."""

import pytest
import torch

from megatron_moo.aggregation import build_aggregator
from megatron_moo.aggregation.gradvac import vaccinate
from megatron_moo.aggregation.order import visit_order
from megatron_moo.aggregation.pcgrad import surgery
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size

CPU = torch.device("cpu")


def draw(k, seed=0, blocks=B):
    return visit_order(blocks, k, torch.Generator().manual_seed(seed), CPU)


def reference_rows(rows, order, target=None, beta=0.0):
    """Algorithm 1 of either paper on one block's rows themselves; PCGrad without targets. Changes ``target``."""
    changed = rows.clone()
    for i in range(len(rows)):
        for j in order[i].tolist():
            product = changed[i] @ rows[j]
            if target is None:
                if product < 0:
                    changed[i] -= product / rows[j].square().sum() * rows[j]
                continue
            length, length_j = changed[i].norm(), rows[j].norm()
            cosine, goal = product / (length * length_j), target[i, j].clone()
            if cosine < goal:
                amount = length * (goal * (1 - cosine**2).sqrt() - cosine * (1 - goal**2).sqrt())
                changed[i] += amount / (length_j * (1 - goal**2).sqrt()) * rows[j]
            target[i, j] = (1 - beta) * goal + beta * cosine
    return changed


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_pcgrad_equals_projection_of_the_rows(family, k):
    """Coefficients that drift from the rows they stand for."""
    rows, preference = make_rows(family, k), make_preference(k)
    order = draw(k)
    weights = build_aggregator("pcgrad")(gramian(rows), None, preference, torch.Generator().manual_seed(0))
    expected = torch.stack([preference @ reference_rows(rows[b], order[b]) for b in range(B)])
    slack = 1e-9 * size(weights, rows)
    assert ((combine(weights, rows) - expected).norm(dim=1) <= slack).all()


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("family", ["random", "conflicting", "aligned", "uneven", "nearly-equal"])
def test_gradvac_equals_the_rows_over_steps(family, k):
    """Targets updated too early, for the wrong pair, or with the cosine after the correction."""
    aggregator = build_aggregator("gradvac", beta=0.2, target=0.1)
    targets = torch.full((B, k, k), 0.1, dtype=torch.float64)
    preference = make_preference(k)
    for step in range(4):
        rows, order = make_rows(family, k, step), draw(k, step)
        weights = aggregator(gramian(rows), None, preference, torch.Generator().manual_seed(step))
        expected = torch.stack([preference @ reference_rows(rows[b], order[b], targets[b], beta=0.2) for b in range(B)])
        slack = 1e-8 * size(weights, rows)
        assert ((combine(weights, rows) - expected).norm(dim=1) <= slack).all()
    assert torch.allclose(aggregator.state_dict()["target_BKK"], targets, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradvac_with_zero_targets_is_pcgrad(family):
    """Equivalence of the two kernels in every degenerate case."""
    gram, preference = gramian(make_rows(family, 6)), make_preference(6)
    order = draw(6)
    active = torch.ones(B, 6, dtype=torch.bool)
    zero = torch.zeros_like(gram)
    scale = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    projected = surgery(gram / scale, active, order)
    vaccinated, targets = vaccinate(gram / scale, active, order, zero, beta=0.0)
    assert torch.equal(targets, zero)
    rows = make_rows(family, 6)
    distance = (preference @ (projected - vaccinated))[:, None, :] @ rows
    assert (distance.squeeze(1).norm(dim=1) <= 1e-6 * size(preference @ projected, rows)).all()


@pytest.mark.parametrize("kernel", ["surgery", "vaccinate"])
def test_equivariant_with_the_order(kernel):
    """An index that mixes up rows and columns: relabelling objectives and orders must relabel the coefficients."""
    k = 5
    gram, order = gramian(make_rows("conflicting", k)), draw(5)
    active = torch.ones(B, k, dtype=torch.bool)
    new = torch.randperm(k, generator=torch.Generator().manual_seed(1))  # new[i]: where the old i-th goes to
    old = new.argsort()
    target = 0.3 * torch.rand(B, k, k, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for case in (lambda x: x, lambda x: x[:, old][:, :, old]):
        visits = order if not results else new[order][:, old]
        if kernel == "surgery":
            results.append(surgery(case(gram), active, visits))
        else:
            results.append(vaccinate(case(gram), active, visits, case(target), 0.1)[0])
    assert torch.allclose(results[0][:, old][:, :, old], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_nothing_happens_without_conflict(name):
    """A method that touches gradients which agree; the weights must be the preference to the last bit."""
    for k in (2, 5, 16):
        gram, preference = gramian(make_rows("aligned", k)), make_preference(k)
        assert torch.equal(build_aggregator(name)(gram, None, preference), preference.expand(B, k))


def test_pcgrad_of_two_is_conflict_free():
    """A projection onto the wrong side."""
    for family in FAMILIES:
        rows = make_rows(family, 2)
        weights = build_aggregator("pcgrad")(gramian(rows), None, make_preference(2))
        products = (rows @ combine(weights, rows)[:, :, None]).squeeze(2)
        assert (products >= -1e-10 * rows.norm(dim=2) * size(weights, rows)[:, None]).all()


def test_pcgrad_of_three_is_not():
    """Documented: a later projection can bring an earlier conflict back."""
    angles = torch.tensor([0.0, 100.0, 200.0], dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1)[None] * torch.tensor([1.0, 1.0, 3.0])[:, None]
    products = (rows @ combine(build_aggregator("pcgrad")(gramian(rows)), rows)[:, :, None]).squeeze(2)
    assert products.min() < -0.1


def test_pinned():
    """g1 = (1, 0), g2 = (-1, 1): g1' = (1/2, 1/2), g2' = (0, 1), d = (1/4, 3/4)."""
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 1.0]]], dtype=torch.float64)
    for name in ("pcgrad", "gradvac"):
        weights = build_aggregator(name)(gramian(rows))
        assert torch.allclose(weights, torch.tensor([[1.0, 0.75]], dtype=torch.float64), atol=1e-12)


def test_opposite_rows_cancel():
    """Division by what is left of a row that was projected away."""
    rows = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for name in ("pcgrad", "gradvac"):
        aggregator = build_aggregator(name)
        for seed in range(3):
            d = combine(aggregator(gramian(rows), generator=torch.Generator().manual_seed(seed)), rows)
            assert torch.allclose(d, torch.tensor([[0.0, 1 / 3]], dtype=torch.float64), atol=1e-6)


def test_vaccine_reaches_its_target():
    """The formula: after the correction the cosine is the target."""
    rows = make_rows("conflicting", 2)
    target = torch.full((B, 2, 2), 0.6, dtype=torch.float64)
    coefficients, _ = vaccinate(gramian(rows), torch.ones(B, 2, dtype=torch.bool), draw(2), target, 0.5)
    changed = coefficients @ rows
    for i, j in ((0, 1), (1, 0)):
        cosine = torch.nn.functional.cosine_similarity(changed[:, i], rows[:, j], dim=1)
        assert torch.allclose(cosine, torch.full((B,), 0.6, dtype=torch.float64))


def test_targets_of_unseen_pairs_stay():
    """A language absent from a step must not have its history pulled towards zero."""
    aggregator = build_aggregator("gradvac", beta=0.5, target=0.4)
    mask = torch.tensor([True, True, False, True]).expand(B, 4)
    aggregator(gramian(make_rows("random", 4)), mask)
    targets = aggregator.state_dict()["target_BKK"]
    assert (targets[:, 2, :] == 0.4).all() and (targets[:, :, 2] == 0.4).all()
    assert (targets.diagonal(dim1=1, dim2=2) == 0.4).all()
    pairs = targets[:, [0, 0, 1, 1, 3, 3], [1, 3, 0, 3, 0, 1]]
    assert (pairs != 0.4).all()


def test_targets_near_one_stay_finite():
    """Two languages that agreed for thousands of steps and then do not."""
    aggregator = build_aggregator("gradvac", beta=1.0)
    equal = torch.ones(1, 2, 2, dtype=torch.float64)
    aggregator(equal)
    weights = aggregator(torch.eye(2, dtype=torch.float64)[None])
    assert weights.isfinite().all() and weights.max() < 50


def test_orders():
    """An order that repeats or includes the row itself, or an uneven shuffle."""
    for k in (1, 2, 6):
        for generator in (None, torch.Generator().manual_seed(0), [torch.Generator().manual_seed(b) for b in range(B)]):
            order = visit_order(B, k, generator, CPU)
            assert order.shape == (B, k, k - 1)
            full = torch.cat([order, torch.arange(k).expand(B, k)[..., None]], 2).sort(2).values
            assert torch.equal(full, torch.arange(k).expand(B, k, k))
    assert visit_order(1, 4, None, CPU)[0, 2].tolist() == [3, 0, 1]
    first = visit_order(3000, 4, torch.Generator().manual_seed(0), CPU)[:, 1, 0].bincount(minlength=4)
    assert first[1] == 0 and (first[[0, 2, 3]] - 1000).abs().max() < 120


@pytest.mark.parametrize("family", ["random", "conflicting", "uneven", "aligned"])
def test_equals_torchjd(family, monkeypatch):
    """A shared misreading is unlikely: torchjd's weights, with its global draws replaced by our orders."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    k = 5
    gram, order = gramian(make_rows(family, k)), draw(k)
    queue = []
    monkeypatch.setattr(torch, "randperm", lambda n, **_: queue.pop(0))
    pcgrad = build_aggregator("pcgrad")(gram, generator=torch.Generator().manual_seed(0))
    gradvac = build_aggregator("gradvac", beta=0.3)
    theirs = [torchjd.GradVacWeighting(beta=0.3, eps=0.0) for _ in range(B)]
    for b in range(B):
        queue[:] = [torch.cat([order[b, i], torch.tensor([i])]) for i in range(k)]
        assert torch.allclose(torchjd.PCGradWeighting()(gram[b]) / k, pcgrad[b], rtol=1e-9, atol=1e-12)
    for step in range(3):
        gram, order = gramian(make_rows(family, k, step)), draw(k, step)
        ours = gradvac(gram, generator=torch.Generator().manual_seed(step))
        for b in range(B):
            queue[:] = [order[b, i] - (order[b, i] > i).long() for i in range(k)]  # positions among the others
            assert torch.allclose(theirs[b](gram[b]) / k, ours[b], rtol=1e-7, atol=1e-9)
