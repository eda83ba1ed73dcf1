"""How much of each language a run is to see: the mathematics of weights.

    sizes = {"en": 1000, "de": 400, "fr": 300, "sw": 20, "yo": 2}        # in tokens, samples or bytes
    shares = temperature(sizes, alpha=0.3)
    epochs(shares, sizes, budget=1000)["yo"]                             # 26.5: times that each sample is seen
    allocate(shares, sizes, budget=1000, max_epochs=4, floor=0.01).shares

A size is what a language has, a share what it gets of the run; both are in one unit, and shares are positive and
sum to 1. A budget is what the run sees in all, in the same unit. Every method maps languages to shares; no result
depends on the order of the languages.

    proportional   share ~ size
    uniform        equal shares
    temperature    share ~ size^alpha, alpha = 1 / tau
    unimax         as equal as a cap on the epochs of each language allows (Chung et al. 2023)
    manual         what the user says
    gramian        more for languages whose gradients help the others (in the manner of DoGE)

`allocate` puts a cap on epochs and a floor under shares, whatever the method. Errors are ValueErrors that name the
language, the rule and the value.

Legend: K languages.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

METHODS = ("proportional", "uniform", "temperature", "unimax", "manual", "gramian")
_TOUCH = 1e-9  # relative distance at which a share counts as being at its cap or floor


def _positive(values: Mapping[str, float], what: str) -> dict[str, float]:
    """The values as floats; a zero, NaN or negative one would make a language vanish or the others wrong."""
    if not values:
        raise ValueError(f"{what}: no language")
    for lang, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise ValueError(f"{what} of {lang!r} must be a number, found {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} of {lang!r} must be positive and finite, found {value!r}; leave the language out")
    return {lang: float(value) for lang, value in values.items()}


def _number(name: str, value: float, low: float, high: float = math.inf, inclusive: bool = False) -> float:
    inside = (low <= value if inclusive else low < value) and value <= high and (math.isfinite(value))
    if not inside:
        left = "[" if inclusive else "("
        right = ")" if math.isinf(high) else "]"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, found {value!r}")
    return float(value)


def _match(given: Iterable[str], languages: Iterable[str], what: str) -> None:
    """Both must name the same languages."""
    known, named = dict.fromkeys(languages), dict.fromkeys(given)
    if unknown := [lang for lang in named if lang not in known]:
        raise ValueError(f"{what}: unknown language {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [lang for lang in known if lang not in named]:
        raise ValueError(f"{what}: nothing for {', '.join(missing)}; give a value for each language, or leave it out")


def normalised(weights: Mapping[str, float], what: str = "the weight") -> dict[str, float]:
    """Weights divided by their sum.

    Raises:
        ValueError: no language, or a weight that is not positive and finite.
    """
    values = _positive(weights, what)
    largest = max(values.values())  # divided first: a sum of huge weights may not be finite
    total = math.fsum(value / largest for value in values.values())
    shares = {lang: value / largest / total for lang, value in values.items()}
    if low := [lang for lang, share in shares.items() if share == 0]:
        raise ValueError(f"{what} of {low[0]!r} is 0 beside the largest one ({largest:g}); leave the language out")
    return shares


def proportional(sizes: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sizes: every language is seen the same number of times."""
    return normalised(sizes, "the size")


def uniform(sizes: Mapping[str, float]) -> dict[str, float]:
    """Equal shares, whatever the sizes."""
    return {lang: 1 / len(sizes) for lang in _positive(sizes, "the size")}


def temperature(sizes: Mapping[str, float], alpha: float | None = None, tau: float | None = None) -> dict[str, float]:
    """Shares ~ size^alpha with alpha = 1 / tau: between proportional (1) and uniform (0).

    Small languages are repeated as often as it takes: see `epochs`, and `allocate` for a cap.

    Args:
        sizes: of the languages.
        alpha: from 0 to 1; or
        tau: at least 1.

    Raises:
        ValueError: neither or both, or out of range.
    """
    if (alpha is None) == (tau is None):
        raise ValueError("temperature: give either alpha or tau = 1 / alpha")
    if tau is not None:
        alpha = 1 / _number("tau", tau, 1, inclusive=True)
    alpha = _number("alpha", alpha, 0, 1, inclusive=True)  # type: ignore[arg-type]
    logs = {lang: alpha * math.log(size) for lang, size in _positive(sizes, "the size").items()}
    top = max(logs.values())
    return normalised({lang: math.exp(value - top) for lang, value in logs.items()})


