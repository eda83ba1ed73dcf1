"""Wrappers that change the weights of a method: a cap, smoothing over steps, the mean's length, rarer solves.

All compare an objective's weight with its preference, ``r_k = w_k / u_k``: under the mean every r_k is 1, whatever the
preference of the step (token counts vary), so each wrapper leaves the mean alone.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import Aggregator, Option, Problem
from .interior import dot, matvec
from .wrapper import Wrapper

# Of the size of the terms a direction sums up: a shorter one is rounding, and is not brought to length.
_CANCELLED = 1e-6


class Capped(Wrapper):
    """No objective gets more than ``ratio`` times the weight it has in the mean: ``|w_k| <= ratio u_k``.

    What is cut off is not given to others, so the update gets shorter; :class:`Rescaled` around it makes up for that.
    Guarantees of the method do not survive where the cap acts. (MGDA has a cap of its own, inside its program.)
    """

    options: ClassVar[dict[str, Option]] = {
        "ratio": Option(3.0, "no objective gets more than this many times its weight in the mean", low=1.0),
    }

    def _weights(self, problem: Problem) -> Tensor:
        bound = self.settings["ratio"] * problem.preference_BK
        return self._inner_weights(problem).minimum(bound).maximum(-bound)


class Smoothed(Wrapper):
    """Weights follow a running mean over steps: ``r <- decay r + (1 - decay) r_now``.

    The smoothing of CR-MOGM (Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond", NeurIPS 2022), which it takes for a stochastic multi-gradient method to converge. It starts at the first
    weights seen, block by block and objective by objective; absent objectives keep their value. Weights lag behind the
    gradients they belong to, so a method's guarantees do not hold for the single step.
    """

    options: ClassVar[dict[str, Option]] = {
        "decay": Option(0.9, "part of the running mean of weights that is kept", low=0.0, high=1.0, high_open=True),
    }
    state_keys = ("smoothed_ratio_BK", "smoothed_seen_BK")

    def _weights(self, problem: Problem) -> Tensor:
        now = _ratio(self._inner_weights(problem), problem)
        self._check_state(problem)
        fresh = {"smoothed_ratio_BK": torch.ones_like(now), "smoothed_seen_BK": torch.zeros_like(now)}
        self._state = fresh | self._state
        seen = self._state["smoothed_seen_BK"].to(now.device) > 0
        before = torch.where(seen, self._state["smoothed_ratio_BK"].to(now), now)
        decay = self.settings["decay"]
        ratio = torch.where(problem.active_BK, decay * before + (1 - decay) * now, before)
        self._state = {
            "smoothed_ratio_BK": torch.where(seen | problem.active_BK, ratio, 1.0),
            "smoothed_seen_BK": (seen | problem.active_BK).double(),
        }
        return problem.preference_BK * torch.where(problem.active_BK, ratio, 0.0)


class Rescaled(Wrapper):
    """The direction of the method, with the length of the mean.

    Compares methods at equal length of the update, and separates what a method does to the direction from what it does
    to the step size. Lengths are those of the Gramian given to this wrapper. The factor is at most ``limit``: where
    rows nearly cancel, a direction is not blown up; where it is zero to rounding (Pareto-stationary rows) it stays.
    """

    options: ClassVar[dict[str, Option]] = {
        "limit": Option(10.0, "largest factor by which a short direction is lengthened to the mean's length", low=1.0),
    }

    def _weights(self, problem: Problem) -> Tensor:
        weights = self._inner_weights(problem)
        gram = problem.gram_BKK
        length = dot(weights, matvec(gram, weights)).clamp(min=0).sqrt()
        goal = dot(problem.preference_BK, matvec(gram, problem.preference_BK)).clamp(min=0).sqrt()
        terms = dot(weights.abs(), torch.where(problem.active_BK, problem.norm_BK, 0.0))
        real = length > _CANCELLED * terms
        factor = (goal / torch.where(real, length, 1.0)).clamp(max=self.settings["limit"])
        return weights * torch.where(real, factor, 1.0)


class EveryNth(Wrapper):
    """Solve every ``n``-th call; between, reuse the weights, relative to the preference of the step.

    Objectives that did not take part in a solve keep the weight of the one before, at first the mean's. With state
    inside (targets, smoothing) that state moves with the solves only. The calls in between cost nothing but a product;
    certificates stay those of the solve.
    """

    options: ClassVar[dict[str, Option]] = {
        "n": Option(1.0, "solve every n-th step and reuse the weights in between (a whole number)", low=1.0),
    }
    state_keys = ("cached_ratio_BK", "cached_age_B1")

    def __init__(self, inner: Aggregator, **options: float | str) -> None:
        super().__init__(inner, **options)
        if self.settings["n"] != math.floor(self.settings["n"]):
            raise ValueError(f"EveryNth option 'n' must be a whole number, found {self.settings['n']:g}")
        self._age: int | None = None  # on the host: whether to solve must not wait for the device

    def _weights(self, problem: Problem) -> Tensor:
        n = self.settings["n"]
        self._check_state(problem)
        if self._age is None:
            self._age = int(self._state["cached_age_B1"].max()) if self._state else int(n)
        ratio = self._state.get("cached_ratio_BK", torch.ones_like(problem.share_BK)).to(problem.share_BK)
        if self._age + 1 >= n:
            weights, self._age = self._inner_weights(problem), 0
            ratio = torch.where(problem.active_BK, _ratio(weights, problem), ratio)
        else:
            self._age += 1
            weights = torch.where(problem.active_BK, problem.preference_BK * ratio, 0.0)
        self._state = {"cached_ratio_BK": ratio, "cached_age_B1": torch.full_like(ratio[:, :1], float(self._age))}
        return weights

    def _forget_calls(self) -> None:
        super()._forget_calls()
        if self._state:
            self._state["cached_age_B1"].fill_(self.settings["n"])
        self._age = None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._age = None


def _ratio(weights_BK: Tensor, problem: Problem) -> Tensor:
    """Weights relative to the preference [B, K]; 1 where there is none."""
    has = problem.preference_BK > 0
    return torch.where(has, weights_BK / torch.where(has, problem.preference_BK, 1.0), 1.0)
