"""Random draws per block, and the order in which gradient surgery visits the other objectives.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Generators


def draw(
    sampler: Callable[..., Tensor],
    blocks: int,
    shape: tuple[int, ...],
    generator: torch.Generator | Sequence[torch.Generator],
) -> Tensor:
    """Samples [B, *shape] in float64 on the CPU, from one generator for all blocks or from one per block.

    Args:
        sampler: ``torch.rand`` or ``torch.randn``.
        blocks: B.
        shape: of one block's samples. It should depend on K alone, never on masks, so that a mask does not shift the
            draws of later steps.
        generator: one, or one per block.
    """
    if isinstance(generator, torch.Generator):
        return sampler(blocks, *shape, generator=generator, dtype=torch.float64)
    samples = torch.empty(blocks, *shape, dtype=torch.float64)
    for index, one in enumerate(generator):
        sampler(*shape, generator=one, dtype=torch.float64, out=samples[index])
    return samples


def visit_order(blocks: int, objectives: int, generator: Generators, device: torch.device) -> Tensor:
    """For every block and objective i, the other objectives in the order they are visited [B, K, K-1].

    Without a generator row i visits i+1, i+2, ... and wraps around, so that no objective is always the last
    word. With one, each row's order is uniform and independent of the other rows' (as in PCGrad, Algorithm
    1). The number of draws depends on K alone, never on masks, so that a mask does not shift the draws of
    later steps.
    """
    b, k = blocks, objectives
    if generator is None:
        i = torch.arange(k, device=device)
        order = (i[:, None] + 1 + torch.arange(k - 1, device=device)[None, :]) % k
        return order.expand(b, k, k - 1)
    keys = draw(torch.rand, b, (k, k), generator)
    keys.diagonal(dim1=1, dim2=2).fill_(2.0)  # above every draw: the row itself comes last and is cut off
    return keys.argsort(dim=-1, stable=True)[..., : k - 1].to(device, non_blocking=True)
