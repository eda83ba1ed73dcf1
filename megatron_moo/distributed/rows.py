"""Which rows belong to which objective, and the arithmetic on rows: fix-ups and combination (Gramian: gramian.py).

A step leaves W rows for each of the S ranks over which a bucket is reduced, one per wave and rank; a row is of the
objective of its rank's slot. Rows of one objective are summed and divided by the objective's own count (tokens, or rows
where Megatron already averaged). For the noise control every objective's rows are summed in two halves: the inner
product of two halves of one language shows how much of a cosine is sampling noise. The rows of one slot in one wave
stay in one half: its ranks hold parts of the same samples (context parallelism), or an expert's gradient has mixed
theirs. Everything that crosses ranks is a [B, H, H] array of products of the H half rows, H <= min(R, 2K).

Legend: B blocks, K objectives, W waves, D slots, S ranks of a bucket's group, R = W * S rows, H half rows, N elements
of a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moo.distributed.blocks import PartialSpan, Segment

# Elements that a product copies or results in: the temporary memory (16 MiB in fp32) does not grow with slots or waves.
PIECE = 2**22
# On the CPU, columns of one product: its result must stay in the core's cache until it is written back.
CPU_COLUMNS = 2**16

Rows = Sequence[torch.Tensor]  # W tensors [S, N] of one bucket


@dataclass(frozen=True)
class RowPlan:
    """The rows of one step in the buckets of one process group.

    Plans of one step for several groups differ in their rows, not in their half rows.

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
    def from_assignment(
        cls,
        assignment: Sequence[Sequence[int]],
        num_objectives: int,
        device: torch.device | str | None = None,
        members: Sequence[int] | None = None,
    ) -> RowPlan:
        """Plan for a step.

        Args:
            assignment: ``assignment[wave][slot]`` is an objective id in [0, K).
            num_objectives: K.
            device: of the plan's tensors.
            members: slot of every rank of the group; each slot must occur. Default: every rank is a slot.
        """
        members = range(len(assignment[0])) if members is None else members
        times = [0] * num_objectives  # that a slot has worked on each objective so far
        halves: list[list[tuple[int, int]]] = []
        for wave in assignment:
            halves.append([])
            for k in map(int, wave):
                halves[-1].append((k, times[k] % 2))
                times[k] += 1
        pairs = [wave[slot] for wave in halves for slot in members]
        order = sorted(set(pairs))
        number = {pair: h for h, pair in enumerate(order)}
        rows: list[list[int]] = [[] for _ in order]
        for r, pair in enumerate(pairs):
            rows[number[pair]].append(r)
        longest = sorted(range(len(order)), key=lambda h: -len(rows[h]))
        ranks = [[rows[h][i] for h in longest if i < len(rows[h])] for i in range(max(map(len, rows)))]
        folding = {h: place for place, h in enumerate(longest)}
        place_H = [folding[h] if len(ranks) > 1 else rows[h][0] for h in range(len(order))]
        count_K = [0] * num_objectives
        for k, _ in pairs:
            count_K[k] += 1
        tensors = _on_device(
            [
                [k for k, _ in pairs],
                [number[pair] for pair in pairs],
                [k for k, _ in order],
                count_K,
                [r for rank in ranks for r in rank],
                place_H,
            ],
            device,
        )
        in_place = place_H == list(range(len(place_H)))
        return cls(*tensors[:5], [len(rank) for rank in ranks], tensors[5], in_place)

    @property
    def num_halves(self) -> int:
        return self.objective_H.numel()

    @property
    def folds(self) -> bool:
        """Whether any half row is a sum of several rows."""
        return self.num_halves < self.half_R.numel()


def _on_device(lists: Sequence[list[int]], device: torch.device | str | None) -> list[torch.Tensor]:
    """Numbers as tensors, by one copy from pinned memory: the host does not wait for the device."""
    flat = torch.tensor([number for one in lists for number in one])
    if device is not None and torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(one) for one in lists]))


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
        device = views[-1].device  # of the last wave's rows; earlier ones may be kept on the host
        flat = torch.cat([view.reshape(-1).to(device) for view in views])
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
            here = wave.to(rows[bucket][-1].device)
            dist.all_reduce(here, group=group)
            if here is not wave:
                wave.copy_(here)


def mark_spoilt_copies(
    gram_BHH: torch.Tensor, rows: Sequence[Rows], segments: Sequence[Sequence[Segment]], plan: RowPlan
) -> None:
    """Make a half row's square NaN, in the first block, if a copy of a parameter is not finite in it; in place.

    A copy that another rank counts enters no inner product here, and may go bad on this rank alone. Marked before
    Gramians are summed over ranks, it is known to all of them without a message of its own.

    Args:
        gram_BHH: this rank's inner products.
        rows: of the buckets of one process group, W tensors [S, N] each.
        segments: of each of these buckets.
        plan: their rows.
    """
    bad_H = torch.zeros(plan.num_halves, dtype=torch.int64, device=gram_BHH.device)
    for waves, its_segments in zip(rows, segments, strict=True):
        for segment in its_segments:
            if not segment.counted:
                # The norm, not the elements: one pass without a temporary, and the range of the squares of the others.
                norms = [wave[:, segment.start : segment.end].float().norm(dim=1) for wave in waves]
                bad_R = ~torch.cat([norm.to(bad_H.device) for norm in norms]).isfinite()
                bad_H.index_add_(0, plan.half_R, bad_R.long())
    gram_BHH[0].diagonal().masked_fill_(bad_H > 0, torch.nan)


def drop_rows(rows: Iterable[Rows], dropped: Sequence[int]) -> None:
    """Set rows to zero, in place: what is not finite would stay so however small its coefficient.

    Args:
        rows: of buckets of one process group.
        dropped: numbers of rows, wave-major.
    """
    for waves in rows:
        for r in dropped:
            wave, rank = divmod(r, waves[0].shape[0])
            waves[wave][rank].zero_()


def combine(waves: Rows, segments: Sequence[Segment], coefficients_BR: torch.Tensor, shard: torch.Tensor) -> None:
    """Write sum_r c[b, r] row_r into the shard of one bucket.

    The shard is a part of the last wave's rows. No row is read once it is overwritten: a column of the result is made
    of the same column of the rows.

    Args:
        waves: W tensors [S, N].
        segments: of this bucket. Elements of no segment are padding: zero in every row, and left so.
        coefficients_BR: one coefficient per block and row.
        shard: the destination [N].
    """
    ranks = waves[0].shape[0]
    coefficients_BR = coefficients_BR.float()
    columns = PIECE // (1 if waves[0].dtype == torch.float32 else ranks)
    columns = CPU_COLUMNS if shard.device.type == "cpu" else max(columns, 1)
    for segment in segments:
        coefficients_WS = coefficients_BR[segment.block].split(ranks)
        for start, end in _pieces(segment, columns):
            combined = coefficients_WS[0] @ waves[0][:, start:end].float()
            for wave, coefficients_S in zip(waves[1:], coefficients_WS[1:], strict=True):
                combined += coefficients_S @ wave[:, start:end].float()
            shard[start:end].copy_(combined)


def _pieces(segment: Segment, columns: int) -> Iterator[tuple[int, int]]:
    for start in range(segment.start, segment.end, columns):
        yield start, min(start + columns, segment.end)
