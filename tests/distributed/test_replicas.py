"""Parameters that live on several ranks stay bit-identical there, whatever the method, block and scope."""

import itertools

import torch
from megatron.core import parallel_state

from megatron_moo.distributed import GRANULARITIES, SCOPES, MooConfig, install
from tests.helpers import tiny_gpt
from tests.helpers.multiprocess import init_megatron, run_ranks

ASSIGNMENT = [[0, 1], [2, 3]]
VARIANT = tiny_gpt.Variant(tied=True, sequence_parallel=True, qk_layernorm=True)


def _train(rank: int, cases: list[tuple[str, str, str]]) -> list[dict[str, torch.Tensor]]:
    """Per case, this rank's copies of replicated parameters after three steps, by a name that replicas share."""
    init_megatron(tp=2, pp=2)
    results = []
    for method, granularity, scope in cases:
        model = tiny_gpt.build(VARIANT)
        chunk = tiny_gpt.wrap(model)
        config = MooConfig(list("abcd"), method, granularity=granularity, scope=scope, preference="tokens", waves=2)
        moo = install([chunk], config, lambda step: ASSIGNMENT)
        schedule, optimizer = moo.waves(tiny_gpt.stock_schedule()), tiny_gpt.adam(chunk)
        for _ in range(3):
            optimizer.zero_grad()
            slot = parallel_state.get_data_parallel_rank()
            tiny_gpt.run_step(chunk, schedule, tiny_gpt.step_batches(ASSIGNMENT, slot, per_wave=1))
            optimizer.step()
        results.append({_replica_name(model, name, param): param.detach() for name, param in model.named_parameters()})
    return results


def _replica_name(model, name: str, param: torch.Tensor) -> str:
    whole = tiny_gpt.whole_name(model, name)
    if getattr(param, "tensor_model_parallel", False):
        return f"{whole} of tensor-parallel rank {parallel_state.get_tensor_model_parallel_rank()}"
    return whole


def test_replicas_stay_identical():
    """Would catch a rank deciding alone about what another rank holds too, and a drifting copy of the embedding."""
    cases = list(itertools.product(("cagrad", "gradvac"), GRANULARITIES, SCOPES))
    ranks = run_ranks(_train, 8, cases, timeout=200)
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
