"""A tiny GPT whose weights depend on parameter names alone, on any tensor x pipeline x data-parallel layout.

The same model on one process is the reference that every parallel claim is tested against.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

VOCAB, SEQ, HIDDEN, LAYERS, HEADS = 64, 8, 16, 4, 4


@dataclass(frozen=True)
class Variant:
    """What differs between tiny models."""

    tied: bool = True
    sequence_parallel: bool = False
    gated: bool = False
    qk_layernorm: bool = False
    normalization: str = "RMSNorm"
    per_token_loss: bool = True


def build(variant: Variant) -> GPTModel:
    """This rank's stage of the model, with deterministic weights."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=2 * HIDDEN,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=variant.sequence_parallel and tp > 1,
        gated_linear_unit=variant.gated,
        qk_layernorm=variant.qk_layernorm,
        normalization=variant.normalization,
        add_bias_linear=not variant.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=variant.per_token_loss,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        variable_seq_lengths=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=variant.qk_layernorm, normalization=variant.normalization),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=variant.tied,
        position_embedding_type="rope",
    )
    fill(model)
    return model


def whole_name(model: GPTModel, name: str) -> str:
    """A parameter's name in the whole model, from its name on this stage; written without the code under test."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    name = ".".join(parts)
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


@torch.no_grad()
def fill(model: GPTModel) -> None:
    """Set every weight by its name in the whole model, then cut this rank's tensor-parallel part."""
    for name, param in model.named_parameters():
        whole = whole_name(model, name)
        shape = list(param.shape)
        if getattr(param, "tensor_model_parallel", False):
            shape[param.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
        seed = int.from_bytes(hashlib.sha256(whole.encode()).digest()[:7], "little")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        if "norm" in whole and whole.endswith("weight"):
            values += 1
        param.copy_(tensor_parallel_part(values, param, model, whole))


def tensor_parallel_part(values: torch.Tensor, param: torch.Tensor, model: GPTModel, whole: str) -> torch.Tensor:
    """This rank's part of a whole parameter (or of its gradient)."""
    if not getattr(param, "tensor_model_parallel", False):
        return values
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if model.config.gated_linear_unit and "linear_fc1" in whole:
        return torch.cat([half.chunk(size, 0)[rank] for half in values.chunk(2, 0)])
    return values.chunk(size, param.partition_dim)[rank]


def micro_batch(language: int, index: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Micro-batch ``index`` of a language; tokens and number of scored tokens differ between languages."""
    generator = torch.Generator().manual_seed(1000 * language + index)
    low = 5 * (language % 6)
    tokens = torch.randint(low, low + 30, (rows, SEQ + 1), generator=generator)
    mask = torch.rand(rows, SEQ, generator=generator) < 0.4 + 0.05 * (language % 6)
    mask[:, 0] = True
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask.float()}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses of a micro-batch (or this stage's activations)."""
    positions = torch.arange(SEQ).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"])


def forward_step(batches, model):
    """Forward step in the form that Megatron's schedules want."""
    batch = next(batches)

    def loss(mask, output):
        total, tokens = (output.float() * mask).sum(), mask.sum()
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    return losses(model, batch), functools.partial(loss, batch["loss_mask"])


def wrap(model: GPTModel, *, overlap: bool = True, bucket_size: int = 3000) -> DistributedDataParallel:
    """Megatron's DDP with several small buckets on every stage."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
        bucket_size=bucket_size,
    )
    layout = DistributedOptimizer.compute_full_param_layout(
        [p for p in model.parameters() if p.requires_grad],
        bucket_size,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp_config,
        expert_data_parallel_world_size=1,
    )
    chunk = DistributedDataParallel(model.config, ddp_config, model, full_param_layout=layout)
    if overlap:
        model.config.no_sync_func = chunk.no_sync
    return chunk


def step_batches(assignment: Sequence[Sequence[int]], slot: int, per_wave: int) -> list[dict[str, torch.Tensor]]:
    """What a slot reads in one step: its micro-batches, wave after wave.

    A language met a second time in the step goes on with its next micro-batches.
    """
    used: dict[int, int] = {}
    mine = []
    for wave in assignment:
        for where, language in enumerate(wave):
            start = used.get(language, 0)
            used[language] = start + per_wave
            if where == slot:
                mine += [micro_batch(language, start + i) for i in range(per_wave)]
    return mine


def run_step(chunk: DistributedDataParallel, schedule, batches: list[dict[str, torch.Tensor]]) -> list:
    """Zero gradients and run one forward/backward pass with Megatron's schedule (wrapped or not)."""
    chunk.zero_grad_buffer()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[chunk],
        num_microbatches=len(batches),
        seq_length=SEQ,
        micro_batch_size=batches[0]["tokens"].shape[0],
        forward_only=False,
    )


def stock_schedule():
    """Megatron's own schedule for this layout."""
    return get_forward_backward_func()


def adam(chunk: DistributedDataParallel):
    """Megatron's distributed Adam with clipping, as its training script builds it."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-3,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        [chunk],
    )
