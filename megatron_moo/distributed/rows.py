"""Which rows belong to which objective, and the arithmetic on rows: fix-ups and combination (Gramian: gramian.py).

A step leaves R = W * D rows, one per wave and slot. Rows of one objective are summed and divided by the objective's
own count (tokens, or rows where Megatron already averaged). For the noise control every objective's rows are summed
in two halves: the inner product of two halves of one language shows how much of a cosine is sampling noise.
Everything that crosses ranks is a [B, H, H] array of products of the H half rows, H <= min(R, 2K).

Legend: B blocks, K objectives, W waves, D slots, R = W * D rows, H half rows, N elements of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moo.distributed.blocks import BlockMap, PartialSpan, Segment

# Columns of one fp32 product before results are added up in fp64: keeps rounding at that of a short sum whatever the
# size of a shard. Several products are one batched call, of at most PIECE elements of all rows together: the temporary
# memory (16 MiB in fp32, or one CHUNK of every row if that is more) does not grow with slots and waves.
CHUNK = 32768
PIECE = 2**22

Rows = Sequence[torch.Tensor]  # W tensors [D, N] of one bucket


@dataclass(frozen=True)
class RowPlan:
    """The rows of one step.

    Attributes:
        objective_R: objective id of each row, wave-major.
        half_R: half row of each row.
        objective_H: objective id of each half row, ascending.
        rows_K: number of rows of each objective.
        fold_R: the rows in the order of folding: the first row of every half row, then the second of those that have
            one, and so on; half rows with the most rows come first throughout.
        fold_sizes: how many of ``fold_R`` are first rows, second rows, ...: [H, ...], descending.
        place_H: where each half row comes in the order of folding; its only row where nothing folds.
        in_place: whether that is every half row's own number.
    """

    objective_R: torch.Tensor
    half_R: torch.Tensor
    objective_H: torch.Tensor
    rows_K: torch.Tensor
    fold_R: torch.Tensor
    fold_sizes: list[int]
    place_H: torch.Tensor
    in_place: bool

    @classmethod
    def from_assignment(cls, assignment: Sequence[Sequence[int]], num_objectives: int, device=None) -> RowPlan:
        """Plan for ``assignment[wave][slot]`` -> objective id in [0, K)."""
        objective = [int(k) for wave in assignment for k in wave]
        seen = [0] * num_objectives
        pairs = []
        for k in objective:
            pairs.append((k, seen[k] % 2))
            seen[k] += 1
        order = sorted(set(pairs))
        members = [[r for r, found in enumerate(pairs) if found == pair] for pair in order]
        longest = sorted(range(len(order)), key=lambda h: -len(members[h]))
        ranks = [[members[h][i] for h in longest if i < len(members[h])] for i in range(max(map(len, members)))]
        place = [longest.index(h) for h in range(len(order))] if len(ranks) > 1 else [rows[0] for rows in members]
        return cls(
            torch.tensor(objective, device=device),
            torch.tensor([order.index(pair) for pair in pairs], device=device),
            torch.tensor([k for k, _ in order], device=device),
            torch.tensor(seen, device=device),
            torch.tensor([r for rank in ranks for r in rank], device=device),
            [len(rank) for rank in ranks],
            torch.tensor(place, device=device),
            place == list(range(len(place))),
        )

    @property
    def num_halves(self) -> int:
        return self.objective_H.numel()

    @property
    def folds(self) -> bool:
        """Whether any half row is a sum of several rows."""
        return self.num_halves < self.half_R.numel()


def reduce_partial_rows(rows: Sequence[Rows], spans: Sequence[PartialSpan], group: dist.ProcessGroup) -> None:
    """Sum (or average) over tensor-parallel ranks, in place, every row of gradients that are partial there.

    Before any inner product: combining first and reducing later is wrong for every non-linear method.
    """
    if group.size() == 1:
        return
    for reduction in ("sum", "mean"):
        views = [
            wave[:, span.start : span.end]
            for span in spans
            if span.reduction == reduction
            for wave in rows[span.bucket]
        ]
        if not views:
            continue
        flat = torch.cat([view.reshape(-1) for view in views])
        dist.all_reduce(flat, group=group)
        if reduction == "mean":
            flat /= group.size()
        for view, reduced in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(reduced.view_as(view))


def reduce_tied_rows(rows: Sequence[Rows], tied_buckets: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Add up, in place, the rows of a tied embedding over the first and the last pipeline stage.

    Shards line up: Megatron gives the tied embedding a bucket of its own on both stages.
    """
    if group is None:
        return
    for bucket in tied_buckets:
        for wave in rows[bucket]:
            dist.all_reduce(wave, group=group)


def _pieces(segment: Segment, num_rows: int) -> Iterator[tuple[int, int]]:
    """Spans of whole chunks, PIECE elements of all rows at most: what is copied to fp32 at a time."""
    columns = max(PIECE // (num_rows * CHUNK), 1) * CHUNK
    for start in range(segment.start, segment.end, columns):
        yield start, min(start + columns, segment.end)


def combine(
    rows: Sequence[Rows], blocks: BlockMap, coefficients_BR: torch.Tensor, shards: Sequence[torch.Tensor]
) -> None:
    """Write sum_r c[b, r] row_r into the optimizer's shard of every bucket.

    The shards lie in the memory of the last wave's rows; a bucket's result is complete before it is copied there.

    Args:
        rows: per bucket, W tensors [D, N].
        blocks: the segments to fill; elements of no segment (padding) become zero.
        coefficients_BR: one coefficient per block and row.
        shards: per bucket, the destination [N].
    """
    slots = rows[0][0].shape[0]
    by_bucket: list[list] = [[] for _ in rows]
    for segment in blocks.segments:
        by_bucket[segment.bucket].append(segment)
    for waves, segments, shard in zip(rows, by_bucket, shards, strict=True):
        combined = torch.zeros(shard.numel(), dtype=torch.float32, device=shard.device)
        for segment in segments:
            coefficients_WD = coefficients_BR[segment.block].float().split(slots)
            for start, end in _pieces(segment, slots):
                for wave, coefficients_D in zip(waves, coefficients_WD, strict=True):
                    combined[start:end] += coefficients_D @ wave[:, start:end].float()
        shard.copy_(combined)
