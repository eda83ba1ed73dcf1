"""The Gramian of every block of this rank's shards, in one pass over the rows.

Blocks are contiguous segments of a shard, from a scalar to a whole embedding, and there may be thousands. One product
per segment would be thousands of small launches; so a shard is cut once, when the method is installed:

    shard     |--------- A ---------|-B-|C|------- D -------|
    cells     |.......|.......|.......|.......|.......|......   fixed width; those inside one block are multiplied in
              [   A  ][   A   ]               [   D   ]         place, as one strided batched product
    windows                   [ A ][B ][C][ D ]       [ D ]     the rest, of a few widths; gathered, masked, multiplied

A piece of the shard is a run of cells or of windows of one width: one batched product, whatever blocks lie in it, and
its [n, H, H] results are added to the blocks they belong to. A cell that a block boundary cuts is multiplied with its
neighbours and its result goes to a dump, which costs less than leaving it out; many in a row are left out.

Numerics: fp32 products and sums over CHUNK columns at most, no TF32; everything longer is added up in fp64, in the same
order every time: runs repeat to the bit. A non-finite element of a row spoils only the products of its own half row in
its own block.

Legend: B blocks, W waves, S ranks of a bucket's group, R = W * S rows, H half rows, N elements of a shard, n products
of one piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_moo.distributed.blocks import BlockMap, Segment
from megatron_moo.distributed.rows import PIECE, RowPlan, Rows

# Columns of one fp32 product. Longer ones are no faster and round more.
CHUNK = 4096
# Chunks in a cell of the grid, (on the CPU, elsewhere). Results of cells are added up one after the other, which a GPU
# dislikes: fewer are better, though more of the shard then lies in cut cells and is gathered.
CELL_CHUNKS = (1, 8)
# Cut cells in a row that end a run, likewise: fewer cost less to multiply in vain than another launch.
GAP = (2, 8)
# Widths of windows, longest first. A span is cut into full windows of the longest width that it fills at least once,
# and one of the shortest width that holds what is left.
WIDTHS = (4096, 1024, 256, 64)
# Elements of all rows in a piece that is copied, likewise. On the CPU it must stay in the second-level cache, and below
# the size from which malloc maps fresh pages every time: that alone doubles the time.
COPIED = (2**18, PIECE)


class ShardGramian:
    """Inner products of half rows, block by block, over the counted elements of this rank's shards.

    The cut depends on nothing that changes between steps: it is made here, once. A call launches a number of kernels
    that grows with the bytes of the rows, not with the number of blocks or tensors, and never waits for the device.

    Args:
        blocks: the segments; those not counted are skipped.
        shard_sizes: N of every bucket.
        device: where the products are taken.
        first: number of the first bucket in ``blocks``; those of other process groups have a Gramian of their own.
    """

    def __init__(
        self,
        blocks: BlockMap,
        shard_sizes: Sequence[int],
        device: torch.device | str | None = None,
        first: int = 0,
    ) -> None:
        self._num_blocks = len(blocks.names)
        by_bucket: list[list[Segment]] = [[] for _ in shard_sizes]
        for segment in blocks.segments:
            if segment.counted and first <= segment.bucket < first + len(shard_sizes):
                by_bucket[segment.bucket - first].append(segment)
        self._cuts = [
            _cut(segments, size, self._num_blocks, torch.device(device or "cpu"))
            for segments, size in zip(by_bucket, shard_sizes, strict=True)
        ]

    def __call__(self, rows: Sequence[Rows], plan: RowPlan) -> torch.Tensor:
        """Gramian of this rank's elements, before any reduction over ranks.

        Beside its result it takes memory for PIECE elements of all rows, or for a cell of every row if that is more.

        Args:
            rows: per bucket, W tensors [S, N], fp32 or bf16, elements of a row next to each other. Accessed one
                by one, and let go before the next.
            plan: which half row each row belongs to.

        Returns:
            [B, H, H] float64.
        """
        half_rows = plan.num_halves
        shape = (self._num_blocks + 1, half_rows, half_rows)  # the last block is the dump
        gram_BHH = torch.zeros(shape, dtype=torch.float64, device=plan.half_R.device)
        with _full_precision():
            for index, (cells, windows) in enumerate(self._cuts):
                _add_bucket(gram_BHH, rows[index], cells, windows, plan)
        if plan.in_place:
            return gram_BHH[:-1]
        return gram_BHH[:-1].index_select(1, plan.place_H).index_select(2, plan.place_H)


@dataclass(frozen=True)
class _Cells:
    """The grid of one bucket's shard.

    Attributes:
        width: columns of a cell, some chunks.
        block_n: block of every cell; the dump where a boundary cuts the cell.
        runs: on the host, the cells to multiply: [first, last) of runs that begin and end with an uncut cell.
    """

    width: int
    block_n: torch.Tensor
    runs: list[tuple[int, int]]


@dataclass(frozen=True)
class _Windows:
    """Windows of one width in one bucket's shard: columns [start, start + width) of a row.

    Attributes:
        width: columns of a window.
        block_n: block of every window.
        start_n: first column.
        low_n, high_n: only [start + low, start + high) belongs to the block; None where whole windows do.
    """

    width: int
    block_n: torch.Tensor
    start_n: torch.Tensor
    low_n: torch.Tensor | None = None
    high_n: torch.Tensor | None = None


def _cut(segments: Iterable[Segment], size: int, dump: int, device: torch.device) -> tuple[_Cells, list[_Windows]]:
    """Cells and windows of one bucket, which cover every element of every segment once."""
    cell = CELL_CHUNKS[device.type != "cpu"] * CHUNK
    owners = [dump] * (size // cell)
    full: dict[int, list[tuple[int, int]]] = {width: [] for width in WIDTHS}
    partial: dict[int, list[tuple[int, int, int, int]]] = {width: [] for width in WIDTHS}
    for segment in segments:
        first, last = -(-segment.start // cell), segment.end // cell
        rest = [(segment.start, segment.end)]
        if first < last:
            owners[first:last] = [segment.block] * (last - first)
            rest = [(segment.start, first * cell), (last * cell, segment.end)]
        for low, high in rest:
            width = next((width for width in WIDTHS if width <= high - low), WIDTHS[-1])
            whole = low + (high - low) // width * width
            full[width] += [(segment.block, start) for start in range(low, whole, width)]
            if whole < high:
                width = min(width for width in WIDTHS if width >= high - whole)
                start = max(min(whole, size - width), 0)  # a window may not reach beyond the shard
                partial[width].append((segment.block, start, whole - start, high - start))
    windows = [
        _Windows(min(width, size), *torch.tensor(found, device=device).T.contiguous())
        for found_by_width in (full, partial)
        for width, found in found_by_width.items()
        if found
    ]
    return _Cells(cell, torch.tensor(owners, device=device), _runs(owners, dump, GAP[device.type != "cpu"])), windows


def _runs(owners: Sequence[int], dump: int, gap: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for cell, owner in enumerate(owners):
        if owner == dump:
            continue
        if runs and cell - runs[-1][1] < gap:
            runs[-1] = (runs[-1][0], cell + 1)
        else:
            runs.append((cell, cell + 1))
    return runs


def _add_bucket(gram_BHH: torch.Tensor, waves: Rows, cells: _Cells, windows: Sequence[_Windows], plan: RowPlan) -> None:
    for columns, width, block_n in _pieces(waves, cells, windows, plan):
        products_nHH = _products(_half_rows(columns, plan), width)
        # Accumulating index_put_ sorts on CUDA, where index_add_ would add in any order.
        gram_BHH.index_put_((block_n,), products_nHH, accumulate=True)


def _pieces(
    waves: Rows, cells: _Cells, windows: Sequence[_Windows], plan: RowPlan
) -> Iterator[tuple[list[torch.Tensor], int, torch.Tensor]]:
    """One bucket's pieces: columns of every wave [S, n * width], the width, the blocks [n]."""
    num_rows = plan.half_R.numel()
    results = PIECE // plan.num_halves**2  # bounded like the rows: for many rows they take as much
    budget = COPIED[waves[0].device.type != "cpu"]
    copied = len(waves) > 1 or plan.folds or waves[0].dtype != torch.float32
    # Several waves are joined before they fold; rows of one wave fold straight out of their memory.
    copied_rows = plan.num_halves if len(waves) == 1 else num_rows
    width = cells.width
    while copied and width > CHUNK and width * copied_rows > budget:
        width //= 2
    parts, step = cells.width // width, max(results // (width // CHUNK), 1)
    if copied:
        step = max(min(budget // (width * copied_rows), step), 1)
    block_n = cells.block_n.repeat_interleave(parts) if parts > 1 else cells.block_n
    for first, last in cells.runs:
        for begin in range(first * parts, last * parts, step):
            end = min(begin + step, last * parts)
            yield [wave[:, begin * width : end * width] for wave in waves], width, block_n[begin:end]
    for window in windows:
        step = max(min(budget // (num_rows * window.width), results), 1)
        for begin in range(0, window.block_n.numel(), step):
            part = slice(begin, begin + step)
            yield [_gather(wave, window, part) for wave in waves], window.width, window.block_n[part]


def _gather(wave: torch.Tensor, windows: _Windows, part: slice) -> torch.Tensor:
    """Columns of some windows, [S, n * width]; zero outside a window's own span."""
    ranks, size = wave.shape
    width, start_n = windows.width, windows.start_n[part]
    assert wave.stride(1) == 1 or size == 1, "elements of a row must be next to each other"
    # Every window of the memory as a row of a matrix (they overlap, nothing is copied): selecting rows copies runs of
    # elements, which is many times faster than picking single ones.
    everywhere = wave.as_strided(((ranks - 1) * wave.stride(0) + size - width + 1, width), (1, 1))
    rank_S = torch.arange(ranks, device=wave.device) * wave.stride(0)
    gathered = everywhere.index_select(0, (rank_S[:, None] + start_n).flatten()).view(ranks, -1, width)
    if windows.low_n is None:
        return gathered.flatten(1)
    column = torch.arange(width, device=wave.device)
    outside = (column < windows.low_n[part, None]) | (column >= windows.high_n[part, None])
    return gathered.masked_fill_(outside, 0.0).flatten(1)  # filled, not multiplied: another block's NaN stays there


def _half_rows(waves: Rows, plan: RowPlan) -> torch.Tensor:
    """[H, n * width] float32 in the plan's order of folding; in row order, and not copied, where nothing folds."""
    rows = waves[0] if len(waves) == 1 else torch.cat(list(waves))
    if not plan.folds:
        return rows.float()
    # Rank by rank: the first row of every half row, then the second of those that have one. A product with a 0/1
    # matrix would carry one language's NaN to all others.
    first, *others = plan.fold_R.split(plan.fold_sizes)
    half = rows.index_select(0, first).float()
    for other in others:
        half[: other.numel()] += rows.index_select(0, other)
    return half


def _products(half: torch.Tensor, width: int) -> torch.Tensor:
    """[H, n * width] float32 -> [n, H, H] float64."""
    chunk = min(CHUNK, width)
    chunks = half.unflatten(1, (-1, chunk)).transpose(0, 1)
    products = torch.bmm(chunks, chunks.mT)
    if width == chunk:
        return products.double()
    return products.unflatten(0, (-1, width // chunk)).sum(1, dtype=torch.float64)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, which some containers switch on for all products: its error turns the sign of small cosines."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
