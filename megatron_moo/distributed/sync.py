"""The way of a gradient through a step, from the backward hook to the optimizer's shard.

    backward hook -> exchange -> rows -> fix-ups -> Gramian -> weights -> shard -> optimizer

``install`` puts the exchange into a wrapped model; :meth:`BucketLevelMoo.finalize_model_grads` is the rest of
the way and reads like the line above. Nothing after it (clipping, optimizer, parameter gather, checkpoints) knows
that anything happened.

Legend: B blocks, K objectives, W waves, D slots, S data (x context) parallel ranks, R = W * S rows, H half rows, N
elements of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moo.aggregation import NoiseAware, layers
from megatron_moo.distributed import state, upstream
from megatron_moo.distributed.blocks import BlockMap, ModelRank, build_block_map
from megatron_moo.distributed.buckets import BucketSize, exchange_buckets
from megatron_moo.distributed.config import MooConfig
from megatron_moo.distributed.exchange import Exchange
from megatron_moo.distributed.faults import Quarantine, check_agreement, spoilt_objectives
from megatron_moo.distributed.gramian import ShardGramian
from megatron_moo.distributed.record import StepRecord
from megatron_moo.distributed.rows import (
    RowPlan,
    combine,
    drop_rows,
    mark_spoilt_copies,
    reduce_partial_rows,
    reduce_tied_rows,
)
from megatron_moo.distributed.slots import SlotMap
from megatron_moo.distributed.weights import Losses, WeightSolver

Assign = Callable[[int], Sequence[Sequence[int]]]


def install(
    model_chunks: Sequence[torch.nn.Module], config: MooConfig, assign: Assign, losses: Losses | None = None
) -> BucketLevelMoo:
    """Make a DDP-wrapped Megatron model combine its gradients per block instead of adding them up.

    Call it after the model is wrapped (``get_model``) and before the first step, on every rank:

        moo = install(model, MooConfig(objectives=["en", "sw"], method="cagrad"), assign)

    It replaces the bucket groups of the chunks and sets ``finalize_model_grads_func`` of the model's config. With
    more objectives than slots, wrap the schedule too: ``forward_backward = moo.waves(forward_backward)``.

    Args:
        model_chunks: this rank's chunks, each wrapped in Megatron's DistributedDataParallel.
        config: method, granularity, preference, ...
        assign: ``assign(step)[wave][slot]`` is the id of the objective that slot works on, a pure function and the
            same on every rank; your data loader must deliver accordingly. This rank's slot is ``moo.slot``: its
            data-parallel rank, unless experts make several of those one slot (:mod:`megatron_moo.distributed.slots`).
        losses: for methods that work with losses: ``losses()`` gives this rank's [K, 2] sums over the step so far, of
            token losses and of tokens; None, or zeros, where it sees no loss (earlier pipeline stages).

    Raises:
        ValueError: for a layout or method that is not supported; names option, reason and remedy.
        RuntimeError: ranks were given different configurations or assignments.
    """
    chunks = list(model_chunks)
    if problems := upstream.unsupported(chunks):
        raise ValueError("megatron_moo cannot be installed here:\n- " + "\n- ".join(problems))
    moo = BucketLevelMoo(chunks, config, assign, losses)
    upstream.get_model_config(chunks[0]).finalize_model_grads_func = moo.finalize_model_grads
    return moo


class BucketLevelMoo:
    """The combination installed in one model. Made by :func:`install`.

    Attributes:
        config: the configuration.
        step: the optimizer step whose gradients come next. It counts by itself; a loop that resumes, repeats or skips
            steps sets it before each step.
        aggregator: the method.
        blocks: names of this pipeline stage's blocks.
        slots: D.
        slot: this rank's.
        num_waves: W.
        record: what the last step resolved, or None before the first.
    """

    def __init__(self, chunks: list[torch.nn.Module], config: MooConfig, assign: Assign, losses: Losses | None) -> None:
        ddp = chunks[0]
        self._dp_group, self._tp_group, self._pp_group = ddp.intra_dp_cp_group, ddp.tp_group, ddp.pp_group
        self._all_groups = (self._dp_group, self._tp_group, self._pp_group)
        check_agreement("the configuration", repr(config), self._all_groups)
        if config.scope == "local" and upstream.expert_tensor_group(ddp).size() != self._tp_group.size():
            raise ValueError(
                "--moo-scope local with --expert-tensor-parallel-size other than --tensor-model-parallel-size: ranks "
                "that solve a block together would hold different experts; use --moo-scope global"
            )
        self.config = config
        self.step = 0
        self.record: StepRecord | None = None
        self.aggregator = config.build_aggregator()
        if self.aggregator.needs_losses and losses is None:
            raise ValueError(f"{self.aggregator!r} works with losses: give install(..., losses=...)")
        self._assign = assign
        self._model_config = upstream.get_model_config(ddp)
        if config.preference == "tokens" and not self._model_config.calculate_per_token_loss:
            raise ValueError(
                "preference='tokens' needs token counts, which Megatron's schedules hand on only with "
                "--calculate-per-token-loss; add it, or use preference='slots'"
            )
        slot_map = _find_slots(ddp)
        self.slots, self.slot = slot_map.count, slot_map.mine
        config.check_slots(self.slots)
        self.num_waves = config.waves_for(self.slots)
        # With fp16 an overflow is the loss scaler's to see: it skips the step and lowers the scale.
        self._quarantines = config.nonfinite == "quarantine" and not self._model_config.fp16
        self._exchange = Exchange(
            self.num_waves, keep_on_host=config.wave_memory == "host", check_finite=not self._quarantines
        )
        self._tokens_W: list[torch.Tensor] = []
        self._waves_run = False
        self._agreed = -1  # the last step whose assignment was compared
        self._quarantine = Quarantine(config.objectives, config.max_quarantined)
        self._sets = exchange_buckets(chunks, self._exchange, slot_map)
        self._device = next(shard.device for bucket_set in self._sets for shard in bucket_set.shards())
        self._block_map = self._map_blocks(chunks)
        self.blocks = self._block_map.names
        self._segments = self._block_map.by_bucket(sum(len(bucket_set.spans) for bucket_set in self._sets))
        self._solver = WeightSolver(
            config,
            self.aggregator,
            self._block_map,
            self._tp_group,
            (self._dp_group, self._pp_group),
            losses,
            self._device,
        )
        self._gramians = [
            ShardGramian(self._block_map, bucket_set.shard_sizes, self._device, bucket_set.first)
            for bucket_set in self._sets
        ]

    def _map_blocks(self, chunks: list[torch.nn.Module]) -> BlockMap:
        expert_tp = upstream.expert_tensor_group(chunks[0]).rank()
        spans = [span for bucket_set in self._sets for span in bucket_set.spans]
        blocks = build_block_map(
            spans,
            {param: trait for chunk in chunks for param, trait in upstream.parameter_traits(chunk).items()},
            self.config.granularity,
            self.config.scope,
            ModelRank(self._tp_group.rank(), self._pp_group.rank(), expert_tp),
        )
        shared: list[Any] = [None] * self._pp_group.size()
        mine = any(len(spans[bucket].parameters) > 1 for bucket in blocks.tied_buckets)
        dist.all_gather_object(shared, mine, group=self._pp_group)  # or the other stages would wait for this one
        if any(shared) and len(shared) > 1:
            raise ValueError(
                "the tied embedding lies in one bucket with other parameters, so that its two copies would not meet: "
                "without the distributed optimizer Megatron makes such buckets; add "
                "--use-distributed-optimizer, or wrap the model with megatron_moo.distributed.upstream.wrap_padded"
            )
        # Expert-parallel ranks hold different experts; the Gramians that are added up must list all of them.
        names = blocks.names
        for group in (self._dp_group, *([self._tp_group] if self.config.scope == "global" else [])):
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, names, group=group)
            names = list(dict.fromkeys(name for part in parts for name in part))
        return blocks.renumbered(names)

    @property
    def quarantined_steps(self) -> dict[str, int]:
        """Objective -> steps of this process in which it was left out because its gradient was not finite."""
        return dict(self._quarantine.total)

    def buckets(self) -> list[BucketSize]:
        """Sizes of this rank's gradient buckets."""
        return [size for bucket_set in self._sets for size in bucket_set.sizes()]

    # -- one step ------------------------------------------------------------------------------------------------

    def waves(self, forward_backward: Callable[..., list]) -> Callable[..., list]:
        """Wrap a Megatron forward/backward function so that a training step runs it once per wave.

        The step's micro-batches are divided evenly; the data iterator delivers wave after wave.
        """

        def run(*, num_microbatches: int, model: Any, forward_only: bool = False, **kwargs: Any) -> list:
            if not forward_only:
                self._check_assignment()
            if forward_only or self.num_waves == 1:
                return forward_backward(
                    num_microbatches=num_microbatches, model=model, forward_only=forward_only, **kwargs
                )
            if num_microbatches % self.num_waves:
                raise ValueError(
                    f"{num_microbatches} micro-batches per step cannot be divided into {self.num_waves} waves "
                    f"({self.config.step_objectives} objectives on {self.slots} slots); make the global batch size a "
                    f"multiple of micro batch size * {self._dp_group.size()} * {self.num_waves}"
                )
            reports = []
            self._waves_run, self._exchange.wave, self._tokens_W = True, 0, []
            gather_parameters = self._model_config.param_sync_func
            try:
                for _ in range(self.num_waves):
                    reports += forward_backward(
                        num_microbatches=num_microbatches // self.num_waves,
                        model=model,
                        forward_only=False,
                        **kwargs,
                    )
                    self._model_config.param_sync_func = None  # the first wave has gathered them all
            finally:
                self._model_config.param_sync_func = gather_parameters
            self._waves_run = False
            return reports

        return run

    @torch.no_grad()
    def finalize_model_grads(
        self,
        model: list[torch.nn.Module],
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        """Megatron's hook after the last backward of a schedule: leave the combined gradient in the optimizer's shards.

        Args:
            model: the chunks that Megatron hands over.
            num_tokens: this rank's tokens in the wave, valid on the last pipeline stage; None without
                ``calculate_per_token_loss``.
            pg_collection: names the group of the tied embedding; other groups are those the model was wrapped with.
            force_all_reduce: refused.
        """
        if self.num_waves > 1 and not self._waves_run:
            raise RuntimeError(
                f"{self.config.step_objectives} objectives on {self.slots} slots need "
                f"{self.num_waves} waves a step, but the schedule ran once: the step would end without a gradient. "
                "Wrap it: forward_backward = moo.waves(forward_backward)"
            )
        for chunk in model:
            chunk.finish_grad_sync(force_all_reduce=force_all_reduce)
        if num_tokens is not None:
            self._tokens_W.append(self._gather_tokens(num_tokens))
        if not self._exchange.last_wave:
            for chunk in model:
                chunk.zero_grad_buffer()
            self._exchange.next_wave()
            return
        self._check_assignment()  # a schedule that is not wrapped has not done it
        self._resolve(self._embedding_group(pg_collection))
        upstream.finish_step(model, pg_collection)
        self._exchange.wave = 0
        self._tokens_W = []
        self.step += 1

    def _embedding_group(self, pg_collection: Any) -> dist.ProcessGroup | None:
        group = upstream.embedding_group(pg_collection)
        if group is None and self._block_map.tied_buckets:
            raise RuntimeError(
                "the tied embedding lives on two pipeline stages, but no process group joins them: its copies would "
                "drift apart; give the schedule a pg_collection with embd, or initialise Megatron's parallel_state"
            )
        return group

    def _check_assignment(self) -> None:
        """Make sure that ranks agree who works on what: in the first step of a run, or in each one if so configured."""
        if self._agreed == self.step or (self._agreed >= 0 and not self.config.check_assignment):
            return
        self._agreed = self.step
        try:
            text = repr(self._assignment())
        except Exception as error:  # if only this rank fails, the others must hear of it, not wait
            text = repr(error)
        check_agreement(f"the languages of step {self.step}", text, self._all_groups)
        self._assignment()  # raises where all failed alike

    def _resolve(self, embedding_group: dist.ProcessGroup | None) -> None:
        """Rows -> fix-ups -> Gramian -> weights -> shard."""
        assignment, k = self._assignment(), len(self.config.objectives)
        plans = [RowPlan.from_assignment(assignment, k, self._device, s.members) for s in self._sets]
        plan = plans[0]  # of the dense buckets: a row for each rank that counts tokens
        self._exchange.settle()
        rows = [waves for bucket_set in self._sets for waves in bucket_set.rows()]
        reduce_partial_rows(rows, self._block_map.partial, self._tp_group)
        reduce_tied_rows(rows, self._block_map.tied_buckets, embedding_group)

        gram_BHH = self._gramian(plans)
        count_R = self._row_counts(plan)
        spoilt_K = self._leave_out(gram_BHH, count_R, plans)
        solution = self._solver(self.step, gram_BHH, plan, count_R, embedding_group)
        self._combine(solution.weights_BK * solution.scale_K, plans)
        self.record = StepRecord(
            self.step,
            self.blocks,
            gram_BHH,
            plan.objective_H,
            solution.gram_BKK,
            solution.weights_BK,
            solution.active_BK,
            solution.preference_K,
            solution.count_K,
            self.aggregator.kkt_residual_B,
            next((layer.gated_BKK for layer in layers(self.aggregator) if isinstance(layer, NoiseAware)), None),
            spoilt_K,
        )

    def _gramian(self, plans: Sequence[RowPlan]) -> torch.Tensor:
        """Inner products of half rows, [B, H, H], summed over the ranks that share the blocks."""
        gram_BHH = None
        for bucket_set, gramian, plan in zip(self._sets, self._gramians, plans, strict=True):
            part_BHH = gramian(bucket_set.rows_on_device(), plan)
            gram_BHH = part_BHH if gram_BHH is None else gram_BHH.add_(part_BHH)
            if self._quarantines:
                mark_spoilt_copies(gram_BHH, bucket_set.rows(), self._segments[bucket_set.span], plan)
        return self._reduce_gramian(gram_BHH)

    def _leave_out(self, gram_BHH: torch.Tensor, count_R: torch.Tensor, plans: Sequence[RowPlan]) -> torch.Tensor:
        """Who is left out of this step because its gradient is not finite, [K] bool; clears its rows, in place."""
        plan, k = plans[0], len(self.config.objectives)
        if not self._quarantines:
            return torch.zeros(k, dtype=torch.bool, device=self._device)
        differ = [self._pp_group] if self.config.granularity != "model" or self.config.scope == "local" else []
        differ += [self._tp_group] if self.config.scope == "local" else []
        spoilt_K = spoilt_objectives(gram_BHH, plan.objective_H, k, differ)
        count_K = count_R.new_zeros(k).index_add_(0, plan.objective_R, count_R)
        # The host waits for the device here: who is left out decides whether rows are cleared, or the run stops.
        spoilt, present = torch.stack([spoilt_K, count_K > 0]).tolist()
        if (given := self.config.preference_weights) is not None:
            present = [here and weight > 0 for here, weight in zip(present, given, strict=True)]
        self._quarantine.count(self.step, spoilt, present)
        if any(spoilt):
            bad_H = spoilt_K[plan.objective_H]
            gram_BHH.masked_fill_(bad_H[:, None] | bad_H[None, :], 0.0)
            count_R.masked_fill_(spoilt_K[plan.objective_R], 0.0)
            for bucket_set, its_plan in zip(self._sets, plans, strict=True):
                drop_rows(bucket_set.rows(), spoilt_K[its_plan.objective_R].nonzero().flatten().tolist())
        return spoilt_K

    def _combine(self, coefficients_BK: torch.Tensor, plans: Sequence[RowPlan]) -> None:
        """Leave the combined gradient where the optimizer reads it."""
        for bucket_set, plan in zip(self._sets, plans, strict=True):
            coefficients_BR = coefficients_BK[:, plan.objective_R]
            rows, segments = bucket_set.rows_on_device(), self._segments[bucket_set.span]
            for index, shard in enumerate(bucket_set.shards()):
                combine(rows[index], segments[index], coefficients_BR, shard)
            bucket_set.gather()

    def _assignment(self) -> list[list[int]]:
        """Objective of every wave and slot of this step."""
        assignment = [[int(k) for k in wave] for wave in self._assign(self.step)]
        k = len(self.config.objectives)
        shape_ok = len(assignment) == self.num_waves and all(len(wave) == self.slots for wave in assignment)
        if not shape_ok or not all(0 <= objective < k for wave in assignment for objective in wave):
            raise ValueError(
                f"assign({self.step}) must be {self.num_waves} waves of {self.slots} objective ids in [0, {k}), "
                f"found {assignment}"
            )
        given = self.config.preference_weights
        if given is not None and not any(given[objective] > 0 for wave in assignment for objective in wave):
            raise ValueError(
                f"step {self.step}: every objective in it has preference weight 0, its gradient would be zero; add "
                "waves, or give weights above 0"
            )
        return assignment

    def _gather_tokens(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of every data (x context) parallel rank in this wave: [S] float64."""
        num_tokens = num_tokens.detach().reshape(1).double()
        if self._pp_group.size() > 1:
            dist.broadcast(num_tokens, src=upstream.get_pp_last_rank(self._pp_group), group=self._pp_group)
        tokens_S = num_tokens.new_empty(self._dp_group.size())
        dist.all_gather_into_tensor(tokens_S, num_tokens, group=self._dp_group)
        return tokens_S

    def _row_counts(self, plan: RowPlan) -> torch.Tensor:
        """Tokens of each row, or 1 each without token counts: [R] float64."""
        if not self._tokens_W:
            return torch.ones_like(plan.half_R, dtype=torch.float64)
        return torch.cat(self._tokens_W)

    def _reduce_gramian(self, gram_BHH: torch.Tensor) -> torch.Tensor:
        """Sum local inner products over the ranks that share the blocks; one all-reduce per group for all blocks."""
        dist.all_reduce(gram_BHH, group=self._dp_group)
        if self.config.scope == "global":
            if self._tp_group.size() > 1:
                dist.all_reduce(gram_BHH, group=self._tp_group)
            if self.config.granularity == "model" and self._pp_group.size() > 1:
                dist.all_reduce(gram_BHH, group=self._pp_group)
        return gram_BHH

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of the method by block name, of all pipeline stages; the same on every rank of a model replica.

        Collective over the model-parallel ranks. Layout-independent: a block is found again by its name.
        """
        blocks = state.collect(self.aggregator, self.blocks, (self._tp_group, self._pp_group))
        return {"method": self.config.method, "objectives": list(self.config.objectives), "blocks": blocks}

    def load_state_dict(self, saved: dict[str, Any]) -> list[str]:
        """Take up what :meth:`state_dict` of an earlier run gave; blocks it does not name start afresh.

        Returns:
            Names of this stage's blocks without saved state.

        Raises:
            ValueError: for another method or other objectives, if either has state: it would be misread silently.
        """
        blocks = {name: entries for name, entries in saved["blocks"].items() if entries}
        if not blocks and not self.aggregator.stateful:
            return []
        for key, found, ours in (
            ("method", saved["method"], self.config.method),
            ("objectives", list(saved["objectives"]), list(self.config.objectives)),
        ):
            if found != ours:
                raise ValueError(
                    f"the checkpoint's aggregator state is for {key} {found}, this run has {ours}; use the same, or "
                    "start from the weights alone (--finetune, or --no-load-optim)"
                )
        self.aggregator.reset()
        self._solver.forget_step()
        if not blocks:
            return []
        return state.restore(self.aggregator, blocks, self.blocks, len(self.config.objectives), self._device)


def _find_slots(ddp: upstream.DistributedDataParallel) -> SlotMap:
    if not upstream.has_expert_groups(ddp):
        return SlotMap.find(ddp.dp_group, ddp.intra_dp_cp_group)
    mixing = (ddp.ep_group, upstream.expert_tensor_group(ddp))
    return SlotMap.find(ddp.dp_group, ddp.intra_dp_cp_group, mixing, ddp.intra_expt_dp_group, ddp.tp_group)
