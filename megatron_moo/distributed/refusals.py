"""The table of features, second part: what is refused at start-up, why, and what to do instead.

Texts are read by the user: a message is options, value found, reason, remedy.
"""

from __future__ import annotations

from megatron_moo.distributed.features import Row
from megatron_moo.distributed.settings import DDP, Setup


def _rebalances_globally(setup: Setup) -> bool:
    kinds = setup.moe_router_load_balancing_type
    return "global_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds)


def _other_validation_sizes(setup: Setup) -> bool:
    return setup.eval_micro_batch_size not in (None, setup.micro_batch_size) or setup.eval_global_batch_size not in (
        None,
        setup.global_batch_size,
    )


REFUSED = (
    Row(
        "FSDP",
        "--use-megatron-fsdp, --use-torch-fsdp2",
        "refused",
        f"the model must be wrapped in Megatron's {DDP}, as FSDP shards gradients before they can be told apart",
        "drop it",
        ("wrapper",),
    ),
    Row(
        "several optimizer instances",
        "--num-distributed-optimizer-instances > 1",
        "refused",
        "rows of other instances would never meet",
        "set it to 1",
        ("num_distributed_optimizer_instances",),
    ),
    Row(
        "reduce-scatter that accumulates in fp32",
        "--ddp-reduce-scatter-with-fp32-accumulation",
        "refused",
        "the exchange takes the reduce-scatter's place, and accumulates in fp32",
        "drop it",
        ("fp32_reduce_scatter",),
    ),
    Row(
        "average inside the collective",
        "--ddp-average-in-collective",
        "refused",
        "rows are normalised per objective instead",
        "drop it",
        ("average_in_collective",),
    ),
    Row(
        "gradients accumulated outside the buffer",
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        "refused",
        "these gradients are in another place than the bucket that is sent",
        "drop it; --accumulate-allreduce-grads-in-fp32 is fp32 for all",
        ("fp32_local_accumulation",),
    ),
    Row(
        "gradient buffer reused for MXFP8 parameters",
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "refused",
        "gradient rows live in that buffer",
        "drop it",
        ("reuse_grad_buf",),
    ),
    Row(
        "NCCL user buffers",
        "--use-nccl-ub",
        "refused",
        "the exchange does not register its receive buffer",
        "drop it",
        ("nccl_ub",),
    ),
    Row(
        "all-reduce in unpadded buckets",
        "no --use-distributed-optimizer, wrapped by Megatron itself",
        "refused",
        "a bucket must be divided among the ranks that reduce it, and Megatron pads them for the distributed optimizer "
        "only",
        "add --use-distributed-optimizer, or wrap the model with megatron_moo.distributed.upstream.wrap_padded",
        ("unpadded_buckets",),
    ),
    Row(
        "a stage without trainable parameters",
        "requires_grad = False: a pipeline stage has no trainable parameter",
        "refused",
        "it has no gradient bucket to exchange",
        "move the pipeline cut, or train something on every stage",
        ("idle_stage",),
    ),
    Row(
        "another finalize hook",
        "config.finalize_model_grads_func is already set",
        "refused",
        "it would run in place of the combination",
        "leave it unset",
        ("finalize_hook",),
    ),
    Row(
        "delayed weight gradients, combined expert schedule",
        "--delay-wgrad-compute, --overlap-moe-expert-parallel-comm, --overlap-dispatch-backward-with-experts-wgrad",
        "refused",
        "weight gradients come after their backward hook, in a schedule that was never tried with waves",
        "drop them",
        ("delay_wgrad_compute", "overlap_moe_expert_parallel_comm", "overlap_dispatch_backward"),
    ),
    Row(
        "deferred embedding gradients",
        "--defer-embedding-wgrad-compute",
        "refused",
        "the output layer's gradient would be added to a bucket that has been sent",
        "drop it",
        ("defer_embedding_wgrad_compute",),
    ),
    Row(
        "CUDA graphs",
        "--cuda-graph-impl, --optimizer-cuda-graph",
        "refused",
        "a captured step would replay one assignment of languages for ever",
        "set it to none, and drop --optimizer-cuda-graph",
        ("cuda_graph_impl", "optimizer_cuda_graph"),
    ),
    Row(
        "saved weight gradients",
        "--save-wgrads-interval",
        "refused",
        "there is no summed gradient to save while languages are kept apart",
        "drop it",
        ("save_wgrads_interval",),
    ),
    Row(
        "weights gathered in parts (GTP)",
        "--tensor-parallel-num-weight-shards, --expert-tensor-parallel-num-weight-shards (config.gtp_weight_remat_size "
        "> 1)",
        "refused",
        "its own reduction of gradients is not run",
        "leave them out",
        ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"),
    ),
    Row(
        "context parallelism without Transformer Engine",
        "--context-parallel-size > 1 with --transformer-impl local",
        "refused",
        "Megatron's own attention sees one part of a sequence",
        "take --transformer-impl transformer_engine, or set it to 1",
        ("context_parallel_size", "transformer_impl"),
        lambda setup: setup.context_parallel_size > 1 and setup.transformer_impl == "local",
    ),
    Row(
        "hierarchical and hybrid context parallelism",
        "--hierarchical-context-parallel-sizes, --hybrid-context-parallel",
        "refused",
        "the parts of a sequence may lie on several slots, and no test has seen their groups",
        "take one --context-parallel-size",
        ("hierarchical_context_parallel_sizes", "hybrid_context_parallel"),
    ),
    Row(
        "multi-token prediction",
        "--mtp-num-layers",
        "refused",
        "its copies of the embedding on further stages are not summed",
        "drop it",
        ("mtp_num_layers",),
    ),
    Row(
        "learnable softmax offsets, cut over ranks",
        "--softmax-type learnable with --tensor-model-parallel-size > 1",
        "refused",
        "Megatron does not mark the offsets as cut, so that one rank's alone would count in a block",
        "take --softmax-type vanilla or --tensor-model-parallel-size 1",
        ("softmax_type", "tensor_model_parallel_size"),
        lambda setup: setup.softmax_type == "learnable" and setup.tensor_model_parallel_size > 1,
    ),
    Row(
        "load balancing over all ranks",
        "--moe-router-load-balancing-type global_aux_loss",
        "refused",
        "the statistics of all languages would enter the gradient of each",
        "take aux_loss or seq_aux_loss",
        ("moe_router_load_balancing_type",),
        _rebalances_globally,
    ),
    Row(
        "experts in one tensor",
        "--moe-single-grouped-weight, --moe-single-grouped-bias",
        "refused",
        "experts that share a tensor cannot be blocks of their own",
        "drop it",
        ("moe_single_grouped_weight", "moe_single_grouped_bias"),
    ),
    Row(
        "conditional embedders, flextron routers",
        "config.has_cond_embedder, config.flextron",
        "refused",
        "their gradients are reduced over stages after the backward pass, which is not run",
        "train a model without them",
        ("has_cond_embedder", "flextron"),
    ),
    Row(
        "layer-wise optimizers (Muon, Lion, SOAP with shards)",
        "--optimizer muon and others with --use-distributed-optimizer; --optimizer dist_muon",
        "refused",
        "they lay gradients out by layer, not in the shards that are combined",
        "take --optimizer adam, or drop --use-distributed-optimizer",
        ("layer_wise_optimizer",),
    ),
    Row(
        "parameters gathered in the optimizer's step",
        "--overlap-param-gather-with-optimizer-step",
        "refused",
        "it turns bucketing off",
        "drop it",
        ("overlap_param_gather_with_optimizer_step",),
    ),
    Row(
        "preference by tokens without token counts",
        "--moo-preference tokens without --calculate-per-token-loss",
        "refused",
        "Megatron hands on token counts only with --calculate-per-token-loss",
        "add it, or use --moo-preference slots",
        ("preference", "calculate_per_token_loss"),
        lambda setup: setup.preference == "tokens" and not setup.calculate_per_token_loss,
    ),
)

