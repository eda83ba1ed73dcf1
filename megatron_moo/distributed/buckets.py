"""The gradient buckets of a rank, sorted by the process group that they are reduced over.

Dense parameters are reduced over the data (x context) parallel group, experts over the expert-data-parallel group. A
bucket of either kind leaves one row per wave and member of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_moo.distributed import upstream
from megatron_moo.distributed.blocks import BucketSpans
from megatron_moo.distributed.exchange import Exchange, ExchangeBucketGroup
from megatron_moo.distributed.rows import Rows
from megatron_moo.distributed.slots import SlotMap


@dataclass(frozen=True)
class BucketSize:
    """Size of one bucket: gradient elements (padded), bytes of each, ranks that share it, whether of experts."""

    elements: int
    element_size: int
    ranks: int
    expert: bool


class BucketSet:
    """The buckets of one process group.

    Attributes:
        expert: whether they hold experts.
        members: slot of every rank of the group.
        first: number of the first bucket among all of this rank.
        spans: what lies in each bucket.
    """

    def __init__(self, expert: bool, members: Sequence[int], first: int) -> None:
        self.expert, self.members, self.first = expert, members, first
        self.spans: list[BucketSpans] = []
        self._places: list[tuple[ExchangeBucketGroup, int]] = []

    def add(self, group: ExchangeBucketGroup, index: int, owner: object) -> None:
        """Bucket ``index`` of a bucket group, which lies in the DDP buffer ``owner``."""
        bucket = group.buckets[index]
        size, rest = divmod(bucket.grad_data.numel(), group.ranks)
        assert not rest, "a bucket that its ranks do not divide is refused before"
        self._places.append((group, index))
        self.spans.append(BucketSpans(list(upstream.bucket_parameters(owner, bucket)), size, group.rank))

    @property
    def span(self) -> slice:
        """Where these buckets are among all of this rank."""
        return slice(self.first, self.first + len(self.spans))

    @property
    def shard_sizes(self) -> list[int]:
        return [span.shard_size for span in self.spans]

    @property
    def groups(self) -> list[ExchangeBucketGroup]:
        return list({id(group): group for group, _ in self._places}.values())

    def sizes(self) -> list[BucketSize]:
        """Sizes of the buckets."""
        data = [(group.buckets[index].grad_data, group.ranks) for group, index in self._places]
        return [BucketSize(grad.numel(), grad.element_size(), ranks, self.expert) for grad, ranks in data]

    def rows(self) -> list[Rows]:
        """Rows of every bucket after the last wave, where they are kept."""
        return [group.rows(index) for group, index in self._places]

    def rows_on_device(self) -> Sequence[Rows]:
        """The same on the device: rows kept on the host are there for as long as the result of one access is."""
        return _OnDevice(self.rows())

    def shards(self) -> list[torch.Tensor]:
        """Where the combination of every bucket goes."""
        return [group.shard(group.buckets[index]) for group, index in self._places]

    def gather(self) -> None:
        """Without distributed optimizer: give all ranks the combination of every bucket."""
        for group in self.groups:
            if not group.ddp_config.use_distributed_optimizer:
                group.gather()


class _OnDevice(Sequence):
    def __init__(self, rows: list[Rows]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Rows:
        waves = self._rows[index]
        return [wave.to(waves[-1].device, non_blocking=True) for wave in waves]


def exchange_buckets(
    chunks: Sequence[upstream.DistributedDataParallel], exchange: Exchange, slots: SlotMap
) -> list[BucketSet]:
    """Put the exchange in the place of the reduction of all buckets of these model chunks.

    Returns:
        The dense buckets, even if there are none, and those of experts if there are any.
    """
    replaced = []
    for chunk in chunks:
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        owner = {id(bucket): buffer for buffer in buffers for bucket in buffer.buckets}
        experts = {id(bucket) for buffer in chunk.expert_parallel_buffers for bucket in buffer.buckets}
        for group in upstream.replace_bucket_groups(chunk, lambda group: ExchangeBucketGroup(group, exchange)):
            replaced += [(group, i, owner[id(b)], id(b) in experts) for i, b in enumerate(group.buckets)]
    sets: list[BucketSet] = []
    for expert, members in ((False, slots.dense_members), (True, slots.expert_members)):
        found = BucketSet(expert, members, first=sum(len(previous.spans) for previous in sets))
        for group, index, buffer, of_expert in replaced:
            if of_expert == expert:
                found.add(group, index, buffer)
        for group in found.groups:
            group.reserve()
        if found.spans or not expert:
            sets.append(found)
    return sets
