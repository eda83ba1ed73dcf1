"""The argument group of the entry, and its way into configuration objects.

The only module that knows option names; everything below takes dataclasses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_moo.aggregation import AGGREGATORS, ENTRY_POINTS, build_aggregator
from megatron_moo.distributed import GRANULARITIES, PREFERENCES, SCOPES, MooConfig
from megatron_moo.training.method_arguments import add_method_arguments, method_options, wrapper_options

OFF = "off"

Rules = tuple[tuple[Any, str], ...]  # (whether it is broken; option, reason, remedy)


def add_moo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--moo-*`` group to Megatron's parser (an ``extra_args_provider``)."""
    group = parser.add_argument_group(
        "megatron-moo", "bucket-level multi-objective gradients for multilingual fine-tuning"
    )
    _add_gradient_options(group)
    _add_data_options(group)
    _add_run_options(group)
    add_method_arguments(group)
    return parser


def _add_gradient_options(group: Any) -> None:
    group.add_argument(
        "--moo-method",
        default="mean",
        metavar="METHOD",
        help="how the languages' gradients become one. 'off': stock Megatron reduction on the same data; 'mean': the "
        f"same result through the exchange; others: {', '.join(name for name in AGGREGATORS if name != 'mean')}; a "
        f"method of your own: package.module:Class, or an entry point of the group {ENTRY_POINTS} (default: mean)",
    )
    group.add_argument(
        "--moo-granularity",
        default="bucket",
        choices=GRANULARITIES,
        help="the block within which a conflict is resolved; bucket size is Megatron's --ddp-bucket-size "
        "(default: bucket)",
    )
    group.add_argument(
        "--moo-scope",
        default="global",
        choices=SCOPES,
        help="global: a block is whole tensors, whatever the tensor-parallel size; local: every model-parallel "
        "rank decides alone (default: global)",
    )
    group.add_argument(
        "--moo-preference",
        default=None,
        choices=PREFERENCES,
        help="the mean a method falls back to without conflict "
        "(default: tokens with --calculate-per-token-loss, else slots)",
    )
    group.add_argument(
        "--moo-preference-weights",
        default=None,
        metavar="LANG=W,...",
        help="weights of --moo-preference given, one per language: en=1,sw=2",
    )
    group.add_argument(
        "--moo-waves",
        type=int,
        default=None,
        help="forward/backward passes per step (default: as few as give every language a data-parallel slot)",
    )


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--moo-data",
        type=Path,
        default=None,
        metavar="DIR",
        help="data made by tools/preprocess.py (holds manifest.json)",
    )
    group.add_argument(
        "--moo-languages",
        default=None,
        metavar="LANG,...",
        help="train on these only (default: all that the training split has)",
    )
    group.add_argument("--moo-train-split", default="train", help="split to train on (default: train)")
    group.add_argument(
        "--moo-valid-split",
        default="valid",
        help="split for Megatron's validation loss, if there (default: valid)",
    )


def _add_run_options(group: Any) -> None:
    group.add_argument(
        "--moo-run-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="run directory for config.json, metrics.jsonl, eval.json, and the defaults of --save, --load, "
        "--tensorboard-dir",
    )
    group.add_argument(
        "--moo-log-interval",
        type=int,
        default=10,
        help="steps between records of conflicts and weights per block (default: 10)",
    )
    group.add_argument(
        "--moo-eval-rows",
        type=Path,
        nargs="*",
        default=[],
        metavar="SPLIT_DIR",
        help="directories of LANG.jsonl rows to decode greedily after training, scored by exact match",
    )
    group.add_argument(
        "--moo-eval-limit",
        type=int,
        default=None,
        help="rows per language and directory (default: all of them)",
    )
    group.add_argument("--moo-eval-new-tokens", type=int, default=24, help="longest answer in tokens (default: 24)")
    group.add_argument(
        "--moo-eval-batch-size", type=int, default=64, help="prompts decoded at a time by each slot (default: 64)"
    )


def validate_moo_arguments(args: argparse.Namespace) -> None:
    """Refuse what Megatron's flags and ours cannot do together; fill in what depends on both.

    Raises:
        ValueError: naming option, reason and remedy.
    """
    if args.moo_data is None:
        raise ValueError("--moo-data is missing: the directory that tools/preprocess.py made")
    if args.moo_log_interval < 1:
        raise ValueError(f"--moo-log-interval must be at least 1, found {args.moo_log_interval}")
    if args.moo_preference is None:
        args.moo_preference = "tokens" if args.calculate_per_token_loss else "slots"
    options, wrappers = method_options(args), wrapper_options(args)
    if args.moo_method != OFF:
        try:
            build_aggregator(args.moo_method, wrappers=wrappers, **options)
        except ValueError as error:
            raise ValueError(f"--moo-method {args.moo_method}: {error}") from error
    elif options or wrappers:
        raise ValueError(
            f"--moo-method off combines nothing, but options of {', '.join([*options, *wrappers])} are given; drop them"
        )
    _refuse("this entry", _data_rules(args))
    if args.moo_method != OFF:
        _refuse(f"--moo-method {args.moo_method}", _exchange_rules(args))


def _refuse(who: str, rules: Rules) -> None:
    if broken := [text for hit, text in rules if hit]:
        raise ValueError(f"not supported with {who}:\n- " + "\n- ".join(broken))


