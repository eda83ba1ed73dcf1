"""Noise of a Gramian from several rows per objective, and the wrapper that corrects for it."""

import pytest
import torch

from megatron_moo.aggregation import AGGREGATORS, Mean, Rescaled, RowNoise, build_aggregator, fold_rows, interior
from megatron_moo.aggregation.noise_aware import NoiseAware, student_quantiles
from tests.unit.aggregation.families import FAMILIES, B, make_preference, make_rows
from tests.unit.aggregation.test_properties import _Watch

ALL = {"unbiased": "yes", "smoothing": 0.6, "shrink": "yes", "gate": 0.1}
OPTIONS = {
    "unbiased": {"unbiased": "yes"},
    "smoothing": {"smoothing": 0.6},
    "shrink": {"shrink": "yes"},
    "gate": {"gate": 0.1},
    "all": ALL,
}
LOSSES = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)

every_method = pytest.mark.parametrize("method", AGGREGATORS)
every_option = pytest.mark.parametrize("option", OPTIONS)


class Probe(Mean):
    """The mean; keeps the Gramian that it was given."""

    def _weights(self, problem):
        self.gram = problem.gram_BKK
        return super()._weights(problem)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class World:
    """Objectives with known means and known noise, as the sums of their rows.

    Noise of one sample of objective k has standard deviations ``sigma_KN`` in the N directions.
    """

    def __init__(self, mean_KN, sigma_KN, rows_K, count_R=None, seed=0):
        k = len(mean_KN)
        self.mean, self.sigma = mean_KN, sigma_KN
        self.objective = torch.arange(k).repeat_interleave(torch.tensor(rows_K))
        self.count = torch.ones(len(self.objective)).double() if count_R is None else count_R
        self.total = torch.zeros(k).double().index_add_(0, self.objective, self.count)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, blocks):
        """Gramian and noise of ``blocks`` independent steps."""
        x = normal(self.generator, blocks, len(self.objective), self.mean.shape[1])
        count = self.count[:, None]
        x = count * self.mean[self.objective] + count.sqrt() * self.sigma[self.objective] * x
        return fold_rows(x @ x.mT, self.objective, self.count, len(self.mean))


def orthogonal(k, n, seed=0):
    return torch.linalg.qr(normal(torch.Generator().manual_seed(seed), n, k))[0].mT


def isotropic(k, n, noise):
    """Standard deviations for noise of ``noise`` times the length of a unit mean, in all directions alike."""
    return torch.full((k, n), noise / n**0.5, dtype=torch.float64)


def assert_centred(errors, bound=4.0):
    """The mean over the first axis is 0 as far as its standard error tells."""
    error = errors.std(0) / len(errors) ** 0.5
    assert (errors.mean(0).abs() <= bound * error).all(), (errors.mean(0) / error).abs().max()


def halves(family, k, seed=0, noise=0.5):
    """Gramian and noise of a family's rows, each cut in two rows that differ by noise."""
    rows = make_rows(family, k, seed)
    shift = noise * rows.norm(dim=2, keepdim=True) * normal(torch.Generator().manual_seed(seed), *rows.shape)
    shift = shift / rows.shape[2] ** 0.5
    both = torch.cat([rows / 2 + shift, rows / 2 - shift], 1)
    return fold_rows(both @ both.mT, torch.arange(k).repeat(2), torch.full((2 * k,), 0.5), k)


def all_halves(k, seed=0, noise=0.5):
    """Those of all families, block after block."""
    found = [halves(family, k, seed, noise) for family in FAMILIES]
    fields = zip(*((n.bias_BK, n.one_BKK, n.both_BKK, n.freedom_BK) for _, n in found), strict=True)
    return torch.cat([gram for gram, _ in found]), RowNoise(*map(torch.cat, fields), found[0][1].count_K)


# fold_rows


