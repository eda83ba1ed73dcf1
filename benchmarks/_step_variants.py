"""The ways to train one step that `step.py` compares; each leaves the gradient where Megatron's optimizer reads it.

plain          Megatron as it is: all micro-batches in one backward pass, a reduce-scatter a bucket.
plain, a2a     Megatron with --ddp-reduce-scatter-with-fp32-accumulation: its own reduce-scatter by all-to-all, added up
               by the receiver. gloo's reduce-scatter sends twice what it must, this one and the exchange do not.
METHOD BLOCKS  this project: `install`, one exchange a wave.
K-pass         what one writes without knowing better: a forward/backward schedule per language, over all slots; the
               language's gradient is all-reduced bucket by bucket during its backward pass (Megatron's DDP, asked to
               all-reduce) and copied into a buffer of its own, K of them. Then every rank takes the K x K products of
               whole gradients and writes the combination of its shards. The same samples; each language's are spread
               over all slots. (A rank that combined all of it, not its shards alone, would do D times that work.)
reconstruct    whole-model resolution with one backward pass per wave, as here, but by bringing all gradients to all
               ranks: every bucket is all-gathered as soon as it is ready, in place into a [R, n] buffer, R = W * D.
               Then as for K-pass. What the exchange spares is the D-fold gather and that buffer.

All use Megatron's model, DDP buffers and optimizer. K-pass and reconstruct know whole-model blocks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _step_model import Settings, build, language_batches, row_batches, run_schedule

PLAIN, PLAIN_A2A, K_PASS, RECONSTRUCT = "plain", "plain, a2a", "K-pass", "reconstruct"
# Columns of one fp32 product; longer ones are added up in fp64, so that K-pass and reconstruct are as exact as ours.
CHUNK = 2**15


@dataclass(frozen=True)
class Variant:
    """One way to train: a name above, or a method with its granularity."""

    method: str
    granularity: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.granularity)))

    @property
    def ours(self) -> bool:
        return bool(self.granularity)


def make_trainer(variant: Variant, settings: Settings) -> Trainer:
    """The trainer of a variant."""
    if variant.ours:
        return Ours(settings, variant)
    return {PLAIN: Plain, PLAIN_A2A: PlainAllToAll, K_PASS: KPass, RECONSTRUCT: Reconstruct}[variant.method](settings)


class Trainer:
    """A model, its optimizer and one way to get gradients; :meth:`step` is one optimizer step.

    Attributes:
        blocks: number of blocks in which conflicts are resolved.
        chunks: the wrapped model.
    """

    blocks = 0

    def __init__(self, settings: Settings, **ddp_options: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.settings = settings
        self.chunks, self.optimizer = build(settings, **ddp_options)
        self.slot = parallel_state.get_data_parallel_rank()
        self.group = self.chunks[0].intra_dp_cp_group
        self._schedule: Callable[..., Any] = get_forward_backward_func()
        self._count = 0

    @property
    def config(self) -> Any:
        return self.chunks[0].config

    @property
    def parameters(self) -> int:
        return sum(param.numel() for param in self.chunks[0].parameters())

    @property
    def buckets(self) -> list[torch.Tensor]:
        """Gradients [n] of every bucket."""
        return [bucket.grad_data for buffer in self.chunks[0].buffers for bucket in buffer.buckets]

    def shards(self) -> torch.Tensor:
        """The gradient that this rank's optimizer reads, as one vector."""
        return torch.cat([self._shard_of(bucket) for bucket in self.buckets])

    def _shard_of(self, bucket: torch.Tensor) -> torch.Tensor:
        """This rank's part of the last axis."""
        return bucket.unflatten(-1, (self.settings.dp, -1))[..., self.slot, :]

    def gradients(self, step: int) -> None:
        """Everything before the optimizer."""
        self._zero()
        self._run([batch for wave in range(self.settings.waves) for batch in self._wave(step, wave)])

    def _wave(self, step: int, wave: int) -> list:
        return list(row_batches(self.settings, step, wave * self.settings.dp + self.slot))

    def _run(self, batches: list, **more: Any) -> None:
        run_schedule(self._schedule, self.settings, self.chunks, batches, len(batches), **more)

    def _zero(self) -> None:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()

    def optimize(self) -> None:
        """Clip, update the shards, gather the parameters."""
        self.optimizer.step()

    def step(self) -> None:
        """One optimizer step; returns when the device is done."""
        self.gradients(self._count)
        self.optimize()
        self._count += 1
        if self.settings.cuda:
            torch.cuda.synchronize()


