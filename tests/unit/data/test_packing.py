"""Which samples share a pack, and how the plan is kept."""

import logging

import numpy as np
import pytest

from megatron_moo.data.corpus import Corpus
from megatron_moo.data.sampling import packing
from megatron_moo.data.sampling.packing import PackedCorpus, PackPlan, load_plan, plan_packs
from tests.helpers.tiny_corpus import random_pair

FAMILIES = {
    "short": lambda rng, s: rng.integers(2, max(s // 4, 3), 500),
    "mixed": lambda rng, s: rng.integers(2, s + 2, 300),
    "long": lambda rng, s: rng.integers(s // 2, s + 2, 60),
    "equal": lambda rng, s: np.full(101, s // 3 + 1),
    "skewed": lambda rng, s: np.clip(rng.lognormal(2, 1, 800), 2, s + 1).astype(int),
    "one": lambda rng, s: np.array([s + 1]),
}


def _used(plan: PackPlan, lengths: np.ndarray) -> list[int]:
    """Positions used of each pack; which of equally full packs takes a sample makes no difference to it."""
    return sorted(int((lengths[plan[p]] - 1).sum()) for p in range(len(plan)))


def _by_the_book(lengths: np.ndarray, s: int) -> list[int]:
    """The same by best fit decreasing, a sample at a time."""
    packs: list[int] = []
    for size in sorted((lengths - 1).tolist(), reverse=True):
        fullest = max((used for used in packs if used + size <= s), default=None)
        if fullest is not None:
            packs.remove(fullest)
        packs.append((fullest or 0) + size)
    return sorted(packs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("s", [16, 64, 1000])
def test_plan_is_best_fit_decreasing(family, s):
    """Would catch: a sample lost or in two packs, a pack over S, or packs emptier than the rule leaves them."""
    lengths = FAMILIES[family](np.random.default_rng(s), s)
    plan = plan_packs(lengths, s)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert plan.starts[0] == 0 and plan.starts[-1] == len(lengths) and (np.diff(plan.starts) > 0).all()
    assert max(_used(plan, lengths)) <= s
    assert _used(plan, lengths) == _by_the_book(lengths, s)
    again = plan_packs(lengths.copy(), s)
    assert np.array_equal(plan.order, again.order) and np.array_equal(plan.starts, again.starts)


def _fewest(sizes: list[int], s: int, packs: tuple[int, ...] = ()) -> int:
    """The fewest packs, by trying all ways to put the samples in."""
    if not sizes:
        return len(packs)
    size, *rest = sizes
    ways = [(*packs[:p], used + size, *packs[p + 1 :]) for p, used in enumerate(packs) if used + size <= s]
    return min(_fewest(rest, s, way) for way in [*ways, (*packs, size)])


def test_packs_are_nearly_the_fewest():
    """Would catch: packs beyond the bound of Johnson et al., 11/9 of the fewest and one."""
    for seed in range(40):
        lengths = np.random.default_rng(seed).integers(2, 8, 7)
        assert len(plan_packs(lengths, 10)) <= 11 / 9 * _fewest((lengths - 1).tolist(), 10) + 1


def test_neighbours_of_one_length_are_spread():
    """Would catch: packs of neighbours in the file, which are often alike."""
    plan = plan_packs(np.full(4000, 11), 40)
    gaps = [np.ptp(plan[p]) for p in range(len(plan))]
    assert len(plan) == 1000 and np.median(gaps) > 1000


def test_lengths_out_of_range():
    """Would catch: a sample that fits in no pack, or one that takes no place."""
    for lengths in ([3, 10], [1, 5]):
        with pytest.raises(ValueError, match=r"lengths must be in \[2, 9\] to fit in seq_length 8, found"):
            plan_packs(np.array(lengths), 8)


@pytest.fixture
def planned(monkeypatch) -> list[int]:
    """Grows whenever packs are planned."""
    calls: list[int] = []
    original = packing.plan_packs
    monkeypatch.setattr(packing, "plan_packs", lambda lengths, s: (calls.append(s), original(lengths, s))[1])
    return calls


def test_plan_is_kept_under_all_that_changes_it(tmp_path, planned, monkeypatch):
    """Would catch: the plan of other lengths, another S or an older algorithm used again, or one never found again."""
    prefix = str(tmp_path / "de")
    lengths = np.random.default_rng(0).integers(2, 30, 200).astype(np.int32)
    first = load_plan(prefix, lengths, 64)
    same = load_plan(prefix, lengths, 64)
    assert planned == [64]
    assert np.array_equal(first.order, same.order) and np.array_equal(first.starts, same.starts)
    load_plan(prefix, lengths, 65)
    load_plan(prefix, lengths[::-1].copy(), 64)
    load_plan(prefix, lengths[:-1], 64)
    assert planned == [64, 65, 64, 64]
    monkeypatch.setattr(packing, "_VERSION", packing._VERSION + 1)
    load_plan(prefix, lengths, 64)
    assert len(planned) == 5
    assert len(list(tmp_path.iterdir())) == 5 and not list(tmp_path.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "not a plan"])
def test_broken_plan_is_made_again(tmp_path, planned, caplog, damage):
    """Would catch: a run that stops, or trains on other packs than its ranks, for a file cut off or gone bad."""
    prefix = str(tmp_path / "de")
    lengths = np.random.default_rng(0).integers(2, 30, 200).astype(np.int32)
    first = load_plan(prefix, lengths, 64)
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        whole[400] ^= 1
        path.write_bytes(whole)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        np.savez(path, order=first.order[:-1], starts=first.starts, fingerprint=np.array("0"))
    else:
        np.savez(path, fingerprint=np.array("0"))
    with caplog.at_level(logging.WARNING):
        again = load_plan(prefix, lengths, 64)
    assert len(planned) == 2 and "planned again" in caplog.text
    assert np.array_equal(again.order, first.order)
    load_plan(prefix, lengths, 64)
    assert len(planned) == 2, "the plan was put right"


def test_plan_that_cannot_be_kept(tmp_path, planned, caplog):
    """Would catch: a run that stops because its data lie where it may not write."""
    lengths = np.array([3, 4, 5], dtype=np.int32)
    with caplog.at_level(logging.WARNING):
        plan = load_plan(str(tmp_path / "missing" / "de"), lengths, 8)
    assert len(plan) == 2 and "cannot be written" in caplog.text


def test_packed_corpus_gives_all_samples_once(tmp_path):
    """Would catch: samples of another pack, or a report of how full packs are that is not so."""
    lengths = np.random.default_rng(1).integers(1, 40, 80)
    prefix, *_ = random_pair(tmp_path / "x", lengths)
    corpus = Corpus(prefix, "xx", 33, "split")
    packed = PackedCorpus(corpus, 32)
    samples = [tokens.tolist() for p in range(len(packed)) for tokens, _ in packed[p]]
    assert sorted(samples) == sorted(corpus[i][0].tolist() for i in range(len(corpus)))
    used = [sum(len(tokens) - 1 for tokens, _ in packed[p]) for p in range(len(packed))]
    assert packed.lengths.tolist() == [sum(len(tokens) for tokens, _ in packed[p]) for p in range(len(packed))]
    assert packed.efficiency == pytest.approx(sum(used) / (32 * len(packed)))
    assert packed.samples_per_pack == pytest.approx(len(corpus) / len(packed))
    assert (packed.lang, packed.longest, packed.fit, packed.keys) == ("xx", corpus.longest, corpus.fit, None)
