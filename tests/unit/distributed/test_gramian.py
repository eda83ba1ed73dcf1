"""The one pass over a shard against a plain loop over segments."""

import pytest
import torch

from megatron_moo.distributed import gramian as ops
from megatron_moo.distributed.blocks import BlockMap, Segment
from megatron_moo.distributed.rows import RowPlan

FOLDED = [[2, 0, 1], [0, 0, 2]]  # two waves of three slots, half rows of one and of two rows; objective 3 is absent
UNEVEN = [[1, 1, 1], [1, 1, 0]]  # half rows of three, two and one
SINGLE = [[2, 0, 1], [0, 1, 2]]  # every half row is one row


def _gramian(rows, blocks: BlockMap, plan: RowPlan) -> torch.Tensor:
    return ops.ShardGramian(blocks, [waves[0].shape[1] for waves in rows], plan.half_R.device)(rows, plan)


def _map(segments: list[Segment]) -> BlockMap:
    names = [str(block) for block in range(max(segment.block for segment in segments) + 1)]
    return BlockMap(names, segments, partial=[], tied_buckets=[], tied_blocks=[], replicated_blocks=[])


def _layout(seed: int, sizes: tuple[int, ...], blocks: int) -> BlockMap:
    """Segments of random lengths, many short ones and few long ones; gaps, blocks in several places, replicas."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    segments = []
    for bucket, size in enumerate(sizes):
        at = draw(5)
        while at < size:
            end = min(at + 1 + draw((3, 70, 600, 3000)[draw(4)]), size)
            segments.append(Segment(bucket, at, end, draw(blocks), draw(6) > 0))
            at = end + (draw(20) if draw(4) == 0 else 0)
    segments.append(Segment(0, 0, 0, blocks - 1, True))  # every block has a name, also without elements here
    return _map(segments)


def _rows(sizes, assignment, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = len(assignment[0])
    return [[torch.randn(slots, n, generator=generator).to(dtype) for _ in assignment] for n in sizes]


def _looped(rows, blocks: BlockMap, plan: RowPlan) -> torch.Tensor:
    """One product per segment, in fp64."""
    half_rows = plan.num_halves
    gram = torch.zeros(len(blocks.names), half_rows, half_rows, dtype=torch.float64)
    for segment in blocks.segments:
        if segment.counted:
            part = torch.cat([wave[:, segment.start : segment.end] for wave in rows[segment.bucket]]).double()
            half = part.new_zeros(half_rows, part.shape[1]).index_add_(0, plan.half_R, part)
            gram[segment.block] += half @ half.T
    return gram


def _assert_equal(found, expected):
    """To the accuracy of fp32 sums: relative to the rows' lengths, since products of unlike rows cancel."""
    length = expected.diagonal(dim1=1, dim2=2).sqrt()
    bound = 2e-6 * length[:, :, None] * length[:, None, :]
    worst = ((found - expected).abs() - bound).max().item()
    assert worst <= 0, f"off by {worst:.1e} more than allowed"


@pytest.fixture(params=["cells of a chunk", "long cells", "long cells, short pieces"])
def short_cells(monkeypatch, request):
    """Small shards then have all that large ones have: cells, cut cells, windows of every width, several pieces."""
    chunks, piece = {"cells of a chunk": (1, 2000), "long cells": (4, 5000)}.get(request.param, (4, 100))
    monkeypatch.setattr(ops, "CHUNK", 64)
    monkeypatch.setattr(ops, "CELL_CHUNKS", (chunks, chunks))
    monkeypatch.setattr(ops, "GAP", (2, 2))
    monkeypatch.setattr(ops, "WIDTHS", (64, 16, 4))
    monkeypatch.setattr(ops, "COPIED", (piece, piece))