class Plain(Trainer):
    """Stock Megatron."""

    def __init__(self, settings: Settings, **ddp_options: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        super().__init__(settings, **ddp_options)
        self.config.finalize_model_grads_func = finalize_model_grads

    def gradients(self, step: int) -> None:
        import megatron.core.distributed.param_and_grad_buffer as buffers

        # Megatron keeps its choice of a reduce-scatter in a global, which models of one process would share.
        with mock.patch.object(buffers, "dist_reduce_scatter_func", self._reduce_scatter()):
            super().gradients(step)

    def _reduce_scatter(self) -> Callable[..., Any]:
        return dist.reduce_scatter_tensor


class PlainAllToAll(Plain):
    """Stock Megatron's reduce-scatter by all-to-all."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, reduce_scatter_with_fp32_accumulation=True)

    def _reduce_scatter(self) -> Callable[..., Any]:
        from megatron.core.distributed import reduce_scatter_with_fp32_accumulation as module

        return module.reduce_scatter_with_fp32_accumulation


class Ours(Trainer):
    """This project."""

    def __init__(self, settings: Settings, variant: Variant) -> None:
        from megatron_moo.distributed import MooConfig, install

        super().__init__(settings)
        config = MooConfig(
            objectives=[f"language{k}" for k in range(settings.languages)],
            method=variant.method,
            granularity=variant.granularity,
            preference="tokens",
            waves=settings.waves,
            wave_memory=settings.wave_memory,
        )
        self._moo = install(self.chunks, config, lambda step: settings.assignment)
        self._schedule = self._moo.waves(self._schedule)
        self.blocks = len(self._moo.blocks)

    def gradients(self, step: int) -> None:
        self._moo.step = step
        super().gradients(step)


class Vectors(Trainer):
    """What K-pass and reconstruct share: whole gradients on every rank, resolved there.

    Legend: K languages, V vectors (one a language, or one a row), n elements of a bucket.
    """

    def __init__(self, settings: Settings, num_vectors: int) -> None:
        from megatron_moo.aggregation import build_aggregator

        super().__init__(settings)
        self.vectors = [bucket.new_empty(num_vectors, bucket.numel()) for bucket in self.buckets]
        self.blocks = 1
        self._aggregator = build_aggregator(settings.method)

    def _combine(self, language_V: torch.Tensor, tokens_V: torch.Tensor) -> None:
        """Whole-model Gramian -> weights -> shards."""
        fold_KV = torch.nn.functional.one_hot(language_V, self.settings.languages).T.double()
        tokens_K = fold_KV @ tokens_V.double()
        fold_KV = fold_KV / tokens_K[:, None]
        gram_VV = sum(_products(vectors) for vectors in self.vectors)
        gram_KK = fold_KV @ gram_VV @ fold_KV.T
        weights_K = self._aggregator(gram_KK[None], preference_K=tokens_K / tokens_K.sum())[0]
        coefficients_V = (weights_K @ fold_KV).float()
        for bucket, vectors in zip(self.buckets, self.vectors, strict=True):
            torch.matmul(coefficients_V, self._shard_of(vectors), out=self._shard_of(bucket))


def _products(vectors: torch.Tensor) -> torch.Tensor:
    """Inner products [V, V] float64 of fp32 vectors [V, n]."""
    total = 0.0
    whole = vectors.shape[1] // CHUNK * CHUNK
    if whole:
        chunks = vectors[:, :whole].unflatten(1, (-1, CHUNK)).transpose(0, 1)
        total = torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64)
    rest = vectors[:, whole:]
    return total + (rest @ rest.T).double()


class KPass(Vectors):
    """A schedule per language, each gradient all-reduced and copied."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.languages)
        self._language = 0
        self._tokens_K = torch.zeros(settings.languages, device=self.buckets[0].device)
        self.config.finalize_model_grads_func = self._finish
        self.chunks[0].force_all_reduce = True  # during the backward pass, too

    def gradients(self, step: int) -> None:
        for language in range(self.settings.languages):
            self._language = language
            self._zero()
            batches = language_batches(self.settings, step, language, self.slot)
            self._run(batches, force_all_reduce=True)
        self._combine(torch.arange(self.settings.languages, device=self._tokens_K.device), self._tokens_K)

    @torch.no_grad()
    def _finish(self, model: list, num_tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        for chunk in model:
            chunk.finish_grad_sync(force_all_reduce=True)
        dist.all_reduce(num_tokens, group=self.group)
        self._tokens_K[self._language] = num_tokens
        for bucket, vectors in zip(self.buckets, self.vectors, strict=True):
            vectors[self._language].copy_(bucket)


class Reconstruct(Vectors):
    """A backward pass per wave; every rank's gradient is gathered by every rank."""

    def __init__(self, settings: Settings) -> None:
        from megatron_moo.distributed.upstream import replace_bucket_groups

        super().__init__(settings, settings.rows)
        self._tokens_W: list[torch.Tensor] = []
        vectors = dict(zip(map(torch.Tensor.data_ptr, self.buckets), self.vectors, strict=True))
        make = _gathering()
        self._groups = replace_bucket_groups(self.chunks[0], lambda group: make(group, vectors))
        self.config.finalize_model_grads_func = self._finish

    def gradients(self, step: int) -> None:
        self._tokens_W = []
        for wave in range(self.settings.waves):
            self._zero()
            for group in self._groups:
                group.wave = wave
            self._run(self._wave(step, wave))
        language_R = torch.tensor(self.settings.assignment, device=self.buckets[0].device).flatten()
        self._combine(language_R, torch.cat(self._tokens_W))

    @torch.no_grad()
    def _finish(self, model: list, num_tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        for chunk in model:
            chunk.finish_grad_sync()
        tokens_D = num_tokens.new_empty(self.settings.dp)
        dist.all_gather_into_tensor(tokens_D, num_tokens.reshape(1), group=self.group)
        self._tokens_W.append(tokens_D)


def _gathering() -> type:
    """The class of bucket groups that gather; made late, since ranks import Megatron after the shim."""
    from megatron_moo.distributed.upstream import BucketGroup

    class GatherBucketGroup(BucketGroup):
        """All-gathers each bucket into the rows of its wave, as soon as Megatron would reduce it."""

        def __init__(self, group: BucketGroup, vectors: dict[int, torch.Tensor]) -> None:
            super().__init__(
                group.buckets,
                group.ddp_config,
                group.intra_distributed_optimizer_instance_group,
                group.intra_distributed_optimizer_instance_size,
            )
            self.wave = 0
            self._vectors = [vectors[bucket.grad_data.data_ptr()] for bucket in group.buckets]

        def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
            if self.is_first_batch and self.grad_reduce_handle is not None:
                return
            slots = self.intra_distributed_optimizer_instance_size
            self.grad_reduce_handle = [
                dist.all_gather_into_tensor(
                    vectors[self.wave * slots : (self.wave + 1) * slots].flatten(),
                    bucket.grad_data,
                    group=self.intra_distributed_optimizer_instance_group,
                    async_op=self.ddp_config.overlap_grad_reduce,
                )
                for bucket, vectors in zip(self.buckets, self._vectors, strict=True)
            ]

        def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
            self.param_gather_dispatched = False
            if self.grad_reduce_finished:
                return
            if not self.ddp_config.overlap_grad_reduce or self.is_first_batch:
                self.start_grad_sync()
            for handle in self.grad_reduce_handle:
                if handle is not None:
                    handle.wait()
            self.grad_reduce_handle = None
            self.grad_reduce_finished = True

    return GatherBucketGroup
