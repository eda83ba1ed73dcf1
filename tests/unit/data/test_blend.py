"""The mathematics of weights, by their properties over seeded random corpora."""

import math

import numpy as np
import pytest

from megatron_moo.data.blending.weights import (
    allocate,
    convert,
    epochs,
    gramian,
    manual,
    normalised,
    proportional,
    temperature,
    uniform,
    unimax,
)

SIZES = {"en": 1000, "de": 400, "fr": 300, "sw": 20, "yo": 2}


def corpora(count: int = 300, seed: int = 0):
    """Random sizes over several orders, with a budget and a cap that bind none, some or all of them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        k = int(rng.integers(1, 40))
        sizes = {f"l{i}": int(10 ** rng.uniform(0, 9)) for i in rng.permutation(k)}
        cap = float(10 ** rng.uniform(-1, 2))
        budget = cap * sum(sizes.values()) * 10 ** rng.uniform(-4, 1)
        yield sizes, budget, cap, rng


def shuffled(values: dict, rng: np.random.Generator) -> dict:
    names = list(values)
    return {names[i]: values[names[i]] for i in rng.permutation(len(names))}


def close(a: dict, b: dict, rel: float = 1e-9) -> None:
    assert set(a) == set(b)
    for lang in a:
        assert a[lang] == pytest.approx(b[lang], rel=rel), lang


def test_the_vectors_of_the_papers_methods():
    """Would catch a UniMax that visits large languages first, or an exponent on the wrong side."""
    assert list(unimax(SIZES, 1000, 4).values()) == pytest.approx([0.304, 0.304, 0.304, 0.080, 0.008])
    assert epochs(temperature(SIZES, alpha=0.3), SIZES, 1000)["yo"] == pytest.approx(26.5, abs=0.05)
    assert list(proportional(SIZES)) == list(SIZES)


def test_unimax_properties():
    """Would catch a language over its cap, unequal shares below it, a budget not spent, or a dependence on order."""
    for sizes, budget, cap, rng in corpora():
        shares = unimax(sizes, budget, cap)
        room = cap * sum(sizes.values())
        spent = {lang: share * min(budget, room) for lang, share in shares.items()}
        assert all(spent[lang] <= cap * sizes[lang] * (1 + 1e-9) for lang in sizes)
        free = [share for lang, share in shares.items() if spent[lang] < cap * sizes[lang] * (1 - 1e-9)]
        assert not free or max(free) == pytest.approx(min(free), rel=1e-9)
        assert not free or max(free) >= max(shares.values()) * (1 - 1e-9), "nobody capped has more than the free"
        assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
        if budget < room:
            assert free or budget == pytest.approx(room)
        close(unimax(shuffled(sizes, rng), budget, cap), shares)


def test_unimax_is_equal_shares_under_a_cap():
    """Would catch a general cap that differs from the published one."""
    for sizes, budget, cap, _ in corpora(seed=1):
        found = allocate(uniform(sizes), sizes, budget, cap)
        close(found.shares, unimax(sizes, budget, cap))
        assert found.spendable == pytest.approx(min(budget, cap * sum(sizes.values())))


def test_unimax_between_uniform_and_proportional():
    """Would catch a limit that is neither: a large cap leaves equal shares, a small one those of the corpus."""
    for sizes, budget, _, _ in corpora(60, seed=2):
        close(unimax(sizes, budget, 1e12), uniform(sizes))
        close(unimax(sizes, budget, 1e-12), proportional(sizes))


def test_temperature_limits_and_order():
    """Would catch alpha and tau mixed up, or a small language that gets less than its natural share."""
    for sizes, _, _, rng in corpora(60, seed=3):
        close(temperature(sizes, alpha=1), proportional(sizes), rel=1e-8)
        close(temperature(sizes, alpha=0), uniform(sizes))
        close(temperature(sizes, alpha=0.25), temperature(sizes, tau=4))
        shares, natural = temperature(sizes, tau=rng.uniform(1, 5)), proportional(sizes)
        smallest, largest = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
        assert shares[smallest] >= natural[smallest] * (1 - 1e-9)
        assert shares[largest] <= natural[largest] * (1 + 1e-9)


@pytest.mark.parametrize("method", [proportional, uniform, lambda sizes: temperature(sizes, alpha=0.3)])
def test_order_and_scale_do_not_matter(method):
    """Would catch weights that depend on the order of languages or on the unit being k or M."""
    for sizes, _, _, rng in corpora(40, seed=4):
        shares = method(sizes)
        close(method(shuffled(sizes, rng)), shares)
        close(method({lang: size * 1000 for lang, size in sizes.items()}), shares, rel=1e-8)
        assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12) and min(shares.values()) > 0


def test_caps_and_floors_hold_and_the_rest_keeps_its_proportions():
    """Would catch a bound that is broken after the others were lifted, or clipping that changes who is in between."""
    for sizes, budget, cap, rng in corpora(seed=5):
        start = normalised({lang: float(10 ** rng.uniform(-3, 0)) for lang in sizes})
        floor = float(rng.uniform(0, 1 / len(sizes)))
        found = allocate(start, sizes, budget, cap, floor)
        room = cap * sum(sizes.values())
        assert math.fsum(found.shares.values()) == pytest.approx(1, abs=1e-9)
        limits = {lang: cap * sizes[lang] / budget for lang in sizes}
        if budget >= room:
            assert found.capped == set(sizes)
            close(found.shares, proportional(sizes))
            continue
        for lang, share in found.shares.items():
            assert share <= limits[lang] * (1 + 1e-6)
            assert share >= min(floor, limits[lang]) * (1 - 1e-6)
        assert found.unfloored == {lang for lang in sizes if limits[lang] < floor}
        ratios = [share / start[lang] for lang, share in found.shares.items()
                  if lang not in found.capped and share > min(floor, limits[lang]) * (1 + 1e-6)]  # fmt: skip
        assert not ratios or max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_nothing_changes_without_bounds():
    """Would catch a method whose weights are not what its name says although nothing binds."""
    for sizes, budget, _, _ in corpora(40, seed=6):
        shares = temperature(sizes, alpha=0.5)
        found = allocate(shares, sizes, budget)
        close(found.shares, shares)
        assert not found.capped and not found.floored and found.spendable == budget
    assert allocate(uniform(SIZES), SIZES).spendable is None


def test_what_was_seen_counts():
    """Would catch a second phase that spends the cap again."""
    first = unimax(SIZES, 400, 3)
    seen = {lang: share * 400 for lang, share in first.items()}
    second = unimax(SIZES, 600, 4, seen)
    total = epochs(second, SIZES, 600, seen)
    assert max(total.values()) <= 4 + 1e-9 and total["yo"] == pytest.approx(4)
    with pytest.raises(ValueError, match="'yo' was seen 4 times already, the cap on epochs is 4; raise the cap"):
        unimax(SIZES, 600, 4, {"yo": 8})


def test_a_gramian_lifts_whom_the_others_agree_with():
    """Would catch a sign, a missing prior, or a raw Gramian where cosines were meant."""
    prior = {"a": 0.5, "b": 0.3, "c": 0.2}
    rows = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [-0.2, 0.1, 0.9]])
    products = rows @ rows.T
    close(gramian(prior, products, eta=0), prior)
    shares = gramian(prior, products)
    cosine = products / np.sqrt(np.outer(np.diag(products), np.diag(products)))
    wanted = np.array(list(prior.values())) * np.exp(cosine.mean(axis=1))
    assert list(shares.values()) == pytest.approx(wanted / wanted.sum())
    assert shares["c"] < prior["c"]
    scale = np.diag([1.0, 100.0, 0.01])
    close(gramian(prior, scale @ products @ scale), shares)
    close(gramian(prior, products * 1e6, normalise=False), gramian(prior, products, normalise=False))
    long = gramian(uniform(prior), scale @ products @ scale, normalise=False)
    assert max(long, key=long.get) == "b", "without cosines the longest gradient wins"
    order = [2, 0, 1]
    turned = gramian({"c": 0.2, "a": 0.5, "b": 0.3}, products[np.ix_(order, order)])
    close(turned, shares)


def test_unmeasured_pairs_are_left_out_of_the_mean():
    """Would catch a NaN that spreads to all weights, in runs where some languages never met."""
    products = np.array([[1.0, np.nan, 0.5], [np.nan, 1.0, 0.5], [0.5, 0.5, 1.0]])
    shares = gramian(uniform(dict.fromkeys("abc", 1)), products)
    wanted = np.exp([0.75, 0.75, 2 / 3])
    assert list(shares.values()) == pytest.approx(wanted / wanted.sum())


def test_units_convert_and_come_back():
    """Would catch shares multiplied where they are to be divided: long samples need fewer of them."""
    tokens = {"en": 0.5, "th": 0.5}
    samples = convert(tokens, {"en": 1 / 100, "th": 1 / 300})
    assert samples == pytest.approx({"en": 0.75, "th": 0.25})
    close(convert(samples, {"en": 100, "th": 300}), tokens)


BAD = {
    "no language": lambda: proportional({}),
    "size of 'b' must be positive and finite, found 0": lambda: proportional({"a": 1, "b": 0}),
    "size of 'b' must be positive and finite, found nan": lambda: uniform({"a": 1, "b": math.nan}),
    "size of 'b' must be positive and finite, found -3": lambda: temperature({"a": 1, "b": -3}, alpha=0.5),
    "size of 'a' must be a number, found '7'": lambda: proportional({"a": "7"}),
    "size of 'a' must be a number, found True": lambda: proportional({"a": True}),
    "give either alpha or tau": lambda: temperature(SIZES),
    "give either alpha or tau = ": lambda: temperature(SIZES, alpha=0.5, tau=2),
    r"alpha must be in \[0, 1\], found 1.5": lambda: temperature(SIZES, alpha=1.5),
    r"alpha must be in \[0, 1\], found nan": lambda: temperature(SIZES, alpha=math.nan),
    r"tau must be in \[1, inf\), found 0.5": lambda: temperature(SIZES, tau=0.5),
    r"budget must be in \(0, inf\), found 0": lambda: unimax(SIZES, 0, 4),
    r"budget must be in \(0, inf\), found inf": lambda: unimax(SIZES, math.inf, 4),
    r"cap on epochs must be in \(0, inf\), found 0": lambda: unimax(SIZES, 10, 0),
    r"cap on epochs must be in \(0, inf\), found -1": lambda: allocate(uniform(SIZES), SIZES, 10, -1),
    "a cap on epochs needs a budget": lambda: allocate(uniform(SIZES), SIZES, None, 4),
    r"floor must be in \[0, 0.2\], found 0.3": lambda: allocate(uniform(SIZES), SIZES, floor=0.3),
    "unknown language 'xx'; known: en": lambda: manual({"xx": 1}, ["en"]),
    "nothing for de, fr": lambda: manual({"en": 1}, ["en", "de", "fr"]),
    "weight of 'en' must be positive and finite, found 0": lambda: manual({"en": 0, "de": 1}, ["en", "de"]),
    "weight of 'en' must be positive and finite, found inf": lambda: manual({"en": math.inf}, ["en"]),
    "weight of 'a' is 0 beside the largest one": lambda: manual({"a": 1e-300, "b": 1e300}, ["a", "b"]),
    "shares: nothing for yo": lambda: allocate({"en": 1, "de": 1, "fr": 1, "sw": 1}, SIZES),
    r"must be 2 x 2, one row a language, found \(3, 3\)": lambda: gramian({"a": 1, "b": 1}, np.eye(3)),
    "must be symmetric and finite": lambda: gramian({"a": 1, "b": 1}, np.array([[1, 0.5], [0.1, 1]])),
    "no gradient of b": lambda: gramian({"a": 1, "b": 1}, np.array([[1, np.nan], [np.nan, np.nan]])),
    r"eta must be in \[0, inf\), found -1": lambda: gramian({"a": 1, "b": 1}, np.eye(2), eta=-1),
    "factors: nothing for b": lambda: convert({"a": 0.5, "b": 0.5}, {"a": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_values_are_named(message):
    """Would catch weights made from nonsense, or an error that does not say which value."""
    with pytest.raises(ValueError, match=message):
        BAD[message]()
