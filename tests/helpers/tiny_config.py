"""What a tiny GPT (``tiny_gpt.py``) may be, in Megatron's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

VOCAB, SEQ, HIDDEN, LAYERS, HEADS = 64, 8, 16, 4, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BIAS_UPDATE_RATE = 0.05  # of the routers' expert bias
BARRED_EXPERT, BARRED_LANGUAGE = 3, 0  # with Variant.barred


@dataclass(frozen=True)
class Variant:
    """What differs between tiny models.

    Attributes:
        attention: False leaves the attention out: each position is by itself, and so may be each context-parallel rank.
        latent: multi-latent attention.
        dtype: of weights and activations.
        experts: of every layer's mixture; 0: a dense model.
        dispatcher: how tokens get to experts; gloo cannot do ``alltoall`` where experts are cut and spread.
        shared_expert, expert_bias: parts of the mixture.
        aux_loss: coefficient of the load-balancing loss.
        barred: tokens of language BARRED_LANGUAGE never reach BARRED_EXPERT of any layer: its weights keep them away,
            and no other language has a token in common with it.
        recompute: "", "full" or "selective" recomputation of activations.
        frozen: pattern of the names of parameters that are not trained, matched from the start of the name.
    """

    tied: bool = True
    sequence_parallel: bool = False
    gated: bool = False
    qk_layernorm: bool = False
    normalization: str = "RMSNorm"
    per_token_loss: bool = True
    attention: bool = True
    latent: bool = False
    dtype: str = "fp32"
    experts: int = 0
    dispatcher: str = "alltoall"
    shared_expert: bool = False
    expert_bias: bool = False
    aux_loss: float = 0.0
    barred: bool = False
    recompute: str = ""
    frozen: str | None = None


def transformer_config(variant: Variant) -> TransformerConfig:
    """Megatron's configuration, on the layout of this process."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    settings: dict[str, Any] = dict(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=2 * HIDDEN,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=variant.sequence_parallel and tp > 1,
        gated_linear_unit=variant.gated,
        qk_layernorm=variant.qk_layernorm,
        normalization=variant.normalization,
        add_bias_linear=not (variant.gated or variant.experts or variant.latent),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=DTYPES[variant.dtype],
        pipeline_dtype=DTYPES[variant.dtype],
        bf16=variant.dtype == "bf16",
        fp16=variant.dtype == "fp16",
        calculate_per_token_loss=variant.per_token_loss,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        variable_seq_lengths=False,
    )
    if settings["virtual_pipeline_model_parallel_size"] is not None:
        # Megatron's default there. In a batch gloo would mix up the two messages of a pair of stages: it matches them
        # by their order.
        settings.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if variant.recompute == "full":
        settings.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif variant.recompute:
        settings.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    if variant.experts:
        settings.update(
            num_moe_experts=variant.experts,
            moe_router_topk=2,
            moe_ffn_hidden_size=2 * HIDDEN,
            expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
            expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
            moe_token_dispatcher_type=variant.dispatcher,
            moe_router_load_balancing_type="aux_loss" if variant.aux_loss else "none",
            moe_aux_loss_coeff=variant.aux_loss,
            moe_shared_expert_intermediate_size=2 * HIDDEN if variant.shared_expert else None,
        )
    if variant.expert_bias:
        settings.update(
            moe_router_enable_expert_bias=True,
            moe_router_score_function="sigmoid",
            moe_router_bias_update_rate=BIAS_UPDATE_RATE,
        )
    if variant.latent:
        sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=4, v_head_dim=8, kv_channels=8)
        return MLATransformerConfig(rope_type="rope", **sizes, **settings)
    return TransformerConfig(**settings)


class _LatentCoreAttention(DotProductAttention):
    """Megatron's local attention as multi-latent attention calls it; queries and values must be of one size."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        assert k_channels == v_channels
        super().__init__(*args, **kwargs)


def layer_spec(variant: Variant) -> ModuleSpec:
    """Megatron's local layer."""
    spec = get_gpt_layer_local_spec(
        num_experts=variant.experts or None,
        qk_layernorm=variant.qk_layernorm,
        multi_latent_attention=variant.latent,
        normalization=variant.normalization,
    )
    if variant.latent:
        spec.submodules.self_attention.submodules.core_attention = _LatentCoreAttention
    if not variant.attention:
        spec.submodules.input_layernorm = IdentityOp
        spec.submodules.self_attention = IdentityOp
        spec.submodules.self_attn_bda = IdentityFuncOp
    return spec
