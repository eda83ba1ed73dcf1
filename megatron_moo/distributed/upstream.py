"""Every contact with private names of megatron-core, in one file.

A new megatron-core release that moves one of them breaks this module and ``tests/unit/distributed/test_upstream.py``,
which says which seam moved, and nothing else. Written against megatron-core 0.19.2.

The seams:

1. ``_ParamAndGradBucketGroup``: the object whose ``start_grad_sync``/``finish_grad_sync`` a DDP backward hook
   reaches. Ours replaces it, see :func:`replace_bucket_groups`.
2. ``config.finalize_model_grads_func``: a public field, called by every pipeline schedule after the last backward.
3. The forward/backward function, wrapped for waves (``sync.py``); its keyword arguments are public.
4. Parameter attributes that say how a gradient is spread over ranks: :func:`parameter_traits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucket as Bucket,
)
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup as BucketGroup,
)
from megatron.core.pipeline_parallel.utils import get_pp_last_rank
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import get_attr_wrapped_model, get_model_config

__all__ = [
    "Bucket",
    "BucketGroup",
    "DistributedDataParallel",
    "ParameterTraits",
    "bucket_parameters",
    "embedding_group",
    "every_stage_trains",
    "get_model_config",
    "get_pp_last_rank",
    "parameter_traits",
    "replace_bucket_groups",
    "unsupported",
]

TIED_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ParameterTraits:
    """How one parameter's gradient is spread over the model-parallel ranks.

    Attributes:
        name: its name in the whole model, the same on every layout (layers numbered globally; a tied output
            layer carries the name of the embedding it copies).
        tensor_parallel: each tensor-parallel rank holds a different part.
        tp_reduction: ``"sum"`` or ``"mean"`` where the gradient is partial on each tensor-parallel rank.
        tied: lives on the first and the last pipeline stage, which must agree on the sum of both gradients.
        copy: the second of the two, not to be counted again in sums over pipeline stages.
    """

    name: str
    tensor_parallel: bool
    tp_reduction: str | None
    tied: bool
    copy: bool


def parameter_traits(chunk: DistributedDataParallel) -> dict[torch.nn.Parameter, ParameterTraits]:
    """Traits of every trainable parameter of a wrapped model chunk."""
    config = get_model_config(chunk)
    module = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    layer_names = _global_layer_names(module)
    traits = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        tied = bool(getattr(param, "shared_embedding", False))
        traits[param] = ParameterTraits(
            name=TIED_EMBEDDING if tied else _globalise(name, layer_names),
            tensor_parallel=bool(getattr(param, "tensor_model_parallel", False)),
            tp_reduction=_tp_reduction(name, param, config),
            tied=tied,
            copy=not param_is_not_shared(param),
        )
    return traits


def _tp_reduction(name: str, param: torch.nn.Parameter, config) -> str | None:
    # The rule of megatron's own _allreduce_non_tensor_model_parallel_grads.
    if getattr(param, "average_gradients_across_tp_domain", False):
        return "mean"
    if config.sequence_parallel and getattr(param, "sequence_parallel", False):
        return "sum"
    if config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name):
        return "sum"
    return None


def _global_layer_names(module: torch.nn.Module) -> dict[str, str]:
    """Local layer prefix -> prefix with the layer's number in the whole model, counted from 0."""
    renamed = {}
    for name, child in module.named_modules():
        match = re.fullmatch(r"(.*layers)\.(\d+)", name)
        if match and hasattr(child, "layer_number"):
            renamed[name] = f"{match.group(1)}.{child.layer_number - 1}"
    return renamed


def _globalise(name: str, layer_names: dict[str, str]) -> str:
    for local, whole in layer_names.items():
        if name.startswith(local + "."):
            return whole + name[len(local) :]
    return name


def bucket_parameters(buffer, bucket: Bucket) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """(parameter, start, end) inside ``bucket.grad_data``, in memory order.

    From the buffer's index map: it holds the distributed optimizer's padding, where ``bucket.param_to_index`` of some
    releases does not.
    """
    spans = (
        (param, start - bucket.offset, end - bucket.offset)
        for param, (start, end, bucket_id) in buffer.param_index_map.items()
        if bucket_id == bucket.bucket_id
    )
    return iter(sorted(spans, key=lambda span: span[1]))


def replace_bucket_groups(
    chunk: DistributedDataParallel, make: Callable[[BucketGroup], BucketGroup]
) -> list[BucketGroup]:
    """Put ``make(group)`` in the place of every bucket group of a chunk, with the links between them.

    Returns the new groups, in the order in which backward fills them.
    """
    groups = [make(old) for old in chunk.bucket_groups]
    by_old = dict(zip(map(id, chunk.bucket_groups), groups, strict=True))
    for old, new in zip(chunk.bucket_groups, groups, strict=True):
        if old.next_param_gather_bucket_group is not None:
            new.next_param_gather_bucket_group = by_old[id(old.next_param_gather_bucket_group)]
        for param in new.params:
            chunk.param_to_bucket_group[param] = new
    chunk.bucket_groups = groups
    return groups


