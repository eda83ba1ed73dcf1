"""Slots: the ranks that must work on the same objective at the same time.

A data-parallel rank has peers that see the same samples (tensor- and pipeline-parallel ranks), a part of them
(context-parallel ranks), or whose tokens meet in one gradient (expert-parallel ranks: an expert's gradient is a sum
over the tokens of the whole expert-parallel group). All of them form one slot. Without experts a slot is a
data-parallel rank; with experts it is the smallest union of expert-parallel groups that holds such ranks whole.

Legend: D slots, P data-parallel ranks of a slot (its *peers*, which read different samples of one objective).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


def num_slots(stage_ranks: int, tp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None) -> int:
    """D, from the sizes of a layout alone.

    Megatron numbers the ranks of a pipeline stage so that a data-parallel rank is ``tp * cp`` ranks in a row, and the
    ranks whose tokens meet in an expert are ``etp * ep`` in a row. A slot ends where both end.

    Args:
        stage_ranks: ranks of one pipeline stage (world size / pipeline-parallel size).
        tp, cp, ep: tensor-, context- and expert-parallel sizes.
        etp: tensor-parallel size of experts; default: tp.

    Raises:
        ValueError: if the sizes do not divide the number of ranks.
    """
    dense, expert = tp * cp, (tp if etp is None else etp) * ep
    for name, size in (("tensor x context", dense), ("expert-tensor x expert", expert)):
        if stage_ranks % size:
            raise ValueError(f"{stage_ranks} ranks of a pipeline stage cannot be divided by {name} parallelism {size}")
    return stage_ranks // math.lcm(dense, expert)


@dataclass(frozen=True)
class SlotMap:
    """Where this rank is among the slots, and whose slot the members of its gradient groups are.

    Attributes:
        count: D.
        mine: this rank's slot.
        dense_members: slot of every member of the data (x context) parallel group, in its order.
        expert_members: the same of the expert-data-parallel group; as dense_members where there are no experts.
    """

    count: int
    mine: int
    dense_members: tuple[int, ...]
    expert_members: tuple[int, ...]

    @classmethod
    def find(
        cls,
        dp_group: dist.ProcessGroup,
        dp_cp_group: dist.ProcessGroup,
        ep_groups: Sequence[dist.ProcessGroup] = (),
        expt_dp_group: dist.ProcessGroup | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ) -> SlotMap:
        """Ask the ranks of this pipeline stage; collective over all the groups given.

        Args:
            dp_group: data-parallel group without context parallelism; its ranks are the data-parallel ranks.
            dp_cp_group: the group that dense gradients are reduced over.
            ep_groups: groups whose tokens meet in an expert's gradient.
            expt_dp_group: the group that expert gradients are reduced over.
            tp_group: where expert-parallel groups may span tensor-parallel ranks.
        """
        linked = {dp_group.rank()}
        for group in ep_groups:
            linked |= set().union(*_gather(linked, group))
        sets = _gather(linked, dp_cp_group)
        if tp_group is not None:
            sets = [found for part in _gather(sets, tp_group) for found in part]
        slot_of = _components(dp_group.size(), sets)
        mine = slot_of[dp_group.rank()]
        return cls(
            max(slot_of) + 1,
            mine,
            tuple(_gather(mine, dp_cp_group)),
            tuple(_gather(mine, expt_dp_group or dp_cp_group)),
        )


def _gather(value: Any, group: dist.ProcessGroup) -> list:
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _components(size: int, sets: Sequence[set[int]]) -> list[int]:
    """Number of the component of each of ``size`` members, in the order of their first members."""
    lowest = list(range(size))
    changed = True
    while changed:
        changed = False
        for linked in sets:
            low = min(lowest[i] for i in linked)
            for i in linked:
                changed, lowest[i] = changed or lowest[i] != low, low
    order = sorted(set(lowest))
    return [order.index(low) for low in lowest]
