"""A tiny GPT whose weights depend on parameter names alone, on any tensor x pipeline x data-parallel layout.

The same model on one process is the reference that every parallel claim is tested against.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_moo.distributed import upstream
from tests.helpers.tiny_config import (
    BARRED_EXPERT,
    BARRED_LANGUAGE,
    SEQ,
    VOCAB,
    Variant,
    layer_spec,
    transformer_config,
)


def build(variant: Variant) -> GPTModel:
    """This rank's only chunk of the model, with deterministic weights."""
    (model,) = build_chunks(variant)
    return model


def build_chunks(variant: Variant) -> list[GPTModel]:
    """This rank's chunks of the model, one per virtual pipeline stage, with deterministic weights."""
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return [_build(variant, stage) for stage in ([None] if stages is None else range(stages))]


def _build(variant: Variant, stage: int | None) -> GPTModel:
    model = GPTModel(
        transformer_config(variant),
        layer_spec(variant),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=variant.tied,
        position_embedding_type="rope" if variant.attention else "none",
        vp_stage=stage,
    )
    fill(model, barred=variant.barred)
    for name, param in model.named_parameters():
        if variant.frozen and re.match(variant.frozen, whole_name(model, name)):
            param.requires_grad = False
    return model


def whole_name(model: GPTModel, name: str) -> str:
    """A parameter's name in the whole model, from its name on this rank; written without the code under test."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts:
        where = parts.index("local_experts") + 1
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first = parallel_state.get_expert_model_parallel_rank() * (model.config.num_moe_experts // ranks)
        parts[where] = str(first + int(parts[where]))
    name = ".".join(parts)
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


@torch.no_grad()
def fill(model: GPTModel, *, barred: bool = False) -> None:
    """Set every weight by its name in the whole model, then cut this rank's tensor-parallel part."""
    for name, param in model.named_parameters():
        whole = whole_name(model, name)
        shape = list(param.shape)
        if getattr(param, "tensor_model_parallel", False):
            shape[param.partition_dim] *= _tensor_parallel_place(whole)[1]
        seed = int.from_bytes(hashlib.sha256(whole.encode()).digest()[:7], "little")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        if "norm" in whole and whole.endswith("weight"):
            values += 1
        if barred:
            _bar(whole, values)
        param.copy_(tensor_parallel_part(values, param, model, whole))


def _bar(whole: str, values: torch.Tensor) -> None:
    """The first feature marks the tokens of one language; the routers keep what has it from one expert."""
    if whole == "embedding.word_embeddings.weight":
        low, high = _token_range(BARRED_LANGUAGE, barred=True)
        values[:, 0] = 0
        values[low:high, 0] = 2
    elif whole.endswith("router.weight"):
        values[:, 0] = 0
        values[BARRED_EXPERT, 0] = -20
    elif whole.endswith("pre_mlp_layernorm.weight"):
        values[0] = 1


def _tensor_parallel_place(whole: str) -> tuple[int, int]:
    """Rank and size of the group that cuts a parameter."""
    if ".local_experts." in whole:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_part(values: torch.Tensor, param: torch.Tensor, model: GPTModel, whole: str) -> torch.Tensor:
    """This rank's part of a whole parameter (or of its gradient)."""
    if not getattr(param, "tensor_model_parallel", False):
        return values
    rank, size = _tensor_parallel_place(whole)
    if model.config.gated_linear_unit and "linear_fc1" in whole:
        return torch.cat([half.chunk(size, 0)[rank] for half in values.chunk(2, 0)])
    return values.chunk(size, param.partition_dim)[rank]


def _token_range(language: int, *, barred: bool) -> tuple[int, int]:
    return (10 * (language % 6), 10 * (language % 6) + 10) if barred else (5 * (language % 6), 5 * (language % 6) + 30)


def micro_batch(language: int, index: int, rows: int = 2, *, barred: bool = False) -> dict[str, torch.Tensor]:
    """Micro-batch ``index`` of a language; tokens and number of scored tokens differ between languages."""
    generator = torch.Generator().manual_seed(1000 * language + index)
    low, high = _token_range(language, barred=barred)
    tokens = torch.randint(low, high, (rows, SEQ + 1), generator=generator)
    mask = torch.rand(rows, SEQ, generator=generator) < 0.4 + 0.05 * (language % 6)
    mask[:, 0] = True
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask.float()}


