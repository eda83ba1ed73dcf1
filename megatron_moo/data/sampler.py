"""Which language each gradient row of a step works on, and which of its samples the row takes.

A step has W waves on D slots, so R = W * D rows; each row is of one objective. Everything here is a pure
function of (seed, step, wave, slot), so that a run resumes from its step number alone, and of R rather than
of W and D, so that 2 waves on 4 slots see the samples of 4 waves on 2 slots.

How many rows an objective gets: its share of R, where no share is less than one row if R >= K (so that every
objective occurs in every step). Shares are seldom whole. Their whole parts are given in each step; the rest
follows Tijdeman's algorithm ("The chairman assignment problem", Discrete Mathematics 32, 1980), which
keeps every cumulative count within one row of its target. The plain rule "whoever lags most" strays by more
(1.12 rows were seen at K = 8).

Which rows: an order drawn for each R steps and turned by one row per step, so that over R steps an objective
visits all waves and slots alike and no rank is tied to a language.

Which samples: each objective has a stream of permutations of its corpus, one per epoch; its rows take
consecutive pieces.

With ``active``, a step works on a rotating subset of the objectives; `rotation.py` says which and with how many rows.

Legend: K objectives, D slots, W waves, R = W * D rows of a step, n samples of a row.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_moo.data.rotation import Rotation
from megatron_moo.data.rotation import permutation as _permutation

# Shares are integers in units of 1 / _UNIT: no rounding error piles up, on any machine. Divisible by 1..24
# and 128, so that equal shares are exact and the pattern repeats after a few steps.
_UNIT = 8 * math.lcm(*range(1, 25))
_SNAPSHOT = 1024  # steps between kept states; resuming replays at most that many after the first pass
_ORDER, _EPOCH = 1, 2  # what a random stream is for


def shares(weights: Sequence[float], rows: int) -> np.ndarray:
    """Shares of the rows of a step that can be kept: weights with a floor of one row where there are enough.

    Args:
        weights: [K], positive.
        rows: R.

    Returns:
        [K], summing to 1. If R >= K, none is below 1 / R; those above are in the proportion of their weights.
    """
    w = np.asarray(weights, dtype=np.float64)
    w = w / w.sum()
    floor = np.zeros(len(w), dtype=bool)
    if rows < len(w):
        return w
    while True:
        scale = (1 - floor.sum() / rows) / w[~floor].sum() if not floor.all() else 0.0
        lifted = np.where(floor, 1 / rows, w * scale)
        low = ~floor & (lifted < 1 / rows)
        if not low.any():
            return lifted
        floor |= low


class LanguagePureSampler:
    """Assigns an objective to every row of every step, and samples to every row.

    Args:
        num_objectives: K.
        slots: D, the slots of the data-parallel group.
        waves: W, forward/backward passes of a step.
        weights: [K] requested shares, positive; None for equal ones. They are normalised.
        seed: at least 0.
        active: None: the objectives of a step follow from their shares of the rows alone, all of them if R >= K. Else
            each step has exactly min(active, K, R) different ones, by turns; see :class:`Rotation` for what is
            guaranteed. Where that is all K, nothing changes.
        floor: with a subset, an objective is active in at least ``floor * active / K`` of the steps, however small its
            weight; in (0, 1].

    Attributes:
        rotation: of the subset; None where there is none.

    Raises:
        ValueError: sizes below one, or weights of the wrong number or not positive.
    """

    def __init__(
        self,
        num_objectives: int,
        slots: int,
        waves: int,
        weights: Sequence[float] | None = None,
        seed: int = 1,
        active: int | None = None,
        floor: float = 0.5,
    ):
        sizes = {"num_objectives": num_objectives, "slots": slots, "waves": waves, "active": active}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        weights = [1.0] * num_objectives if weights is None else list(weights)
        if len(weights) != num_objectives:
            raise ValueError(f"weights: {len(weights)} given for {num_objectives} objectives; give one for each")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            raise ValueError(
                f"weights must be positive and finite, got {weights}; leave an unwanted objective out instead"
            )
        self.num_objectives, self.slots, self.waves, self.seed = num_objectives, slots, waves, seed
        self.rows = slots * waves
        self.shares = shares(weights, self.rows)
        self._split_shares()
        zero = np.zeros(num_objectives, dtype=np.int64)
        self._states = {0: (zero, zero)}
        self._last = 0
        self._period = 0  # steps after which the pattern repeats; 0: not known yet
        subset = num_objectives if active is None else min(active, num_objectives, self.rows)
        self.rotation = Rotation(weights, subset, self.rows, floor, seed) if subset < num_objectives else None
        self.counts = lru_cache(maxsize=64)(self._counts)
        self.assign = lru_cache(maxsize=64)(self._assign)
        self._epoch = lru_cache(maxsize=num_objectives + 4)(_permutation)  # 8 bytes a sample

    def _split_shares(self) -> None:
        """Rows per step: whole parts `_whole` [K], and integer rests `_rest` [K], `_per_step` rows."""
        units = np.rint(self.shares * self.rows * _UNIT).astype(np.int64)
        # A share within rounding of a whole number is meant to be whole: a floor of 1 row must not be 0.9999.
        nearest = np.rint(units / _UNIT).astype(np.int64) * _UNIT
        units = np.where(abs(units - nearest) <= 4 * self.num_objectives, nearest, units)
        self._whole, self._rest = np.divmod(units, _UNIT)
        self._per_step = int(round(self._rest.sum() / _UNIT))
        # Rounding leaves the sum a few units off; the largest rest takes the difference.
        if self._per_step:
            self._rest[self._rest.argmax()] += self._per_step * _UNIT - self._rest.sum()
        else:
            self._rest[:] = 0

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

    def _counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each objective in all steps before `step`, and in it: two [K] int64 arrays.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self.rotation is not None:
            return self.rotation.counts(step)
        before, after = self._given(step), self._given(step + 1)
        return self._whole * step + before, self._whole + after - before

    def _assign(self, step: int) -> np.ndarray:
        """Objective of every row of a step: [W, D] int64. Treat it as read-only."""
        rows = np.repeat(np.arange(self.num_objectives), self.counts(step)[1])
        order = _permutation(self.rows, self.seed, _ORDER, step // self.rows)
        placed = np.empty_like(rows)
        placed[(order + step) % self.rows] = rows
        placed.setflags(write=False)
        return placed.reshape(self.waves, self.slots)

    def row_examples(self, step: int, wave: int, slot: int, n: int, sizes: Sequence[int]) -> np.ndarray:
        """Samples of a row: [n] int64 indices into the corpus of its objective.

        Args:
            step, wave, slot: the row.
            n: samples of a row, the same in every row and step of a run.
            sizes: [K] samples of each corpus, at least 1.

        Raises:
            ValueError: a wave or slot out of range, or a size below one.
        """
        if not (0 <= wave < self.waves and 0 <= slot < self.slots):
            raise ValueError(f"wave {wave}, slot {slot}: there are {self.waves} waves and {self.slots} slots")
        flat = self.assign(step).ravel()
        here = wave * self.slots + slot
        objective = int(flat[here])
        size = int(sizes[objective])
        if size < 1:
            raise ValueError(f"sizes[{objective}] must be at least 1, got {size}")
        row = int(self.counts(step)[0][objective]) + int((flat[:here] == objective).sum())
        position = np.arange(row * n, (row + 1) * n)
        epoch = position // size
        picked = np.empty(n, dtype=np.int64)
        for e in np.unique(epoch).tolist():
            order = self._epoch(size, self.seed, _EPOCH, objective, e)
            picked[epoch == e] = order[position[epoch == e] % size]
        return picked

    def examples(self, step: int, n: int, sizes: Sequence[int]) -> np.ndarray:
        """Samples of all rows of a step: [W, D, n] int64; see row_examples."""
        rows = [self.row_examples(step, w, d, n, sizes) for w in range(self.waves) for d in range(self.slots)]
        return np.stack(rows).reshape(self.waves, self.slots, n)
