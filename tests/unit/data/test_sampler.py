"""The language-pure sampler: which objective and which samples each gradient row takes."""

import itertools

import numpy as np
import pytest

from megatron_moo.data.sampling.apportion import shares
from megatron_moo.data.sampling.sampler import LanguagePureSampler
from tests.helpers.sampling import step_examples

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
    target = np.arange(STEPS)[:, None] * sampler.phases[0].source.shares * d * w
    assert np.abs(before - target).max() < 1
    in_step = np.diff(before, axis=0)
    assert (in_step.sum(1) == d * w).all() and in_step.min() >= 0
    if d * w >= k:
        assert in_step.min() >= 1, "every objective occurs in every step"


@pytest.mark.parametrize("kind", ["equal", "skewed"])
@pytest.mark.parametrize(("k", "d", "w"), SHAPES)
def test_any_window_is_within_two_rows_of_its_shares(k, d, w, kind):
    """Would catch rows of a language that come in clusters: each count right, a stretch of steps wrong."""
    sampler = LanguagePureSampler(k, d, w, _weights(kind, k))
    target = np.arange(STEPS)[:, None] * sampler.phases[0].source.shares * d * w
    off = _cumulative(sampler, STEPS) - target
    # The worst window begins where a count is furthest behind and ends where it is furthest ahead, or the reverse.
    worst = np.ptp(off, axis=0).max()
    assert worst <= 2 - 1 / max(k - 1, 1) + 1e-9
    if k <= 2 or kind == "equal":
        assert worst <= 1 + 1e-9


def test_no_schedule_keeps_every_window_within_one_row():
    """The reason for the bound of two: all schedules of 1/2, 1/3, 1/6 over eight single rows leave it somewhere."""
    share = np.array([1 / 2, 1 / 3, 1 / 6])
    for choice in itertools.product(range(3), repeat=8):
        off = np.cumsum(np.eye(3)[list(choice)] - share, axis=0)
        assert np.ptp(np.vstack([np.zeros(3), off]), axis=0).max() >= 1 - 1e-9


def test_counts_stay_within_one_row_for_many_objectives():
    """Would catch a bound that holds for a few objectives only; the rare ones wait longest here."""
    weights = [1 / (k + 1) ** 1.5 for k in range(60)]
    sampler = LanguagePureSampler(60, 1, 7, weights)
    target = np.arange(3000)[:, None] * sampler.phases[0].source.shares * 7
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
        seen = {step: (walked.assign(step).copy(), step_examples(walked, step, 3, sizes)) for step in range(1100)}
        for step in (1099, 0, 517, 1025, 1):
            fresh = LanguagePureSampler(k, d, w, _weights(kind, k), seed=3)
            assert np.array_equal(fresh.assign(step), seen[step][0])
            assert np.array_equal(step_examples(fresh, step, 3, sizes), seen[step][1])
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
    assert not np.array_equal(
        np.sort(step_examples(one, 0, 4, sizes), None), np.sort(step_examples(two, 0, 4, sizes), None)
    )


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
            samples = step_examples(sampler, step, 2, sizes).ravel().tolist()
            steps[-1].append(sorted(zip(objectives, samples, strict=True)))
    assert steps[0] == steps[1] == steps[2]


def test_requested_shares_hold_over_ten_thousand_steps():
    """Would catch a rounding of shares, for the sake of a short cycle, that adds up."""
    rng = np.random.default_rng(0)
    for k, rows in ((2, 1), (5, 8), (40, 16), (100, 128)):
        sampler = LanguagePureSampler(k, rows, 1, weights := rng.dirichlet(np.full(k, 0.7)) + 1e-5)
        kept = sampler.phases[0].source.shares
        assert kept.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(kept - shares(weights, rows)).max() * rows * STEPS < 0.2


@pytest.mark.parametrize("floor", [0, 0.25])
def test_a_lower_floor_keeps_smaller_shares(floor):
    """Would catch: a floor of a row in spite of the option, or objectives that never come."""
    sampler = LanguagePureSampler(4, 2, 2, [60, 30, 9, 1], floor=floor)
    kept = sampler.phases[0].source.shares
    expected = {0: [0.6, 0.3, 0.09, 0.01], 0.25: [0.5682, 0.2841, 0.0852, 0.0625]}[floor]
    assert kept == pytest.approx(expected, abs=1e-4)
    assert min(kept) >= floor / 4 - 1e-9
    target = np.arange(STEPS)[:, None] * kept * 4
    assert np.abs(_cumulative(sampler, STEPS) - target).max() < 1


