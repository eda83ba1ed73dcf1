"""The language-pure sampler: which objective and which samples each gradient row takes."""

import numpy as np
import pytest

from megatron_moo.data.sampler import LanguagePureSampler, shares

STEPS = 10_000
# K objectives, D slots, W waves; more rows than objectives, as many, and fewer.
SHAPES = [(3, 2, 2), (16, 2, 8), (8, 2, 6), (16, 2, 4), (5, 1, 1), (1, 2, 1)]


def _weights(kind: str, k: int) -> list[float] | None:
    if kind == "equal":
        return None
    rng = np.random.default_rng(k)
    return list(rng.dirichlet(np.full(k, 0.5)) + 1e-4)


def _cumulative(sampler: LanguagePureSampler, steps: int) -> np.ndarray:
    return np.array([sampler.counts(step)[0] for step in range(steps)])


@pytest.mark.parametrize("kind", ["equal", "skewed"])
@pytest.mark.parametrize(("k", "d", "w"), SHAPES)
def test_counts_stay_within_one_row_of_their_shares(k, d, w, kind):
    """Would catch a drift of the shares, which shows only after thousands of steps."""
    sampler = LanguagePureSampler(k, d, w, _weights(kind, k))
    before = _cumulative(sampler, STEPS)
    target = np.arange(STEPS)[:, None] * sampler.shares * d * w
    assert np.abs(before - target).max() < 1
    in_step = np.diff(before, axis=0)
    assert (in_step.sum(1) == d * w).all() and in_step.min() >= 0
    if d * w >= k:
        assert in_step.min() >= 1, "every objective occurs in every step"


def test_counts_stay_within_one_row_for_many_objectives():
    """Would catch a bound that holds for a few objectives only; the rare ones wait longest here."""
    weights = [1 / (k + 1) ** 1.5 for k in range(60)]
    sampler = LanguagePureSampler(60, 1, 7, weights)
    target = np.arange(3000)[:, None] * sampler.shares * 7
    assert np.abs(_cumulative(sampler, 3000) - target).max() < 1


def test_shares_keep_the_weights_above_the_floor():
    """Would catch a floor that is paid for by the wrong objectives or a sum that is not one."""
    got = shares([0.7, 0.2, 0.06, 0.04], rows=8)
    assert got == pytest.approx([0.75 * 0.7 / 0.9, 0.75 * 0.2 / 0.9, 1 / 8, 1 / 8])
    assert shares([3, 1], rows=1) == pytest.approx([0.75, 0.25])  # too few rows for a floor
    assert shares([1e-9, 1, 1], rows=3) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("kind", ["equal", "skewed"])
def test_any_step_at_once_equals_walking_there(kind):
    """Would catch state that a resumed run does not have."""
    for k, d, w in SHAPES:
        walked = LanguagePureSampler(k, d, w, _weights(kind, k), seed=3)
        sizes = [37 + i for i in range(k)]
        seen = {step: (walked.assign(step).copy(), walked.examples(step, 3, sizes)) for step in range(1100)}
        for step in (1099, 0, 517, 1025, 1):
            fresh = LanguagePureSampler(k, d, w, _weights(kind, k), seed=3)
            assert np.array_equal(fresh.assign(step), seen[step][0])
            assert np.array_equal(fresh.examples(step, 3, sizes), seen[step][1])
            assert np.array_equal(walked.assign(step), seen[step][0]), "going back changed the answer"


@pytest.mark.parametrize(("k", "d", "w"), [(8, 2, 4), (4, 4, 2), (16, 2, 4)])
def test_no_place_is_tied_to_an_objective(k, d, w):
    """Would catch a rank that always works on the same language, or a wave that is always the same one's."""
    sampler = LanguagePureSampler(k, d, w)
    steps = 200 * d * w
    assigned = np.stack([sampler.assign(step) for step in range(steps)])
    for objective in range(k):
        visits = (assigned == objective).sum(0)
        assert np.abs(visits / (steps / k) - 1).max() < 0.2
    assert len({tuple(a.ravel()) for a in assigned[: 4 * d * w]}) > d * w, "the order must not repeat after a turn"


