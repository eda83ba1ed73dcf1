"""What holds for every method: scale, masks, order, ties, independence of blocks, no hidden side effects."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moo.aggregation import AGGREGATORS, build_aggregator, interior
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size

METHODS = {name: (name, {}) for name in AGGREGATORS} | {
    "mgda-l2": ("mgda", {"normalise": "l2"}),
    "mgda-loss+": ("mgda", {"normalise": "loss+"}),
    "mgda-capped": ("mgda", {"cap": 2.0}),
    "cagrad-0.9": ("cagrad", {"c": 0.9}),
    "gradvac-0.2": ("gradvac", {"target": 0.2}),
    "aligned-mtl-rmse": ("aligned-mtl", {"scale": "rmse"}),
}
RANDOM = ("pcgrad", "gradvac", "gradvac-0.2", "random")
# d falls back to the mean where every two rows agree.
NO_OP = ("mean", "pcgrad", "upgrad", "dualproj")
# <g_k, d> >= 0 for every k, whatever the rows.
CONFLICT_FREE = ("mgda", "mgda-l2", "mgda-loss+", "upgrad", "dualproj", "nash-mtl", "fairgrad")
# d = 0 where the rows are Pareto-stationary with every row in the combination that vanishes.
STOPS = ("mgda", "mgda-l2", "mgda-loss+", "upgrad", "dualproj", "nash-mtl", "fairgrad")
# The preference is scale, mask and tie-break only.
NO_PREFERENCE = ("mgda", "mgda-l2", "mgda-loss+", "imtl-g", "config")
SIZES = (2, 7)

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def uneven_losses(k):
    """Losses [K] for the methods that look at them."""
    return 1 + torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def solve(method, gram, *arguments, **keywords):
    """Weights of a method in its first step."""
    name, options = METHODS[method]
    losses = uneven_losses(gram.shape[1])
    return build_aggregator(name, **options)(gram, *arguments, **{"losses_K": losses} | keywords)


def assert_same_direction(left, right, rows, tolerance=1e-6):
    """Equal weights, or different ones of dependent rows that give the same direction."""
    distance = (combine(left, rows) - combine(right, rows)).norm(dim=1)
    assert (distance <= tolerance * size(left, rows) + 1e-300).all(), (distance / size(left, rows)).max()


@every_method
@every_family
def test_finite_and_homogeneous(method, family):
    """An absolute threshold: at a gradient scale of 1e-8 a method would turn into zero or into the mean."""
    for k in SIZES:
        rows, preference = make_rows(family, k), make_preference(k)
        weights = solve(method, gramian(rows), None, preference)
        assert weights.isfinite().all()
        for scale in (1e-8, 1e8):
            scaled = solve(method, gramian(scale * rows), None, preference)
            assert_same_direction(weights, scaled, rows)
        # A power of two is exact.
        assert torch.equal(weights, solve(method, gramian(rows) * 2.0**-80, None, preference))


@every_method
@every_family
def test_masked_objectives_change_nothing(method, family):
    """An absent language that enters as a zero row, or whose garbage leaks, or that shifts the visiting order."""
    k, kept = 6, [1, 2, 5]
    rows, preference = make_rows(family, k), make_preference(k)
    gram = gramian(rows)
    mask = torch.zeros(B, k, dtype=torch.bool)
    mask[:, kept] = True
    garbage = gram.clone()
    garbage[:, [0, 3, 4], :] = torch.nan
    garbage[:, :, [0, 3, 4]] = torch.inf
    weights = solve(method, garbage, mask, preference)
    alone = solve(method, gram[:, kept][:, :, kept], None, preference[kept], losses_K=uneven_losses(k)[kept])
    assert (weights[:, [0, 3, 4]] == 0).all()
    assert_same_direction(weights[:, kept], alone, rows[:, kept], 1e-8)
    by_preference = solve(method, gram, None, torch.where(mask[0], preference, 0.0))
    assert_same_direction(weights[:, kept], by_preference[:, kept], rows[:, kept], 1e-12)
    assert (by_preference[:, [0, 3, 4]] == 0).all()
    if method != "mean":  # which keeps the weight of a row that is zero: it adds nothing
        present = rows * mask[..., None]
        zero_rows = solve(method, gramian(present), None, preference)
        assert_same_direction(weights, zero_rows, present, 1e-8)
        assert (zero_rows[:, [0, 3, 4]] == 0).all()


@every_method
def test_masks_differ_between_blocks(method):
    """A mask read from the wrong block."""
    rows = make_rows("conflicting", 5)
    gram, preference = gramian(rows), make_preference(5)
    mask = torch.rand(B, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0], mask[1] = False, torch.arange(5) == 2
    weights = solve(method, gram, mask, preference)
    assert (weights[0] == 0).all()
    assert torch.allclose(weights[1], torch.where(mask[1], preference, 0.0), rtol=1e-14, atol=0)
    for b in range(B):
        alone = solve(method, gram[b : b + 1], mask[b : b + 1], preference)
        assert_same_direction(weights[b : b + 1], alone, rows[b : b + 1], 1e-8)


@every_method
def test_weights_carry_the_active_preference(method):
    """Blocks that few languages touch would get larger updates than under the mean, or smaller."""
    rows = make_rows("nearly-equal", 4)
    mask = torch.tensor([True, False, True, True]).expand(B, 4)
    preference = 3 * make_preference(4)
    weights = solve(method, gramian(rows), mask, preference)
    sums = weights.sum(1)
    expected = preference[[0, 2, 3]].sum()
    assert (sums - expected).abs().max() < 1e-6 * expected if method.startswith("mgda") else (sums > 0).all()
    per_block = solve(method, gramian(rows), mask, preference.expand(B, 4))
    assert torch.equal(weights, per_block)


@every_method
def test_equal_rows_give_the_mean(method):
    """A method whose scale is not that of the mean, so that learning rates cannot be compared."""
    for k in (1, 2, 5, 16):
        for preference in (None, make_preference(k), torch.logspace(-7, 0, k, dtype=torch.float64)):
            rows = make_rows("random", k)[:, :1].expand(B, k, -1)
            direction = combine(solve(method, gramian(rows), None, preference), rows)
            total = 1.0 if preference is None else preference.sum()
            torch.testing.assert_close(direction, total * rows[:, 0], rtol=1e-8, atol=1e-9)


@every_method
def test_default_preference_is_uniform(method):
    """A default that sums to K would scale every update by it."""
    gram = gramian(make_rows("random", 4))
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(solve(method, gram), solve(method, gram, None, uniform))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("pcgrad", "gradvac", "gradvac-0.2")])
@every_family
def test_permutation_equivariant(method, family):
    """A solver that favours the first objective."""
    k = 7
    rows, preference = make_rows(family, k), make_preference(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    weights = solve(method, gramian(rows), None, preference)
    permuted = solve(method, gramian(rows[:, order]), None, preference[order], losses_K=uneven_losses(k)[order])
    assert_same_direction(weights[:, order], permuted, rows[:, order])


@pytest.mark.parametrize("method", NO_OP)
def test_without_conflict_nothing_changes(method):
    """A method that acts where there is nothing to resolve."""
    for k in SIZES:
        preference = make_preference(k)
        assert torch.equal(solve(method, gramian(make_rows("aligned", k)), None, preference), preference.expand(B, k))


@pytest.mark.parametrize("method", CONFLICT_FREE)
@every_family
def test_conflict_free(method, family):
    """An update that hurts an objective although the method promises not to."""
    for k in (2, 7, 16):
        rows, preference = make_rows(family, k), make_preference(k)
        weights = solve(method, gramian(rows), None, preference)
        products = (rows @ combine(weights, rows)[:, :, None]).squeeze(2) / rows.norm(dim=2)
        assert (products >= -1e-8 * size(weights, rows)[:, None]).all()


@pytest.mark.parametrize("method", STOPS)
def test_stops_where_no_direction_helps_everybody(method):
    """A step at a Pareto-stationary point: it can only trade objectives against each other."""
    for k in SIZES:
        rows = make_rows("stationary", k)
        weights = solve(method, gramian(rows))
        assert (combine(weights, rows).norm(dim=1) <= 1e-5 * size(weights, rows)).all()


@every_method
def test_preference_is_respected(method):
    """A preference that is ignored or turned round; or that acts where it is said not to."""
    rows, preference = make_rows("random", 5), torch.full((5,), 0.2, dtype=torch.float64)
    more = torch.tensor([0.2, 0.2, 0.6, 0.2, 0.2], dtype=torch.float64)
    before, after = (solve(method, gramian(rows), None, u / u.sum()) for u in (preference, more))
    directions = (combine(weights, rows) for weights in (before, after))
    then, now = (torch.cosine_similarity(direction, rows[:, 2], dim=1) for direction in directions)
    if method in NO_PREFERENCE:
        torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-9)
    else:
        assert now.mean() > then.mean() + 0.01


@every_method
def test_rows_that_are_not_finite_are_left_out_and_reported(method):
    """One language's overflow that spoils the update of all."""
    k, kept = 5, [0, 1, 3]
    gram, preference = gramian(make_rows("conflicting", k)), make_preference(k)
    expected = solve(method, gram, torch.tensor([True, True, False, True, False]).expand(B, k), preference)
    broken = gram.clone()
    broken[:, 2], broken[:, :, 2] = torch.nan, torch.nan
    broken[:, 4, 4] = torch.inf
    name, options = METHODS[method]
    aggregator = build_aggregator(name, **options)
    weights = aggregator(broken, None, preference, losses_K=uneven_losses(k))
    if method == "mean":  # which does not look at the Gramian: "off is identical"
        assert torch.equal(weights, preference.expand(B, k)) and not aggregator.nonfinite_BK.any()
        return
    assert torch.equal(weights, expected) and (weights[:, kept] != 0).any(1).all()
    assert torch.equal(aggregator.nonfinite_BK, torch.tensor([False, False, True, False, True]).expand(B, k))
    broken = gram.clone()
    broken[1, 0, 3] = torch.inf  # a product that overflowed, of rows that did not: which to trust is not known
    aggregator = build_aggregator(name, **options)
    assert aggregator(broken, None, preference, losses_K=uneven_losses(k)).isfinite().all()
    assert aggregator.nonfinite_BK.nonzero().tolist() == [[1, 0], [1, 3]]


