"""What goes around a method: a cap, smoothing, the mean's length, rarer solves; alone, together, and resumed."""

import pytest
import torch

from megatron_moo.aggregation import AGGREGATORS, MGDA, WRAPPERS, Capped, EveryNth, Mean, Smoothed, build_aggregator
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows

NOISE = {"unbiased": "yes", "smoothing": 0.5, "shrink": "yes", "gate": 0.2}
ALL = {"noise": NOISE, "cap": {"ratio": 2.0}, "smooth": {"decay": 0.5}, "rescale": {}, "every": {"n": 2.0}}
LOSSES = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)

every_method = pytest.mark.parametrize("method", AGGREGATORS)


def steps(count, k=6, family="conflicting"):
    return [gramian(make_rows(family, k, seed)) for seed in range(count)]


@every_method
def test_each_composes_with_every_method(method):
    """A wrapper that breaks a method's state, masks or losses."""
    preference = make_preference(6)
    mask = torch.arange(6) != 3
    assert set(ALL) == set(WRAPPERS)
    for wrappers in ({name: ALL[name]} for name in WRAPPERS):
        aggregator = build_aggregator(method, wrappers=wrappers)
        for gram in steps(3):
            weights = aggregator(gram, mask.expand(B, 6), preference, losses_K=LOSSES)
            assert weights.isfinite().all() and (weights[:, 3] == 0).all() and (weights != 0).any(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_together_leave_the_mean_alone(family):
    """A wrapper that acts without need, or that takes a change of preference for one of weights."""
    aggregator = build_aggregator("mean", wrappers=ALL)
    for seed, gram in enumerate(steps(4, family=family)):
        preference = make_preference(6, seed)
        assert torch.allclose(aggregator(gram, None, preference), preference.expand(B, 6), rtol=1e-9, atol=0)


def test_the_cap_holds_and_changes_nothing_below_it():
    """A cap on the sum, or relative to 1/K whatever the preference."""
    gram, preference = gramian(make_rows("uneven", 6)), make_preference(6)
    bare = build_aggregator("mgda")(gram, None, preference)
    capped = build_aggregator("mgda", wrappers={"cap": {"ratio": 1.5}})(gram, None, preference)
    assert (bare > 1.5 * preference).any()
    assert torch.equal(capped, bare.minimum(1.5 * preference))
    assert torch.equal(build_aggregator("mgda", wrappers={"cap": {"ratio": 1e6}})(gram, None, preference), bare)


def test_smoothing_is_the_running_mean_that_it_says():
    """A start at zero (weights too small for many steps), or a decay the wrong way round."""
    grams, preference = steps(3), make_preference(6)
    smoothed = Smoothed(MGDA(), decay=0.75)
    expected = None
    for gram in grams:
        now = MGDA()(gram, None, preference)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
        assert torch.allclose(smoothed(gram, None, preference), expected, rtol=1e-12, atol=1e-15)


def test_an_absent_objective_keeps_its_smoothed_weight():
    """An absence that counts as a weight of zero, and slows the language down when it comes back."""
    grams = steps(3)
    mask = torch.ones(B, 6, dtype=torch.bool)
    mask[:, 2] = False
    smoothed = Smoothed(MGDA(), decay=0.5)
    first = smoothed(grams[0])
    assert (smoothed(grams[1], mask)[:, 2] == 0).all()
    now = MGDA()(grams[2])
    assert torch.allclose(smoothed(grams[2])[:, 2], 0.5 * first[:, 2] + 0.5 * now[:, 2], rtol=1e-12, atol=1e-15)


def test_rescaled_updates_have_the_length_of_the_mean():
    """Methods compared at different lengths of the update; a zero direction blown up into rounding errors."""
    for method in AGGREGATORS:
        rows, preference = make_rows("random", 6), make_preference(6)
        aggregator = build_aggregator(method, wrappers={"rescale": {"limit": 1e6}})
        direction = combine(aggregator(gramian(rows), None, preference, losses_K=LOSSES), rows)
        goal = combine(preference.expand(B, 6), rows)
        assert torch.allclose(direction.norm(dim=1), goal.norm(dim=1), rtol=1e-9, atol=0)
    rows = make_rows("stationary", 6)
    weights = build_aggregator("mgda", wrappers={"rescale": {}})(gramian(rows), None, make_preference(6))
    assert torch.equal(weights, build_aggregator("mgda")(gramian(rows), None, make_preference(6)))
    limited = build_aggregator("mgda", wrappers={"rescale": {"limit": 1.0}})(gramian(make_rows("random", 6)))
    assert torch.equal(limited, build_aggregator("mgda")(gramian(make_rows("random", 6))))


class _Counted(MGDA):
    """Counts its solves."""

    solves = 0

    def _weights(self, problem):
        self.solves += 1
        return super()._weights(problem)


def test_every_nth_solves_every_nth_time():
    """A cache that is never used, never renewed, or that keeps the weights of an absent language."""
    inner = _Counted()
    aggregator, grams = EveryNth(inner, n=3), steps(6)
    mask = torch.arange(6) != 1
    weights = [aggregator(gram, (mask if i == 2 else mask | True).expand(B, 6)) for i, gram in enumerate(grams)]
    assert inner.solves == 2
    assert torch.allclose(weights[1], weights[0], rtol=1e-12) and torch.allclose(weights[4], weights[3], rtol=1e-12)
    assert torch.allclose(weights[3], MGDA()(grams[3]), rtol=1e-12)
    assert torch.allclose(weights[2], torch.where(mask, weights[0], 0.0), rtol=1e-12)
    with pytest.raises(ValueError, match="must be a whole number, found 1.5"):
        EveryNth(MGDA(), n=1.5)


@every_method
def test_resuming_at_any_step_gives_the_same_weights(method):
    """State that a checkpoint loses, or that is mixed up with the fresh state of blocks it does not name."""
    preference, everybody = make_preference(6), torch.ones(B, 6, dtype=torch.bool)

    def weights_of(aggregator, step):
        mask = everybody if step != 2 else ~everybody  # all blocks overflowed, and nobody takes part
        return aggregator(grams[step], mask, preference, losses_K=LOSSES + grams[step][0, 0, 0])

    grams = steps(7)
    whole, saved, expected = build_aggregator(method, wrappers=ALL), [], []
    for step in range(7):
        saved.append(whole.state_dict())
        expected.append(weights_of(whole, step))
    for stop in range(1, 7):
        resumed = build_aggregator(method, wrappers=ALL)
        fresh = resumed.fresh_state(B, 6)
        assert set(fresh) == set(saved[stop])
        for key, value in fresh.items():
            for b in range(B):  # as a trainer does, which finds blocks by their names
                value[b] = saved[stop][key][b]
        resumed.load_state_dict(fresh)
        for step in range(stop, 7):
            assert torch.equal(weights_of(resumed, step), expected[step]), (stop, step)


def test_a_wrapper_that_is_new_in_a_resumed_run_starts_by_solving():
    """Fresh state that passes for the cache of a solve: the mean until the next one is due."""
    resumed = build_aggregator("mgda", wrappers=ALL)
    resumed.load_state_dict(resumed.fresh_state(B, 6))
    gram = steps(1)[0]
    assert torch.equal(resumed(gram), build_aggregator("mgda", wrappers=ALL)(gram))


def test_a_solve_without_anybody_keeps_the_cached_weights():
    """An overflow at the step that solves: the mean until the next solve, but not after a resume."""
    aggregator, grams = EveryNth(MGDA(), n=2), steps(4)
    first = aggregator(grams[0])
    aggregator(grams[1])
    assert (aggregator(grams[2], torch.zeros(B, 6, dtype=torch.bool)) == 0).all()
    torch.testing.assert_close(aggregator(grams[3]), first, rtol=1e-12, atol=0)


def test_state_of_other_blocks_is_refused():
    """Weights of one block applied to another after the blocks have changed."""
    for wrappers in ({"smooth": {}}, {"every": {"n": 4.0}}):
        aggregator = build_aggregator("mgda", wrappers=wrappers)
        aggregator(steps(1)[0])
        with pytest.raises(ValueError, match=r"call reset\(\)"):
            aggregator(steps(1)[0][:2])
        aggregator.reset()
        aggregator(steps(1)[0][:2])


def test_wrapping_twice_or_by_an_unknown_name_is_refused():
    """A second smoothing whose state would overwrite the first's."""
    with pytest.raises(ValueError, match="Capped is there already"):
        Capped(Smoothed(Capped(Mean())))
    with pytest.raises(ValueError, match="unknown wrapper 'cpa'; known: noise, cap, smooth, rescale, every"):
        build_aggregator("mgda", wrappers={"cpa": {}})
    for value in ("inf", "nan"):
        with pytest.raises(ValueError, match=f"found {value}"):
            build_aggregator("mgda", wrappers={"cap": {"ratio": float(value)}})
    with pytest.raises(ValueError, match=r"Capped option 'ratio' must be a number in \[1, inf\), found 0.5"):
        build_aggregator("mgda", wrappers={"cap": {"ratio": 0.5}})


def test_certificates_and_reports_come_through():
    """A residual or a masked row that a wrapper hides."""
    gram = steps(1)[0].clone()
    gram[1, 2] = gram[1, :, 2] = torch.nan
    aggregator = build_aggregator("mgda", wrappers=ALL)
    assert (aggregator(gram)[1, 2] == 0).all()
    assert (aggregator.kkt_residual_B < 1e-9).all()
    assert aggregator.nonfinite_BK.sum() == 1 and aggregator.nonfinite_BK[1, 2]
