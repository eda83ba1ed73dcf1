"""A wrapper that corrects the Gramian for sampling noise before a method sees it.

Notation: ``c_ij`` cosine of two gradients, ``noise_i = tr C_i / G_ii`` the share of noise in a square (see
:mod:`~megatron_moo.aggregation.noise`). The variance of a cosine is written with squared cosines,

    ``Var c_ij = noise_i a_ij + noise_j a_ji - noise_i noise_j d_ij``

    ``a_ij``  squared cosine of a contrast of i (pure noise) and the gradient of j
    ``d_ij``  squared cosine of a contrast of i and one of j

since these keep their size when token counts change, are bounded, and where noise has no preferred direction are all
the same number, one over the dimension of the noise. One step gives one or a few of each per pair, far too few: with
two rows per objective each is the square of a single product. So they are pooled as limma pools variances (Smyth,
Statistical Applications in Genetics and Molecular Biology 3, 2004): each pair keeps a running mean, and is moved
towards the mean over its block's pairs as if that were ``_PRIOR`` products of its own. d is pooled over the block
alone; it can take away half of a variance at most. How many products an estimate rests on decides the quantile:
Student's in place of the normal one.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import ROUNDING_SHIFT, missing_shift
from .noise import RowNoise
from .wrapper import Wrapper

# Least share of a square that is left when its noise is taken off. An estimate can exceed the square itself.
_LEAST_SQUARE = 0.1
# Products that the block's pool is worth against a pair's own.
_PRIOR = 4.0
# Part of the sums of squared cosines that is kept per step: noise is remembered for about 50 steps.
_MEMORY = 0.98
# Share of noise below which a contrast is rounding.
_NO_NOISE = 1e-12
# Relative to the diagonal: what a corrected matrix may lack of a Gramian.
_MARGIN = 1e-9
# Student's quantile is tabulated at this many steps of 1 / degrees of freedom.
_TABLE = 128


# What the options keep: sums or means, each with the weight that it rests on.
_POOL_STATE = (
    "noise_one_BKK",  # a_ij
    "noise_ones_BKK",
    "noise_both_BKK",  # d_ij
    "noise_boths_BKK",
)
_SHRINK_STATE = ("noise_signal_BKK", "noise_signals_BKK")  # c^2 - V
_SMOOTH_STATE = ("noise_cosine_BKK", "noise_seen_BKK")
_SPREAD_STATE = ("noise_spread_BKK",)  # noise left in smoothed cosines, in units of a_ij
_ATTENUATION_STATE = ("noise_reliability_BK", "noise_known_BK")


class NoiseAware(Wrapper):
    """The method's weights for a Gramian that is corrected for noise, as far as options say; all are off by default.

    Needs ``noise`` (:func:`~megatron_moo.aggregation.fold_rows`), save for ``smoothing`` alone. Where no objective of
    a block has two rows, or no ``noise`` is given, nothing is known of the noise in this step, and only smoothing
    acts. In order:

    - ``unbiased = yes``: ``G_kk`` less the noise in it, at least a tenth of ``G_kk``. Objectives with a single row
      keep theirs.
    - ``smoothing = s``: cosines are running means over steps, ``c <- c + (c_now - c) (1 - s) / (1 - s^n)`` at a
      pair's n-th observation: weights 1, s, s^2, ... into the past. Pairs not seen in a step stay. Lengths are those
      of the step. With ``unbiased``, noise's attenuation of the mean cosine is taken off by the reliability's own
      running mean.
    - ``shrink = yes``: cosines are multiplied by their reliability ``T / (T + V)``: V is the variance of the cosine
      (as smoothed), T the running mean of ``c^2 - V``, per pair, moved towards the block's. Empirical Bayes towards
      zero; with T pooled over everything it is ``1 - V / E c^2``.
    - ``gate = alpha``: a negative product that noise alone would undercut with probability alpha or more is set to 0
      (one-sided test, Student's quantile). Of pairs whose true product is 0 a share alpha stays negative; fewer with
      ``shrink``. At 0.5 it changes nothing; 0 is off. Conflicts that it leaves keep their size.

    The result may not be a Gramian (smaller diagonal, zeroed entries). Cosines are held within [-1, 1], and a block
    that was changed and is not positive semidefinite has the smallest of a list of multiples of its diagonal added
    (:func:`~megatron_moo.aggregation.interior.missing_shift`), so that every method is fit for it. Signs stay. What a
    method guarantees (conflict-freeness) then holds for the corrected Gramian, not for the rows of this step; that is
    the point.

    The level holds on average over the pairs of a block from the first step on; for a single pair whose noise lies
    otherwise than its block's, only as its own history counts up. Departs from limma in a fixed strength of the pool,
    which does not depend on how much pairs differ.

    Attributes:
        reliability_BK: the share of each square at the last call that is not noise, before the floor; NaN where
            unknown.
        gated_BKK: pairs whose product the gate set to 0 at the last call.
    """

    options: ClassVar[dict[str, Option]] = {
        "unbiased": Option("no", "take the noise's share off the squared lengths: yes or no", choices=("no", "yes")),
        "smoothing": Option(
            0.0, "part of the running mean of cosines that is kept per step", low=0.0, high=1.0, high_open=True
        ),
        "shrink": Option("no", "multiply cosines by their estimated reliability: yes or no", choices=("no", "yes")),
        "gate": Option(0.0, "level of the test that a conflict must pass to be left in; 0: no test", low=0.0, high=0.5),
    }

    def __init__(self, inner: Aggregator, **options: float | str) -> None:
        super().__init__(inner, **options)
        self._unbiased = self.settings["unbiased"] == "yes"
        self._smooth = self.settings["smoothing"] > 0
        self._shrink = self.settings["shrink"] == "yes"
        self._gate = self.settings["gate"] > 0
        self._tests = self._shrink or self._gate
        self.uses_noise = inner.uses_noise or self._unbiased or self._tests
        self.state_keys = (
            _POOL_STATE * self._tests
            + _SHRINK_STATE * self._shrink
            + _SMOOTH_STATE * self._smooth
            + _SPREAD_STATE * (self._smooth and self._tests)
            + _ATTENUATION_STATE * (self._smooth and self._unbiased)
        )
        self.stateful = inner.stateful or bool(self.state_keys)
        self._quantiles = student_quantiles(self.settings["gate"]) if self._gate else None
        self.reliability_BK: Tensor | None = None
        self.gated_BKK: Tensor | None = None

    def _weights(self, problem: Problem) -> Tensor:
        if not (self._unbiased or self._smooth or self._tests):
            return self._inner_weights(problem)
        # The noise is that of the Gramian before: nobody inside may take it for that of the new one.
        return self._inner_weights(replace(problem, gram_BKK=self._corrected(problem), noise=None))

    def _corrected(self, problem: Problem) -> Tensor:
        gram, active = problem.gram_BKK, problem.active_BK
        self._check_state(problem)
        view = _view(problem)
        squares = torch.where(active, gram.diagonal(dim1=1, dim2=2), 0.0)
        self.reliability_BK = torch.where(view.known_BK, 1 - view.noise_BK, torch.nan)
        if self._unbiased:
            squares = squares * torch.where(view.known_BK, (1 - view.noise_BK).clamp(_LEAST_SQUARE, 1.0), 1.0)
        lengths = torch.where(active, squares, 1.0).sqrt()
        area = lengths[:, :, None] * lengths[:, None, :]
        estimate = self._estimate(view) if self._tests else None
        spread = estimate.spread_BKK if estimate else None

        cosines, products = gram / (view.length_BK[:, :, None] * view.length_BK[:, None, :]), gram
        if self._smooth:
            # Plain ones, attenuated by noise, since a mean of quotients by a noisy reliability would be biased.
            cosines, spread = self._smoothed(cosines, spread, view.pairs_BKK)
            stretch = self._attenuation(view).rsqrt()
            products = cosines * (stretch[:, :, None] * stretch[:, None, :]) * area
        if self._unbiased or self._smooth:
            products = products.maximum(-area).minimum(area)
        if estimate:
            part = spread * estimate.one_BKK
            variance = part + part.mT
            tested = view.pairs_BKK & estimate.known_B11
            if self._shrink:
                products = products * self._reliability(cosines, variance, tested)
            if self._gate:
                bound = self._quantile(estimate.freedom(part)) * variance.sqrt()
                self.gated_BKK = tested & (cosines < 0) & (cosines >= -bound)
                products = torch.where(self.gated_BKK, 0.0, products)
        return _mended(torch.where(view.pairs_BKK, products, torch.diag_embed(squares)), gram, active)

    def _estimate(self, view: _View) -> _Estimate:
        """What is known of the noise's directions, this step included."""
        one, ones = self._add("noise_one_BKK", "noise_ones_BKK", view.one_BKK, view.ones_BKK)
        both, boths = self._add("noise_both_BKK", "noise_boths_BKK", view.both_BKK, view.boths_BKK)
        return _estimate(view, one, ones, both, boths)

    def _add(self, key: str, count_key: str, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Running sums of the values, and of their weights; entries of weight 0 stay."""
        found = []
        for name, new in ((key, values * weights), (count_key, weights)):
            before = self._kept(name, new)
            found.append(torch.where(weights > 0, _MEMORY * before + new, before))
            self._state[name] = found[-1]
        return found[0], found[1]

    def _kept(self, key: str, like: Tensor) -> Tensor:
        return self._state[key].to(like) if key in self._state else torch.zeros_like(like)

    def _smoothed(self, cosines: Tensor, spread: Tensor | None, pairs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Running means of the cosines, and what noise is left in them."""
        mean, step = self._mean("noise_cosine_BKK", "noise_seen_BKK", cosines, pairs)
        if spread is not None:
            before = self._kept("noise_spread_BKK", cosines)
            spread = torch.where(pairs, (1 - step).square() * before + step.square() * spread, before)
            self._state["noise_spread_BKK"] = spread
        return mean, spread

    def _attenuation(self, view: _View) -> Tensor:
        """The running mean of the reliability [B, K], at least a tenth; 1 where it is not to be looked at."""
        if not self._unbiased:
            return torch.ones_like(view.noise_BK)
        mean, _ = self._mean("noise_reliability_BK", "noise_known_BK", 1 - view.noise_BK, view.known_BK)
        return torch.where(self._state["noise_known_BK"] > 0, mean, 1.0).clamp(_LEAST_SQUARE, 1.0)

    def _mean(self, key: str, seen_key: str, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean at the ``smoothing`` decay, and the weight of the new value in it; others stay."""
        decay = self.settings["smoothing"]
        before, seen = self._kept(key, values), self._kept(seen_key, values)
        seen = torch.where(known, decay * seen + (1 - decay), seen)
        step = torch.where(known, (1 - decay) / torch.where(known, seen, 1.0), 0.0)
        mean = torch.where(known, before + step * (values - before), before)
        self._state[key], self._state[seen_key] = mean, seen
        return mean, step

    def _reliability(self, cosines: Tensor, variance: Tensor, tested: Tensor) -> Tensor:
        """``T / (T + V)`` of each pair [B, K, K]; 1 where nothing is known."""
        excess = torch.where(tested, cosines.square() - variance, 0.0)
        signal, signals = self._add("noise_signal_BKK", "noise_signals_BKK", excess, tested.double())
        # Pooled before it is clipped: single differences are negative half of the time.
        pool = _ratio(signal.sum((1, 2), keepdim=True), signals.sum((1, 2), keepdim=True))
        signal = ((_PRIOR * pool + signal) / (_PRIOR + signals)).clamp(min=0)
        return torch.where(tested & (variance > 0), signal / (signal + variance), 1.0)

    def _quantile(self, freedom: Tensor) -> Tensor:
        """Student's upper quantile at the gate's level, interpolated in 1 / freedom (from above: it is convex)."""
        self._quantiles = self._quantiles.to(freedom.device)
        place = (_TABLE / freedom).clamp(0, _TABLE)
        left = place.floor().clamp(max=_TABLE - 1)
        low, high = (self._quantiles[left.long() + i] for i in (0, 1))
        return low + (place - left) * (high - low)


@dataclass(frozen=True)
class _View:
    """One step's noise in units without scale.

    pairs_BKK: pairs of different active objectives. known_BK: who has contrasts. length_BK: row lengths.
    noise_BK: share of noise in each square. one_BKK, ones_BKK: mean of ``a_ij`` and how many products it rests
    on; both_BKK, boths_BKK: the same of ``d_ij``. similar_B11: mean over pairs of squared cosines, own included.
    """

    pairs_BKK: Tensor
    known_BK: Tensor
    length_BK: Tensor
    noise_BK: Tensor
    one_BKK: Tensor
    ones_BKK: Tensor
    both_BKK: Tensor
    boths_BKK: Tensor
    similar_B11: Tensor


@dataclass(frozen=True)
class _Estimate:
    """Pooled noise: ``Var c_ij = spread_ij one_ij + spread_ji one_ji`` of this step's plain cosines.

    one_BKK: pooled ``a_ij``. spread_BKK: their factors. ones_BKK: products that a pair's own part rests on;
    pool_B11: independent products in the block's pool. known_B11: whether this step tells anything.
    """

    one_BKK: Tensor
    spread_BKK: Tensor
    ones_BKK: Tensor
    pool_B11: Tensor
    known_B11: Tensor

    def freedom(self, part_BKK: Tensor) -> Tensor:
        """Degrees of freedom of ``part_ij + part_ji`` after Satterthwaite, at least 1 [B, K, K]."""
        share = _ratio(part_BKK, part_BKK + part_BKK.mT)
        own = self.ones_BKK / (_PRIOR + self.ones_BKK)
        # A mean of n squared normals has relative variance 2 / n; the pool contains the pair's own.
        spread = share.square() * own / (_PRIOR + self.ones_BKK) + share * (1 - own * own) / self.pool_B11.clamp(min=1)
        return 1 / (spread + spread.mT).clamp(1e-9, 1.0)


def _view(problem: Problem) -> _View:
    gram, active = problem.gram_BKK, problem.active_BK
    k = gram.shape[1]
    both_active = active[:, :, None] & active[:, None, :]
    pairs = both_active & ~torch.eye(k, dtype=torch.bool, device=gram.device)
    squares = torch.where(active, gram.diagonal(dim1=1, dim2=2), 1.0)
    cosines = gram * (squares[:, :, None] * squares[:, None, :]).rsqrt()
    present = active.sum(1)[:, None, None].clamp(min=1)
    similar = cosines.square().sum((1, 2), keepdim=True) / (present * present)
    noise = _no_noise(active) if problem.noise is None else problem.noise
    freedom = torch.where(active, noise.freedom_BK, 0.0)
    known = freedom > 0
    bias = torch.where(known, noise.bias_BK, 0.0)
    # A single row: the noise of a sample, from the others'.
    per_sample = _ratio((freedom * bias * noise.count_K).sum(1, keepdim=True), freedom.sum(1, keepdim=True))
    other = per_sample / noise.count_K.clamp(min=1e-300)
    other = torch.where(known.any(1, keepdim=True), other / squares, 1.0).clamp(max=1.0)
    share = torch.where(known, bias / squares, other)

    real = known & (share > _NO_NOISE)
    bias = torch.where(real, bias, 1.0)
    weight = torch.where(real, freedom, 0.0)
    ones = torch.where(pairs, weight[:, :, None], 0.0)
    boths = torch.where(pairs, weight[:, :, None] * weight[:, None, :], 0.0)
    one = torch.where(ones > 0, noise.one_BKK / (bias[:, :, None] * squares[:, None, :]), 0.0).clamp(0, 1)
    both = torch.where(boths > 0, noise.both_BKK / (bias[:, :, None] * bias[:, None, :]), 0.0).clamp(0, 1)
    return _View(pairs, known, squares.sqrt(), share, one, ones, both, boths, similar)


def _no_noise(active_BK: Tensor) -> RowNoise:
    zero_BK = torch.zeros_like(active_BK, dtype=torch.float64)
    zero_BKK = zero_BK[:, :, None] * zero_BK[:, None, :]
    return RowNoise(zero_BK, zero_BKK, zero_BKK, zero_BK, zero_BK[:1].sum(0))


def _estimate(view: _View, one: Tensor, ones: Tensor, both: Tensor, boths: Tensor) -> _Estimate:
    """Pool the running sums over each block's pairs."""
    total = ones.sum((1, 2), keepdim=True)
    pool = _ratio(one.sum((1, 2), keepdim=True), total)
    # Before data tell, noise meets noise as it meets gradients.
    pairs = boths.sum((1, 2), keepdim=True) / 2
    noise_pool = (_PRIOR * pool + both.sum((1, 2), keepdim=True) / 2) / (_PRIOR + pairs)
    share = view.noise_BK.clamp(max=1)
    noise_i, noise_j = share[:, :, None], share[:, None, :]
    # One's expectation holds that of both: its part in the variance is at least half of its own.
    common = (noise_i * noise_j * _ratio(noise_pool, pool)).minimum(noise_i).minimum(noise_j)
    # Products of one contrast with similar gradients repeat each other.
    active = view.pairs_BKK.any(2).sum(1)[:, None, None].clamp(min=1)
    return _Estimate(
        one_BKK=(_PRIOR * pool + one) / (_PRIOR + ones),
        spread_BKK=torch.where(view.pairs_BKK, noise_i - common / 2, 0.0),
        ones_BKK=ones,
        pool_B11=total / (view.similar_B11 * active).clamp(min=1),
        known_B11=view.known_BK.any(1)[:, None, None],
    )


def _mended(corrected: Tensor, gram: Tensor, active: Tensor) -> Tensor:
    """The corrected matrix as a method expects it: nearly a Gramian, its longest row of length 1."""
    changed = (corrected != gram).any(2).any(1)[:, None, None]
    diagonal = corrected.diagonal(dim1=1, dim2=2)
    # A margin, since three cosines of -1 need a shift of 1 to the bit.
    shift = missing_shift(corrected + torch.diag_embed(_MARGIN * diagonal + (~active).double()))[:, :, None]
    # Beyond the list it is the number of objectives: of those that take part, or absent ones would count.
    shift = shift.minimum(active.sum(1)[:, None, None].clamp(min=1))
    shift = torch.where(changed & (shift > ROUNDING_SHIFT), shift + 2 * _MARGIN, 0.0)
    corrected = corrected + shift * torch.diag_embed(diagonal)
    longest = (1 + shift) * diagonal.amax(1)[:, None, None]
    return corrected / torch.where(changed & (longest > 0), longest, 1.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient; 0 where the denominator is."""
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1.0), 0.0)


def student_quantiles(level: float) -> Tensor:
    """Upper quantiles of Student's t at 1 / freedom = 0, 1 / 128, ..., 1, for a level in (0, 0.5] [129].

    With ``t = sqrt(n) cot x``, the upper tail is half the integral of ``sin^(n-1)`` up to x over that up to pi / 2.
    """
    x = torch.logspace(-14, math.log10(math.pi / 2), 8001, dtype=torch.float64)
    freedom = (_TABLE / torch.arange(1, _TABLE + 1, dtype=torch.float64))[:, None]
    density = x.sin() ** (freedom - 1)
    steps = (density[:, 1:] + density[:, :-1]) / 2 * x.diff()
    tail = torch.cat([x[:1] ** freedom / freedom, steps], 1).cumsum(1)
    tail = (tail / (2 * tail[:, -1:])).clamp(max=0.5)
    right = torch.searchsorted(tail, torch.full_like(freedom, level)).clamp(1, len(x) - 1)
    lower, upper = (tail.gather(1, right + i).clamp(min=1e-320).log() for i in (-1, 0))
    part = ((math.log(level) - lower) / (upper - lower)).clamp(0, 1)
    place = x.log()[right - 1] + part * (x.log()[right] - x.log()[right - 1])
    found = (freedom.sqrt() / place.exp().tan()).squeeze(1).clamp(min=0)
    normal = -torch.special.ndtri(torch.tensor([level], dtype=torch.float64))
    return torch.cat([normal, found])