def test_folds_to_the_gramian_of_the_means():
    """Rows weighted by their number instead of their samples; an absent row that counts."""
    generator = torch.Generator().manual_seed(0)
    sums, count = normal(generator, 3, 7, 20), torch.tensor([2.0, 5.0, 1.0, 0.0, 3.0, 7.0, 4.0])
    sums[:, 3] = 0
    objective = torch.tensor([0, 1, 0, 0, 2, 1, 2])
    gram, noise = fold_rows((sums @ sums.mT), objective, count, 4)
    means = torch.stack(
        [sums[:, objective == k].sum(1) / count[objective == k].sum().clamp(min=1) for k in range(4)], 1
    )
    assert torch.allclose(gram, means @ means.mT, rtol=1e-12, atol=1e-14)
    assert (gram[:, 3] == 0).all() and (noise.freedom_BK == torch.tensor([1, 1, 1, 0])).all()
    assert noise.count_K.tolist() == [3, 12, 7, 0] and (noise.bias_BK[:, 3] == 0).all()
    assert noise.variance_BKK[:, 3].isnan().all() and noise.variance_BKK[:, [0, 0, 1], [1, 2, 2]].isfinite().all()


def test_two_equal_halves_by_hand():
    """A factor in the noise: with halves a and b of one sample each it is |a - b|^2 / 4."""
    a, b, c, d = rows = normal(torch.Generator().manual_seed(1), 4, 9)
    gram, noise = fold_rows((rows @ rows.mT)[None], torch.tensor([0, 0, 1, 1]), torch.ones(4), 2)
    expected = torch.stack([(a - b).square().sum(), (c - d).square().sum()]) / 4
    assert torch.allclose(noise.bias_BK[0], expected)
    assert torch.allclose(noise.one_BKK[0, 0, 1], ((a - b) / 2 @ (c + d) / 2) ** 2)
    assert torch.allclose(noise.both_BKK[0, 0, 1], ((a - b) / 2 @ (c - d) / 2) ** 2)


@pytest.mark.parametrize("rows,unequal", [([2] * 4, False), ([2, 3, 5, 2], True)])
def test_unbiased_error_is_centred_and_the_plain_one_biased_as_predicted(rows, unequal):
    """A wrong factor, or isotropy taken for granted: known means and noise, squares and variances as the model says."""
    k, n, blocks = 4, 24, 6000
    generator = torch.Generator().manual_seed(3)
    mean = normal(generator, k, n)
    sigma = 3 * torch.rand(k, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, n).double()
    count = torch.rand(sum(rows), generator=generator, dtype=torch.float64) * 5 + 1 if unequal else None
    world = World(mean, sigma, rows, count)
    gram, noise = world.draw(blocks)

    truth = mean @ mean.mT
    covariance = sigma.square() / world.total[:, None]  # C_k, diagonal
    plain = gram.diagonal(dim1=1, dim2=2) - truth.diagonal()
    predicted = covariance.sum(1)
    assert_centred(plain - predicted)
    assert (plain.mean(0) > 10 * plain.std(0) / blocks**0.5).all()  # the bias is no trifle here
    assert_centred(plain - noise.bias_BK)
    off = ~torch.eye(k, dtype=torch.bool)
    assert_centred((gram - truth)[:, off])

    both = covariance @ covariance.mT
    one = covariance @ mean.square().mT + both
    assert_centred((noise.one_BKK - one)[:, off])
    assert_centred((noise.both_BKK - both)[:, off])
    variance = one + one.mT - both
    assert_centred((noise.variance_BKK - variance)[:, off])
    assert_centred(((gram - truth).square() - variance)[:, off])


def test_a_row_that_is_not_finite_spoils_its_objective_alone():
    """One overflow in one row: the noise of every language in the block would be NaN."""
    rows = normal(torch.Generator().manual_seed(0), 2, 6, 15)
    objective, count = torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6)
    gram, noise = fold_rows(rows @ rows.mT, objective, count, 3)
    broken = rows.clone()
    broken[0, 2, 4] = torch.inf
    found, found_noise = fold_rows(broken @ broken.mT, objective, count, 3)
    keep = torch.tensor([0, 2])
    assert found[0, 1].isnan().all() and found[0, :, 1].isnan().all()
    for left, right in ((found, gram), (found_noise.one_BKK, noise.one_BKK), (found_noise.both_BKK, noise.both_BKK)):
        assert torch.equal(left[1], right[1]) and torch.equal(left[0][keep][:, keep], right[0][keep][:, keep])
    assert found_noise.freedom_BK.tolist() == [[1, 0, 1], [1, 1, 1]]
    aggregator = NoiseAware(build_aggregator("pcgrad"), **ALL)
    weights = aggregator(found, noise=found_noise)
    assert (
        weights.isfinite().all() and weights[0, 1] == 0 and aggregator.nonfinite_BK.tolist()[0] == [False, True, False]
    )


