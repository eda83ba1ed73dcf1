"""Segments: every element of a shard in exactly one block, replicas counted once."""

import itertools

import pytest
import torch

from megatron_moo.distributed.blocks import BucketSpans, ModelRank, build_block_map
from megatron_moo.distributed.upstream import TIED_EMBEDDING, ParameterTraits

SLOTS = 3


def _parameter(name, size, *, tp=True, reduction=None, tied=False, copy=False):
    return torch.nn.Parameter(torch.zeros(size)), ParameterTraits(name, tp, reduction, tied, copy)


def _stage():
    """Two buckets of a made-up stage: (parameter, start, end) with a gap for alignment, and the traits."""
    norm = _parameter("decoder.layers.3.input_layernorm.weight", 4, tp=False, reduction="sum")
    qkv = _parameter("decoder.layers.3.self_attention.linear_qkv.weight", 20)
    final = _parameter("decoder.final_layernorm.weight", 4, tp=False)
    tied = _parameter(TIED_EMBEDDING, 12, tied=True, copy=True)
    buckets = [
        [(final[0], 0, 4), (norm[0], 8, 12), (qkv[0], 12, 32)],
        [(tied[0], 0, 12)],
    ]
    return buckets, [12, 4], dict([norm, qkv, final, tied])


def _maps(granularity, scope, tp=0):
    buckets, sizes, traits = _stage()
    return [
        build_block_map(
            [BucketSpans(params, size, slot) for params, size in zip(buckets, sizes, strict=True)],
            traits,
            granularity,
            scope,
            ModelRank(tp, 1, tp),
        )
        for slot in range(SLOTS)
    ]


@pytest.mark.parametrize(
    ("granularity", "scope"),
    list(itertools.product(("bucket", "layer", "tensor", "model"), ("global", "local"))),
)
def test_segments_cover_every_element_once(granularity, scope):
    """Would catch an element combined twice, or left at zero."""
    buckets, sizes, _ = _stage()
    for slot, blocks in enumerate(_maps(granularity, scope)):
        for index, (params, size) in enumerate(zip(buckets, sizes, strict=True)):
            times = torch.zeros(size, dtype=torch.int)
            for segment in blocks.segments:
                if segment.bucket == index:
                    times[segment.start : segment.end] += 1
            assert int(times.max()) <= 1
            for _, start, end in params:
                low, high = max(start - slot * size, 0), min(end - slot * size, size)
                assert bool((times[low : max(high, low)] == 1).all())


def test_every_slot_lists_the_same_blocks_in_the_same_order():
    """Would catch Gramians of different blocks added up by the all-reduce."""
    for granularity in ("bucket", "layer", "tensor", "model"):
        names = [blocks.names for blocks in _maps(granularity, "global")]
        assert names[0] == names[1] == names[2]


def test_block_names():
    """Would catch names that depend on the layout: state and random draws go by them."""
    assert _maps("layer", "global")[0].names == [
        "decoder.final_layernorm",
        "decoder.layers.3",
        "embedding.word_embeddings",
    ]
    assert _maps("model", "global")[0].names == ["model"]
    assert TIED_EMBEDDING in _maps("bucket", "global")[0].names


def test_replicas_are_counted_once():
    """Would catch norms weighing tensor-parallel-size times, or the tied embedding twice in a whole-model block."""
    first, second = _maps("tensor", "global", tp=0)[0], _maps("tensor", "global", tp=1)[0]
    norm = first.names.index("decoder.final_layernorm.weight")
    assert [s.counted for s in first.segments if s.block == norm] == [True]
    assert [s.counted for s in second.segments if s.block == norm] == [False]
    tied = [s.counted for s in _maps("model", "global")[0].segments if s.bucket == 1]
    assert tied == [False]
    assert [s.counted for s in _maps("tensor", "global")[0].segments if s.bucket == 1] == [True]


def test_local_scope_keeps_replicas_apart():
    """Would catch replicas drifting: a rank's own decision may not touch what another rank holds too."""
    for tp in (0, 1):
        blocks = _maps("model", "local", tp)[0]
        assert blocks.names == ["model@pp1@replicated", f"model@pp1@tp{tp}", f"{TIED_EMBEDDING}@tp{tp}"]


def test_partial_gradients_are_found():
    """Would catch sequence-parallel norms combined before their sum over tensor-parallel ranks."""
    spans = [span for blocks in _maps("layer", "global") for span in blocks.partial]
    assert [(s.bucket, s.start, s.end, s.reduction) for s in spans] == [(0, 8, 12, "sum")]
    assert all(blocks.tied_buckets == [1] for blocks in _maps("layer", "global"))
