"""Which elements of this rank's gradient shards belong to which block.

A block is the unit whose conflict is resolved on its own. Blocks are named after parameters in the whole model, so
that a name means the same on every rank and layout: random draws, state and logs go by it.

Legend: B blocks of this rank's pipeline stage. Every rank that adds its inner products to those of others must list the
same blocks in the same order; expert-parallel ranks hold different ones at first, hence :meth:`BlockMap.renumbered`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_moo.distributed.upstream import TIED_EMBEDDING, ParameterTraits


@dataclass(frozen=True)
class Segment:
    """Elements [start, end) of this rank's shard of one bucket.

    Attributes:
        bucket: index into the list of buckets.
        block: index of the block.
        counted: this rank adds them to the block's Gramian; false where another rank holds the same gradient.
    """

    bucket: int
    start: int
    end: int
    block: int
    counted: bool


@dataclass(frozen=True)
class PartialSpan:
    """Elements [start, end) of a shard whose gradient is partial on each tensor-parallel rank."""

    bucket: int
    start: int
    end: int
    reduction: str


@dataclass(frozen=True)
class BlockMap:
    """Blocks of a pipeline stage and where they lie in this rank's shards.

    Attributes:
        names: of the B blocks.
        segments: of this rank's shards.
        partial: spans to sum over tensor-parallel ranks before anything else.
        tied_buckets: buckets whose rows are summed over the first and the last pipeline stage.
        tied_blocks: blocks that both of those stages solve.
        replicated_blocks: with scope ``local``, blocks that every tensor-parallel rank solves.
    """

    names: list[str]
    segments: list[Segment]
    partial: list[PartialSpan]
    tied_buckets: list[int]
    tied_blocks: list[int]
    replicated_blocks: list[int]

    def by_bucket(self, number: int) -> list[list[Segment]]:
        """Segments of each of a number of buckets."""
        found: list[list[Segment]] = [[] for _ in range(number)]
        for segment in self.segments:
            found[segment.bucket].append(segment)
        return found

    def renumbered(self, names: Sequence[str]) -> BlockMap:
        """The same for another list of names, which holds all of this one's."""
        place = {name: index for index, name in enumerate(names)}
        new = [place[name] for name in self.names]
        return replace(
            self,
            names=list(names),
            segments=[replace(segment, block=new[segment.block]) for segment in self.segments],
            tied_blocks=[new[block] for block in self.tied_blocks],
            replicated_blocks=[new[block] for block in self.replicated_blocks],
        )


@dataclass(frozen=True)
class ModelRank:
    """This rank's place among the ranks that share a model replica.

    Attributes:
        tp, pp: tensor- and pipeline-parallel rank.
        expert_tp: tensor-parallel rank for the weights of experts.
    """

    tp: int
    pp: int
    expert_tp: int


@dataclass(frozen=True)
class BucketSpans:
    """What lies in one bucket, and which part of it is this rank's.

    Attributes:
        parameters: (parameter, start, end) inside the whole bucket, in memory order.
        shard_size: elements of a shard.
        shard: index of this rank's.
    """

    parameters: Sequence[tuple[torch.nn.Parameter, int, int]]
    shard_size: int
    shard: int


def build_block_map(
    buckets: Sequence[BucketSpans],
    traits: dict[torch.nn.Parameter, ParameterTraits],
    granularity: str,
    scope: str,
    rank: ModelRank,
) -> BlockMap:
    """Cut this rank's shards into segments.

    Args:
        buckets: of all model chunks of this rank.
        traits: of every parameter in the buckets.
        granularity, scope: see :class:`~megatron_moo.distributed.config.MooConfig`.
        rank: where this rank is.
    """
    names: dict[str, int] = {}
    segments: list[Segment] = []
    partial: list[PartialSpan] = []
    tied_blocks: set[int] = set()
    replicated_blocks: set[int] = set()
    for index, bucket in enumerate(buckets):
        bucket_name = _bucket_name([traits[param].name for param, _, _ in bucket.parameters])
        size, first = bucket.shard_size, bucket.shard * bucket.shard_size
        for param, start, end in bucket.parameters:
            trait = traits[param]
            name = _block_name(trait, bucket_name, granularity)
            if scope == "local":
                name = _local_name(name, trait, rank)
            # Every rank registers every block of the stage, also where its own shard holds none of it.
            block = names.setdefault(name, len(names))
            if trait.tied and name != "model":
                tied_blocks.add(block)
            if scope == "local" and not trait.tensor_parallel:
                replicated_blocks.add(block)
            start, end = max(start - first, 0), min(end - first, size)
            if start >= end:
                continue
            segments.append(Segment(index, start, end, block, _counted(trait, granularity, scope, rank)))
            if trait.tp_reduction:
                partial.append(PartialSpan(index, start, end, trait.tp_reduction))
    tied = [i for i, bucket in enumerate(buckets) if any(traits[param].tied for param, _, _ in bucket.parameters)]
    return BlockMap(list(names), _merge(segments), partial, tied, sorted(tied_blocks), sorted(replicated_blocks))


def _block_name(trait: ParameterTraits, bucket_name: str, granularity: str) -> str:
    if granularity == "tensor":
        return trait.name
    if granularity == "layer":
        # The embeddings keep to themselves: a tied one is a block on two stages, and must not differ between them.
        match = re.match(r"(.*layers\.\d+)\.", trait.name)
        return match.group(1) if match else ".".join(trait.name.split(".")[:2])
    return bucket_name if granularity == "bucket" else "model"


def _bucket_name(parameters: Sequence[str]) -> str:
    return parameters[0] if len(parameters) == 1 else f"{parameters[0]} .. {parameters[-1]}"


def _local_name(name: str, trait: ParameterTraits, rank: ModelRank) -> str:
    """Without reductions over model-parallel ranks, replicas must still agree: they get blocks of their own."""
    if trait.tied and name == "model":
        name = TIED_EMBEDDING
    elif name == "model":
        name = f"model@pp{rank.pp}"
    if not trait.tensor_parallel:
        return f"{name}@replicated"
    return f"{name}@tp{rank.expert_tp if trait.expert else rank.tp}"


def _counted(trait: ParameterTraits, granularity: str, scope: str, rank: ModelRank) -> bool:
    if scope == "local":
        return True
    if not trait.tensor_parallel and (rank.expert_tp if trait.expert else rank.tp) != 0:
        return False
    return not (granularity == "model" and trait.copy)


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbours of one block. The padding between them is zero in every row, so it may ride along."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and (last.bucket, last.block, last.counted) == (
            segment.bucket,
            segment.block,
            segment.counted,
        ):
            merged[-1] = Segment(last.bucket, last.start, segment.end, last.block, last.counted)
        else:
            merged.append(segment)
    return merged