def test_fold_names_what_does_not_fit():
    """An id that is out of range would silently drop rows."""
    gram = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"ids in \[0, 2\), found 0 to 2"):
        fold_rows(gram, torch.tensor([0, 1, 2]), torch.ones(3), 2)
    with pytest.raises(ValueError, match="count_R must have one entry per row"):
        fold_rows(gram, torch.tensor([0, 1, 1]), torch.ones(2), 2)


# The gate


def left_negative(world, blocks, steps, **options):
    """Share of pairs that are negative after NoiseAware [B], and of negative products before, at the last step."""
    aggregator = NoiseAware(Probe(), **options)
    for _ in range(steps):
        gram, noise = world.draw(blocks)
        aggregator(gram, noise=noise)
    off = ~torch.eye(gram.shape[1], dtype=torch.bool)
    return (aggregator.inner.gram < 0)[:, off].double().mean(1), (gram < 0)[:, off].double().mean()


def assert_level(shares, alpha, least=0.75):
    """At the level, or below it by a quarter at most, as far as the blocks' standard error tells."""
    error = (
        4 * (alpha * (1 - alpha) / len(shares)) ** 0.5 / 1
        if shares.std() == 0
        else 4 * shares.std() / len(shares) ** 0.5
    )
    level = shares.mean()
    assert level <= alpha + error and level >= least * alpha - error, f"{level:.4f} at {alpha}, tolerance {error:.4f}"


