"""What a step does with preferences, absent languages, empty batches and non-finite gradients."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_moo.distributed import MooConfig, install
from tests.helpers import reference, tiny_gpt
from tests.helpers.multiprocess import RanksFailed, init_megatron, run_ranks

VARIANT = tiny_gpt.Variant(per_token_loss=True)
ASSIGNMENT = [[0, 2], [2, 2]]  # language 1 is absent; language 2 has three rows


def _mean_error(rank: int, cases: list[tuple[MooConfig, list[float]]]) -> list[float]:
    """Worst error of this rank's shards against sum_k u_k g_k, relative to the largest entry of each gradient."""
    init_megatron()
    gradients = reference.language_gradients(VARIANT, [[0, 1, 2], [2, 2]], per_wave=1)[0]
    return [_compare(_step(config)[0], gradients, weights) for config, weights in cases]


def _step(config: MooConfig, spoil=None):
    chunk = tiny_gpt.wrap(tiny_gpt.build(VARIANT), overlap=False)
    moo = install([chunk], config, lambda step: ASSIGNMENT)
    batches = tiny_gpt.step_batches(ASSIGNMENT, parallel_state.get_data_parallel_rank(), per_wave=1)
    if spoil is not None:
        spoil(chunk, batches)
    tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    return chunk, moo


def _shards(chunk):
    """(name, span inside the parameter, this rank's combined gradient there)."""
    names = {param: name for name, param in chunk.module.named_parameters()}
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for buffer in chunk.buffers:
        for param, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            n = bucket.grad_data.numel() // size
            low, high = max(bucket.offset + rank * n, start), min(bucket.offset + (rank + 1) * n, end)
            if low < high:
                yield names[param], slice(low - start, high - start), buffer.grad_data[low:high]


def _compare(chunk, gradients: dict[str, torch.Tensor], weights: list[float]) -> float:
    worst = 0.0
    for name, span, ours in _shards(chunk):
        expected = torch.tensordot(torch.tensor(weights).double(), gradients[name], dims=1)
        error = (ours.double() - expected.reshape(-1)[span]).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
    return worst


def test_preferences_are_shared_among_the_languages_of_the_step():
    """Would catch: an absent language that keeps its share, or weights of one language given to another."""
    names = ["a", "b", "c"]
    cases = [
        (MooConfig(names, preference="uniform", waves=2), [0.5, 0.0, 0.5]),
        (MooConfig(names, preference="slots", waves=2), [0.25, 0.0, 0.75]),
        (MooConfig(names, preference="given", preference_weights=[1, 5, 3], waves=2), [0.25, 0.0, 0.75]),
        (MooConfig(names, preference="given", preference_weights=[0, 1, 2], waves=2), [0.0, 0.0, 1.0]),
        (MooConfig(names, "mgda", preference="given", preference_weights=[0, 1, 2], waves=2), [0.0, 0.0, 1.0]),
    ]
    for errors in run_ranks(_mean_error, 2, cases):
        assert max(errors) < 1e-5, errors


def _all_weights_absent(rank: int) -> None:
    init_megatron()
    _step(MooConfig(["a", "b", "c"], preference="given", preference_weights=[0, 1, 0], waves=2))


def test_a_step_without_any_preferred_language_is_an_error():
    """Would catch: a zero gradient, on which Adam goes on moving and decaying."""
    with pytest.raises(RanksFailed, match="every objective in it has preference weight 0"):
        run_ranks(_all_weights_absent, 2)


def _empty_batch(rank: int) -> tuple[list[float], list[bool]]:
    """Language 0 has no scored token: weights and activity of the model's one block."""
    init_megatron()

    def spoil(chunk, batches):
        if parallel_state.get_data_parallel_rank() == 0:
            batches[0]["loss_mask"].zero_()

    config = MooConfig(["a", "b", "c"], method="mgda", granularity="model", preference="tokens", waves=2)
    chunk, moo = _step(config, spoil)
    assert all(bool(ours.isfinite().all()) and float(ours.abs().max()) > 0 for _, _, ours in _shards(chunk))
    return moo.record.weights_BK[0].tolist(), moo.record.active_BK[0].tolist()