@every_method
def test_few_and_many_objectives(method):
    """K = 1 (nothing to combine), and K = 128."""
    rows = make_rows("random", 1)
    assert torch.equal(solve(method, gramian(rows), None, torch.tensor([0.7])), torch.full((B, 1), 0.7).double())
    rows, preference = make_rows("conflicting", 128)[:2], make_preference(128)
    weights = solve(method, gramian(rows), None, preference)
    assert weights.isfinite().all() and weights.shape == (2, 128)
    assert (combine(weights, rows).norm(dim=1) <= 100 * rows.norm(dim=2).amax(1)).all()


@every_method
def test_blocks_are_independent(method):
    """Layout dependence: a block's weights would change with the blocks that happen to share the rank."""
    k = 5
    rows = torch.cat(
        [torch.nn.functional.pad(r, (0, 20 - r.shape[2])) for r in (make_rows(f, k)[:2] for f in FAMILIES)]
    )
    gram = gramian(rows)
    generators = [torch.Generator().manual_seed(b) for b in range(len(gram))]
    together = solve(method, gram, generator=generators)
    for b in range(len(gram)):
        alone = solve(method, gram[b : b + 1], generator=[torch.Generator().manual_seed(b)])
        assert_same_direction(together[b : b + 1], alone, rows[b : b + 1], 1e-8)


