"""The fine-tuning entry: Megatron's ``pretrain`` with language-pure data and combined gradients.

    torchrun --nproc-per-node 4 -m megatron_moo.finetune --moo-data data/locale --moo-method cagrad \\
        --moo-granularity layer --moo-run-dir runs/first  <Megatron's own flags>

Everything that Megatron does (arguments, schedules, optimizer, checkpoints, signals) stays Megatron's. Added are the
argument group of ``arguments.py``, what ``plan.py`` settles before the start, the data of ``megatron_moo.data``, the
hooks of ``seams.py`` and what a run writes.

A *slot* works on one language at a time: a data-parallel rank, or several that share experts (``plan.py``). Its
context-parallel ranks read the same samples, each a part of the sequence.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tensorboard_writer, pretrain, print_rank_0, print_rank_last
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_moo.analysis.cost import start_report
from megatron_moo.data.batches import MicroBatches
from megatron_moo.distributed import BucketLevelMoo, install
from megatron_moo.training import metrics
from megatron_moo.training.arguments import OFF
from megatron_moo.training.builder import MooGPTModelConfig
from megatron_moo.training.evaluation import evaluate, write_evaluation
from megatron_moo.training.plan import Plan, has_validation, prepare, write_config
from megatron_moo.training.seams import hooked_training_loop


class Run:
    """One fine-tuning run in this process: hooks for Megatron's loop, and what they need to share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model: list[torch.nn.Module] = []
        self.moo: BucketLevelMoo | None = None
        self._losses = metrics.LossRecorder(len(plan.objectives))
        self._file: metrics.MetricsFile | None = None
        self._read: Counter[int] = Counter()  # batches of the current step, by virtual pipeline stage

    # -- hooks for pretrain --------------------------------------------------------------------------------------

    def on_wrapped(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Post-wrap hook of the model builder: put the exchange in."""
        assert self.moo is None, "two models are built in one run"
        self.model = model
        if get_args().moo_method != OFF and not get_args().skip_train:
            self.moo = install(model, self.plan.config, self.plan.sampler.assign, self._losses.sums)
            if self.moo.slot != self._place()[0]:
                raise RuntimeError(
                    f"the exchange takes this rank for slot {self.moo.slot}, its data are those of slot "
                    f"{self._place()[0]}: ranks are not numbered as Megatron does by default"
                )
            self._print_cost()
        return model

    def _print_cost(self) -> None:
        """What the exchange costs a rank of the first stage and one of the last."""
        args, config, sampler = get_args(), self.plan.config, self.plan.sampler
        last = args.rank == args.world_size - 1 and args.pipeline_model_parallel_size > 1
        if args.rank != 0 and not last:
            return
        everywhere = config.scope == "global"
        text = start_report(
            self.moo.buckets(),
            waves=sampler.waves,
            languages=len(self.plan.objectives),
            blocks=len(self.moo.blocks),
            half_rows=min(sampler.rows, 2 * config.step_objectives),
            tp=args.tensor_model_parallel_size if everywhere else 1,
            pp=args.pipeline_model_parallel_size if everywhere and config.granularity == "model" else 1,
            host=config.wave_memory == "host",
            distributed_optimizer=args.use_distributed_optimizer,
        )
        for line in text.splitlines():
            print(f" moo: rank {args.rank}: {line}", flush=True)

    def _place(self) -> tuple[int, int]:
        return self.plan.place(parallel_state.get_data_parallel_rank())

    def datasets(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Iterator | None, Iterator | None, None]:
        """Megatron's dataset provider, for ``--dataloader-type external``: this rank's iterators.

        Called for each virtual pipeline stage; the schedule reads an iterator a stage, each at its own pace.
        """
        args = get_args()
        # By the step's number, as the exchange: a resumed run may have another batch size.
        train = self._batches(args.moo_train_split, args.iteration)
        valid = None
        if has_validation(args, self.plan.manifest):
            valid = self._batches(args.moo_valid_split, args.consumed_valid_samples // args.global_batch_size)
        return train, valid, None

    def _batches(self, split: str, start_step: int) -> MicroBatches:
        args = get_args()
        slot, peer = self._place()
        return MicroBatches(
            self.plan.manifest,
            split,
            self.plan.sampler,
            slot=slot,
            micro_batch_size=args.micro_batch_size,
            micro_batches_per_wave=self.plan.micro_batches_per_wave,
            seq_length=args.seq_length,
            pad_id=self.plan.manifest.tokenizer.eod,
            start_step=start_step,
            peer=peer,
            peers=self.plan.peers,
        )

    def begin_step(self) -> int:
        """Called before the forward passes of a step, again if Megatron repeats it; returns the step's number."""
        self._losses.clear()
        self._read.clear()
        return get_args().curr_iteration

    def forward_step(self, batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
        """One micro-batch through this chunk of the model."""
        if not any(get_attr_wrapped_model(model, end) for end in ("pre_process", "post_process")):
            return model(None, None, None), None
        batch = dict(next(batches))  # a copy: Megatron's rerun machine keeps the original
        objective = int(batch.pop("objective"))
        if model.training:
            self._check_objective(objective, get_attr_wrapped_model(model, "vp_stage") or 0)
        batch = {key: value.to(torch.cuda.current_device(), non_blocking=True) for key, value in batch.items()}
        if get_args().context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, functools.partial(self._loss, batch["loss_mask"], objective if model.training else None)

    def _check_objective(self, objective: int, stage: int) -> None:
        """The exchange takes the sampler's word for a row's language; so must the data of each virtual stage."""
        wave = self._read[stage] // self.plan.micro_batches_per_wave
        self._read[stage] += 1
        step, (slot, _) = get_args().curr_iteration, self._place()
        expected = int(self.plan.sampler.assign(step)[wave, slot])
        if objective != expected:
            names = self.plan.objectives
            raise RuntimeError(
                f"step {step}, wave {wave}, slot {slot}: the batch is {names[objective]}, the exchange expects "
                f"{names[expected]}: data and steps have come apart"
            )

    def _loss(self, mask: torch.Tensor, objective: int | None, losses: torch.Tensor) -> tuple:
        """Sum of token losses and number of tokens of this rank's part; Megatron divides as its flags say."""
        total = (losses.float() * mask).sum()
        tokens = mask.sum()
        if objective is not None:
            self._losses.add(objective, total, tokens)
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    def after_step(self, *, learning_rate: Any, iteration: int, grad_norm: Any) -> None:
        """Write what the step reports: losses every step, conflicts at intervals."""
        args = get_args()
        sums = self._losses.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        rows = None
        if self.moo is not None and iteration % args.moo_log_interval == 0:
            rows = metrics.gather_blocks(self.moo.record, parallel_state.get_pipeline_model_parallel_group())
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        quarantined = self._quarantined()
        step = metrics.step_fields(iteration, self.plan.objectives, sums, learning_rate, grad_norm, quarantined)
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

    def _quarantined(self) -> list[str]:
        """Languages that were left out of the step because their gradient was not finite."""
        if self.moo is None:
            return []
        flags = self.moo.record.quarantined_K.tolist()
        return [name for name, left_out in zip(self.plan.objectives, flags, strict=True) if left_out]

    def _report(self, step: dict[str, Any], rows: list[dict[str, Any]] | None) -> None:
        writer = get_tensorboard_writer()
        for name in step.get("quarantined", ()):
            total = self.moo.quarantined_steps[name]
            print_rank_last(
                f" moo: step {step['step']}: the gradient of {name} is not finite, the step goes on without it "
                f"({total} such steps so far)"
            )
            if writer:
                writer.add_scalar(f"moo/quarantined/{name}", total, step["step"])
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
        write_config(args, plan)
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
