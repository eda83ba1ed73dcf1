"""Off is identical: the exchange with `mean` trains like stock Megatron, at stock Megatron's wire bytes."""

import itertools

import pytest
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from benchmarks._wire import counted
from megatron_moo.distributed import MooConfig, install
from tests.helpers import tiny_gpt
from tests.helpers.multiprocess import init_megatron, run_ranks

STEPS = 5
TOLERANCE = 1e-6

LAYOUTS = {
    "dp2": (1, 1, 2),
    "dp4": (1, 1, 4),
    "tp2dp2": (2, 1, 2),
    "pp2dp2": (1, 2, 2),
    "tp2pp2dp2": (2, 2, 2),
}


def _assignment(step: int, waves: int, slots: int) -> list[list[int]]:
    """Three languages moving over slots and waves, unevenly."""
    return [[(step + 2 * wave + slot) % 3 for slot in range(slots)] for wave in range(waves)]


def _train(variant: tiny_gpt.Variant, waves: int, overlap: bool, moo: bool) -> list[tuple[float, float]]:
    """(loss, grad norm) of every step; a rank without the loss reports zero."""
    chunk = tiny_gpt.wrap(tiny_gpt.build(variant), overlap=overlap)
    slots, slot = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    schedule = tiny_gpt.stock_schedule()
    if moo:
        config = MooConfig(
            objectives=["a", "b", "c"],
            method="mean",
            preference="tokens" if variant.per_token_loss else "slots",
            waves=waves,
        )
        installed = install([chunk], config, lambda step: _assignment(step, waves, slots))
        schedule = installed.waves(schedule)
    else:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    optimizer = tiny_gpt.adam(chunk)
    history = []
    for step in range(STEPS):
        batches = tiny_gpt.step_batches(_assignment(step, waves, slots), slot, per_wave=2)
        optimizer.zero_grad()
        reports = tiny_gpt.run_step(chunk, schedule, batches)
        _, grad_norm, _ = optimizer.step()
        loss = sum(float(report["lm loss"][0]) for report in reports) if reports else 0.0
        history.append((loss, float(grad_norm)))
    return history


def _compare(rank: int, tp: int, pp: int) -> dict[str, float]:
    init_megatron(tp, pp)
    worst = {}
    for per_token, overlap, waves in itertools.product((True, False), (True, False), (1, 2)):
        # A fraction of all combinations in which no two factors vary together.
        variant = tiny_gpt.Variant(
            per_token_loss=per_token, sequence_parallel=overlap != (waves == 2), tied=per_token != overlap
        )
        stock = _train(variant, waves, overlap, moo=False)
        ours = _train(variant, waves, overlap, moo=True)
        pairs = [pair for a, b in zip(stock, ours, strict=True) for pair in zip(a, b, strict=True)]
        worst[f"{per_token=} {overlap=} {waves=}"] = max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_equals_stock_megatron(layout):
    """Would catch: any scaling, masking or ordering that makes the exchange more than a transposed reduce-scatter."""
    tp, pp, dp = LAYOUTS[layout]
    for rank, worst in enumerate(run_ranks(_compare, tp * pp * dp, tp, pp, timeout=240)):
        assert len(worst) == 8
        assert all(error < TOLERANCE for error in worst.values()), (rank, worst)


def _bytes(rank: int, tp: int, pp: int, waves: int, moo: bool) -> tuple[dict, int]:
    """Bytes this rank sends in one step, and its number of blocks."""
    init_megatron(tp, pp)
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant(sequence_parallel=True)), overlap=False)
    slots, slot = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    schedule, blocks = tiny_gpt.stock_schedule(), 0
    if moo:
        config = MooConfig(["a", "b", "c"], waves=waves)
        installed = install([chunk], config, lambda step: _assignment(step, waves, slots))
        schedule, blocks = installed.waves(schedule), len(installed.blocks)
    else:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    batches = tiny_gpt.step_batches(_assignment(0, waves, slots), slot, per_wave=1)
    with counted() as sent:
        tiny_gpt.run_step(chunk, schedule, batches)
    return dict(sent), blocks


@pytest.mark.parametrize("layout", ["dp4", "tp2dp2", "pp2dp2"])
def test_gradients_cost_the_bytes_of_stock_megatron(layout):
    """Would catch: a gradient vector rebuilt, gathered or reduced a second time anywhere in the step."""
    tp, pp, dp = LAYOUTS[layout]
    stock = run_ranks(_bytes, tp * pp * dp, tp, pp, 1, False)
    ours = run_ranks(_bytes, tp * pp * dp, tp, pp, 1, True)
    for (plain, _), (exchanged, _) in zip(stock, ours, strict=True):
        assert plain["reduce_scatter_tensor", dp] == exchanged["all_to_all_single", dp] > 0
        assert ("reduce_scatter_tensor", dp) not in exchanged
    # Norms under sequence parallelism and the tied embedding are reduced in shards: a rank's part differs, the sum
    # does not. Beyond that, exactly: one Gramian of D half rows over the data- and one over the tensor-parallel ranks,
    # every slot's number of tokens (8 bytes each) in the place of their sum (4 bytes), and over the stages 4 bytes for
    # each language, whether its gradient was finite.
    extra = sum(sum(sent.values()) for sent, _ in ours) - sum(sum(sent.values()) for sent, _ in stock)
    gramians = sum(8 * (2 * blocks * dp**2 * (size - 1) // size) for _, blocks in ours for size in (dp, tp))
    counts = len(ours) * (8 * (dp - 1) - 4 * (2 * (dp - 1) // dp))
    finite = len(ours) * 4 * 2 * 3 * (pp - 1) // pp
    assert extra == gramians + counts + finite


def test_every_wave_costs_one_exchange():
    """The price of waves, stated: W exchanges a step. Would catch rows of earlier waves sent again."""
    one = run_ranks(_bytes, 2, 1, 1, 1, True)
    two = run_ranks(_bytes, 2, 1, 1, 2, True)
    for (single, _), (double, _) in zip(one, two, strict=True):
        assert double["all_to_all_single", 2] == 2 * single["all_to_all_single", 2]


def _forget_waves(rank: int) -> str:
    init_megatron()
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    install([chunk], MooConfig(["a", "b"]), lambda step: [[0], [1]])
    with pytest.raises(RuntimeError) as raised:
        tiny_gpt.run_step(chunk, tiny_gpt.stock_schedule(), [tiny_gpt.micro_batch(0, 0)])
    return str(raised.value)


def test_forgotten_waves_are_an_error():
    """Would catch steps that end with a zero gradient because the schedule was not wrapped."""
    assert "forward_backward = moo.waves(forward_backward)" in run_ranks(_forget_waves, 1)[0]
