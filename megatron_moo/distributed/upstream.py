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
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucket as Bucket,
)
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup as BucketGroup,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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
    "expert_tensor_group",
    "finish_step",
    "get_model_config",
    "get_pp_last_rank",
    "gradient_group",
    "has_expert_groups",
    "parameter_traits",
    "replace_bucket_groups",
    "unsupported",
    "wrap_padded",
]

# The module; megatron.core.distributed exports its function under the same name.
_finalize = sys.modules[finalize_model_grads.__module__]

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
        expert: reduced over the expert-data-parallel group, and cut by the tensor parallelism of experts.
    """

    name: str
    tensor_parallel: bool
    tp_reduction: str | None
    tied: bool
    copy: bool
    expert: bool = False


def parameter_traits(chunk: DistributedDataParallel) -> dict[torch.nn.Parameter, ParameterTraits]:
    """Traits of every trainable parameter of a wrapped model chunk."""
    config = get_model_config(chunk)
    module = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    layer_names = _global_layer_names(module)
    first_expert = _first_expert(chunk)
    traits = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        tied = bool(getattr(param, "shared_embedding", False))
        traits[param] = ParameterTraits(
            name=TIED_EMBEDDING if tied else _number_experts(_globalise(name, layer_names), first_expert),
            tensor_parallel=bool(getattr(param, "tensor_model_parallel", False)),
            tp_reduction=_tp_reduction(name, param, config),
            tied=tied,
            copy=not param_is_not_shared(param),
            expert=not getattr(param, "allreduce", True),
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


def has_expert_groups(chunk: DistributedDataParallel) -> bool:
    """Whether the model's experts are reduced over a group of their own; the same on every pipeline stage."""
    config = get_model_config(chunk)
    return getattr(config, "num_moe_experts", None) is not None and (
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size not in (None, config.tensor_model_parallel_size)
    )


def expert_tensor_group(chunk: DistributedDataParallel) -> torch.distributed.ProcessGroup:
    """The ranks that an expert's weights are cut over."""
    return parallel_state.get_expert_tensor_parallel_group(check_initialized=False) or chunk.tp_group


def _first_expert(chunk: DistributedDataParallel) -> int:
    """Number in the whole model of this rank's first expert."""
    experts, group = getattr(get_model_config(chunk), "num_moe_experts", None), chunk.ep_group
    return 0 if experts is None or group is None else experts // group.size() * group.rank()


def _number_experts(name: str, first: int) -> str:
    """Local expert number -> number in the whole model: experts in a list, or as weights of one grouped layer."""
    return re.sub(
        r"(\.local_experts\.|\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)",
        lambda match: f"{match.group(1)}{int(match.group(2)) + first}",
        name,
    )


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

    Returns the new groups, in the order in which backward fills them; those of experts last.
    """
    made = []
    for place in ("bucket_groups", "expert_parallel_bucket_groups"):
        stock = getattr(chunk, place)
        groups = [make(old) for old in stock]
        by_old = dict(zip(map(id, stock), groups, strict=True))
        for old, new in zip(stock, groups, strict=True):
            if old.next_param_gather_bucket_group is not None:
                new.next_param_gather_bucket_group = by_old[id(old.next_param_gather_bucket_group)]
            for param in new.params:
                chunk.param_to_bucket_group[param] = new
        setattr(chunk, place, groups)
        made += groups
    return made


def gradient_group(group: BucketGroup) -> torch.distributed.ProcessGroup:
    """The ranks over which a bucket group's gradients are reduced."""
    if group.ddp_config.use_distributed_optimizer:
        return group.intra_distributed_optimizer_instance_group
    return group.data_parallel_group


def wrap_padded(
    module: torch.nn.Module, config: Any, ddp_config: Any, pg_collection: Any, bucket_size: int | None
) -> DistributedDataParallel:
    """Megatron's DDP without distributed optimizer, in buckets that its ranks divide, as the exchange needs them.

    Stock Megatron pads buckets for the distributed optimizer only. The layout is the same here: aligned parameters, a
    bucket of its own for a tied embedding, and room to divide each bucket among its ranks.
    """
    layout = DistributedOptimizer.compute_full_param_layout(
        [param for param in module.parameters() if param.requires_grad],
        bucket_size,
        pg_collection.dp_cp.size(),
        ddp_config,
        expert_data_parallel_world_size=pg_collection.expt_dp.size(),
    )
    for buffer in layout.layouts.values():
        # Without the optimizer the padding is nobody's: to DDP it is gradient like any other, and stays zero.
        buffer.per_bucket_numel_unpadded[:] = [end - start for start, end in buffer.bucket_indices]
    return DistributedDataParallel(config, ddp_config, module, pg_collection=pg_collection, full_param_layout=layout)


def finish_step(chunks: list[torch.nn.Module], pg_collection: Any = None) -> None:
    """What Megatron's ``finalize_model_grads`` does besides gradients: routers' biases, counters of a step."""
    config = get_model_config(chunks[0])
    if config.moe_router_enable_expert_bias:
        group = getattr(pg_collection, "tp_dp_cp", None)
        if group is None:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        _finalize._update_router_expert_bias(chunks, config, tp_dp_cp_group=group)
    if config.moe_router_load_balancing_type == "quantile_balancing":
        _finalize._update_router_qb_beta(chunks, config, dp_cp_group=chunks[0].dp_cp_group)
    _finalize.reset_model_temporary_tensors(config, chunks)


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
    trains = all(chunk.bucket_groups + chunk.expert_parallel_bucket_groups for chunk in chunks)
    mine = torch.tensor([int(trains)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MIN, group=chunks[0].pp_group)
    return bool(mine)


def unsupported(chunks: list[torch.nn.Module]) -> list[str]:
    """What of these wrapped chunks the exchange cannot do; each entry names option, reason and remedy.

    Collective over the pipeline stages, unless the chunks are not Megatron's DistributedDataParallel.
    """
    # Not at the top: ``python -m megatron_moo.distributed.support`` imports this package first.
    from megatron_moo.distributed import settings, support

    wrapped = all(map(settings.wrapped, chunks))
    problems = support.problems(settings.Setup.from_chunks(chunks, wrapped and not every_stage_trains(chunks)))
    if not wrapped:
        return problems
    # A stage that alone went on would wait for the others for ever.
    stages: list[list[str]] = [[] for _ in range(chunks[0].pp_group.size())]
    torch.distributed.all_gather_object(stages, problems, group=chunks[0].pp_group)
    return list(dict.fromkeys(text for stage in stages for text in stage))