def unimax(sizes: Mapping[str, float], budget: float, max_epochs: float, seen: Mapping[str, float] | None = None
           ) -> dict[str, float]:  # fmt: skip
    """UniMax (Chung et al. 2023, algorithm 1): as equal as `max_epochs` of each language allow.

    Languages by size, the smallest first, take an equal part of what is left of the budget, but not more than
    `max_epochs` times their size. With a budget that nobody is too small for, shares are equal; with one that all
    are too small for, proportional.

    Args:
        sizes: of the languages.
        budget: what the run sees in all.
        max_epochs: how often a sample may be seen.
        seen: what an earlier phase of the run has seen of each language, which counts.

    Raises:
        ValueError: a budget or cap that is not positive, or a language that has no epoch left.
    """
    caps = _caps(sizes, _number("the budget", budget, 0), max_epochs, seen)
    rest, takes = float(budget), {}
    for number, lang in enumerate(sorted(caps, key=lambda lang: (caps[lang], lang))):
        takes[lang] = min(rest / (len(caps) - number), caps[lang])
        rest -= takes[lang]
    return normalised({lang: takes[lang] for lang in sizes})


def manual(weights: Mapping[str, float], languages: Iterable[str]) -> dict[str, float]:
    """The given weights, normalised, in the order of `languages`.

    Raises:
        ValueError: an unknown or missing language, or a weight that is not positive and finite.
    """
    languages = list(languages)
    _match(weights, languages, "weights")
    return normalised({lang: weights[lang] for lang in languages})


def gramian(
    prior: Mapping[str, float], products: np.ndarray, eta: float = 1.0, normalise: bool = True
) -> dict[str, float]:
    """Shares ~ prior * exp(eta * score): a language gets more the better its gradient fits those of all.

    The score of k is the mean over l of the inner product of the gradients of k and l, its own included: a row
    sum of the Gramian, over K. With `normalise` products are cosines, so that scores lie in [-1, 1] and no share
    changes against another by more than exp(2 eta); without, they are divided by their mean diagonal, and a language
    of large gradients scores high.

    DoGE (Fan, Pagliardini, Jaggi, arXiv 2310.15393) makes this step, with the row sums of raw Gramians, at every
    step of a small proxy model, and takes the mean of the weights along the way. Here it is *one* step, from the
    mean Gramian of a run that was made anyway. It says which languages pull together; it is not DoGE's weights, no
    optimum of anything, and it lowers languages that stand alone, which multilingual training may not want.
    Take a floor with it.

    Args:
        prior: the shares that the run was made with, or any others to start from.
        products: [K, K], symmetric, in the order of `prior`; NaN for pairs that were never measured.
        eta: how far to go; 0 gives back the prior.
        normalise: divide each product by both norms.

    Raises:
        ValueError: a shape, a value or a diagonal that cannot be; a language without any measurement.
    """
    shares = normalised(prior)
    names = list(shares)
    g = _checked(np.asarray(products, dtype=np.float64), names)
    norms = np.sqrt(np.diag(g))
    g = g / np.outer(norms, norms) if normalise else g / np.mean(np.diag(g))
    scores = np.nanmean(g, axis=1)
    steps = _number("eta", eta, 0, inclusive=True) * (scores - scores.max())
    return normalised({lang: shares[lang] * math.exp(step) for lang, step in zip(names, steps, strict=True)})


def _checked(g: np.ndarray, names: list[str]) -> np.ndarray:
    k = len(names)
    if g.shape != (k, k):
        raise ValueError(f"the Gramian must be {k} x {k}, one row a language, found {g.shape}")
    if np.isinf(g).any() or not np.allclose(g, g.T, rtol=1e-4, atol=1e-12, equal_nan=True):
        raise ValueError("the Gramian must be symmetric and finite")
    bad = [lang for lang, value in zip(names, np.diag(g), strict=True) if not value > 0]  # NaN is not, either
    if bad:
        raise ValueError(
            f"the Gramian holds no gradient of {', '.join(bad)}; use a run in which each language took part"
        )
    return g


@dataclass(frozen=True)
class Allocation:
    """Shares within their bounds.

    Attributes:
        shares: by language.
        capped, floored: languages that a bound holds.
        unfloored: languages whose cap is below the floor; the cap holds.
        spendable: how much of the budget the caps leave room for, in its unit; None without a budget.
    """

    shares: dict[str, float]
    capped: frozenset[str] = frozenset()
    floored: frozenset[str] = frozenset()
    unfloored: frozenset[str] = frozenset()
    spendable: float | None = None


