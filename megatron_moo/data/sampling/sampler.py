"""Which language each gradient row of a step works on, and which of its samples the row takes.

A step has W waves on D slots, so R = W * D rows; each row is of one objective. Everything here is a pure
function of (seed, step, wave, slot), so that a run resumes from its step number alone, and of R rather than
of W and D, so that 2 waves on 4 slots see the samples of 4 waves on 2 slots.

How many rows an objective gets: see `apportion`; with ``active``, a step works on a rotating subset of the objectives,
and `rotation` says which and with how many rows. Shares may change during a run, in phases; each phase keeps its own.

Which rows: an order drawn for each R steps and turned by one row per step, so that over R steps an objective
visits all waves and slots alike and no rank is tied to a language.

Which samples: each objective has a stream of permutations of its corpus, one per epoch; its rows take
consecutive pieces. Parallel batches take the pieces of one stream that all objectives have in common.

Legend: K objectives, D slots, W waves, R = W * D rows of a step, n samples of a row.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_moo.data.sampling.apportion import Apportionment
from megatron_moo.data.sampling.rotation import Rotation
from megatron_moo.data.sampling.rotation import permutation as _permutation

_ORDER, _EPOCH = 1, 2  # what a random stream is for


@dataclass(frozen=True)
class Phase:
    """Rows from step ``start`` on; ``source`` counts steps from there."""

    start: int
    source: Apportionment | Rotation


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
        floor: what an objective gets however small its weight. Without a subset, rows per step on average, from 0
            (shares are kept exactly) to 1 (all objectives in every step, if R >= K), which is the default; with one, it
            is active in at least ``floor * active / K`` of the steps, in (0, 1], 0.5 by default.
        later: weights that change: pairs (step from which they hold, weights), steps ascending and above 0.

    Attributes:
        phases: what gives the rows of a step, and from which step on.

    Raises:
        ValueError: sizes below one, weights of the wrong number or not positive, or steps of ``later`` not ascending.
    """

    def __init__(
        self,
        num_objectives: int,
        slots: int,
        waves: int,
        weights: Sequence[float] | None = None,
        seed: int = 1,
        active: int | None = None,
        floor: float | None = None,
        later: Sequence[tuple[int, Sequence[float]]] = (),
    ):
        sizes = {"num_objectives": num_objectives, "slots": slots, "waves": waves, "active": active}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if floor is not None and not 0 <= floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, got {floor}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.num_objectives, self.slots, self.waves, self.seed = num_objectives, slots, waves, seed
        self.rows = slots * waves
        subset = num_objectives if active is None else min(active, num_objectives, self.rows)
        weights = [1.0] * num_objectives if weights is None else weights
        phases = [(0, weights), *later]
        if any(b <= a for (a, _), (b, _) in itertools.pairwise(phases)):
            raise ValueError(f"later: steps must ascend from above 0, got {[start for start, _ in later]}")
        self.phases = [self._phase(start, list(w), subset, floor) for start, w in phases]
        self.counts = lru_cache(maxsize=64)(self._counts)
        self.assign = lru_cache(maxsize=64)(self._assign)
        self._before = lru_cache(maxsize=None)(self._rows_before_phase)
        self._orders: dict[tuple[int, int], dict[int, np.ndarray]] = {}  # 8 bytes a sample

    def _phase(self, start: int, weights: list[float], subset: int, floor: float | None) -> Phase:
        k = self.num_objectives
        if len(weights) != k:
            raise ValueError(f"weights: {len(weights)} given for {k} objectives; give one for each")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            raise ValueError(
                f"weights must be positive and finite, got {weights}; leave an unwanted objective out instead"
            )
        if subset < k:
            return Phase(start, Rotation(weights, subset, self.rows, 0.5 if floor is None else floor, self.seed))
        return Phase(start, Apportionment(weights, self.rows, 1.0 if floor is None else floor))

    def _counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each objective in all steps before `step`, and in it: two [K] int64 arrays.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        number = self._phase_of(step)
        before, now = self.phases[number].source.counts(step - self.phases[number].start)
        return self._before(number) + before, now

    def _phase_of(self, step: int) -> int:
        return bisect.bisect_right([phase.start for phase in self.phases], step) - 1

    def _rows_before_phase(self, number: int) -> np.ndarray:
        """Rows of each objective in all earlier phases: [K]."""
        past = np.zeros(self.num_objectives, dtype=np.int64)
        for phase, following in itertools.pairwise(self.phases[: number + 1]):
            past += phase.source.counts(following.start - phase.start)[0]
        return past

    def _most_before(self, step: int) -> int:
        """Sum over the steps before `step` of the most rows that one objective can have in a step."""
        number = self._phase_of(step)
        pairs = itertools.pairwise(self.phases[: number + 1])
        past = sum(phase.source.most * (following.start - phase.start) for phase, following in pairs)
        return past + self.phases[number].source.most * (step - self.phases[number].start)

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
        objective, earlier = self._row(step, wave, slot)
        row = int(self.counts(step)[0][objective]) + earlier
        return self._piece(row * n, n, int(sizes[objective]), objective)

    def parallel_examples(self, step: int, wave: int, slot: int, n: int, size: int) -> np.ndarray:
        """As `row_examples`, of samples that all objectives have in common: [n] int64 indices into a list of them.

        The i-th rows that the objectives have in a step take the same samples. One that has fewer rows in a step
        than others leaves some out, and meets them in a later epoch.

        Args:
            step, wave, slot, n: see row_examples.
            size: samples in common, at least 1.
        """
        _, earlier = self._row(step, wave, slot)
        return self._piece((self._most_before(step) + earlier) * n, n, size, self.num_objectives)

    def _row(self, step: int, wave: int, slot: int) -> tuple[int, int]:
        """Objective of a row, and how many rows it has before this one in the step."""
        if not (0 <= wave < self.waves and 0 <= slot < self.slots):
            raise ValueError(f"wave {wave}, slot {slot}: there are {self.waves} waves and {self.slots} slots")
        flat = self.assign(step).ravel()
        here = wave * self.slots + slot
        return int(flat[here]), int((flat[:here] == flat[here]).sum())

    def _piece(self, start: int, n: int, size: int, stream: int) -> np.ndarray:
        """[n] of a stream of permutations of `size` things."""
        if size < 1:
            raise ValueError(f"objective {stream}: its size must be at least 1, got {size}")
        position = np.arange(start, start + n)
        epoch = position // size
        picked = np.empty(n, dtype=np.int64)
        for e in np.unique(epoch).tolist():
            picked[epoch == e] = self._order(size, stream, e)[position[epoch == e] % size]
        return picked

    def _order(self, size: int, stream: int, epoch: int) -> np.ndarray:
        """[size] order of an epoch; the last two of each stream are kept, whatever other streams ask for."""
        kept = self._orders.setdefault((size, stream), {})
        if epoch not in kept:
            if len(kept) > 1:
                del kept[next(iter(kept))]
            kept[epoch] = _permutation(size, self.seed, _EPOCH, stream, epoch)
        return kept[epoch]