def _data_rules(args: argparse.Namespace) -> Rules:
    """What language-pure batches, which are a function of the step's number, cannot do; whatever the method."""
    return (
        (
            args.dataloader_type != "external",
            f"--dataloader-type {args.dataloader_type}: batches come language by language from --moo-data; drop it",
        ),
        (
            args.iterations_to_skip,
            "--iterations-to-skip: the language of a step follows from its number; drop it",
        ),
        (
            args.rampup_batch_size or getattr(args, "step_batch_size_schedule", None),
            "--rampup-batch-size / --step-batch-size-schedule: a step needs the same number of rows throughout; "
            "drop it",
        ),
        (args.context_parallel_size > 1, "--context-parallel-size > 1: not supported yet; set it to 1"),
        (
            getattr(args, "eval_micro_batch_size", None) not in (None, args.micro_batch_size)
            or getattr(args, "eval_global_batch_size", None) not in (None, args.global_batch_size),
            "--eval-micro-batch-size / --eval-global-batch-size: validation batches have the training sizes; drop them",
        ),
        (
            args.moo_eval_rows
            and args.sequence_parallel
            and args.max_position_embeddings % args.tensor_model_parallel_size,
            "--moo-eval-rows with --sequence-parallel: decoding cuts up to --max-position-embeddings tokens into "
            "tensor-parallel parts; make it a multiple of --tensor-model-parallel-size",
        ),
    )


def _exchange_rules(args: argparse.Namespace) -> Rules:
    """What the exchange cannot do; ``upstream.unsupported`` refuses it too, but when files have been written."""
    return (
        (
            args.moo_preference == "tokens" and not args.calculate_per_token_loss,
            "--moo-preference tokens: Megatron hands on token counts only with --calculate-per-token-loss; add it, or "
            "use --moo-preference slots",
        ),
        (
            getattr(args, "save_wgrads_interval", None),
            "--save-wgrads-interval: there is no summed gradient to save while languages are kept apart; drop it",
        ),
        (
            args.expert_model_parallel_size > 1 or getattr(args, "num_experts", None),
            "--num-experts, --expert-model-parallel-size > 1: mixtures of experts are not supported yet; "
            "use a dense model",
        ),
        (
            getattr(args, "gtp_weight_remat_size", 1) > 1 or getattr(args, "expert_gtp_weight_remat_size", 1) > 1,
            "--gtp-weight-remat-size > 1: its gradient reduction is not run; set it to 1",
        ),
        (
            args.virtual_pipeline_model_parallel_size,
            "--virtual-pipeline-model-parallel-size and its kin: interleaved stages are not tested yet; drop them",
        ),
        (
            args.use_megatron_fsdp or args.use_torch_fsdp2,
            "--use-megatron-fsdp / --use-torch-fsdp2: FSDP shards gradients before they can be told apart; drop it",
        ),
        (
            not args.use_distributed_optimizer,
            "all-reduce DDP has no gradient shard to combine into; add --use-distributed-optimizer",
        ),
        (
            getattr(args, "overlap_param_gather_with_optimizer_step", False),
            "--overlap-param-gather-with-optimizer-step: it turns bucketing off; drop it",
        ),
        (
            args.num_distributed_optimizer_instances > 1,
            "--num-distributed-optimizer-instances > 1: rows of other instances would never meet; set it to 1",
        ),
        (
            getattr(args, "ddp_reduce_scatter_with_fp32_accumulation", False),
            "--ddp-reduce-scatter-with-fp32-accumulation: the exchange takes the reduce-scatter's place; drop it",
        ),
        (
            args.ddp_average_in_collective,
            "--ddp-average-in-collective: rows are normalised per language instead; drop it",
        ),
        (
            args.reuse_grad_buf_for_mxfp8_param_ag,
            "--reuse-grad-buf-for-mxfp8-param-ag: gradient rows live in that buffer; drop it",
        ),
        (args.nccl_ub, "--use-nccl-ub: the exchange does not register its receive buffer; drop it"),
        (
            args.mtp_num_layers,
            "--mtp-num-layers: the extra embedding copies of multi-token prediction are not supported; drop it",
        ),
        (
            args.cuda_graph_impl != "none",
            f"--cuda-graph-impl {args.cuda_graph_impl}: a captured step would replay one assignment of languages for "
            "ever; set it to none",
        ),
    )


def moo_config(args: argparse.Namespace, objectives: list[str]) -> MooConfig:
    """The configuration that the arguments describe.

    Raises:
        ValueError: for weights of unknown or missing languages, or whatever ``MooConfig`` refuses.
    """
    weights = None
    if (args.moo_preference == "given") != (args.moo_preference_weights is not None):
        raise ValueError(
            f"--moo-preference given and --moo-preference-weights LANG=W,... go together; found --moo-preference "
            f"{args.moo_preference}, --moo-preference-weights {args.moo_preference_weights}"
        )
    if args.moo_preference_weights is not None:
        items = [_parse_weight(item) for item in args.moo_preference_weights.split(",")]
        given = dict(items)
        if set(given) != set(objectives) or len(items) != len(given):
            raise ValueError(
                f"--moo-preference-weights must name each of {', '.join(objectives)} once; "
                f"found {', '.join(name for name, _ in items)}"
            )
        weights = [given[name] for name in objectives]
    return MooConfig(
        objectives=objectives,
        method=args.moo_method,
        method_options=method_options(args),
        wrappers=wrapper_options(args),
        granularity=args.moo_granularity,
        scope=args.moo_scope,
        preference=args.moo_preference,
        preference_weights=weights,
        waves=args.moo_waves,
        seed=args.seed,
    )


def _parse_weight(item: str) -> tuple[str, float]:
    name, _, value = item.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise ValueError(f"--moo-preference-weights: {item!r} is not LANG=NUMBER") from None
