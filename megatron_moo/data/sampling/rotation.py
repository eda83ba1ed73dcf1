"""A rotating subset: which n of the K objectives a step works on, and how its rows are divided among them.

Objective k is to be active in a share f_k of the steps. That is the problem of *proportionate fair* schedules: n
processors, tasks of weight f_k, a step as the unit of time. The algorithm PD2 (Anderson and Srinivasan, "Mixed
Pfair/ERfair scheduling of asynchronous periodic tasks", 2004) solves it: the i-th turn of a task has the window
[floor((i-1) / f), ceil(i / f)). A step takes n tasks whose turn is open, first those whose window ends first; two
rules break ties. Every turn then lies in its window: after t steps an objective was active floor(f t) or ceil(f t)
times. Ties that are left are broken at random: with equal weights all pairs of objectives meet. With unequal ones some
pairs may never be active together: of two that are rare, one may always go where the other does not.

The f_k are multiples of 1 / U. After a cycle of U steps all counts are whole and the subsets begin again: no step is
further than U steps from a known state, and a run resumes from its step's number alone.

Legend: K objectives, n active ones, R rows of a step, U steps of a cycle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_STEPS = 5000  # at least as many in a cycle; also the precision of the f_k
_ROW = 1 << 20  # units of a row when rows are divided
_SNAPSHOT = 128  # steps between kept states
_TIES = 3  # what the random stream is for; 1 and 2 are the sampler's


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of ``size`` things that depends on ``key`` alone, on any machine."""
    # Raw Philox output is fixed by numpy's compatibility policy; Generator.permutation is not.
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class _State:
    turns: np.ndarray  # [K] turns so far in this cycle
    rows: np.ndarray  # [K] rows so far in this cycle
    lag: np.ndarray  # [K] rows due but not given, in units of 1 / _ROW