def embedding_group(pg_collection: Any = None) -> torch.distributed.ProcessGroup | None:
    """First and last pipeline stage of this rank's model replica; None where it is on neither or they are one.

    Args:
        pg_collection: what the schedule hands to ``finalize_model_grads``; None means Megatron's global groups.
    """
    group = getattr(pg_collection, "embd", None) or parallel_state.get_embedding_group(check_initialized=False)
    if not isinstance(group, torch.distributed.ProcessGroup) or group.size() < 2:
        return None
    if torch.distributed.get_rank() not in torch.distributed.get_process_group_ranks(group):
        return None
    return group


def every_stage_trains(chunks: list[DistributedDataParallel]) -> bool:
    """Whether each pipeline stage has a trainable parameter; collective over the stages, the same answer on all."""
    mine = torch.tensor([int(all(chunk.bucket_groups for chunk in chunks))], device=torch.cuda.current_device())
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN, group=chunks[0].pp_group)
    return bool(mine)


def unsupported(chunks: list[torch.nn.Module]) -> list[str]:
    """What of these wrapped chunks the exchange cannot do; each entry names option, reason and remedy."""
    if not all(isinstance(chunk, DistributedDataParallel) for chunk in chunks):
        kinds = ", ".join(sorted({type(chunk).__name__ for chunk in chunks}))
        return [
            f"the model must be wrapped in Megatron's DistributedDataParallel, found {kinds}: FSDP shards gradients "
            "before they can be told apart; drop --use-megatron-fsdp / --use-torch-fsdp2"
        ]
    config, ddp = get_model_config(chunks[0]), chunks[0].ddp_config
    cp = chunks[0].dp_cp_group.size() // chunks[0].dp_group.size()
    rules = (
        (
            len(chunks) > 1,
            "--virtual-pipeline-model-parallel-size: interleaved stages are not tested yet; drop it",
        ),
        (
            not ddp.use_distributed_optimizer,
            "all-reduce DDP has no shard to combine into; add --use-distributed-optimizer",
        ),
        (
            ddp.num_distributed_optimizer_instances > 1,
            "--num-distributed-optimizer-instances > 1: rows of other instances would never meet; set it to 1",
        ),
        (
            ddp.reduce_scatter_with_fp32_accumulation,
            "--ddp-reduce-scatter-with-fp32-accumulation: the exchange replaces the reduce-scatter (and accumulates "
            "in fp32); drop it",
        ),
        (
            ddp.reuse_grad_buf_for_mxfp8_param_ag,
            "--reuse-grad-buf-for-mxfp8-param-ag: gradient rows live in that buffer; drop it",
        ),
        (
            ddp.average_in_collective,
            "--ddp-average-in-collective: rows are normalised per objective instead; drop it",
        ),
        (ddp.nccl_ub, "--use-nccl-ub: the exchange does not register its receive buffer; drop it"),
        (
            cp > 1,
            "--context-parallel-size > 1: rows of context-parallel peers are not folded yet; set it to 1",
        ),
        (
            bool(chunks[0].expert_parallel_buffers) or getattr(config, "num_moe_experts", None) is not None,
            "--num-experts: mixtures of experts are not supported yet (an expert's gradient mixes the tokens of its "
            "peers, and the routers' updates after the backward pass are not run); use a dense model",
        ),
        (
            max(getattr(config, "gtp_weight_remat_size", 1), getattr(config, "expert_gtp_weight_remat_size", 1)) > 1,
            "--gtp-weight-remat-size > 1: its gradient reduction is not run; set it to 1",
        ),
        (
            getattr(config, "has_cond_embedder", False) or getattr(config, "flextron", False),
            "conditional embedders and flextron routers are not supported: their gradients are not reduced over stages",
        ),
        (
            bool(getattr(config, "mtp_num_layers", None)),
            "--mtp-num-layers: the extra embedding copies of multi-token prediction are not supported; drop it",
        ),
        (
            getattr(config, "cuda_graph_impl", "none") != "none",
            "--cuda-graph-impl: a captured step would replay one assignment of languages for ever; set it to none",
        ),
        (
            any(bucket.params_with_extra_main_grads for g in chunks[0].bucket_groups for bucket in g.buckets),
            "gradients accumulated outside the communication buffer (main_grads in another dtype) are not supported; "
            "use --accumulate-allreduce-grads-in-fp32",
        ),
    )
    return [text for broken, text in rules if broken]
