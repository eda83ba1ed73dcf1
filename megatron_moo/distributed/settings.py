"""The part of Megatron's settings that decides whether the exchange can work, read from either of two sources.

The command line is checked on ``Setup.from_args(args)`` before any file is written, ``install()`` on
``Setup.from_chunks(chunks)``: one table of rules (:mod:`megatron_moo.distributed.refusals`) looks at the result. Each
field names where it comes from, so what only one of the two can see can be read off here. Imports no Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

DDP = "DistributedDataParallel"


def _read(default: Any, *, args: str = "", config: str = "", ddp: str = "", chunks: bool = False) -> Any:
    """A setting, its harmless value, and its names: in Megatron's arguments, its model config, its DDP config.

    ``chunks``: found in the wrapped chunks themselves.
    """
    return field(default=default, metadata={"args": args, "config": config, "ddp": ddp, "chunks": chunks})


def _both(name: str, default: Any = False) -> Any:
    return _read(default, args=name, config=name)


def _ddp(name: str, args: str, default: Any = False) -> Any:
    return _read(default, args=args, ddp=name)


def _args(name: str, default: Any = False) -> Any:
    return _read(default, args=name)


@dataclass(frozen=True)
class Setup:
    """The settings that the rows look at, whatever they were read from.

    A field that a source does not have keeps its default, which no row refuses.
    """

    # How the model is wrapped and its gradients are reduced.
    wrapper: str = _read(DDP, args="use_megatron_fsdp use_torch_fsdp2", chunks=True)
    num_distributed_optimizer_instances: int = _ddp(
        "num_distributed_optimizer_instances", "num_distributed_optimizer_instances", 1
    )
    fp32_reduce_scatter: bool = _ddp(
        "reduce_scatter_with_fp32_accumulation", "ddp_reduce_scatter_with_fp32_accumulation"
    )
    average_in_collective: bool = _ddp("average_in_collective", "ddp_average_in_collective")
    fp32_local_accumulation: Sequence[str] = _ddp(
        "param_name_patterns_for_fp32_local_accumulation", "ddp_param_name_patterns_for_fp32_local_accumulation", ()
    )
    reuse_grad_buf: bool = _ddp("reuse_grad_buf_for_mxfp8_param_ag", "reuse_grad_buf_for_mxfp8_param_ag")
    nccl_ub: bool = _ddp("nccl_ub", "nccl_ub")
    unpadded_buckets: bool = _read(False, chunks=True)
    idle_stage: bool = _read(False, chunks=True)
    finalize_hook: Any = _read(None, chunks=True)
    # When a gradient is ready, and what else happens to it.
    delay_wgrad_compute: bool = _both("delay_wgrad_compute")
    overlap_moe_expert_parallel_comm: bool = _both("overlap_moe_expert_parallel_comm")
    overlap_dispatch_backward: bool = _both("overlap_dispatch_backward_with_experts_wgrad")
    defer_embedding_wgrad_compute: bool = _both("defer_embedding_wgrad_compute")
    cuda_graph_impl: str = _both("cuda_graph_impl", "none")
    optimizer_cuda_graph: bool = _args("optimizer_cuda_graph")
    save_wgrads_interval: int | None = _args("save_wgrads_interval", None)
    # Layout and model.
    tensor_model_parallel_size: int = _both("tensor_model_parallel_size", 1)
    gtp_weight_remat_size: int = _both("gtp_weight_remat_size", 1)
    expert_gtp_weight_remat_size: int = _both("expert_gtp_weight_remat_size", 1)
    context_parallel_size: int = _args("context_parallel_size", 1)
    transformer_impl: str = _args("transformer_impl", "transformer_engine")
    hierarchical_context_parallel_sizes: Sequence[int] = _both("hierarchical_context_parallel_sizes", ())
    hybrid_context_parallel: bool = _both("hybrid_context_parallel")
    mtp_num_layers: int | None = _both("mtp_num_layers", None)
    softmax_type: str = _both("softmax_type", "vanilla")
    moe_router_load_balancing_type: str | Sequence[str] = _both("moe_router_load_balancing_type", "aux_loss")
    moe_single_grouped_weight: bool = _both("moe_single_grouped_weight")
    moe_single_grouped_bias: bool = _both("moe_single_grouped_bias")
    has_cond_embedder: bool = _read(False, config="has_cond_embedder")
    flextron: bool = _read(False, config="flextron")
    # Optimizer.
    layer_wise_optimizer: bool = _read(False, args="use_layer_wise_distributed_optimizer", chunks=True)
    overlap_param_gather_with_optimizer_step: bool = _args("overlap_param_gather_with_optimizer_step")
    # What the entry alone decides.
    preference: str | None = _args("moo_preference", None)
    calculate_per_token_loss: bool = _args("calculate_per_token_loss")
    packed: bool = _args("moo_pack")
    experimental_attention_variant: str | None = _args("experimental_attention_variant", None)
    dataloader_type: str = _args("dataloader_type", "external")
    iterations_to_skip: Sequence[int] = _args("iterations_to_skip", ())
    rampup_batch_size: Any = _args("rampup_batch_size", None)
    step_batch_size_schedule: Any = _args("step_batch_size_schedule", None)
    micro_batch_size: int | None = _args("micro_batch_size", None)
    global_batch_size: int | None = _args("global_batch_size", None)
    eval_micro_batch_size: int | None = _args("eval_micro_batch_size", None)
    eval_global_batch_size: int | None = _args("eval_global_batch_size", None)
    eval_rows: Sequence[Any] = _args("moo_eval_rows", ())
    sequence_parallel: bool = _args("sequence_parallel")
    max_position_embeddings: int | None = _args("max_position_embeddings", None)
    full_validation: bool = _args("full_validation")
    multiple_validation_sets: bool = _args("multiple_validation_sets")
    optimizer: str = _args("optimizer", "adam")
    use_distributed_optimizer: bool = _args("use_distributed_optimizer")
    freeze_all_layers: bool = _args("freeze_all_layers")
    hybrid_layer_pattern: str | None = _args("hybrid_layer_pattern", None)
    perform_rl_step: bool = _args("perform_rl_step")
    moe_use_upcycling: bool = _args("moe_use_upcycling")
    logits_load_dir: str | None = _args("logits_load_dir", None)
    data_path: Sequence[str] = _args("data_path", ())
    per_split_data_args_path: str | None = _args("per_split_data_args_path", None)
    mock_data: bool = _args("mock_data")
    sft: bool = _args("sft")
    eod_mask_loss: bool = _args("eod_mask_loss")
    reset_position_ids: bool = _args("reset_position_ids")
    reset_attention_mask: bool = _args("reset_attention_mask")

    @classmethod
    def from_args(cls, args: Any) -> Setup:
        """From Megatron's arguments with ours, parsed and validated."""
        found = {}
        for setting in fields(cls):
            name = setting.metadata["args"]
            if name and setting.name != "wrapper":
                found[setting.name] = getattr(args, name, None) or setting.default
        for name, wrapper in (("use_megatron_fsdp", "Megatron-FSDP"), ("use_torch_fsdp2", "torch FSDP2")):
            if getattr(args, name, False):
                found["wrapper"] = wrapper
        return cls(**found)

    @classmethod
    def from_chunks(cls, chunks: Sequence[Any], idle_stage: bool = False) -> Setup:
        """From wrapped model chunks and their configs.

        Args:
            chunks: of this rank.
            idle_stage: whether a pipeline stage has nothing to train, which one rank cannot see.
        """
        if strange := sorted({_kind(chunk) for chunk in chunks if not wrapped(chunk)}):
            return cls(wrapper=", ".join(strange))
        config, ddp = chunks[0].config, chunks[0].ddp_config
        found = {}
        for setting in fields(cls):
            for source, kind in ((config, "config"), (ddp, "ddp")):
                if name := setting.metadata[kind]:
                    found[setting.name] = getattr(source, name, None) or setting.default
        return cls(
            **found,
            # What else gathers parameters without the distributed optimizer?
            layer_wise_optimizer=ddp.overlap_param_gather and not ddp.use_distributed_optimizer,
            unpadded_buckets=any(map(_unpadded, chunks)),
            finalize_hook=config.finalize_model_grads_func,
            idle_stage=idle_stage,
        )


def wrapped(chunk: Any) -> bool:
    """Whether a chunk is in Megatron's own DistributedDataParallel; torch's has the same name."""
    return any(base.__name__ == DDP for base in type(chunk).__mro__) and hasattr(chunk, "bucket_groups")


def _kind(chunk: Any) -> str:
    kind = type(chunk)
    return f"{kind.__module__}.{DDP}" if kind.__name__ == DDP else kind.__name__


def _unpadded(chunk: Any) -> bool:
    """Whether a bucket of a chunk cannot be divided among the ranks that all-reduce it."""
    return any(
        bucket.grad_data.numel() % group.data_parallel_group.size()
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        if hasattr(group, "data_parallel_group")  # else of the distributed optimizer, which pads
        for bucket in group.buckets
    )


DEFAULTS = {setting.name: setting.default for setting in fields(Setup)}
SOURCES = {setting.name: setting.metadata for setting in fields(Setup)}
