"""What the ranks of `exchange.py` do: train one way or another, and write down what it took."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VOCAB = 512
STOCK = "stock"


@dataclass(frozen=True)
class Variant:
    """One way to reduce gradients."""

    method: str
    granularity: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.method, self.granularity)))


@dataclass(frozen=True)
class Settings:
    """What every rank needs to know."""

    dp: int
    waves: int
    hidden: int
    layers: int
    seq_length: int
    micro_batch_size: int
    bucket_size: int
    rounds: int
    loopback: bool
    cuda: bool
    directory: str


class Trainer:
    """A model, its optimizer and one way to reduce gradients; `step()` is one optimizer step."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_moo.distributed import MooConfig, install

        self.settings = settings
        self.blocks = 0
        self._chunks, self._optimizer = _build(settings)
        self._schedule: Callable[..., Any] = get_forward_backward_func()
        self._count = 0
        model_config = self._chunks[0].config
        if variant.method == STOCK:
            model_config.finalize_model_grads_func = finalize_model_grads
            return
        # A language of its own for every row of the step: the most products that can be.
        rows = [[wave * settings.dp + slot for slot in range(settings.dp)] for wave in range(settings.waves)]
        config = MooConfig(
            objectives=[f"language{k}" for k in range(settings.dp * settings.waves)],
            method=variant.method,
            granularity=variant.granularity,
            preference="tokens",
            waves=settings.waves,
        )
        moo = install(self._chunks, config, lambda step: rows)
        self._schedule = moo.waves(self._schedule)
        self.blocks = len(moo.blocks)

    @property
    def parameters(self) -> int:
        return sum(param.numel() for param in self._chunks[0].parameters())

    @property
    def gradient_bytes(self) -> int:
        return sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in self._chunks[0].buffers)

    def step(self) -> None:
        settings = self.settings
        self._chunks[0].zero_grad_buffer()
        self._optimizer.zero_grad()
        self._schedule(
            forward_step_func=_forward_step,
            data_iterator=_batches(settings, self._count),
            model=self._chunks,
            num_microbatches=settings.waves,
            seq_length=settings.seq_length,
            micro_batch_size=settings.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()
        self._count += 1
        if settings.cuda:
            torch.cuda.synchronize()


def _build(settings: Settings) -> tuple[list, Any]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.training.training import wrap_model_chunks_with_ddp

    config = TransformerConfig(
        num_layers=settings.layers,
        hidden_size=settings.hidden,
        num_attention_heads=max(1, settings.hidden // 64),
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    torch.manual_seed(1234)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCAB, settings.seq_length, position_embedding_type="rope").cuda()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=True,
        bucket_size=settings.bucket_size,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = wrap_model_chunks_with_ddp([model], config, ddp_config, pg_collection=groups)
    config.no_sync_func = chunks[0].no_sync
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0, use_distributed_optimizer=True)
    return chunks, get_megatron_optimizer(optimizer, chunks)


def _batches(settings: Settings, step: int) -> Iterator[torch.Tensor]:
    """One micro-batch of random tokens per wave, the same for every variant."""
    for wave in range(settings.waves):
        generator = torch.Generator().manual_seed(hash((step, wave, dist.get_rank())))
        shape = (settings.micro_batch_size, settings.seq_length + 1)
        yield torch.randint(VOCAB, shape, generator=generator).cuda()


def _forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple:
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)

    def loss(output: torch.Tensor) -> tuple:
        count = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
        return output.float().sum(), count, {"loss": output.detach().float().mean()}

    return model(inputs, positions, None, labels=labels), loss


@contextlib.contextmanager
def _group(rank: int, settings: Settings, name: str) -> Iterator[None]:
    """The shim, a process group, and Megatron's groups in it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_moo.platform import cpu, repairs

    quiet()
    torch.set_num_threads(1)
    if settings.cuda:
        repairs.install()
        torch.cuda.set_device(rank)
    else:
        cpu.install()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if settings.cuda else "gloo",
        init_method=f"file://{settings.directory}/{name}",
        rank=rank,
        world_size=settings.dp,
        timeout=datetime.timedelta(minutes=3),
    )
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def measure_memory(rank: int, settings: Settings, variant: Variant) -> None:
    """One variant alone in fresh processes; the mean over ranks goes to a file."""
    from _memory import TensorBytes, resident_bytes

    before, _ = resident_bytes()
    with _group(rank, settings, f"memory-{variant.label}"):
        with TensorBytes() as tensors:
            trainer = Trainer(variant, settings)
            for _ in range(2):
                tensors.reset_peak()
                if settings.cuda:
                    torch.cuda.reset_peak_memory_stats()
                trainer.step()
        peak = torch.cuda.max_memory_allocated() if settings.cuda else tensors.peak
        live = torch.cuda.memory_allocated() if settings.cuda else tensors.live
        numbers = torch.tensor([live, peak, resident_bytes()[1] - before], dtype=torch.float64).cuda()
        dist.all_reduce(numbers)
        if rank == 0:
            live, peak, rss = (numbers / settings.dp).tolist()
            _write(settings, f"memory-{variant.label}", {"live": live, "peak": peak, "rss": rss})


def measure_steps(rank: int, settings: Settings, ways: Sequence[Variant]) -> None:
    """Bytes and time of all variants in the same processes; rank 0 writes what it found to a file."""
    from _wire import counted, loopback_bytes

    with _group(rank, settings, "steps"):
        trainers = {way.label: Trainer(way, settings) for way in ways}
        results: dict[str, dict[str, Any]] = {}
        for label, trainer in trainers.items():
            trainer.step()  # buckets learn their order in the first step
            with counted() as sent:
                trainer.step()
            results[label] = {
                "sent": {name: count for (name, _), count in sent.items()},
                "blocks": trainer.blocks,
                "parameters": trainer.parameters,
                "gradient_bytes": trainer.gradient_bytes,
            }
        if settings.loopback:
            for label, trainer in trainers.items():
                dist.barrier()
                results[label]["loopback"] = _between_barriers(trainer.step, loopback_bytes) / settings.dp
        seconds: dict[str, list[float]] = {label: [] for label in trainers}
        order = list(trainers)
        for _ in range(settings.rounds):
            for label in order:
                seconds[label].append(_between_barriers(trainers[label].step, time.perf_counter))
            order = order[1:] + order[:1]  # nobody always comes after the same one
        slowest = torch.tensor(list(seconds.values()), dtype=torch.float64).cuda()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        for label, values in zip(seconds, slowest.tolist(), strict=True):
            results[label]["seconds"] = values
        if rank == 0:
            _write(settings, "steps", results)


def _between_barriers(run: Callable[[], None], clock: Callable[[], float]) -> float:
    dist.barrier()
    start = clock()
    run()
    dist.barrier()
    return clock() - start


def quiet() -> None:
    """A rank reports by file; Megatron's listing of every bucket is of no use here."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _write(settings: Settings, name: str, value: Any) -> None:
    Path(settings.directory, f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