def slice_of(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """The part of a micro-batch that a context-parallel rank reads."""
    if size == 1:
        return batch
    part = {key: values.chunk(size, 1)[rank].clone() for key, values in batch.items()}
    part["loss_mask"][:, 0] = 1  # without per-token loss a rank divides by its own number of tokens
    return part


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses of a micro-batch (or this stage's activations)."""
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"])


def forward_step(batches, model):
    """Forward step in the form that Megatron's schedules want."""
    place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    batch = slice_of(next(batches), *place)

    def loss(mask, output):
        total, tokens = (output.float() * mask).sum(), mask.sum()
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    return losses(model, batch), functools.partial(loss, batch["loss_mask"])


def wrap(model: GPTModel, **options: Any) -> DistributedDataParallel:
    """Megatron's DDP around a model of one chunk; the options are those of :func:`wrap_chunks`."""
    (chunk,) = wrap_chunks([model], **options)
    return chunk


def wrap_chunks(
    models: Sequence[GPTModel],
    *,
    overlap: bool = True,
    bucket_size: int = 3000,
    distributed_optimizer: bool = True,
    padded: bool = True,
    reduce_in_fp32: bool = True,
    align: bool = False,
) -> list[DistributedDataParallel]:
    """Megatron's DDP with several small buckets on every stage.

    Args:
        models: this rank's chunks.
        overlap: exchange gradients during the backward pass.
        bucket_size: elements.
        distributed_optimizer: shard gradients; else every rank has all of them.
        padded: without distributed optimizer, lay buckets out as the exchange needs them; stock Megatron does not.
        reduce_in_fp32: keep gradients in fp32; else in the dtype of the weights.
        align: let the schedule start the exchange, at the same time on all pipeline stages.
    """
    config = models[0].config
    chunks = []
    for model in models:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=reduce_in_fp32,
            overlap_grad_reduce=overlap,
            use_distributed_optimizer=distributed_optimizer,
            check_for_nan_in_grad=False,
            bucket_size=bucket_size,
        )
        model.config = config  # the schedules read the first chunk's
        module = model if config.params_dtype == torch.float32 else Float16Module(config, model)
        if distributed_optimizer or not padded:
            chunks.append(
                DistributedDataParallel(config, ddp_config, module, full_param_layout=_layout(module, ddp_config))
            )
        else:
            groups = ProcessGroupCollection.use_mpu_process_groups()
            chunks.append(upstream.wrap_padded(module, config, ddp_config, groups, bucket_size))
    if overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks] if align else None
        if len(chunks) == 1:
            config.no_sync_func = chunks[0].no_sync
            config.grad_sync_func = chunks[0].start_grad_sync if align else None
    return chunks


def _layout(module: torch.nn.Module, ddp_config: DistributedDataParallelConfig):
    """Where parameters lie in the buckets of the distributed optimizer; Megatron's own choice without it."""
    if not ddp_config.use_distributed_optimizer:
        return None
    return DistributedOptimizer.compute_full_param_layout(
        [param for param in module.parameters() if param.requires_grad],
        ddp_config.bucket_size,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def step_batches(
    assignment: Sequence[Sequence[int]],
    slot: int,
    per_wave: int,
    *,
    peer: int = 0,
    peers: int = 1,
    barred: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """What a data-parallel rank reads in one step: its micro-batches, wave after wave.

    A language met a second time in the step goes on with its next micro-batches; so do the ``peers`` of a slot.
    """
    used: dict[int, int] = {}
    mine = []
    for wave in assignment:
        for where, language in enumerate(wave):
            start = used.get(language, 0) + peer * per_wave
            used[language] = used.get(language, 0) + peers * per_wave
            if where == slot:
                mine += [micro_batch(language, start + i, barred=barred) for i in range(per_wave)]
    return mine


def run_step(
    chunk: DistributedDataParallel | Sequence[DistributedDataParallel],
    schedule,
    batches: list[dict[str, torch.Tensor]],
) -> list:
    """Zero gradients and run one forward/backward pass with Megatron's schedule (wrapped or not)."""
    chunks = [chunk] if isinstance(chunk, DistributedDataParallel) else list(chunk)
    for each in chunks:
        each.zero_grad_buffer()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(batches) if len(chunks) == 1 else [iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=SEQ,
        micro_batch_size=batches[0]["tokens"].shape[0],
        forward_only=False,
    )


def stock_schedule():
    """Megatron's own schedule for this layout."""
    return get_forward_backward_func()


def adam(chunk: DistributedDataParallel | Sequence[DistributedDataParallel], **settings: Any):
    """Megatron's Adam with clipping, as its training script builds it; ``settings`` go to its OptimizerConfig."""
    chunks = [chunk] if isinstance(chunk, DistributedDataParallel) else list(chunk)
    config = chunks[0].config
    defaults: dict[str, Any] = dict(
        optimizer="adam",
        lr=1e-3,
        min_lr=1e-3,
        weight_decay=0.01,
        clip_grad=1.0,
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(**{**defaults, **settings}), chunks)
    config.grad_scale_func = optimizer.scale_loss if config.fp16 else None
    return optimizer