@pytest.mark.parametrize("assignment", [FOLDED, UNEVEN, SINGLE, [[3, 0, 1]]], ids=["folded", "uneven", "single", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_one_pass_equals_a_loop_over_segments(short_cells, assignment, dtype, seed):
    """Would catch elements left out, counted twice, or counted for a neighbour; wrong folding; a wrong order."""
    sizes = (20000, 3, 1000, 256)
    blocks = _layout(seed, sizes, blocks=12)
    rows = _rows(sizes, assignment, dtype, seed)
    plan = RowPlan.from_assignment(assignment, 4)
    _assert_equal(_gramian(rows, blocks, plan), _looped(rows, blocks, plan))


@pytest.mark.parametrize("assignment", [FOLDED, [[3, 0, 1]]], ids=["folded", "one"])
@pytest.mark.parametrize("kind", [0, 1], ids=["cpu", "other devices"])
def test_real_widths(monkeypatch, assignment, kind):
    """Would catch constants that do not fit together: cells, chunks and windows at their real size."""
    for name in ("CELL_CHUNKS", "GAP", "COPIED"):
        monkeypatch.setattr(ops, name, (getattr(ops, name)[kind],) * 2)
    cell = 8 * ops.CHUNK
    sizes = (3 * cell + 777, 40)
    segments = [
        Segment(0, 0, 100, 0, True),
        Segment(0, 100, 2 * cell + 5000, 1, True),
        Segment(0, 2 * cell + 5000, 2 * cell + 5001, 2, True),
        Segment(0, 2 * cell + 5001, 3 * cell, 0, True),
        Segment(0, 3 * cell, 3 * cell + 777, 3, True),
        Segment(1, 0, 40, 2, True),
    ]
    rows, plan = _rows(sizes, assignment), RowPlan.from_assignment(assignment, 4)
    _assert_equal(_gramian(rows, _map(segments), plan), _looped(rows, _map(segments), plan))


@pytest.mark.parametrize("where", ["slots apart", "inside a larger buffer"])
def test_rows_need_not_fill_their_memory(short_cells, where):
    """Would catch windows read at the wrong place: Megatron's buckets are views of one long buffer."""
    sizes, assignment = (3000,), [[2, 0, 1]]
    blocks = _layout(5, sizes, blocks=6)
    plan = RowPlan.from_assignment(assignment, 4)
    rows = _rows(sizes, assignment)
    if where == "slots apart":
        buffer = torch.full((3, 3100), torch.nan)
        view = buffer[:, 50:3050]
    else:
        buffer = torch.full((9050,), torch.nan)
        view = buffer[50:].view(3, 3000)
    view.copy_(rows[0][0])
    torch.testing.assert_close(_gramian([[view]], blocks, plan), _gramian(rows, blocks, plan), rtol=0, atol=0)


@pytest.mark.parametrize("assignment", [FOLDED, SINGLE, [[3, 0, 1]]], ids=["folded", "single", "one"])
def test_a_non_finite_element_spoils_its_own_block_and_row_alone(short_cells, assignment):
    """Would catch NaN times zero: in the padding of a window, in a cut cell, in the folding of rows."""
    sizes = (3000,)
    blocks = _layout(7, sizes, blocks=40)
    plan = RowPlan.from_assignment(assignment, 4)
    rows = _rows(sizes, assignment)
    clean = _gramian(rows, blocks, plan)
    for segment in blocks.segments[::5]:
        if not segment.counted or segment.start == segment.end:
            continue
        spoilt = [[wave.clone() for wave in waves] for waves in rows]
        spoilt[0][-1][1, segment.start] = torch.inf
        found = _gramian(spoilt, blocks, plan)
        half = plan.half_R.view(len(assignment), -1)[-1, 1]
        hit = torch.zeros_like(found, dtype=torch.bool)
        hit[segment.block, half, :] = hit[segment.block, :, half] = True
        assert not found[hit].isfinite().any()
        torch.testing.assert_close(found[~hit], clean[~hit], rtol=0, atol=0)


def test_one_element_between_long_neighbours(short_cells):
    """Would catch a scalar parameter lost in the rounding or the padding of its neighbours."""
    blocks = _map([Segment(0, 0, 700, 0, True), Segment(0, 700, 701, 1, True), Segment(0, 701, 2000, 0, True)])
    rows = [[torch.full((2, 2000), 1e6)]]
    rows[0][0][:, 700] = torch.tensor([3.0, -2.0])
    gram = _gramian(rows, blocks, RowPlan.from_assignment([[0, 1]], 2))
    assert gram[1].tolist() == [[9.0, -6.0], [-6.0, 4.0]]


def test_launches_grow_with_the_rows_not_with_the_tensors():
    """Would catch a loop over tensors: thousands of biases and norms would cost thousands of launches."""
    counts = []
    size, plan = 2**16, RowPlan.from_assignment([[0, 1]], 2)
    rows = [[torch.ones(2, size)]]
    for tensors in (32, 4096):
        length = size // tensors
        blocks = _map([Segment(0, i * length, (i + 1) * length, i, True) for i in range(tensors)])
        gramian = ops.ShardGramian(blocks, [size])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gramian(rows, plan)
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::bmm"))
    assert max(counts) <= 3


def test_sums_stay_exact_over_a_long_block():
    """Would catch one fp32 sum over a whole shard: a million equal products would lose their last digits."""
    rows = [[torch.full((2, 2**20), 0.1)]]
    gram = _gramian(rows, _map([Segment(0, 0, 2**20, 0, True)]), RowPlan.from_assignment([[0, 1]], 2))
    exact = 2**20 * float(torch.tensor(0.1)) ** 2
    assert ((gram - exact).abs() / exact).max() < 2e-6


def test_memory_stays_bounded(short_cells, monkeypatch):
    """Would catch a copy of the whole shard: pieces hold a bounded number of elements of all rows."""
    monkeypatch.setattr(ops, "COPIED", (6 * 256, 6 * 256))
    sizes = (20000,)
    blocks = _layout(2, sizes, blocks=12)
    plan = RowPlan.from_assignment(FOLDED, 4)
    largest = 0
    gathered = ops._half_rows

    def watch(waves, plan):
        nonlocal largest
        largest = max(largest, sum(wave.numel() for wave in waves))
        return gathered(waves, plan)

    monkeypatch.setattr(ops, "_half_rows", watch)
    _gramian(_rows(sizes, FOLDED), blocks, plan)
    assert 0 < largest <= 6 * 256