def test_seed_changes_places_and_samples():
    """Would catch a seed that is ignored."""
    one, two = (LanguagePureSampler(8, 2, 4, seed=s) for s in (1, 2))
    sizes = [1000] * 8
    assert not np.array_equal(one.assign(0), two.assign(0))
    assert not np.array_equal(np.sort(one.examples(0, 4, sizes), None), np.sort(two.examples(0, 4, sizes), None))


@pytest.mark.parametrize("kind", ["equal", "skewed"])
def test_an_epoch_takes_every_sample_once(kind):
    """Would catch samples repeated or skipped inside an epoch, also where a row spans two epochs."""
    k, d, w, n = 4, 2, 3, 5
    sizes = [23, 60, 7, 3]  # 3 < n: a row spans several epochs
    sampler = LanguagePureSampler(k, d, w, _weights(kind, k))
    streams: list[list[int]] = [[] for _ in range(k)]
    for step in range(60):
        for wave in range(w):
            for slot in range(d):
                rows = sampler.row_examples(step, wave, slot, n, sizes)
                streams[sampler.assign(step)[wave, slot]] += rows.tolist()
    orders = set()
    for objective, size in enumerate(sizes):
        stream = streams[objective]
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))
            orders.add(tuple(stream[start : start + size]))
    assert len(orders) > 4 + 3, "each epoch has its own order"


@pytest.mark.parametrize("kind", ["equal", "skewed"])
def test_samples_of_a_step_do_not_depend_on_the_layout(kind):
    """Would catch a run on 4 slots that sees other data than the same run on 8."""
    sizes = [101, 50, 33, 70, 20]
    steps = []
    for d, w in ((2, 4), (4, 2), (8, 1)):
        sampler = LanguagePureSampler(5, d, w, _weights(kind, 5), seed=9)
        steps.append([])
        for step in range(50):
            objectives = np.repeat(sampler.assign(step).ravel(), 2).tolist()
            samples = sampler.examples(step, 2, sizes).ravel().tolist()
            steps[-1].append(sorted(zip(objectives, samples, strict=True)))
    assert steps[0] == steps[1] == steps[2]


def test_pinned_values():
    """Would catch a change of the random streams, with which old runs would resume on other data."""
    sampler = LanguagePureSampler(4, 2, 2, seed=1)
    assert [sampler.assign(s).ravel().tolist() for s in (0, 1, 7)] == [
        [2, 0, 3, 1],
        [1, 2, 0, 3],
        [3, 1, 2, 0],
    ]
    assert sampler.row_examples(3, 1, 0, 4, [50] * 4).tolist() == [13, 33, 7, 24]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 2), "num_objectives must be at least 1"),
        ((2, 0, 2), "slots must be at least 1"),
        ((2, 2, 0), "waves must be at least 1"),
        ((2, 2, 2, [1.0]), "1 given for 2 objectives"),
        ((2, 2, 2, [1.0, 0.0]), "leave an unwanted objective out"),
        ((2, 2, 2, [1.0, float("nan")]), "positive and finite"),
        ((2, 2, 2, None, -1), "seed must not be negative"),
    ],
)
def test_bad_arguments(arguments, message):
    """Would catch a silent default for a share or size that cannot be met."""
    with pytest.raises(ValueError, match=message):
        LanguagePureSampler(*arguments)


def test_bad_rows():
    """Would catch a rank that reads past its wave or an empty corpus."""
    sampler = LanguagePureSampler(2, 2, 1)
    with pytest.raises(ValueError, match="1 waves and 2 slots"):
        sampler.row_examples(0, 1, 0, 1, [5, 5])
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        sampler.row_examples(0, 0, 0, 1, [0, 0])
    with pytest.raises(ValueError, match="step must not be negative"):
        sampler.assign(-1)