@pytest.mark.parametrize("k,blocks", [(2, 6000), (4, 1500), (8, 400), (16, 120)])
@pytest.mark.parametrize("noise", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_gate_holds_its_level_at_the_first_step(k, blocks, noise, alpha):
    """A normal quantile for a variance from two products, or a term left out: 2-3 times as many false conflicts."""
    world = World(orthogonal(k, 64), isotropic(k, 64, noise), [2] * k)
    shares, before = left_negative(world, blocks, 1, gate=alpha)
    assert 0.45 < before < 0.55
    assert_level(shares, alpha)


CASES = {
    "light": ([2] * 4, 0.2, {}),
    "heavy": ([2] * 4, 10.0, {}),
    "smoothed": ([2] * 4, 2.0, {"smoothing": 0.8}),
    "smoothed-unbiased": ([2] * 4, 2.0, {"smoothing": 0.8, "unbiased": "yes"}),
    "unbiased": ([2] * 4, 5.0, {"unbiased": "yes"}),
    "uneven-rows": ([1, 2, 3, 5], 2.0, {}),
    "uneven-counts": ([2] * 4, 2.0, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_gate_holds_its_level_later(case):
    """Pooling that forgets how counts differ, or a smoothed cosine tested with the noise of a single step."""
    rows, noise, options = CASES[case]
    count = torch.logspace(0, 2, 8).double() if case == "uneven-counts" else None
    world = World(orthogonal(4, 64), isotropic(4, 64, noise * (4 if count is not None else 1)), rows, count)
    for steps, blocks in ((10, 500), (40, 200)):
        shares, _ = left_negative(world, blocks, steps, gate=0.1, **options)
        assert_level(shares, 0.1)


@pytest.mark.parametrize("k", [2, 8])
def test_gate_holds_its_level_for_noise_with_preferred_directions(k):
    """A pool that takes noise for the same in all directions: the means lie where it is largest."""
    sigma = 2 * torch.arange(1, 65).double() ** -0.7
    world = World(torch.eye(64).double()[:k], sigma.expand(k, 64), [2] * k)
    for steps, blocks in ((1, 1000), (20, 300)):
        shares, _ = left_negative(world, blocks, steps, gate=0.1)
        assert_level(shares, 0.1, least=0.4 if steps == 1 else 0.75)


def test_a_pair_of_its_own_kind_nears_the_level():
    """Pooling for ever: a pair whose noise lies otherwise than the others' would never be tested fairly."""
    k, n = 8, 96
    sigma = torch.full((k, n), 0.3, dtype=torch.float64)
    sigma[:2, :8] = 3.0
    mean = torch.eye(n).double()[[0, 1, *range(20, 18 + k)]]
    world, aggregator, levels = World(mean, 2 * sigma / sigma.norm(dim=1, keepdim=True), [2] * k), None, []
    aggregator = NoiseAware(Probe(), gate=0.05)
    for _ in range(40):
        gram, noise = world.draw(250)
        aggregator(gram, noise=noise)
        levels.append((aggregator.inner.gram[:, 0, 1] < 0).double().mean().item())
    assert levels[0] > 0.12 and sum(levels[-10:]) / 10 < 0.09, levels


@pytest.mark.parametrize("smoothing", [0.0, 0.8])
def test_gate_leaves_what_is_beyond_noise(smoothing):
    """A gate that also damps: real conflicts and agreements pass bit for bit, nothing is added to the diagonal."""
    mean = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [0.5, 0.9]]).double() @ orthogonal(2, 64)
    world = World(mean, isotropic(3, 64, 0.1), [2] * 3)
    aggregator, plain = NoiseAware(Probe(), gate=0.05, smoothing=smoothing), Probe()
    wrapped = Rescaled(plain)  # any wrapper that changes nothing: the Gramian scaled as the library does
    for _ in range(8):
        gram, noise = world.draw(200)
        aggregator(gram, noise=noise)
        wrapped(gram)
    assert not aggregator.gated_BKK[:, 0, 2].any() and not aggregator.gated_BKK[:, 1, 2].any()
    assert aggregator.gated_BKK[:, 0, 1].double().mean() < 0.02
    kept = ~aggregator.gated_BKK.any(2).any(1)
    if not smoothing:
        assert torch.equal(aggregator.inner.gram[kept], plain.gram[kept])


def test_single_rows_change_nothing_and_take_the_pool_beside_others():
    """An objective without an estimate that is gated always, or never, or that makes NaN."""
    world = World(orthogonal(4, 64), isotropic(4, 64, 2.0), [1] * 4)
    gram, noise = world.draw(20)
    for options in OPTIONS.values():
        for given in (noise, None):
            expected = build_aggregator("pcgrad")(gram)
            weights = NoiseAware(build_aggregator("pcgrad"), **options)(gram, noise=given)
            assert (
                torch.allclose(weights, expected, rtol=1e-12)
                if "smoothing" in options
                else torch.equal(weights, expected)
            )
    world = World(orthogonal(4, 64), isotropic(4, 64, 2.0), [2, 2, 1, 1])
    aggregator = NoiseAware(Probe(), gate=0.1, unbiased="yes")
    gram, noise = world.draw(2000)
    aggregator(gram, noise=noise)
    assert aggregator.reliability_BK[:, 2:].isnan().all() and aggregator.reliability_BK[:, :2].isfinite().all()
    assert_level((aggregator.inner.gram[:, 2, 3] < 0).double(), 0.1, least=0.5)


@pytest.mark.parametrize("level", [0.4, 0.05, 0.001])
def test_quantiles_are_students(level):
    """The expansion for large samples used at one or two degrees of freedom."""
    stats = pytest.importorskip("scipy.stats")
    quantiles = student_quantiles(level)
    freedom = 128 / torch.arange(1, 129).double()
    assert torch.allclose(quantiles[1:], torch.tensor(stats.t.isf(level, freedom.numpy())), rtol=2e-3)
    assert abs(quantiles[0].item() - stats.norm.isf(level)) < 1e-9


# Unbiased, smoothing, shrink


def test_unbiased_diagonal_and_its_floor():
    """A square that turns negative, or a reliability upside down."""
    world = World(torch.cat([orthogonal(2, 64), torch.zeros(1, 64)]), isotropic(3, 64, 1.0), [2, 2, 2])
    gram, noise = world.draw(500)
    aggregator = NoiseAware(Probe(), unbiased="yes")
    aggregator(gram, noise=noise)
    plain = gram.diagonal(dim1=1, dim2=2)
    wanted = plain - noise.bias_BK
    assert torch.allclose(aggregator.reliability_BK, wanted / plain, rtol=1e-9, atol=1e-12)
    assert (wanted[:, 2] < 0).any()
    corrected = aggregator.inner.gram.diagonal(dim1=1, dim2=2)
    floored = wanted.maximum(0.1 * plain)
    # Up to the scale of the block, which is the longest row's.
    assert torch.allclose(corrected / corrected[:, :1], floored / floored[:, :1], rtol=1e-9)


def test_smoothing_is_the_running_mean_that_it_says():
    """A start at zero, or an absent pair that decays."""
    world = World(orthogonal(3, 32), isotropic(3, 32, 1.0), [2] * 3)
    aggregator, decay = NoiseAware(Probe(), smoothing=0.7), 0.7
    total, weight = torch.zeros(5, 3, 3).double(), torch.zeros(5, 3, 3).double()
    for step in range(6):
        gram, _ = world.draw(5)
        active = torch.ones(5, 3, dtype=torch.bool)
        active[:2, 1] = step != 3
        pairs = active[:, :, None] & active[:, None, :]
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
        area = lengths[:, :, None] * lengths[:, None, :]
        total = torch.where(pairs, decay * total + gram / area, total)
        weight = torch.where(pairs, decay * weight + 1, weight)
        aggregator(gram, active)
        scale = torch.where(active, lengths, 0).amax(1)[:, None, None] ** 2
        expected = torch.where(pairs, (total / weight) * area, 0) / scale
        assert torch.allclose(aggregator.inner.gram, expected, rtol=1e-10, atol=1e-13)


def test_shrinkage_brings_cosines_closer_to_the_truth():
    """A reliability that is always one or always zero, or of the wrong sign."""
    generator = torch.Generator().manual_seed(0)
    mean = normal(generator, 8, 40) + normal(generator, 40)
    mean = mean / mean.norm(dim=1, keepdim=True)
    off = ~torch.eye(8, dtype=torch.bool)
    truth = (mean @ mean.mT)[off] / 3  # of the cosines as noise attenuates them: it is two thirds of the squares
    errors = {}
    for name, options in {"plain": {"gate": 0.5}, "shrink": {"shrink": "yes"}}.items():
        world, aggregator = World(mean, isotropic(8, 40, 2.0), [2] * 8), NoiseAware(Probe(), **options)
        for _ in range(15):
            gram, noise = world.draw(60)
            aggregator(gram, noise=noise)
        found = aggregator.inner.gram
        lengths = found.diagonal(dim1=1, dim2=2).sqrt()
        errors[name] = ((found / (lengths[:, :, None] * lengths[:, None, :]))[:, off] - truth).square().mean().item()
    # One that shrinks to nothing has the truth's own square as its error.
    assert errors["shrink"] < 0.6 * errors["plain"] and errors["shrink"] < truth.square().mean(), errors


def test_without_noise_nothing_changes():
    """Halves that are equal: rounding taken for noise."""
    for family in FAMILIES:
        gram, noise = halves(family, 5, noise=0.0)
        for options in ({"unbiased": "yes"}, {"shrink": "yes"}, {"gate": 0.01}):
            expected, corrected = Probe(), Probe()
            Rescaled(expected)(gram)
            NoiseAware(corrected, **options)(gram, noise=noise)
            lengths = expected.gram.diagonal(dim1=1, dim2=2).sqrt()
            slack = 1e-7 * lengths[:, :, None] * lengths[:, None, :]
            assert ((expected.gram - corrected.gram).abs() <= slack).all(), (family, options)


# As a wrapper


@every_method
def test_off_is_the_method_bit_for_bit(method):
    """A wrapper that rounds, or that keeps state, though nothing was asked of it."""
    aggregator = NoiseAware(build_aggregator(method))
    bare = build_aggregator(method)
    for seed in range(2):
        gram, noise = halves("conflicting", 6, seed)
        preference = make_preference(6)
        weights = aggregator(gram, None, preference, losses_K=LOSSES, noise=noise)
        assert torch.equal(weights, bare(gram, None, preference, losses_K=LOSSES))
    assert not aggregator.uses_noise and aggregator.stateful == bare.stateful
    assert set(aggregator.state_dict()) == set(bare.state_dict())


@every_method
@every_option
def test_composes_with_every_method(method, option):
    """A corrected matrix that is no Gramian breaks a solver: NaN, or weights without bounds."""
    aggregator = NoiseAware(build_aggregator(method), **OPTIONS[option])
    for seed in range(2):
        gram, noise = all_halves(6, seed, noise=2.0)
        active = (torch.arange(6) != 3).expand(len(gram), 6)
        weights = aggregator(gram, active, make_preference(6), losses_K=LOSSES, noise=noise)
        assert weights.isfinite().all() and (weights[:, 3] == 0).all()


def test_methods_get_nearly_a_gramian():
    """Zeroed products leave negative eigenvalues of the size of the diagonal."""
    for k in (2, 7, 16):
        aggregator = NoiseAware(Probe(), **ALL)
        for seed in range(2):
            gram, noise = all_halves(k, seed, noise=2.0)
            aggregator(gram, noise=noise)
            found = aggregator.inner.gram
            assert torch.equal(found, found.mT)
            assert torch.allclose(found.diagonal(dim1=1, dim2=2).amax(1), torch.ones(len(gram)).double())
            unit = found.diagonal(dim1=1, dim2=2).rsqrt()
            assert torch.linalg.eigvalsh(unit[:, :, None] * found * unit[:, None, :]).min() > -2e-9


@every_option
def test_homogeneous(option):
    """An absolute threshold, or a variance in other units than the square of the Gramian's."""
    results = []
    for scale in (1.0, 2.0**-40, 1e-8, 1e8):
        aggregator = NoiseAware(Probe(), **OPTIONS[option])
        for seed in range(2):
            gram, noise = all_halves(5, seed)
            noise = noise.divided_by(torch.full((len(gram), 1, 1), scale**-2, dtype=torch.float64))
            aggregator(gram * scale**2, noise=noise)
        results.append(aggregator.inner.gram)
    assert torch.equal(results[0], results[1])
    lengths = results[0].diagonal(dim1=1, dim2=2).sqrt()
    for other in results[2:]:
        assert ((other - results[0]).abs() <= 1e-9 * lengths[:, :, None] * lengths[:, None, :]).all()


@every_option
def test_inactive_objectives_change_nothing(option):
    """An absent language whose zero or garbage enters the block's pool."""
    kept, gone = [0, 2, 5], [1, 3, 4]
    active = torch.zeros(B, 6, dtype=torch.bool)
    active[:, kept] = True
    full = NoiseAware(build_aggregator("pcgrad"), **OPTIONS[option])
    alone = NoiseAware(build_aggregator("pcgrad"), **OPTIONS[option])
    for seed in range(3):
        gram, noise = halves("conflicting", 6, seed)
        few = RowNoise(
            noise.bias_BK[:, kept],
            noise.one_BKK[:, kept][:, :, kept],
            noise.both_BKK[:, kept][:, :, kept],
            noise.freedom_BK[:, kept],
            noise.count_K[kept],
        )
        expected = alone(gram[:, kept][:, :, kept], None, make_preference(6)[kept], noise=few)
        for tensor in (gram, noise.bias_BK, noise.one_BKK, noise.both_BKK):
            tensor[:, gone] = torch.nan
        weights = full(gram, active, make_preference(6), noise=noise)
        assert torch.allclose(weights[:, kept], expected, rtol=1e-10, atol=1e-14) and (weights[:, gone] == 0).all()
    for key, value in full.state_dict().items():
        assert value.isfinite().all() and (value[:, gone] == 0).all(), key


def test_blocks_are_independent():
    """A pool over all blocks instead of each: weights would depend on the layout."""
    together = NoiseAware(build_aggregator("pcgrad"), **ALL)
    apart = [NoiseAware(build_aggregator("pcgrad"), **ALL) for _ in range(B)]
    for seed in range(3):
        gram, noise = halves("conflicting", 5, seed)
        weights = together(gram, noise=noise)
        for b, one in enumerate(apart):
            fields = (noise.bias_BK, noise.one_BKK, noise.both_BKK, noise.freedom_BK)
            alone = one(gram[b : b + 1], noise=RowNoise(*(field[b : b + 1] for field in fields), noise.count_K))
            assert torch.allclose(alone[0], weights[b], rtol=1e-10, atol=1e-14)


@every_option
def test_state_resumes_exactly(option):
    """Something kept outside state_dict: a resumed or repeated step would differ."""
    first = NoiseAware(build_aggregator("gradvac"), **OPTIONS[option])
    steps = [halves("conflicting", 5, seed) for seed in range(5)]
    for gram, noise in steps[:3]:
        first(gram, noise=noise)
    state = first.state_dict()
    second = NoiseAware(build_aggregator("gradvac"), **OPTIONS[option])
    second.load_state_dict(state)
    expected = [first(gram, noise=noise) for gram, noise in steps[3:]]
    assert all(torch.equal(second(gram, noise=noise), e) for (gram, noise), e in zip(steps[3:], expected, strict=True))
    first.load_state_dict(state)
    assert all(torch.equal(first(gram, noise=noise), e) for (gram, noise), e in zip(steps[3:], expected, strict=True))
    assert all(len(value) == B for value in state.values()) and first.stateful
    if option not in ("unbiased",):
        with pytest.raises(ValueError, match="call reset"):
            first(steps[0][0][:2])
    first.reset()
    fresh = NoiseAware(build_aggregator("gradvac"), **OPTIONS[option])
    assert torch.equal(first(steps[0][0], noise=steps[0][1]), fresh(steps[0][0], noise=steps[0][1]))


def test_does_not_wait_for_the_device(monkeypatch):
    """A look at values in every step, which an accelerator pays with a stall."""
    gram, noise = halves("conflicting", 5)
    expected = NoiseAware(build_aggregator("pcgrad"), **ALL)(gram, noise=noise)
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    aggregator = NoiseAware(build_aggregator("pcgrad"), **ALL)
    rows = make_rows("random", 6)
    with _Watch():
        weights = aggregator(gram, noise=noise)
        fold_rows(rows @ rows.mT, torch.arange(6) // 2, torch.ones(6), 3)
    assert torch.equal(weights, expected)


def test_options_name_rule_and_value():
    """A level of one half or more would call agreement a conflict."""
    with pytest.raises(ValueError, match=r"'gate' must be a number in \[0, 0.5\], found 0.6"):
        NoiseAware(Mean(), gate=0.6)
    with pytest.raises(ValueError, match="is there already"):
        NoiseAware(NoiseAware(Mean()))


@every_option
def test_degenerate_problems(option):
    """One objective, a step without anybody, objectives that never had a row: finite, and state that stays usable."""
    options = OPTIONS[option]
    gram, noise = halves("random", 1)
    assert torch.equal(NoiseAware(build_aggregator("cagrad"), **options)(gram, noise=noise), torch.ones(B, 1).double())
    aggregator = NoiseAware(build_aggregator("cagrad"), **options)
    gram, noise = halves("conflicting", 4)
    assert (aggregator(gram, torch.zeros(B, 4, dtype=torch.bool), noise=noise) == 0).all()
    fresh = NoiseAware(build_aggregator("cagrad"), **options)
    assert torch.equal(aggregator(gram, noise=noise), fresh(gram, noise=noise))
    zero, nothing = fold_rows(torch.zeros(2, 4, 4), torch.arange(4) // 2, torch.ones(4), 3)
    assert (NoiseAware(build_aggregator("cagrad"), **options)(zero, noise=nothing) == 0).all()
