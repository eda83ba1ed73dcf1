"""The rotating subset: who is active in a step, how long others wait, how rows are divided."""

from itertools import combinations

import numpy as np
import pytest

from megatron_moo.data.sampling.apportion import Apportionment
from megatron_moo.data.sampling.rotation import Rotation
from megatron_moo.data.sampling.sampler import LanguagePureSampler
from tests.helpers.sampling import step_examples

# K objectives, n active, R rows, floor, weights. Steps: several cycles of equal weights, a part of one of others.
STEPS = 700
CASES = [
    (5, 1, 1, 0.5, "equal"),
    (6, 4, 4, 0.5, "equal"),
    (16, 8, 12, 0.5, "equal"),
    (50, 8, 8, 0.5, "equal"),
    (7, 6, 16, 0.5, "skewed"),
    (12, 5, 8, 0.1, "skewed"),
    (12, 5, 5, 1.0, "skewed"),
    (40, 8, 24, 0.5, "skewed"),
    (3, 2, 4, 0.2, "lopsided"),
]


def _weights(kind: str, k: int) -> list[float]:
    if kind == "lopsided":
        return [1000.0] + [1.0] * (k - 1)  # the first is always active
    if kind == "skewed":
        return list(np.random.default_rng(k).dirichlet(np.full(k, 0.4)) + 1e-5)
    return [1.0] * k


def _sampler(k: int, n: int, r: int, floor: float, kind: str, waves: int = 1, seed: int = 3) -> LanguagePureSampler:
    weights = None if kind == "equal" else _weights(kind, k)
    return LanguagePureSampler(k, r // waves, waves, weights, seed, active=n, floor=floor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_has_its_subset_and_turns_keep_their_share(case):
    """Would catch: a language twice among the active ones, a drift of shares, or a wait beyond its bound."""
    k, n, r, floor, kind = case
    sampler = _sampler(*case)
    rows = np.array([sampler.counts(step)[1] for step in range(STEPS)])
    active = rows > 0
    assert (active.sum(1) == n).all() and (rows.sum(1) == r).all()
    rates = sampler.phases[0].source.rates
    assert rates.sum() == pytest.approx(n) and rates.min() >= floor * n / k - 1e-9 and rates.max() <= 1
    turns = np.cumsum(active, axis=0)
    assert np.abs(turns - np.arange(1, STEPS + 1)[:, None] * rates).max() < 1
    for objective in range(k):
        waits = np.diff(np.flatnonzero(active[:, objective]), prepend=-1)
        assert waits.max() <= np.ceil(2 / rates[objective]) <= sampler.phases[0].source.max_wait
    if kind == "equal":
        assert np.allclose(rates, n / k) and sampler.phases[0].source.max_wait == -(-2 * k // n)
    if floor == 1:
        assert np.ptp(rates) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_follow_the_weights(case):
    """Would catch: extra rows that always go to the same, or weights that count twice (in turns and in rows)."""
    k, n, r, floor, kind = case
    sampler = _sampler(*case)
    before, last = sampler.counts(STEPS)[0], sampler.counts(STEPS - 1)
    assert np.array_equal(last[0] + last[1], before)
    mean = before / STEPS
    if kind == "equal":
        assert np.abs(mean * k / r - 1).max() < 0.05
    wanted = np.array(_weights(kind, k)) / sum(_weights(kind, k)) * r
    free = (sampler.phases[0].source.rates > floor * n / k + 1e-3) & (sampler.phases[0].source.rates < 1)
    if r == n and free.any():  # no minimum of a row decides
        scale = mean[free] / wanted[free]
        assert np.ptp(scale) < 0.15 * scale.mean()


def test_the_rates_are_the_weights_between_floor_and_one():
    """Would catch: a floor or a cap that is paid for by the wrong objectives."""
    rotation = Rotation([8, 4, 2, 1, 1], 2, 2, 0.5, 1)
    assert rotation.rates == pytest.approx([32 / 35, 16 / 35, 0.2286, 0.2, 0.2], abs=1e-3)
    capped = Rotation([80, 4, 2, 2], 2, 2, 0.1, 1).rates
    assert capped == pytest.approx([1, 0.5, 0.25, 0.25], abs=1e-3)


@pytest.mark.parametrize(("k", "n"), [(6, 2), (5, 2), (9, 4), (16, 8)])
def test_all_pairs_meet(k, n):
    """Would catch: fixed groups of languages, whose conflicts with the others nobody would ever see."""
    sampler = LanguagePureSampler(k, n, 1, active=n)
    steps = (sorted(sampler.assign(step).ravel().tolist()) for step in range(400))
    assert {pair for languages in steps for pair in combinations(languages, 2)} == set(combinations(range(k), 2))


def test_no_place_is_tied_to_an_objective():
    """Would catch: turns in step with the turning order of the rows, so that a rank sees some languages only."""
    for k, n, d, w in ((8, 4, 4, 1), (6, 4, 2, 2), (16, 8, 4, 2)):
        sampler = LanguagePureSampler(k, d, w, active=n)
        assigned = np.stack([sampler.assign(step) for step in range(4000)])
        for objective in range(k):
            visits = (assigned == objective).sum(0)
            assert np.abs(visits / visits.mean() - 1).max() < 0.2


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[8]], ids=str)
def test_any_step_at_once_equals_walking_there(case):
    """Would catch: state that a resumed run does not have, also in a later cycle."""
    k, cycle = case[0], _sampler(*case).phases[0].source.cycle
    sizes = [37 + i for i in range(k)]
    walked = _sampler(*case)
    seen = {step: (walked.assign(step).copy(), step_examples(walked, step, 2, sizes)) for step in range(300)}
    for step in (299, 0, 128, 131):
        fresh = _sampler(*case)
        assert np.array_equal(fresh.assign(step), seen[step][0])
        assert np.array_equal(step_examples(fresh, step, 2, sizes), seen[step][1])
        assert np.array_equal(walked.assign(step), seen[step][0]), "going back changed the answer"
    fresh = _sampler(*case)
    late, ends = fresh.counts(2 * cycle + 7), _sampler(*case).counts(cycle)
    assert np.array_equal(late[1], walked.counts(7)[1]), "subsets begin again after a cycle"
    assert np.array_equal(late[0], 2 * ends[0] + walked.counts(7)[0])