class Rotation:
    """Active objectives and their rows, step by step.

    Guaranteed, for every step:

    - exactly n different objectives are active, each with at least one row;
    - after any number t of steps, objective k was active floor(f_k t) or ceil(f_k t) times; so it waits at most
      ceil(2 / f_k) steps from one turn to the next, and ``max_wait`` is the longest of these;
    - f_k is in the proportion of the weights, but at least ``floor * n / K`` and at most 1;
    - the rows of a step are divided in the proportion w_k / f_k, with a minimum of one: an active objective gets that
      share of R, rounded down or up. What rounding leaves goes to whom it is due longest.

    So an objective's rows follow its weight in the long run where neither floor nor minimum holds.

    Args:
        weights: [K] requested shares, positive.
        active: n, at most K.
        rows: R, at least n.
        floor: the least f_k, as a part of n / K; in (0, 1]. With 1 all are active equally often.
        seed: of the random ties.

    Attributes:
        rates: [K] the f_k, summing to n.
        cycle: U.
        most: the most rows that one objective can have in a step.
        max_wait: steps.

    Raises:
        ValueError: a floor out of range.
    """

    def __init__(self, weights: Sequence[float], active: int, rows: int, floor: float, seed: int):
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {floor}: without one, a rare objective may never be active")
        k = len(weights)
        self._active, self._rows, self._seed = active, rows, seed
        self.cycle = k * math.ceil(_STEPS / k)  # n / K is a multiple of 1 / U
        self._units = _rates(weights, active, floor, self.cycle)
        self.rates = self._units / self.cycle
        equal = len(set(weights)) == 1
        self.most = -(-rows // active) if equal else rows - active + 1
        self.max_wait = max(math.ceil(2 * self.cycle / unit) for unit in self._units.tolist())
        total = math.fsum(weights)
        # Relative to one another: rows when active.
        self._claim = np.array(
            [round(w / total / f * _ROW * _ROW) for w, f in zip(weights, self.rates, strict=True)], dtype=object
        )
        zero = np.zeros(k, dtype=np.int64)
        self._states = {0: _State(zero, zero, zero)}
        self._last = 0

    @cached_property
    def shares(self) -> np.ndarray:
        """[K] shares of all rows of a cycle."""
        return self._state(self.cycle).rows / (self.cycle * self._rows)

    def counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each objective in all steps before ``step``, and in it: two [K] int64 arrays."""
        cycles, place = divmod(step, self.cycle)
        before, after = self._state(place).rows, self._state(place + 1).rows
        past = cycles * self._state(self.cycle).rows if cycles else 0
        return past + before, after - before

    def _state(self, step: int) -> _State:
        if step in self._states:
            return self._states[step]
        start = max(s for s in self._states if s <= step)
        state = self._states[start]
        for s in range(start + 1, step + 1):
            state = self._advance(state, s - 1)
            if s % _SNAPSHOT == 0 or s == self.cycle:
                self._states[s] = state
        if self._last % _SNAPSHOT and self._last != self.cycle:
            self._states.pop(self._last, None)
        self._states[step], self._last = state, step
        return state

    def _advance(self, state: _State, step: int) -> _State:
        ties = permutation(len(self._units), self._seed, _TIES, step)
        chosen = self._turns(state.turns, step, ties)
        due, rows = np.zeros_like(state.lag), np.zeros_like(state.rows)
        due[chosen] = _divide(self._claim[chosen], self._rows)
        rows[chosen] = due[chosen] // _ROW
        # Rounded down, some rows are left over: one each to those whose lag is largest.
        open_ = chosen[due[chosen] % _ROW > 0]
        lag = state.lag + due - rows * _ROW
        left = self._rows - int(rows.sum())
        first = open_[np.lexsort((ties[open_], -lag[open_]))[:left]]
        rows[first] += 1
        lag[first] -= _ROW
        turns = state.turns.copy()
        turns[chosen] += 1
        return _State(turns, state.rows + rows, lag)

    def _turns(self, turns: np.ndarray, step: int, ties: np.ndarray) -> np.ndarray:
        """The n objectives of a step, by PD2: open turns, earliest end first."""
        units, cycle = self._units, self.cycle
        ends, tight = _windows(turns, units, cycle)
        chain = _chains(ends, units, cycle)
        closed = turns * cycle // units > step
        order = np.lexsort((ties, -chain, ~tight, ends, closed))
        return order[: self._active]


def _windows(turns: np.ndarray, units: np.ndarray, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the turn after ``turns``: end of its window, and whether the next window begins before that."""
    ends = -(-(turns + 1) * cycle // units)
    return ends, (turns + 1) * cycle % units > 0


def _chains(ends: np.ndarray, units: np.ndarray, cycle: int) -> np.ndarray:
    """PD2's group deadlines: until when a delay now would be handed on from turn to turn; 0 for f < 1/2."""
    rest = cycle - units
    safe = np.maximum(rest, 1)
    holes = -(-ends * rest // cycle)
    return np.where((2 * units >= cycle) & (rest > 0), -(-holes * cycle // safe), 0)


def _rates(weights: Sequence[float], active: int, floor: float, cycle: int) -> np.ndarray:
    """[K] int64 units of 1 / U summing to n U: the weights' proportion, held between floor and U."""
    k, total = len(weights), math.fsum(weights)
    low = math.ceil(floor * active * (cycle // k) - 1e-9)
    wanted = [w / total * active * cycle for w in weights]
    under, over = 0.0, max(1.0, max(wanted) / min(wanted)) * k
    for _ in range(200):  # the sum grows with the scale
        scale = (under + over) / 2
        if math.fsum(min(max(scale * w, low), cycle) for w in wanted) < active * cycle:
            under = scale
        else:
            over = scale
    exact = [min(max(over * w, low), cycle) for w in wanted]
    units = [round(e) for e in exact]
    while (missing := active * cycle - sum(units)) != 0:
        sign = 1 if missing > 0 else -1
        free = [i for i in range(k) if low <= units[i] + sign <= cycle]
        units[max(free, key=lambda i: (sign * (exact[i] - units[i]), -i))] += sign
    return np.array(units, dtype=np.int64)


def _divide(claims: np.ndarray, rows: int) -> np.ndarray:
    """[n] int64 units of rows in the proportion of the claims, at least one row each; they sum to R rows."""
    held = np.zeros(len(claims), dtype=bool)
    while True:
        room, total = (rows - int(held.sum())) * _ROW, int(claims[~held].sum())
        due = np.where(held, _ROW, room * claims // total).astype(np.int64)
        low = due < _ROW
        if not low.any():
            break
        held |= low  # never all: the largest claim gets at least the mean
    due[due.argmax()] += rows * _ROW - int(due.sum())
    return due
