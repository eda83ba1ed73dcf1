"""The fine-tuning entry: Megatron's ``pretrain`` with language-pure data and combined gradients.

    torchrun --nproc-per-node 4 -m megatron_moo.finetune --moo-data data/locale --moo-method cagrad \\
        --moo-granularity layer --moo-run-dir runs/first  <Megatron's own flags>

Everything that Megatron does (arguments, schedules, optimizer, checkpoints, signals) stays Megatron's. Added are the
argument group of ``arguments.py``, the data of ``megatron_moo.data``, the hooks of ``seams.py`` and what a run writes.

Legend: K objectives (languages), D data-parallel slots, W waves, M micro-batches of a slot in a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tensorboard_writer, pretrain, print_rank_0, print_rank_last
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_moo.data.batches import MicroBatches
from megatron_moo.data.manifest import Manifest
from megatron_moo.data.rows import EvalRow
from megatron_moo.data.sampler import LanguagePureSampler
from megatron_moo.distributed import BucketLevelMoo, MooConfig, install
from megatron_moo.training import metrics
from megatron_moo.training.arguments import OFF, add_moo_arguments, moo_config, validate_moo_arguments
from megatron_moo.training.builder import MooGPTModelConfig
from megatron_moo.training.evaluation import check_lengths, evaluate, read_splits, write_evaluation
from megatron_moo.training.seams import hooked_training_loop, parse_arguments


@dataclasses.dataclass
class Plan:
    """What is settled before Megatron starts: the data, who works on what, and how gradients are combined."""

    manifest: Manifest
    config: MooConfig
    sampler: LanguagePureSampler
    micro_batches_per_wave: int
    evaluation: dict[str, list[EvalRow]]

    @property
    def objectives(self) -> list[str]:
        return list(self.config.objectives)


class Run:
    """One fine-tuning run in this process: hooks for Megatron's loop, and what they need to share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model: list[torch.nn.Module] = []
        self.moo: BucketLevelMoo | None = None
        self._losses = metrics.LossRecorder(len(plan.objectives))
        self._file: metrics.MetricsFile | None = None
        self._batches_read = 0  # of the current step

    # -- hooks for pretrain --------------------------------------------------------------------------------------

    def on_wrapped(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Post-wrap hook of the model builder: put the exchange in."""
        self.model = model
        if get_args().moo_method != OFF and not get_args().skip_train:
            self.moo = install(model, self.plan.config, self.plan.sampler.assign, self._losses.sums)
        return model

    def datasets(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Iterator | None, Iterator | None, None]:
        """Megatron's dataset provider, for ``--dataloader-type external``: this slot's iterators."""
        args = get_args()
        # By the step's number, as the exchange: a resumed run may have another batch size.
        train = self._batches(args.moo_train_split, args.iteration)
        valid = None
        if _has_validation(args, self.plan.manifest):
            valid = self._batches(args.moo_valid_split, args.consumed_valid_samples // args.global_batch_size)
        return train, valid, None

    def _batches(self, split: str, start_step: int) -> MicroBatches:
        args = get_args()
        return MicroBatches(
            self.plan.manifest,
            split,
            self.plan.sampler,
            slot=parallel_state.get_data_parallel_rank(),
            micro_batch_size=args.micro_batch_size,
            micro_batches_per_wave=self.plan.micro_batches_per_wave,
            seq_length=args.seq_length,
            pad_id=self.plan.manifest.tokenizer.eod,
            start_step=start_step,
        )

    def begin_step(self) -> int:
        """Called before the forward passes of a step, again if Megatron repeats it; returns the step's number."""
        self._losses.clear()
        self._batches_read = 0
        return get_args().curr_iteration

    def forward_step(self, batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
        """One micro-batch through this pipeline stage."""
        if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
            return model(None, None, None), None
        batch = dict(next(batches))  # a copy: Megatron's rerun machine keeps the original
        objective = int(batch.pop("objective"))
        if model.training:
            self._check_objective(objective)
        batch = {key: value.to(torch.cuda.current_device(), non_blocking=True) for key, value in batch.items()}
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, functools.partial(self._loss, batch["loss_mask"], objective if model.training else None)

    def _check_objective(self, objective: int) -> None:
        """The exchange takes the sampler's word for a row's language; so must the data."""
        wave, self._batches_read = self._batches_read // self.plan.micro_batches_per_wave, self._batches_read + 1
        step, slot = get_args().curr_iteration, parallel_state.get_data_parallel_rank()
        expected = int(self.plan.sampler.assign(step)[wave, slot])
        if objective != expected:
            names = self.plan.objectives
            raise RuntimeError(
                f"step {step}, wave {wave}, slot {slot}: the batch is {names[objective]}, the exchange expects "
                f"{names[expected]}: data and steps have come apart"
            )

    def _loss(self, mask: torch.Tensor, objective: int | None, losses: torch.Tensor) -> tuple:
        """Sum of token losses and number of tokens; Megatron divides as its flags say."""
        total = (losses.float() * mask).sum()
        tokens = mask.sum()
        if objective is not None:
            self._losses.add(objective, total, tokens)
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    def after_step(self, *, learning_rate: Any, iteration: int, grad_norm: Any) -> None:
        """Write what the step reports: losses every step, conflicts at intervals."""
        args = get_args()
        sums = self._losses.reduce(parallel_state.get_data_parallel_group())
        rows = None
        if self.moo is not None and iteration % args.moo_log_interval == 0:
            rows = metrics.gather_blocks(self.moo.record, parallel_state.get_pipeline_model_parallel_group())
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        step = metrics.step_fields(iteration, self.plan.objectives, sums, learning_rate, grad_norm)
        if args.moo_run_dir is not None:
            self._file = self._file or metrics.MetricsFile(args.moo_run_dir / "metrics.jsonl")
            self._file.write("step", **step)
            if rows is not None:
                self._file.write(
                    "blocks",
                    step=iteration,
                    method=args.moo_method,
                    granularity=args.moo_granularity,
                    objectives=self.plan.objectives,
                    blocks=rows,
                )
        self._report(step, rows)

    def _report(self, step: dict[str, Any], rows: list[dict[str, Any]] | None) -> None:
        writer = get_tensorboard_writer()
        if writer:
            for name, values in step["objectives"].items():
                if values["loss"] is not None:
                    writer.add_scalar(f"loss/{name}", values["loss"], step["step"])
        if rows is None:
            return
        shares = {
            key: metrics.mean_of(rows, key)
            for key in (
                "conflict_share",
                "control_share",
                "control_cosine",
                "norm_ratio",
                "gated_share",
                "kkt_residual",
            )
            if key in rows[0]
        }
        for key, value in shares.items():
            if writer and value is not None:
                writer.add_scalar(f"moo/{key}", value, step["step"])
        text = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in shares.items() if value is not None)
        print_rank_last(f" moo: step {step['step']}: {text}")

    # -- after training ------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Decode the evaluation rows and write eval.json into the run directory."""
        args = get_args()
        print_rank_0(f" moo: decoding {sum(map(len, self.plan.evaluation.values()))} prompts ...")
        counts = evaluate(
            self.model,
            self.plan.manifest.load_tokenizer(),
            self.plan.evaluation,
            max_new_tokens=args.moo_eval_new_tokens,
            seq_length=args.max_position_embeddings,
            batch_size=args.moo_eval_batch_size,
        )
        for split, languages in counts.items():
            cells = [cell for tasks in languages.values() for cell in tasks.values()]
            correct, total = (sum(cell[key] for cell in cells) for key in ("correct", "total"))
            print_rank_0(f" moo: exact match on {split}: {correct} of {total} ({correct / total:.3f})")
        if args.moo_run_dir is not None and args.rank == 0:
            write_evaluation(args.moo_run_dir / "eval.json", counts, method=args.moo_method, steps=self._steps(args))

    @staticmethod
    def _steps(args: Any) -> int:
        """Optimizer steps in the weights: all of the run's, or those of the checkpoint that is only evaluated."""
        return args.iteration if args.skip_train else args.train_iters


def prepare() -> Plan:
    """Parse and check everything that can be checked before the process group exists.

    Raises:
        ValueError: naming the option or file, the rule and the remedy.
    """
    plans: list[Plan] = []
    parse_arguments(add_moo_arguments, _defaults(sys.argv[1:]), lambda args: plans.append(_plan(args)))
    return plans[0]


def _plan(args: Any) -> Plan:
    validate_moo_arguments(args)
    manifest = Manifest.load(args.moo_data)
    objectives = _objectives(args, manifest)
    manifest = dataclasses.replace(manifest, objectives=tuple(objectives))
    if not _has_validation(args, manifest):
        args.eval_iters = 0  # or Megatron would ask for batches that nobody has
    _check_lengths(args, manifest)
    config = moo_config(args, objectives)
    if config.method != OFF:
        config.check_slots(args.data_parallel_size)
    waves = config.waves_for(args.data_parallel_size)
    unit = args.micro_batch_size * args.data_parallel_size * waves
    if args.global_batch_size % unit:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of {unit}: micro batch size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel slots x {waves} waves "
            f"({len(objectives)} languages)"
        )
    sampler = LanguagePureSampler(len(objectives), args.data_parallel_size, waves, seed=args.seed)
    evaluation = read_splits(args.moo_eval_rows, args.moo_eval_limit)
    check_lengths(evaluation, manifest.load_tokenizer(), args.max_position_embeddings)
    return Plan(manifest, config, sampler, args.global_batch_size // unit, evaluation)


def _check_lengths(args: Any, manifest: Manifest) -> None:
    """Say which samples are too long, and refuse a language none of whose samples fits."""
    splits = [args.moo_train_split] + [args.moo_valid_split] * _has_validation(args, manifest)
    for split in splits:
        for lang in manifest.objectives:
            corpus = manifest.corpus(split, lang, args.seq_length + 1)
            if corpus.dropped and args.rank == 0:
                print(
                    f" moo: {split}/{lang}: {corpus.dropped} of {corpus.dropped + len(corpus)} samples are longer than "
                    f"--seq-length {args.seq_length} and left out"
                )


def _objectives(args: Any, manifest: Manifest) -> list[str]:
    known = list(manifest.languages(args.moo_train_split))
    if args.moo_languages is None:
        return known
    chosen = [name.strip() for name in args.moo_languages.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(
            f"--moo-languages: no training data for {', '.join(unknown)} in {args.moo_data}; known: {', '.join(known)}"
        )
    return chosen


def _has_validation(args: Any, manifest: Manifest) -> bool:
    return set(manifest.objectives) <= set(manifest.splits.get(args.moo_valid_split, ()))


def _defaults(argv: list[str]) -> dict[str, Any]:
    """Defaults of Megatron's arguments that follow from ours; flags that are given win."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--moo-data", type=Path)
    early.add_argument("--moo-run-dir", type=Path)
    ours, _ = early.parse_known_args(argv)
    defaults: dict[str, Any] = {
        "dataloader_type": "external",
        "tokenizer_type": "NullTokenizer",
        "eval_interval": 1000,
        "save_interval": 1000,  # Megatron wants one with --save; it saves at the end and on a signal in any case
    }
    if ours.moo_data is not None:
        defaults["vocab_size"] = Manifest.load(ours.moo_data).tokenizer.vocab_size
    if ours.moo_run_dir is not None:
        checkpoints = str(ours.moo_run_dir / "checkpoints")
        defaults |= {
            "save": checkpoints,
            "load": checkpoints,
            "tensorboard_dir": str(ours.moo_run_dir / "tensorboard"),
        }
    return defaults


def run() -> None:
    """Fine-tune and evaluate, as the command line says. Exits with 2 on bad input."""
    try:
        plan = prepare()
    except ValueError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    args = get_args()
    if args.exit_signal_handler:
        # ^C asks for the same as Slurm's SIGTERM: finish the step, save, leave.
        signal.signal(signal.SIGINT, signal.getsignal(args.exit_signal))
    if args.moo_run_dir is not None and args.rank == 0:
        _write_config(args, plan)
    this = Run(plan)
    this.datasets.__func__.is_distributed = True
    model_config = gpt_config_from_args(args, model_config_cls=MooGPTModelConfig)
    model_config.post_wrap_hooks.append(this.on_wrapped)
    with hooked_training_loop(lambda: this.moo, this.begin_step, this.after_step):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            this.datasets,
            ModelType.encoder_or_decoder,
            this.forward_step,
        )
    if plan.evaluation:
        this.evaluate()


def _write_config(args: Any, plan: Plan) -> None:
    args.moo_run_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "method": plan.config.method,
        "moo": dataclasses.asdict(plan.config),
        "waves": plan.config.waves_for(args.data_parallel_size),
        "megatron": {
            key: value for key, value in vars(args).items() if isinstance(value, str | int | float | bool | None)
        },
        "argv": sys.argv[1:],
    }
    temporary = args.moo_run_dir / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(args.moo_run_dir / "config.json")