def test_samples_of_a_step_do_not_depend_on_the_layout():
    """Would catch: a run on 4 slots that sees other data than the same run on 8."""
    sizes = [101, 50, 33, 70, 20, 44]
    steps = []
    for waves in (4, 2, 1):
        sampler = _sampler(6, 4, 8, 0.5, "skewed", waves)
        steps.append([])
        for step in range(50):
            objectives = np.repeat(sampler.assign(step).ravel(), 2).tolist()
            samples = step_examples(sampler, step, 2, sizes).ravel().tolist()
            steps[-1].append(sorted(zip(objectives, samples, strict=True)))
    assert steps[0] == steps[1] == steps[2]


def test_all_active_is_no_rotation():
    """Would catch: other data for `active = K`, which asks for what is done anyway."""
    plain, all_ = LanguagePureSampler(4, 2, 3, seed=2), LanguagePureSampler(4, 2, 3, seed=2, active=4)
    assert isinstance(all_.phases[0].source, Apportionment)
    assert all(np.array_equal(plain.assign(step), all_.assign(step)) for step in range(20))
    few = LanguagePureSampler(4, 2, 1, active=3)  # fewer rows than asked for
    assert all(len(set(few.assign(step).ravel().tolist())) == 2 for step in range(20))


def test_pinned_values():
    """Would catch: a change of the random ties, with which old runs would resume on other languages."""
    sampler = LanguagePureSampler(6, 2, 2, seed=1, active=3)
    assert [sampler.assign(s).ravel().tolist() for s in (0, 1, 7)] == [[5, 1, 5, 2], [3, 3, 0, 4], [5, 3, 5, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"active": 0}, "active must be at least 1"), ({"active": 1, "floor": 0.0}, r"floor must be in \(0, 1\], got 0")],
)
def test_bad_options(options, message):
    """Would catch: a language that is never active."""
    with pytest.raises(ValueError, match=message):
        LanguagePureSampler(3, 2, 1, **options)


def test_the_most_rows_of_a_step_and_the_shares_of_a_cycle():
    """Would catch: parallel batches that take a sample twice in an epoch, because a step had more rows than said."""
    for case in CASES:
        source = _sampler(*case).phases[0].source
        rows = np.stack([source.counts(step)[1] for step in range(600)])
        assert rows.max() <= source.most
        assert source.shares.sum() == pytest.approx(1)
        assert source.shares * source.cycle * case[2] == pytest.approx(source.counts(source.cycle)[0])