@pytest.mark.parametrize("method", RANDOM)
def test_randomness_is_the_generators(method):
    """A draw from the global state: ranks would disagree, and a resumed run would differ."""
    gram = gramian(make_rows("conflicting", 6))
    before = torch.get_rng_state()
    fixed = [solve(method, gram) for _ in range(2)]
    drawn = [solve(method, gram, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    other = solve(method, gram, generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*fixed) and torch.equal(*drawn)
    assert not torch.equal(drawn[0], other) and not torch.equal(drawn[0], fixed[0])


@pytest.mark.parametrize("method", RANDOM)
def test_masks_do_not_shift_later_draws(method):
    """A number of draws that depends on who is present: after an absence all later orders would differ."""
    gram = gramian(make_rows("conflicting", 4))
    mask = torch.tensor([True, False, True, True]).expand(B, 4)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    solve(method, gram, generator=generators[0])
    solve(method, gram, mask, generator=generators[1])
    assert torch.equal(*(generator.get_state() for generator in generators))


@every_method
def test_no_autograd_graph(method):
    """A graph kept alive through the Gramian would hold the gradients' memory."""
    gram = gramian(make_rows("random", 4).requires_grad_())
    assert gram.requires_grad
    assert not solve(method, gram).requires_grad


class _Watch(TorchDispatchMode):
    """Fails at operations whose result the host must wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert not any(word in str(function) for word in self.WAITING), f"{function} waits for the device"
        return function(*arguments, **(keywords or {}))


@every_method
def test_does_not_wait_for_the_device(method, monkeypatch):
    """A hidden .item() or data-dependent loop: on an accelerator every step would stall."""
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    gram = gramian(make_rows("conflicting", 4))
    mask = torch.tensor([True, False, True, True]).expand(B, 4)
    expected = solve(method, gram, mask)
    with _Watch():
        weights = solve(method, gram, mask)
    assert torch.equal(weights, expected)


@every_method
def test_running_all_iterations_changes_nothing(method, monkeypatch):
    """The CPU stops early and an accelerator does not: they must agree, so finished blocks must stay put."""
    gram = torch.cat([gramian(make_rows(family, 4)) for family in FAMILIES])
    early = solve(method, gram)
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    assert torch.equal(solve(method, gram), early)