def test_late_steps_are_near():
    """Would catch a resumed run that replays all its steps in Python: the pattern begins again after a cycle."""
    sampler = LanguagePureSampler(5, 3, 1, [5, 4, 3, 2, 1.5], later=[(300_000, [1, 2, 3, 4, 5])])
    first = sampler.phases[0].source
    before, now = sampler.counts(200_000)
    assert np.abs(before - first.shares * 3 * 200_000).max() < 1 and now.sum() == 3
    assert len(first._states) < 70
    assert np.abs(sampler.counts(300_000)[0] - first.shares * 3 * 300_000).max() < 1


def test_a_tiny_corpus_does_not_push_out_a_large_one(monkeypatch):
    """Would catch the order of a large corpus drawn again in every step, as a row takes many epochs of a tiny one."""
    from megatron_moo.data.sampling import sampler as module

    drawn = []
    monkeypatch.setattr(module, "_permutation", lambda size, *key: drawn.append(size) or np.arange(size))
    sampler = LanguagePureSampler(3, 3, 1)
    for step in range(20):
        for slot in range(3):
            sampler.row_examples(step, 0, slot, 64, [1, 100_000, 5])
    assert drawn.count(100_000) == 1


def test_weights_that_change_keep_each_phase_within_one_row():
    """Would catch a phase that begins late, or one whose shares pay for the deviations of the one before."""
    first, second, third = [6, 3, 1], [1, 3, 6], [1, 1, 1]
    sampler = LanguagePureSampler(3, 2, 2, first, seed=4, later=[(701, second), (1500, third)])
    before = _cumulative(sampler, 3000)
    for start, end, weights in ((0, 701, first), (701, 1500, second), (1500, 3000, third)):
        given = before[start:end] - before[start]
        target = np.arange(end - start)[:, None] * shares(weights, 4) * 4
        assert np.abs(given - target).max() < 1
    assert (np.diff(before, axis=0).sum(1) == 4).all()


@pytest.mark.parametrize("active", [None, 2])
def test_a_phase_goes_on_in_the_streams_of_the_one_before(active):
    """Would catch samples that are repeated or skipped where the weights change, and state that a resume has not."""
    sizes = [23, 60, 7]
    sampler = LanguagePureSampler(3, 2, 1, [5, 3, 2], active=active, later=[(40, [1, 1, 8])])
    streams: list[list[int]] = [[], [], []]
    for step in range(150):
        for slot in range(2):
            picked = sampler.row_examples(step, 0, slot, 3, sizes)
            streams[sampler.assign(step)[0, slot]] += picked.tolist()
    for stream, size in zip(streams, sizes, strict=True):
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))
    fresh = LanguagePureSampler(3, 2, 1, [5, 3, 2], active=active, later=[(40, [1, 1, 8])])
    assert np.array_equal(step_examples(fresh, 120, 3, sizes), step_examples(sampler, 120, 3, sizes))


def test_parallel_rows_take_the_same_samples_in_all_languages():
    """Would catch translations that drift apart, or an epoch that takes a sample twice."""
    k, d, w, n, size = 4, 2, 4, 3, 50
    sampler = LanguagePureSampler(k, d, w)
    streams: list[list[int]] = [[] for _ in range(k)]
    for step in range(100):
        rows = {objective: [] for objective in range(k)}
        for wave in range(w):
            for slot in range(d):
                picked = sampler.parallel_examples(step, wave, slot, n, size).tolist()
                rows[int(sampler.assign(step)[wave, slot])].append(picked)
        assert all(rows[objective] == rows[0] for objective in range(k))
        for objective in range(k):
            streams[objective] += [i for row in rows[objective] for i in row]
    for stream in streams:
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))


def test_parallel_rows_of_unequal_shares_stay_in_step():
    """Would catch a rare language that lags behind the others in the common stream."""
    sampler = LanguagePureSampler(3, 2, 2, [7, 2, 1], later=[(30, [1, 1, 1])])
    for step in range(80):
        firsts = {}
        for wave in range(2):
            for slot in range(2):
                firsts.setdefault(
                    int(sampler.assign(step)[wave, slot]), sampler.parallel_examples(step, wave, slot, 2, 999).tolist()
                )
        assert len(set(map(tuple, firsts.values()))) == 1


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
        ((2, 2, 2, None, 1, None, 1.5), "floor must be from 0 to 1"),
        ((4, 2, 2, None, 1, 2, 0), "floor must be in"),
        ((2, 2, 2, [1.0, 0.0]), "leave an unwanted objective out"),
        ((2, 2, 2, [1.0, float("nan")]), "positive and finite"),
        ((2, 2, 2, None, -1), "seed must not be negative"),
        ((2, 2, 2, None, 1, None, 0.5, [(5, [1, 1]), (5, [1, 2])]), "later: steps must ascend"),
        ((2, 2, 2, None, 1, None, 0.5, [(5, [1, 0])]), "leave an unwanted objective out"),
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
