"""Plans and combination of rows, on one process."""

import pytest
import torch

from megatron_moo.distributed import rows as ops
from megatron_moo.distributed.blocks import BlockMap, Segment
from megatron_moo.distributed.record import StepRecord

ASSIGNMENT = [[2, 0, 1], [0, 0, 2]]  # two waves of three slots; objective 3 is absent
BLOCKS = BlockMap(
    ["a", "b"],
    [
        Segment(0, 0, 40, 0, True),
        Segment(0, 40, 50, 1, True),
        Segment(1, 0, 30, 1, True),
        Segment(1, 30, 32, 0, False),
    ],
    partial=[],
    tied_buckets=[],
    tied_blocks=[],
    replicated_blocks=[],
)


def _rows(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(3, n, generator=generator).to(dtype) for _ in range(2)] for n in (52, 32)]


def _all(rows, bucket):
    return torch.cat(rows[bucket]).double()


def test_halves_alternate_and_cover():
    """Would catch a control computed from a row and itself."""
    plan = ops.RowPlan.from_assignment(ASSIGNMENT, 4)
    assert plan.rows_K.tolist() == [3, 1, 2, 0]
    assert plan.objective_H.tolist() == [0, 0, 1, 2, 2]
    assert plan.half_R.tolist() == [3, 0, 2, 1, 0, 4]
    assert plan.folds


@pytest.mark.parametrize("assignment", [ASSIGNMENT, [[1, 1, 1], [1, 1, 0]], [[2, 0], [1, 0]]])
def test_order_of_folding_covers_every_row_once(assignment):
    """Would catch a row left out or added to another half row, where half rows have different numbers of rows."""
    plan = ops.RowPlan.from_assignment(assignment, 4)
    places = [[] for _ in range(plan.fold_sizes[0])]
    for rank in plan.fold_R.split(plan.fold_sizes):
        for place, row in enumerate(rank.tolist()):
            places[place].append(row)
    halves = [[r for r, half in enumerate(plan.half_R.tolist()) if half == h] for h in range(plan.num_halves)]
    if plan.folds:
        assert [places[place] for place in plan.place_H.tolist()] == halves
    else:
        assert [[row] for row in plan.place_H.tolist()] == halves


def _combine(rows, coefficients, shards):
    for bucket, (waves, shard) in enumerate(zip(rows, shards, strict=True)):
        ops.combine(waves, BLOCKS.by_bucket(2)[bucket], coefficients, shard)


@pytest.mark.parametrize("columns", [ops.CPU_COLUMNS, 7])
def test_combination_fills_segments_and_leaves_the_padding(monkeypatch, columns):
    """Would catch coefficients of the wrong row, block or piece."""
    monkeypatch.setattr(ops, "CPU_COLUMNS", columns)
    rows = _rows()
    coefficients = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shards = [torch.zeros(52), torch.zeros(32)]
    _combine(rows, coefficients, shards)
    expected = torch.cat([coefficients[0] @ _all(rows, 0)[:, :40], coefficients[1] @ _all(rows, 0)[:, 40:50]])
    torch.testing.assert_close(shards[0][:50].double(), expected, rtol=1e-5, atol=1e-5)
    assert shards[0][50:].tolist() == [0, 0]
    torch.testing.assert_close(shards[1][30:].double(), coefficients[0] @ _all(rows, 1)[:, 30:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [ops.CPU_COLUMNS, 7])
def test_combination_may_overwrite_its_own_rows(monkeypatch, columns):
    """Would catch a shard written before the rows in the same memory were read."""
    monkeypatch.setattr(ops, "CPU_COLUMNS", columns)
    rows = _rows()
    copies = [[wave.clone() for wave in waves] for waves in rows]
    shards = [waves[-1][1] for waves in rows]  # the second slot's part of the bucket's memory
    coefficients = torch.ones(2, 6, dtype=torch.float64)
    _combine(rows, coefficients, shards)
    torch.testing.assert_close(shards[0][:50].double(), _all(copies, 0).sum(0)[:50], rtol=1e-5, atol=1e-5)


def _record(gram_HH, objective_H, gram_KK, weights, active):
    k = len(active)
    return StepRecord(
        0,
        ["a"],
        torch.tensor([gram_HH]).double(),
        torch.tensor(objective_H),
        torch.tensor([gram_KK]).double(),
        torch.tensor([weights]).double(),
        torch.tensor([active]),
        torch.full((k,), 1 / k, dtype=torch.float64),
        torch.ones(k, dtype=torch.float64),
    )


def test_record_reads_conflicts_and_their_control():
    """Would catch the control mixed up with the conflicts, or inactive objectives counted."""
    record = _record(
        [[4.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]],
        [0, 0, 1],
        [[7.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        [0.5, 0.5, 0.0],
        [True, True, False],
    )
    assert record.conflict_share_B().tolist() == [1.0]
    assert record.control_share_B().tolist() == [0.0]
    assert record.control_cosine_B().tolist() == [0.5]
    assert record.cosine_BKK()[0, 0, 1] == pytest.approx(-2 / 7**0.5)
    assert record.cosine_BKK()[0, 0, 2].isnan()
    # |d|^2 = (7 - 4 + 1) / 4 = 1, |mean|^2 = 4 / 9
    assert record.norm_ratio_B().tolist() == pytest.approx([1.5])
