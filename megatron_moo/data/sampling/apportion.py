"""How many rows of a step each objective gets, so that the shares are kept at every step.

An objective gets its share of the R rows, where no share is less than one row if R >= K, so that every objective
occurs in every step; a lower floor keeps shares that are smaller. Shares are seldom whole. Their whole parts are given
in each step; the rest follows Tijdeman's algorithm ("The chairman assignment problem", Discrete Mathematics 32, 1980),
which keeps every cumulative count within 1 - 1 / (2K - 2) rows of its target. The plain rule "whoever lags most"
strays by more (1.12 rows were seen at K = 8).

Any window of steps is then within 2 - 1 / (K - 1) rows of its share. No schedule does that within one for all shares:
of 1/2, 1/3 and 1/6 of single rows, the first would have to take every other row and the second every third, and these
meet.

The rests are multiples of 1 / U rows a step, and U a multiple of K, so that equal shares are exact. No rounding error
piles up, on any machine, and after U steps at most the pattern begins again: a run resumes at any step by that work.

Legend: K objectives, R rows of a step, U steps of a cycle.
"""

import math
from collections.abc import Sequence

import numpy as np

_CYCLE = 65_536  # steps at least after which the pattern repeats
_SNAPSHOT = 1024  # steps between kept states; resuming replays at most that many after the first pass


def shares(weights: Sequence[float], rows: int, floor: float = 1.0) -> np.ndarray:
    """Shares of the rows of a step that can be kept: weights with a floor where there are rows enough.

    Args:
        weights: [K], positive.
        rows: R.
        floor: the least rows of an objective per step, on average; from 0 to 1.

    Returns:
        [K], summing to 1. If R >= floor K, none is below floor / R; those above are in the proportion of their weights.
    """
    w = np.asarray(weights, dtype=np.float64)
    w = w / w.sum()
    held = np.zeros(len(w), dtype=bool)
    least = floor / rows
    if least * len(w) > 1:
        return w
    while True:
        scale = (1 - held.sum() * least) / w[~held].sum() if not held.all() else 0.0
        lifted = np.where(held, least, w * scale)
        low = ~held & (lifted < least)
        if not low.any():
            return lifted
        held |= low


class Apportionment:
    """Rows of each objective, step by step; any step can be asked for.

    Args:
        weights: [K] requested shares, positive.
        rows: R.
        floor: see :func:`shares`.

    Attributes:
        shares: [K] what is kept: those of :func:`shares`, as multiples of 1 / (U R).
        most: the most rows that one objective has in a step.
    """

    def __init__(self, weights: Sequence[float], rows: int, floor: float = 1.0):
        self.rows = rows
        self._split_shares(shares(weights, rows, floor))
        self.most = int((self._whole + (self._rest > 0)).max())
        zero = np.zeros(len(self.shares), dtype=np.int64)
        self._states = {0: (zero, zero)}
        self._last = 0
        self._period = 0  # steps after which the pattern repeats; 0: not known yet

    def counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each objective in all steps before ``step``, and in it: two [K] int64 arrays."""
        before, after = self._given(step), self._given(step + 1)
        return self._whole * step + before, self._whole + after - before

    def _split_shares(self, exact: np.ndarray) -> None:
        """Rows per step: whole parts `_whole` [K], and integer rests `_rest` [K], in units of 1 / U; `_per_step` rows.

        Rounded down; the largest remainders take what is left, so that no share is off by more than a unit.
        """
        cycle = len(exact) * math.ceil(_CYCLE / len(exact))
        wanted = exact * self.rows * cycle
        units = np.floor(wanted + 1e-6).astype(np.int64)
        left = self.rows * cycle - int(units.sum())
        units[np.argsort(units - wanted, kind="stable")[:left]] += 1
        self.shares = units / (self.rows * cycle)
        self._whole, self._rest = np.divmod(units, cycle)
        self._per_step = int(self._rest.sum()) // cycle

    def _advance(self, given: np.ndarray, lag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step of Tijdeman's algorithm: rows given beyond the whole parts, and the lag behind the target.

        The lag of k is rest[k] * rows - total * given[k]: an integer, of one unit of row per `total`.
        """
        given, lag = given.copy(), lag.copy()
        active = self._rest > 0
        count = int(active.sum())
        total = int(self._rest.sum())
        for _ in range(self._per_step):
            lag += self._rest
            if count == 1:
                k = int(active.argmax())
            else:
                # Among those that may take a row, the first to be due: the lag must not pass 1 - 1/(2K-2).
                may = active & ((2 * count - 2) * lag >= total)
                slack = ((2 * count - 3) * total - (2 * count - 2) * lag).astype(np.float64)
                k = int(np.where(may, slack / np.maximum(self._rest, 1), np.inf).argmin())
            given[k] += 1
            lag[k] -= total
        return given, lag

    def _given(self, step: int) -> np.ndarray:
        """Rows given beyond the whole parts in all steps before `step`: [K]."""
        if self._period:
            cycles, step = divmod(step, self._period)
            return self._states[self._period][0] * cycles + self._replay(step)[0]
        given = self._replay(step)[0]
        return self._given(step) if self._period else given

    def _replay(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step in self._states:
            return self._states[step]
        start = max(s for s in self._states if s <= step)
        state = self._states[start]
        for s in range(start + 1, step + 1):
            state = self._advance(*state)
            if not self._period and not state[1].any():
                self._period = s
                self._states[s] = state
                return state
            if s % _SNAPSHOT == 0:
                self._states[s] = state
        if self._last % _SNAPSHOT and self._last != self._period:
            self._states.pop(self._last, None)
        self._states[step], self._last = state, step
        return state
