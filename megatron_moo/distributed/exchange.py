"""The transposed gradient bucket: all-to-all where Megatron reduce-scatters.

Protocol, for one bucket of N' = D * N gradient elements on D data-parallel slots:

1. A backward hook finds the bucket's last gradient ready and calls ``start_grad_sync`` (or, without overlap,
   ``finish_grad_sync`` does at the end of the backward pass).
2. The bucket is sent by one all-to-all: slice j goes to rank j. Every rank sends (D - 1) * N elements, as in a
   reduce-scatter, and receives the D slots' gradients of its own shard *unsummed*: rows [D, N].
3. A receive buffer as large as the largest bucket group takes them in. Only one exchange is in flight at a time in the
   last wave: the next one drains it first, so that one buffer is enough (megatron-core's fp32-accumulating
   reduce-scatter works the same way). Earlier waves land in buffers of their own and need no draining.
4. Once sent, the bucket's own memory is free; the rows of the last wave move in there. Rows of earlier waves stay in
   buffers of their own, allocated once: W - 1 of the bucket's size, none for W = 1.

No gradient is scaled, summed or looked at here.

Legend: D slots (data-parallel ranks), W waves, N elements of this rank's shard of a bucket.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_moo.distributed.upstream import Bucket, BucketGroup


class Exchange:
    """What the bucket groups of a rank share: the wave, and in the last one the exchange in flight.

    Args:
        waves: W, the exchanges of each bucket in one optimizer step.
    """

    def __init__(self, waves: int) -> None:
        self.waves = waves
        self.wave = 0
        self._in_flight: ExchangeBucketGroup | None = None
        self._receive: dict[torch.dtype, torch.Tensor] = {}

    @property
    def last_wave(self) -> bool:
        return self.wave == self.waves - 1

    def drain(self) -> None:
        """Complete the exchange in flight, if there is one."""
        if self._in_flight is not None:
            self._in_flight.land()

    def receive_buffer(self, like: torch.Tensor, size: int) -> torch.Tensor:
        """The first ``size`` elements of the shared receive buffer for the dtype and device of ``like``."""
        buffer = self._receive.get(like.dtype)
        if buffer is None or buffer.numel() < size:
            buffer = self._receive[like.dtype] = like.new_empty(size)
        return buffer[:size]


class ExchangeBucketGroup(BucketGroup):
    """A bucket group whose gradients are exchanged instead of reduced.

    Made from Megatron's group of the same buckets; parameter gathering is inherited unchanged.
    """

    def __init__(self, group: BucketGroup, exchange: Exchange) -> None:
        super().__init__(
            group.buckets,
            group.ddp_config,
            group.intra_distributed_optimizer_instance_group,
            group.intra_distributed_optimizer_instance_size,
        )
        self.exchange = exchange
        self.slots = self.intra_distributed_optimizer_instance_size
        self.slot = self.intra_distributed_optimizer_instance_rank
        self._kept: list[list[torch.Tensor]] = []  # [earlier wave][bucket] -> flat [D * N]
        self._landing: list[torch.Tensor] = []

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Send every bucket of the group; asynchronous with ``overlap_grad_reduce``."""
        if force_all_reduce:
            raise RuntimeError(
                "a full all-reduce of gradients was asked for (--save-wgrads-interval?): there is no summed gradient "
                "while languages are kept apart; drop that option"
            )
        if self.is_first_batch and self.grad_reduce_handle is not None:
            return
        if self.exchange.last_wave:
            self.exchange.drain()  # the receive buffer is one for all; earlier waves land in buffers of their own
        assert self.grad_reduce_handle is None, "two exchanges of one bucket group outstanding"
        if self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads:
            self.check_grads(self.ddp_config.check_for_nan_in_grad, self.ddp_config.check_for_large_grads)
        self._landing = self._landing_places()
        self.grad_reduce_handle = [
            dist.all_to_all_single(
                place,
                bucket.grad_data,
                group=self.intra_distributed_optimizer_instance_group,
                async_op=self.ddp_config.overlap_grad_reduce,
            )
            for bucket, place in zip(self.buckets, self._landing, strict=True)
        ]
        if self.exchange.last_wave:
            self.exchange._in_flight = self

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
        """Wait for the rows and, in the last wave, move them into the bucket's own memory."""
        for handle in self.grad_reduce_handle:
            if handle is not None:
                handle.wait()
        if self.exchange.last_wave:
            for bucket, place in zip(self.buckets, self._landing, strict=True):
                bucket.grad_data.copy_(place)
        self._landing = []
        self.grad_reduce_handle = None
        self.grad_reduce_finished = True
        if self.exchange.last_wave:
            self.exchange._in_flight = None

    def reserve(self) -> None:
        """Let the shared receive buffer grow to this group's size now, not in the first step."""
        self.exchange.receive_buffer(self.buckets[0].grad_data, sum(b.grad_data.numel() for b in self.buckets))

    def rows(self, index: int) -> list[torch.Tensor]:
        """Rows of bucket ``index`` after the last wave: W tensors [D, N] of this rank's shard."""
        flat = [kept[index] for kept in self._kept] + [self.buckets[index].grad_data]
        return [row.view(self.slots, -1) for row in flat]

    def shard(self, bucket: Bucket) -> torch.Tensor:
        """The part [N] of a bucket that this rank's optimizer reads its gradient from."""
        size = bucket.grad_data.numel() // self.slots
        return bucket.grad_data[self.slot * size : (self.slot + 1) * size]

    def _landing_places(self) -> list[torch.Tensor]:
        if not self.exchange.last_wave:
            if len(self._kept) <= self.exchange.wave:
                self._kept.append([torch.empty_like(bucket.grad_data) for bucket in self.buckets])
            return self._kept[self.exchange.wave]
        sizes = [bucket.grad_data.numel() for bucket in self.buckets]
        assert len({bucket.grad_data.dtype for bucket in self.buckets}) == 1, "one gradient dtype per bucket group"
        return list(self.exchange.receive_buffer(self.buckets[0].grad_data, sum(sizes)).split(sizes))
