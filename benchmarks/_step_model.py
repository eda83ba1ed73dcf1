"""The model, the optimizer and the data that every variant of `step.py` trains: the same weights, the same samples.

A step has R = W * D rows (W waves, D slots); row r = w * D + d belongs to language r % K. With M micro-batches a step
and rank, every row has M / W of them. Random tokens: what is measured does not depend on what they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

VOCAB = 512

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens [b, s + 1], and which samples count [b]


@dataclass(frozen=True)
class Settings:
    """What every rank needs to know. Sizes are those of the options of `step.py`.

    Attributes:
        languages: K, at most the rows of a step.
        wave_memory: where rows of earlier waves are kept, see ``MooConfig``.
        micro_batches: M, of a rank in a whole step; a multiple of ``waves``.
        loopback: whether to count what crosses the loopback.
        profile: steps of each variant to profile.
        directory: where ranks write what they found.
    """

    dp: int
    waves: int
    languages: int
    method: str
    wave_memory: str
    hidden: int
    layers: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    bucket_size: int
    rounds: int
    profile: int
    loopback: bool
    cuda: bool
    directory: str = ""

    @property
    def rows(self) -> int:
        return self.waves * self.dp

    @property
    def row_samples(self) -> int:
        """Samples of a row."""
        return self.micro_batches // self.waves * self.micro_batch_size

    @property
    def assignment(self) -> list[list[int]]:
        """``[wave][slot]`` -> language."""
        return [[(wave * self.dp + slot) % self.languages for slot in range(self.dp)] for wave in range(self.waves)]


def build(settings: Settings, **ddp_options: Any) -> tuple[list, Any]:
    """A GPT wrapped in Megatron's DDP with the distributed optimizer, and the optimizer.

    Args:
        settings: sizes.
        ddp_options: further fields of ``DistributedDataParallelConfig``.
    """
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
        **ddp_options,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = wrap_model_chunks_with_ddp([model], config, ddp_config, pg_collection=groups)
    config.no_sync_func = chunks[0].no_sync
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0, use_distributed_optimizer=True)
    return chunks, get_megatron_optimizer(optimizer, chunks)


def sample(settings: Settings, step: int, row: int, index: int) -> torch.Tensor:
    """Tokens [s + 1] of one sample of a row; the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(hash((step, row, index)))
    return torch.randint(VOCAB, (settings.seq_length + 1,), generator=generator)


def row_batches(settings: Settings, step: int, row: int) -> Iterator[Batch]:
    """The micro-batches of a row."""
    return _in_micro_batches(settings, (sample(settings, step, row, i) for i in range(settings.row_samples)))


def language_batches(settings: Settings, step: int, language: int, slot: int) -> list[Batch]:
    """A slot's share of all samples of one language, spread evenly over the slots.

    Every slot gets as many micro-batches: where samples run out, they are filled up with some that do not count.
    """
    rows = range(language, settings.rows, settings.languages)
    samples = [(row, index) for row in rows for index in range(settings.row_samples)]
    mine = [sample(settings, step, *which) for which in samples[slot :: settings.dp]]
    batches = list(_in_micro_batches(settings, mine))
    for _ in range(passes_micro_batches(settings, len(samples)) - len(batches)):
        tokens = torch.zeros(settings.micro_batch_size, settings.seq_length + 1, dtype=torch.long)
        batches.append((tokens.cuda(), torch.zeros(len(tokens)).cuda()))
    return batches


def passes_micro_batches(settings: Settings, samples: int) -> int:
    """Micro-batches of every slot when ``samples`` are spread over all slots."""
    return -(-samples // (settings.dp * settings.micro_batch_size))


def _in_micro_batches(settings: Settings, samples: Iterable[torch.Tensor]) -> Iterator[Batch]:
    samples = list(samples)
    size = settings.micro_batch_size
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        counts = torch.ones(size)
        counts[len(part) :] = 0
        part += [part[0]] * (size - len(part))
        yield torch.stack(part).cuda(), counts.cuda()


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple:
    """Megatron's forward step; the loss is a sum over tokens."""
    tokens, counts = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)

    def loss(output: torch.Tensor) -> tuple:
        losses = output.float() * counts[:, None]
        number = (counts.sum() * output.shape[1]).int()
        return losses.sum(), number, {"loss": losses.detach().mean()}

    return model(inputs, positions, None, labels=labels), loss


def run_schedule(
    schedule: Any, settings: Settings, chunks: Sequence[torch.nn.Module], batches: Iterable[Batch], count: int, **more
) -> None:
    """Forward and backward over ``count`` micro-batches."""
    schedule(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=list(chunks),
        num_microbatches=count,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        forward_only=False,
        **more,
    )