def allocate(shares: Mapping[str, float], sizes: Mapping[str, float], budget: float | None = None,
             max_epochs: float | None = None, floor: float = 0.0, seen: Mapping[str, float] | None = None
             ) -> Allocation:  # fmt: skip
    """Keep shares between a floor and a cap on epochs, and in their proportions in between.

    Shares become clip(c * share, floor, cap) with the one c that makes their sum 1, where cap = max_epochs * size
    / budget. From equal shares this is UniMax. A cap below the floor wins: it is a promise not to repeat. Where
    all caps together do not fill the budget, every language is at its cap.

    Args:
        shares: of the languages.
        sizes: of the same languages, in the unit of the shares.
        budget, max_epochs: see `unimax`; a cap needs a budget.
        floor: the least share of a language, at most 1 / K.
        seen: see `unimax`.

    Raises:
        ValueError: other languages in the one than in the other, a value out of range, a cap without a budget, or a
            language that has no epoch left.
    """
    sizes = _positive(sizes, "the size")
    _match(shares, sizes, "shares")
    start = normalised({lang: shares[lang] for lang in sizes})
    floor = _number("the floor", floor, 0, 1 / len(sizes), inclusive=True)
    budget = None if budget is None else _number("the budget", budget, 0)
    caps = dict.fromkeys(sizes, math.inf)
    if max_epochs is not None:
        if budget is None:
            raise ValueError("a cap on epochs needs a budget: how much the run sees in all")
        caps = {lang: cap / budget for lang, cap in _caps(sizes, budget, max_epochs, seen).items()}
    lower = {lang: min(floor, cap) for lang, cap in caps.items()}
    if (room := math.fsum(caps.values())) <= 1:
        values, spendable = {lang: cap / room for lang, cap in caps.items()}, None if budget is None else room * budget
        return Allocation(values, frozenset(caps), spendable=spendable)
    weights, low, high = (np.array([each[lang] for lang in sizes]) for each in (start, lower, caps))
    clipped = np.clip(_scale(weights, low, high) * weights, low, high)
    found = dict(zip(sizes, (clipped / clipped.sum()).tolist(), strict=True))
    return Allocation(
        found,
        capped=frozenset(lang for lang in found if found[lang] >= caps[lang] * (1 - _TOUCH)),
        floored=frozenset(lang for lang in found if start[lang] < found[lang] <= lower[lang] * (1 + _TOUCH)),
        unfloored=frozenset(lang for lang in found if caps[lang] < floor),
        spendable=budget,
    )


def _caps(sizes: Mapping[str, float], budget: float, max_epochs: float, seen: Mapping[str, float] | None
          ) -> dict[str, float]:  # fmt: skip
    """What is left of each language until it was seen `max_epochs` times, in the unit of its size."""
    epochs = _number("the cap on epochs", max_epochs, 0)
    caps = {}
    for lang, size in _positive(sizes, "the size").items():
        before = seen.get(lang, 0.0) if seen else 0.0
        caps[lang] = epochs * size - before
        # Rounding leaves a trace where a language is just used up.
        if caps[lang] <= _TOUCH * epochs * size:
            raise ValueError(
                f"language {lang!r} was seen {before / size:.3g} times already, the cap on epochs is {epochs:g}; "
                "raise the cap"
            )
    return caps


def _scale(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """The c with sum(clip(c * weights, low, high)) = 1, given sum(low) <= 1 < sum(high).

    The sum is piecewise linear in c and never falls: find the piece, then solve it.
    """
    breaks = np.unique(np.concatenate([low / weights, high / weights]))
    breaks = breaks[np.isfinite(breaks)]

    def total(c: float) -> float:
        return float(np.clip(c * weights, low, high).sum())

    first, last = 0, len(breaks)
    while first < last:  # the first break at which the sum reaches 1
        middle = (first + last) // 2
        first, last = (first, middle) if total(breaks[middle]) >= 1 else (middle + 1, last)
    left = breaks[first - 1] if first else 0.0
    right = breaks[first] if first < len(breaks) else math.inf
    # Within the piece, those strictly between their bounds move with c; the others stand.
    moves = (low / weights <= left) & (high / weights >= right)
    slope = float(weights[moves].sum())
    if slope == 0:
        return float(right)
    return float((1 - np.where(moves, 0, np.clip(left * weights, low, high)).sum()) / slope)


def epochs(shares: Mapping[str, float], sizes: Mapping[str, float], budget: float,
           seen: Mapping[str, float] | None = None) -> dict[str, float]:  # fmt: skip
    """How often each sample of a language is seen in a run of `budget`, `seen` before it included.

    Everything above 1 is repetition.
    """
    budget = _number("the budget", budget, 0)
    sizes = _positive(sizes, "the size")
    _match(shares, sizes, "shares")
    return {lang: ((seen.get(lang, 0.0) if seen else 0.0) + shares[lang] * budget) / sizes[lang] for lang in sizes}


def convert(shares: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Shares in another unit, of which one old unit of a language holds `factors`: share * factor, normalised.

    From tokens to samples, the factor is samples per token, one over the mean length of the language's samples.
    """
    _match(factors, shares, "factors")
    factors = _positive(factors, "the factor")
    return normalised({lang: share * factors[lang] for lang, share in shares.items()})
