"""What must not end a run, and what must: gradients that are not finite, ranks that disagree.

A non-finite value in one language's gradient is confined to that language: it is left out of the step in every block,
as if it had had no tokens, and the others go on. Megatron's own answer would be to stop, or to skip the step of all
languages. A language that stays so for a number of steps ends the run.

Legend: B blocks, K objectives, H half rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Quarantine:
    """Counts the steps in which objectives were left out, and stops the run when there are too many in a row.

    Args:
        objectives: their names.
        limit: steps in a row that are borne.

    Attributes:
        total: objective name -> steps in which it was left out, since the start of the process.
    """

    def __init__(self, objectives: Sequence[str], limit: int) -> None:
        self.total = dict.fromkeys(objectives, 0)
        self._objectives, self._limit = list(objectives), limit
        self._streak = dict.fromkeys(objectives, 0)
        self._before = (-1, self.total, self._streak)  # the last step, and the counts before it

    def count(self, step: int, spoilt: Sequence[bool], present: Sequence[bool]) -> None:
        """Take note of one step; the same on every rank.

        Args:
            step: its number.
            spoilt: [K], whose gradients were not finite.
            present: [K], who had tokens. An absent objective neither adds to a streak nor ends it.

        Raises:
            RuntimeError: one objective too often in a row, or none left.
        """
        if step == self._before[0]:  # computed again, as Megatron's rerun machine does: it counts once
            _, self.total, self._streak = self._before
        self._before = (step, dict(self.total), dict(self._streak))
        for name, bad, here in zip(self._objectives, spoilt, present, strict=True):
            if here:
                self._streak[name] = self._streak[name] + 1 if bad else 0
                self.total[name] += bad
        if too_often := [name for name, streak in self._streak.items() if streak > self._limit]:
            raise RuntimeError(
                f"step {step}: the gradient of {', '.join(too_often)} was not finite in {self._limit + 1} steps in a "
                "row, and left out of them. Look at its data and at the learning rate; resume from the last "
                "checkpoint, without it if need be (--moo-languages). --moo-max-quarantined sets how many steps are "
                "borne"
            )
        if any(present) and all(bad for bad, here in zip(spoilt, present, strict=True) if here):
            raise RuntimeError(
                f"step {step}: no objective has a finite gradient, there is nothing to update the weights with. The "
                "weights themselves are likely not finite; resume from the last checkpoint with a lower learning rate"
            )


def spoilt_objectives(
    gram_BHH: torch.Tensor, objective_H: torch.Tensor, num_objectives: int, groups: Sequence[dist.ProcessGroup]
) -> torch.Tensor:
    """Objectives with a non-finite gradient in any block of any rank: [K] bool, the same on all ranks.

    Args:
        gram_BHH: inner products of half rows; a non-finite element of a row makes its square non-finite.
        objective_H: objective of each half row.
        num_objectives: K.
        groups: over which the ranks' blocks differ.
    """
    bad_H = ~gram_BHH.diagonal(dim1=1, dim2=2).isfinite().all(0)
    bad_K = torch.zeros(num_objectives, dtype=torch.int32, device=gram_BHH.device)
    bad_K.index_add_(0, objective_H, bad_H.int())
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(bad_K, op=dist.ReduceOp.MAX, group=group)
    return bad_K > 0


def check_agreement(name: str, text: str, groups: Sequence[dist.ProcessGroup]) -> None:
    """Compare a text over all ranks that the groups join; collective.

    Ranks that disagree on the language of a row would train on, with gradients under the wrong names.

    Args:
        name: what the text says.
        text: must be the same everywhere.
        groups: data-, tensor- and pipeline-parallel groups of this rank.

    Raises:
        RuntimeError: on every rank, naming the ranks that differ from the others.
    """
    found: list = [(dist.get_rank(), hashlib.blake2b(text.encode(), digest_size=8).hexdigest())]
    for group in groups:
        parts: list = [None] * group.size()
        dist.all_gather_object(parts, found, group=group)
        found = [entry for part in parts for entry in part]
    values = [value for _, value in found]
    usual = max(sorted(set(values)), key=values.count)
    if strange := sorted(rank for rank, value in found if value != usual):
        raise RuntimeError(
            f"ranks disagree on {name}: {', '.join(map(str, strange))} differ from the other "
            f"{len(found) - len(strange)}; here: {text[:300]}. Gradients would go under the wrong names; give every "
            "rank the same configuration, data and seed"
        )
