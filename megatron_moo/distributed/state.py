"""The method's state in checkpoints: by block name, so that it finds its block on another layout.

Legend: B blocks, K objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moo.aggregation import Aggregator


def collect(aggregator: Aggregator, blocks: Sequence[str], groups: Sequence[dist.ProcessGroup]) -> dict[str, Any]:
    """State by block name, of the blocks of all ranks that the groups join; collective, the same on all of them.

    Args:
        aggregator: whose state.
        blocks: names of this rank's B blocks.
        groups: the model-parallel groups of this rank.
    """
    state = {key: tensor.cpu() for key, tensor in aggregator.state_dict().items()}
    mine = {name: {key: tensor[b].clone() for key, tensor in state.items()} for b, name in enumerate(blocks)}
    found: list[dict] = [mine]
    for group in groups:
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, found, group=group)
        found = [part for several in parts for part in several]
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for part in found:
        for name, entries in part.items():
            merged.setdefault(name, entries)  # of a block that several ranks solve, the first one's weights hold
    return merged


def restore(
    aggregator: Aggregator,
    saved: dict[str, dict[str, torch.Tensor]],
    blocks: Sequence[str],
    num_objectives: int,
    device: torch.device,
) -> list[str]:
    """Give every block its saved state.

    Returns:
        Names of the blocks without one, which start afresh.
    """
    fresh = aggregator.fresh_state(len(blocks), num_objectives, device)
    for index, name in enumerate(blocks):
        for key, tensor in saved.get(name, {}).items():
            if key in fresh:  # else of a wrapper that this run does not have
                fresh[key][index] = tensor.to(fresh[key])
    aggregator.load_state_dict(fresh)
    return [name for name in blocks if name not in saved]
