"""Parameters that live on several ranks stay bit-identical there, whatever the method, block and scope."""

import itertools

import pytest
import torch
from megatron.core import parallel_state

from megatron_moo.distributed import GRANULARITIES, SCOPES, MooConfig, install
from tests.helpers import tiny_gpt
from tests.helpers.multiprocess import init_megatron, run_ranks

ASSIGNMENTS = {2: [[0, 1], [2, 3]], 3: [[0, 1, 2], [3, 0, 1]]}  # by the number of slots
VARIANT = tiny_gpt.Variant(tied=True, sequence_parallel=True, qk_layernorm=True)


def _train(rank: int, tp: int, cases: list[tuple[str, str, str]]) -> list[dict[str, torch.Tensor]]:
    """Per case, this rank's copies of replicated parameters after three steps, by a name that replicas share."""
    init_megatron(tp=tp, pp=2)
    slots, slot = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    assignment = ASSIGNMENTS[slots]
    results = []
    for method, granularity, scope in cases:
        model = tiny_gpt.build(VARIANT)
        chunk = tiny_gpt.wrap(model)
        config = MooConfig(list("abcd"), method, granularity=granularity, scope=scope, preference="tokens", waves=2)
        moo = install([chunk], config, lambda step: assignment)
        schedule, optimizer = moo.waves(tiny_gpt.stock_schedule()), tiny_gpt.adam(chunk)
        for _ in range(3):
            optimizer.zero_grad()
            tiny_gpt.run_step(chunk, schedule, tiny_gpt.step_batches(assignment, slot, per_wave=1))
            optimizer.step()
        results.append({_replica_name(model, name, param): param.detach() for name, param in model.named_parameters()})
    return results


def _replica_name(model, name: str, param: torch.Tensor) -> str:
    whole = tiny_gpt.whole_name(model, name)
    if getattr(param, "tensor_model_parallel", False):
        return f"{whole} of tensor-parallel rank {parallel_state.get_tensor_model_parallel_rank()}"
    return whole


@pytest.mark.parametrize(("tp", "dp", "methods"), [(2, 2, ("cagrad", "gradvac")), (1, 3, ("mgda", "pcgrad"))])
def test_replicas_stay_identical(tp, dp, methods):
    """Would catch a rank deciding alone about what another rank holds too, and a drifting copy of the embedding."""
    cases = list(itertools.product(methods, GRANULARITIES, SCOPES))
    ranks = run_ranks(_train, tp * 2 * dp, tp, cases, timeout=200)
    compared = 0
    for number, case in enumerate(cases):
        first: dict[str, torch.Tensor] = {}
        for rank in ranks:
            for name, param in rank[number].items():
                if name in first:
                    assert torch.equal(first[name], param), (case, name)
                    compared += 1
                first.setdefault(name, param)
        assert any("word_embeddings" in name for name in first)
    assert compared > 100
