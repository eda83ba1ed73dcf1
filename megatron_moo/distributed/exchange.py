"""The transposed gradient bucket: all-to-all where Megatron reduce-scatters.

Protocol, for one bucket of N' = S * N gradient elements, reduced over a group of S ranks:

1. A backward hook finds the bucket's last gradient ready and calls ``start_grad_sync`` (or, without overlap,
   ``finish_grad_sync`` does at the end of the backward pass).
2. The bucket is sent by one all-to-all: slice j goes to rank j. Every rank sends (S - 1) * N elements, as in a
   reduce-scatter, and receives the S ranks' gradients of its own shard *unsummed*: rows [S, N].
3. A receive buffer as large as the largest bucket group takes them in. Only one exchange is in flight at a time in the
   last wave: the next one drains it first, so that one buffer is enough (megatron-core's fp32-accumulating
   reduce-scatter works the same way). Earlier waves land in buffers of their own and need no draining.
4. Once sent, the bucket's own memory is free; the rows of the last wave move in there. Rows of earlier waves stay in
   buffers of their own, allocated once: W - 1 of the bucket's size, none for W = 1. In host memory they land in the
   shared receive buffer first, and so do take turns.
5. Without the distributed optimizer every rank needs the whole combined gradient: an all-gather of the shards follows
   the combination. Both together send what an all-reduce does.

Experts have buckets of their own, reduced over another group. Their exchanges take turns among themselves, in a lane of
their own: a rank that waited for one group before it posts to the other could wait for a rank that does the opposite.

No gradient is scaled, summed or looked at here.

Legend: S ranks of a bucket's group, W waves, N elements of this rank's shard of a bucket.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_moo.distributed.upstream import Bucket, BucketGroup, gradient_group


class Lane:
    """What the bucket groups over one process group share: the receive buffer, and the exchange that uses it."""

    def __init__(self) -> None:
        self.in_flight: ExchangeBucketGroup | None = None
        self._receive: dict[torch.dtype, torch.Tensor] = {}

    def drain(self) -> None:
        """Complete the exchange in flight, if there is one."""
        if self.in_flight is not None:
            self.in_flight.land()

    def receive_buffer(self, like: torch.Tensor, size: int) -> torch.Tensor:
        """The first ``size`` elements of the shared receive buffer for the dtype and device of ``like``."""
        buffer = self._receive.get(like.dtype)
        if buffer is None or buffer.numel() < size:
            buffer = self._receive[like.dtype] = like.new_empty(size)
        return buffer[:size]


class Exchange:
    """What all bucket groups of a rank share: the wave, and a lane for each process group.

    Args:
        waves: W, the exchanges of each bucket in one optimizer step.
        keep_on_host: rows of earlier waves are kept in host memory.
        check_finite: make Megatron's check for non-finite gradients before sending, if switched on; it ends the run.
    """

    def __init__(self, waves: int, keep_on_host: bool = False, check_finite: bool = True) -> None:
        self.waves = waves
        self.wave = 0
        self.keep_on_host = keep_on_host
        self.check_finite = check_finite
        self._lanes: dict[dist.ProcessGroup, Lane] = {}
        self._copied: torch.cuda.Event | None = None

    def next_wave(self) -> None:
        """All rows of this wave have landed; the next one begins."""
        if self.keep_on_host:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self.wave += 1

    def settle(self) -> None:
        """Let the host read rows that it keeps: wait until the copies are complete, as they usually are by then."""
        if self._copied is not None:
            self._copied.synchronize()

    @property
    def last_wave(self) -> bool:
        return self.wave == self.waves - 1

    @property
    def takes_turns(self) -> bool:
        """Whether rows of this wave land in the shared receive buffer."""
        return self.last_wave or self.keep_on_host

    def lane(self, group: dist.ProcessGroup) -> Lane:
        """The lane of one process group."""
        return self._lanes.setdefault(group, Lane())


class ExchangeBucketGroup(BucketGroup):
    """A bucket group whose gradients are exchanged instead of reduced.

    Made from Megatron's group of the same buckets; parameter gathering is inherited unchanged.
    """

    def __init__(self, group: BucketGroup, exchange: Exchange) -> None:
        self.group = gradient_group(group)
        super().__init__(group.buckets, group.ddp_config, self.group, self.group.size())
        self.exchange = exchange
        self.lane = exchange.lane(self.group)
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self._kept: list[list[torch.Tensor]] = []  # [earlier wave][bucket] -> flat [S * N]
        self._landing: list[torch.Tensor] = []

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Send every bucket of the group; asynchronous with ``overlap_grad_reduce``."""
        if force_all_reduce:
            raise RuntimeError(
                "a full all-reduce of gradients was asked for (--save-wgrads-interval?): there is no summed gradient "
                "while languages are kept apart; drop that option"
            )
        if self.is_first_batch and (self.grad_reduce_handle is not None or self.grad_reduce_finished):
            return
        if self.exchange.takes_turns:
            self.lane.drain()
        assert self.grad_reduce_handle is None, "two exchanges of one bucket group outstanding"
        check_finite = self.ddp_config.check_for_nan_in_grad and self.exchange.check_finite
        if check_finite or self.ddp_config.check_for_large_grads:
            self.check_grads(check_finite, self.ddp_config.check_for_large_grads)
        self._landing = self._landing_places()
        self.grad_reduce_handle = [
            dist.all_to_all_single(
                place, bucket.grad_data, group=self.group, async_op=self.ddp_config.overlap_grad_reduce
            )
            for bucket, place in zip(self.buckets, self._landing, strict=True)
        ]
        if self.exchange.takes_turns:
            self.lane.in_flight = self

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Complete the exchange. A second call within a wave does nothing, as in Megatron."""
        if self.exchange.last_wave:
            # Parameters change only after the last wave; clearing this earlier would gather them once per wave.
            self.param_gather_dispatched = False
        if self.grad_reduce_finished:
            return
        if not self.ddp_config.overlap_grad_reduce or self.is_first_batch:
            self.start_grad_sync(force_all_reduce=force_all_reduce)
        if self.grad_reduce_handle is None:
            raise RuntimeError(
                f"gradients of {len(self.params) - len(self.per_param_grad_ready_counts)} of {len(self.params)} "
                "parameters of a bucket never became ready: with --overlap-grad-reduce every trainable parameter must "
                "take part in every step; freeze the unused ones or drop the option"
            )
        self.land()

    def land(self) -> None:
        """Wait for the rows and bring them where they stay until the step is resolved."""
        for handle in self.grad_reduce_handle:
            if handle is not None:
                handle.wait()
        if self.exchange.takes_turns:
            for place, kept in zip(self._landing, self._resting_places(), strict=True):
                kept.copy_(place, non_blocking=True)
            self.lane.in_flight = None
        self._landing = []
        self.grad_reduce_handle = None
        self.grad_reduce_finished = True

    def gather(self) -> None:
        """Give every rank of the group all combined shards; for the all-reduce of plain data parallelism."""
        for bucket in self.buckets:
            dist.all_gather_into_tensor(bucket.grad_data, self.shard(bucket), group=self.group)

    def reserve(self) -> None:
        """Let the shared receive buffer grow to this group's size now, not in the first step."""
        self.lane.receive_buffer(self.buckets[0].grad_data, sum(b.grad_data.numel() for b in self.buckets))

    def rows(self, index: int) -> list[torch.Tensor]:
        """Rows of bucket ``index`` after the last wave: W tensors [S, N] of this rank's shard, where they are kept."""
        flat = [kept[index] for kept in self._kept] + [self.buckets[index].grad_data]
        return [row.view(self.ranks, -1) for row in flat]

    def shard(self, bucket: Bucket) -> torch.Tensor:
        """The part [N] of a bucket that this rank combines, and a distributed optimizer reads."""
        size = bucket.grad_data.numel() // self.ranks
        return bucket.grad_data[self.rank * size : (self.rank + 1) * size]

    def _landing_places(self) -> list[torch.Tensor]:
        if not self.exchange.takes_turns:
            return self._resting_places()
        sizes = [bucket.grad_data.numel() for bucket in self.buckets]
        assert len({bucket.grad_data.dtype for bucket in self.buckets}) == 1, "one gradient dtype per bucket group"
        return list(self.lane.receive_buffer(self.buckets[0].grad_data, sum(sizes)).split(sizes))

    def _resting_places(self) -> list[torch.Tensor]:
        """Where the rows of this wave stay: the buckets themselves in the last one."""
        if self.exchange.last_wave:
            return [bucket.grad_data for bucket in self.buckets]
        if len(self._kept) <= self.exchange.wave:
            self._kept.append([self._keep(bucket.grad_data) for bucket in self.buckets])
        return self._kept[self.exchange.wave]

    def _keep(self, like: torch.Tensor) -> torch.Tensor:
        if not self.exchange.keep_on_host:
            return torch.empty_like(like)
        # Pinned, or the copy would wait for the device.
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
