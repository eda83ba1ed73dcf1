"""Repairs of megatron-core whose effect one process can show; those of loading and saving are shown by whole runs in
`tests/distributed`."""

import inspect
from types import SimpleNamespace

import torch

from megatron_moo.platform import repairs


def _buffer(sizes: list[list[int]], divisor: int) -> SimpleNamespace:
    """A gradient buffer as Megatron lays it out: buckets of parameters, each padded to a multiple of `divisor`."""
    buckets, places, offset = [], {}, 0
    for number, params in enumerate(sizes):
        start = offset
        for i, size in enumerate(params):
            places[number, i] = (start, start + size, number)
            start += size
        padded = -(-(start - offset) // divisor) * divisor
        grad = torch.empty(padded)
        buckets.append(SimpleNamespace(offset=offset, numel_unpadded=start - offset, grad_data=grad))
        offset += padded
    return SimpleNamespace(buckets=buckets, param_index_map=places, numel=offset)


def test_reshardable_state_is_read_where_it_lies():
    """Would catch: padding between buckets left out again: parameters are saved with their neighbours' state."""
    for sizes in ([[5, 3], [4], [2, 9]], [[8], [8]], [[3]]):
        buffer = _buffer(sizes, divisor=8)
        values = {place: torch.rand(end - start) for place, (start, end, _) in buffer.param_index_map.items()}
        dense = torch.cat(list(values.values()))  # what is gathered: without padding
        state = {"buckets_coalesced": True, 0: {"dtype": {"exp_avg": dense, "numel_unpadded": dense.numel()}}}
        found = repairs._with_padding(state, [buffer])[0]["dtype"]["exp_avg"]
        for place, (start, end, _) in buffer.param_index_map.items():
            assert torch.equal(found[start:end], values[place]), (sizes, place)
    assert repairs._with_padding(None, [buffer]) is None  # ranks that gather nothing


def test_reshardable_state_still_needs_the_repair():
    """Would catch: a release of megatron-core that reads the state elsewhere, or has repaired it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    gather = inspect.getsource(DistributedOptimizer.get_parameter_state_dp_zero)
    save = inspect.getsource(inspect.unwrap(DistributedOptimizer.sharded_param_state_fully_reshardable))
    assert "offset_in_world_tensors += gbuf_world_numel_unpadded" in gather
    assert "self.get_parameter_state_dp_zero(" in save
    assert "world_tensors[state_key][param_world_start:param_world_end]" in save
