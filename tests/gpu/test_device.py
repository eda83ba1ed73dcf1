"""What needs a CUDA device: the same numbers as on the CPU, and no waiting for the device (`make test-gpu`)."""

import pytest
import torch

from megatron_moo.aggregation import AGGREGATORS, build_aggregator
from megatron_moo.distributed import rows as ops
from megatron_moo.distributed.blocks import BlockMap, Segment
from megatron_moo.distributed.gramian import ShardGramian
from megatron_moo.platform import cpu

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _gramians(blocks: int, objectives: int) -> torch.Tensor:
    rows = torch.randn(blocks, objectives, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows @ rows.mT


@pytest.mark.parametrize("method", AGGREGATORS)
def test_weights_equal_those_of_the_cpu(method):
    """Would catch a kernel that rounds, orders or masks differently on the device."""
    gram, losses = _gramians(6, 5), torch.linspace(1, 2, 5)
    here, there = build_aggregator(method), build_aggregator(method)
    for _ in range(2):
        generators = [torch.Generator().manual_seed(b) for b in range(6)]
        expected = here(gram, generator=generators, losses_K=losses)
        generators = [torch.Generator().manual_seed(b) for b in range(6)]
        weights = there(gram.to(DEVICE), generator=generators, losses_K=losses.to(DEVICE))
        assert weights.device.type == DEVICE
        torch.testing.assert_close(weights.cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", AGGREGATORS)
def test_solving_does_not_wait_for_the_device(method):
    """Would catch a host synchronisation in the step (``.item()``, a shape that depends on values)."""
    gram = _gramians(6, 5).to(DEVICE)
    aggregator = build_aggregator(method)
    losses = torch.linspace(1, 2, 5, device=DEVICE)
    aggregator(gram, losses_K=losses)  # libraries initialise at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        aggregator(gram, losses_K=losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _without_waiting(device: str, function, *arguments):
    """The result of the second call, which on a CUDA device must not make the host wait."""
    function(*arguments)
    torch.cuda.set_sync_debug_mode("error" if device == DEVICE else "default")
    try:
        return function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_and_combined_as_on_the_cpu(dtype):
    """Would catch TF32 in the Gramian, and a combination that loses fp32 accumulation."""
    n = 100_100
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.randn(3, n, generator=generator).to(dtype) for _ in range(2)]]
    blocks = BlockMap(["a", "b"], [Segment(0, 0, n - 50, 0, True), Segment(0, n - 50, n, 1, True)], [], [], [], [])
    assignment = [[2, 0, 1], [0, 0, 2]]
    coefficients = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    results = []
    for device in ("cpu", DEVICE):
        here = [[wave.to(device) for wave in waves] for waves in rows]
        shard = torch.zeros(n, dtype=dtype, device=device)
        plan = ops.RowPlan.from_assignment(assignment, 3, device)
        gram = _without_waiting(device, ShardGramian(blocks, [n], device), here, plan)
        ops.combine(here[0], blocks.segments, coefficients.to(device), shard)
        results.append((gram.cpu(), shard.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_the_cpu_shim_stays_away():
    """Would catch GPU work sent to the host without a word."""
    assert cpu.install() is False
    with pytest.raises(RuntimeError, match="CUDA is available"):
        cpu.install(force=True)
