"""Packing: samples of one language put together into sequences of S positions.

A sample of L tokens takes L - 1 positions, as its last token is a target only. Which samples share a pack is decided
by best fit decreasing: the longest first, each into the fullest pack that has room. Its packs are at most 11/9 of
the fewest possible and one (Johnson et al., SIAM J. Computing 3, 1974), as first fit's are; unlike first fit it never
asks which of equally full packs came first, so that packs are dealt with by how much room they have, many at a time,
and the time hardly depends on the number of samples. Among samples of one length the order is random, with a seed that
is always the same: neighbours in a file are often alike.

A plan is a pure function of the lengths and S. It is kept beside the index files under a hash of both, so that every
rank and every later run reads it; it is made again if it is missing, of another version or broken.

Legend: n samples, P packs, S positions of a pack, L tokens of a sample.
"""

import hashlib
import logging
import os
import uuid
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moo.data.corpus import Corpus, Fit

_VERSION = 1  # of the algorithm: raise it when the same lengths give other packs
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackPlan:
    """Which samples make up each pack.

    Attributes:
        order: [n] samples, pack after pack.
        starts: [P + 1] int64; pack p has the samples order[starts[p] : starts[p + 1]].
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, p: int) -> np.ndarray:
        """Samples of a pack, the longest first."""
        return self.order[self.starts[p] : self.starts[p + 1]]


def plan_packs(lengths: np.ndarray, seq_length: int) -> PackPlan:
    """Best fit decreasing.

    Args:
        lengths: [n] L of each sample, 2 <= L <= S + 1.
        seq_length: S.

    Returns:
        A plan with every sample in one pack, and at most S positions in each.

    Raises:
        ValueError: a length out of range.
    """
    sizes = np.asarray(lengths, dtype=np.int64) - 1
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= seq_length:
        raise ValueError(
            f"lengths must be in [2, {seq_length + 1}] to fit in seq_length {seq_length}, found "
            f"{sizes.min() + 1} to {sizes.max() + 1}"
        )
    shuffled = np.random.default_rng(0).permutation(len(sizes))
    # Sorted stably by 16 bits where they do, numpy counts instead of comparing.
    below = (seq_length - sizes[shuffled]).astype(np.min_scalar_type(seq_length))
    descending = shuffled[np.argsort(below, kind="stable")]
    pack = _best_fit(np.bincount(sizes, minlength=seq_length + 1), len(sizes))
    order = descending[np.argsort(pack, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack))]) if len(pack) else np.zeros(1)
    kind = np.int32 if len(sizes) <= np.iinfo(np.int32).max else np.int64
    return PackPlan(order.astype(kind), starts.astype(np.int64))


class _Packs:
    """Packs by the room they have left."""

    def __init__(self, seq_length: int):
        self.number = np.zeros(seq_length + 1, dtype=np.int64)  # of packs, by room
        self._stacks: dict[int, list[np.ndarray]] = defaultdict(list)

    def put(self, room: int, packs: np.ndarray) -> None:
        if room and len(packs):
            self._stacks[room].append(packs)
            self.number[room] += len(packs)

    def take(self, room: int, count: int) -> np.ndarray:
        self.number[room] -= count
        stack, taken = self._stacks[room], []
        while count:
            top = stack.pop()
            if len(top) > count:
                stack.append(top[count:])
                top = top[:count]
            taken.append(top)
            count -= len(top)
        return np.concatenate(taken)


def _best_fit(counts: np.ndarray, samples: int) -> np.ndarray:
    """Pack of each sample, samples in descending order of size: [n].

    Samples of one size go, one by one, into the fullest pack with room: that pack takes them until it has none left
    for another, then the next one. So all packs of equal room take the same number, but for one at the end.

    Args:
        counts: [S + 1] samples of each size.
        samples: n.
    """
    seq_length = len(counts) - 1
    pack_of = np.empty(samples, dtype=np.int32)
    packs, made, done = _Packs(seq_length), 0, 0

    def fill(ids: np.ndarray, room: int, size: int, count: int) -> None:
        """Put `count` samples into these packs of equal room, each as many as it takes, the last one the rest."""
        nonlocal done
        each = room // size
        pack_of[done : done + count] = np.repeat(ids, each)[:count]
        done += count
        whole, rest = divmod(count, each)
        packs.put(room - each * size, ids[:whole])
        packs.put(room - rest * size, ids[whole:])

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        for room in (np.flatnonzero(packs.number[size:]) + size).tolist():
            if not left:
                break
            each = room // size
            used = min(int(packs.number[room]), -(-left // each))
            count = min(left, used * each)
            fill(packs.take(room, used), room, size, count)
            left -= count
        if left:
            new = -(-left // (seq_length // size))
            fill(np.arange(made, made + new), seq_length, size, left)
            made += new
    return pack_of


def load_plan(prefix: str, lengths: np.ndarray, seq_length: int) -> PackPlan:
    """The plan for these samples, from beside `prefix` if it is there; else it is made and kept there.

    Where it cannot be kept, a line in the log says so.

    Args:
        prefix: of the token pair of the language.
        lengths, seq_length: see plan_packs.
    """
    state = np.ascontiguousarray(lengths, dtype="<i4")
    fingerprint = hashlib.sha256(f"{_VERSION} {seq_length} {len(state)}\n".encode() + state.tobytes()).hexdigest()
    path = Path(f"{prefix}.packs-{seq_length}-{fingerprint[:12]}.npz")
    plan = _read(path, fingerprint, len(state))
    if plan is None:
        plan = plan_packs(lengths, seq_length)
        _write(path, fingerprint, plan)
    return plan


def _read(path: Path, fingerprint: str, samples: int) -> PackPlan | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            plan, found = PackPlan(file["order"], file["starts"]), str(file["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s cannot be read (%s); the packs are planned again", path, error)
        return None
    # The file's checksums tell a broken one; this, one that is whole and of something else.
    if found != fingerprint or len(plan.order) != samples or plan.starts[-1] != samples:
        _log.warning("%s is of other samples; the packs are planned again", path)
        return None
    return plan


def _write(path: Path, fingerprint: str, plan: PackPlan) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")  # ranks on several machines write at once
    try:
        with open(temporary, "xb") as file:
            np.savez(file, order=plan.order, starts=plan.starts, fingerprint=np.array(fingerprint))
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("%s cannot be written (%s); the packs are planned again in each run", path, error)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:  # such as a directory that may not be written to
            _log.debug("%s: %s", temporary, error)


class PackedCorpus:
    """Packs of one language: `packed[p]` gives the samples of a pack, each (tokens [L] int64, mask [L] bool).

    To a sampler a pack is what a sample of a Corpus is: it is drawn whole, and epochs are counted in packs.

    Args:
        corpus: its samples; none may have more than S + 1 tokens.
        seq_length: S.

    Attributes:
        plan: which samples make up each pack.
        lengths: [P] int64, tokens of the samples in each pack; of its S positions it uses one less for each sample.
        keys: None: a pack is of several rows.
    """

    keys: np.ndarray | None = None

    def __init__(self, corpus: Corpus, seq_length: int):
        self.corpus, self.seq_length = corpus, seq_length
        self.plan = load_plan(corpus.prefix, corpus.lengths, seq_length)
        self.lengths = np.add.reduceat(corpus.lengths[self.plan.order].astype(np.int64), self.plan.starts[:-1])

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, p: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.corpus[i] for i in self.plan[p]]

    @property
    def lang(self) -> str:
        """Its language."""
        return self.corpus.lang

    @property
    def fit(self) -> Fit:
        """What became of the documents; see Corpus."""
        return self.corpus.fit

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self.corpus.longest

    @property
    def efficiency(self) -> float:
        """Share of all positions that a sample uses."""
        return (int(self.lengths.sum()) - len(self.corpus)) / (len(self) * self.seq_length)

    @property
    def samples_per_pack(self) -> float:
        """On average."""
        return len(self.corpus) / len(self)