ENTRY = (
    Row(
        "packed sequences cut into parts",
        "--moo-pack with --context-parallel-size",
        "entry",
        "each sample of a sequence would have to be cut by itself",
        "drop one of them",
        ("packed", "context_parallel_size"),
        lambda setup: setup.packed and setup.context_parallel_size > 1,
    ),
    Row(
        "packed sequences in other attention",
        "--moo-pack with --experimental-attention-variant",
        "entry",
        "nobody has tried them there",
        "drop one of them",
        ("packed", "experimental_attention_variant"),
        lambda setup: setup.packed and setup.experimental_attention_variant,
    ),
    Row(
        "other data loaders",
        "--dataloader-type",
        "entry",
        "batches come language by language from --blend-manifest or --moo-data",
        "drop it",
        ("dataloader_type",),
    ),
    Row(
        "skipped steps",
        "--iterations-to-skip",
        "entry",
        "the language of a step follows from its number",
        "drop it",
        ("iterations_to_skip",),
    ),
    Row(
        "batch sizes that change",
        "--rampup-batch-size, --step-batch-size-schedule",
        "entry",
        "a step needs the same number of rows throughout",
        "drop it",
        ("rampup_batch_size", "step_batch_size_schedule"),
    ),
    Row(
        "other sizes in validation",
        "--eval-micro-batch-size, --eval-global-batch-size",
        "entry",
        "validation batches have the training sizes",
        "drop them",
        ("eval_micro_batch_size", "eval_global_batch_size"),
        _other_validation_sizes,
    ),
    Row(
        "decoding of lengths that ranks cannot share",
        "--moo-eval-rows with --sequence-parallel",
        "entry",
        "decoding cuts up to --max-position-embeddings tokens into tensor-parallel parts",
        "make it a multiple of --tensor-model-parallel-size",
        ("eval_rows", "sequence_parallel", "max_position_embeddings", "tensor_model_parallel_size"),
        lambda setup: (
            setup.eval_rows
            and setup.sequence_parallel
            and setup.max_position_embeddings % setup.tensor_model_parallel_size
        ),
    ),
    Row(
        "validation to the end of the data, or on several sets",
        "--full-validation, --multiple-validation-sets",
        "entry",
        "validation reads a stream without end",
        "take --eval-iters",
        ("full_validation", "multiple_validation_sets"),
    ),
    Row(
        "SGD with shards",
        "--optimizer sgd with --use-distributed-optimizer",
        "entry",
        "Megatron's distributed optimizer works with Adam",
        "take --optimizer adam, or drop --use-distributed-optimizer",
        ("optimizer", "use_distributed_optimizer"),
        lambda setup: setup.optimizer == "sgd" and setup.use_distributed_optimizer,
    ),
    Row(
        "no optimizer",
        "--freeze-all-layers",
        "entry",
        "nothing is trained",
        "drop it; --skip-train evaluates",
        ("freeze_all_layers",),
    ),
    Row(
        "hybrid models",
        "--hybrid-layer-pattern",
        "entry",
        "it builds GPT models",
        "drop it, or use install() in a program of your own",
        ("hybrid_layer_pattern",),
    ),
    Row(
        "reinforcement learning",
        "--perform-rl-step",
        "entry",
        "it trains on the rows of --moo-data",
        "drop it",
        ("perform_rl_step",),
    ),
    Row(
        "experts made of a dense model",
        "--moe-use-upcycling",
        "entry",
        "Megatron builds a second model for it, and the exchange would be put into that one",
        "convert the checkpoint in a run of stock Megatron, and start from the result",
        ("moe_use_upcycling",),
    ),
    Row(
        "other data",
        "--data-path, --per-split-data-args-path, --mock-data, --sft",
        "entry",
        "batches come from --blend-manifest or --moo-data, and these would be passed over",
        "drop them",
        ("data_path", "per_split_data_args_path", "mock_data", "sft"),
    ),
    Row(
        "another loss, or other positions in a sample",
        "--logits-load-dir, --eod-mask-loss, --reset-position-ids, --reset-attention-mask",
        "entry",
        "the loss is the cross entropy of the masked tokens, a sample is one sequence; these would be passed over",
        "drop them; the mask is made by tools/preprocess.py",
        ("logits_load_dir", "eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
    ),
)