def test_a_language_without_tokens_takes_no_part():
    """Would catch: its zero row making MGDA return zero, or a division by zero tokens."""
    for weights, active in run_ranks(_empty_batch, 2):
        assert active == [False, False, True]
        assert weights == [0.0, 0.0, 1.0]


def _non_finite(rank: int) -> tuple[dict[str, bool], list[bool]]:
    """A NaN in one tensor's gradient: which parameters of this rank's shards are finite afterwards."""
    init_megatron()

    def spoil(chunk, batches):
        weight = dict(chunk.module.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
        weight.register_hook(lambda gradient: gradient * float("nan"))

    config = MooConfig(["a", "b", "c"], "cagrad", granularity="tensor", preference="tokens", waves=2, nonfinite="pass")
    chunk, moo = _step(config, spoil)
    finite: dict[str, bool] = {}
    for name, _, ours in _shards(chunk):
        finite[name] = finite.get(name, True) and bool(ours.isfinite().all())
    return finite, moo.record.weights_BK.isfinite().all(1).tolist()


def test_a_non_finite_gradient_that_is_passed_on_stays_in_its_block():
    """Would catch: a NaN that spreads to other blocks through the solver, or one that a solver turns into numbers."""
    spoilt = set()
    for finite, weights_finite in run_ranks(_non_finite, 2):
        assert all(weights_finite)
        spoilt |= {name for name, ok in finite.items() if not ok}
    assert spoilt == {"decoder.layers.1.mlp.linear_fc2.weight"}


def _frozen_stage(rank: int) -> str:
    init_megatron(pp=2)
    model = tiny_gpt.build(tiny_gpt.Variant(tied=False))
    if parallel_state.is_pipeline_first_stage():
        model.requires_grad_(False)
    chunk = tiny_gpt.wrap(model)
    with pytest.raises(ValueError) as refused:
        install([chunk], MooConfig(["a"]), lambda step: [[0]])
    return str(refused.value)


def test_a_stage_without_trainable_parameters_is_refused_on_every_stage():
    """Would catch: one stage that stops and another that waits for it for ever."""
    for message in run_ranks(_frozen_stage, 2):
        assert "no trainable parameter" in message


def _local_experts(rank: int) -> str:
    init_megatron(tp=2, etp=1)
    variant = tiny_gpt.Variant(sequence_parallel=True, experts=4)
    with pytest.raises(ValueError) as refused:
        install([tiny_gpt.wrap(tiny_gpt.build(variant))], MooConfig(["a"], scope="local"), lambda step: [[0]])
    return str(refused.value)


def test_local_scope_is_refused_where_ranks_of_a_block_hold_different_experts():
    """Would catch: blocks of one name and different experts, whose saved state overwrites each other."""
    for message in run_ranks(_local_experts, 2):
        assert "--moo-scope local with --expert-tensor-parallel-size" in message and "--moo-scope global" in message


def _repeat(rank: int) -> list[torch.Tensor]:
    """GradVac's targets after a step, and after the same step computed again, as Megatron's rerun machine does."""
    init_megatron()
    chunk = tiny_gpt.wrap(tiny_gpt.build(VARIANT), overlap=False)
    config = MooConfig(["a", "b", "c"], method="gradvac", granularity="layer", preference="tokens", waves=2)
    moo = install([chunk], config, lambda step: ASSIGNMENT)
    schedule = moo.waves(tiny_gpt.stock_schedule())
    targets = []
    for step in (0, 1, 1):
        moo.step = step
        slot = parallel_state.get_data_parallel_rank()
        tiny_gpt.run_step(chunk, schedule, tiny_gpt.step_batches(ASSIGNMENT, slot, per_wave=1))
        targets.append(moo.aggregator.state_dict()["target_BKK"].clone())
    return targets


def test_a_repeated_step_moves_the_state_once():
    """Would catch: targets that advance twice when Megatron computes a step again."""
    first, second, again = run_ranks(_repeat, 2)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, again)
