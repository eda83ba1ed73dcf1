"""The way of a gradient through a step, from the backward hook to the optimizer's shard.

    backward hook -> exchange -> rows -> fix-ups -> Gramian -> weights -> shard -> optimizer

``install`` puts the exchange into a wrapped model; :meth:`BucketLevelMoo.finalize_model_grads` is the rest of
the way and reads like the line above. Nothing after it (clipping, optimizer, parameter gather, checkpoints) knows
that anything happened.

Legend: B blocks, K objectives, W waves, D slots, R = W * D rows, H half rows, N elements of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moo.aggregation import NoiseAware, RowNoise, fold_rows, layers
from megatron_moo.distributed import upstream
from megatron_moo.distributed.blocks import ModelRank, build_block_map
from megatron_moo.distributed.config import MooConfig
from megatron_moo.distributed.exchange import Exchange, ExchangeBucketGroup
from megatron_moo.distributed.gramian import ShardGramian
from megatron_moo.distributed.record import StepRecord
from megatron_moo.distributed.rows import (
    RowPlan,
    combine,
    reduce_partial_rows,
    reduce_tied_rows,
)

Assign = Callable[[int], Sequence[Sequence[int]]]
Losses = Callable[[], torch.Tensor | None]


def install(
    model_chunks: Sequence[torch.nn.Module], config: MooConfig, assign: Assign, losses: Losses | None = None
) -> BucketLevelMoo:
    """Make a DDP-wrapped Megatron model combine its gradients per block instead of adding them up.

    Call it after the model is wrapped (``get_model``) and before the first step, on every rank:

        moo = install(model, MooConfig(objectives=["en", "sw"], method="cagrad"), assign)

    It replaces the bucket groups of the chunks and sets ``finalize_model_grads_func`` of the model's config. With
    more objectives than data-parallel slots, wrap the schedule too: ``forward_backward = moo.waves(forward_backward)``.

    Args:
        model_chunks: this rank's chunks, each wrapped in Megatron's DistributedDataParallel.
        config: method, granularity, preference, ...
        assign: ``assign(step)[wave][slot]`` is the id of the objective that slot works on, a pure function and the
            same on every rank; your data loader must deliver accordingly.
        losses: for methods that work with losses: ``losses()`` gives this rank's [K, 2] sums over the step so far, of
            token losses and of tokens; None, or zeros, where it sees no loss (earlier pipeline stages).

    Raises:
        ValueError: for a layout or method that is not supported; names option, reason and remedy.
    """
    chunks = list(model_chunks)
    if problems := upstream.unsupported(chunks):
        raise ValueError("megatron_moo cannot be installed here:\n- " + "\n- ".join(problems))
    if not upstream.every_stage_trains(chunks):
        raise ValueError(
            "a pipeline stage has no trainable parameter: it has no gradient bucket to exchange; move the pipeline "
            "cut, or train something on every stage"
        )
    model_config = upstream.get_model_config(chunks[0])
    if model_config.finalize_model_grads_func is not None:
        raise ValueError(
            f"config.finalize_model_grads_func is already set to {model_config.finalize_model_grads_func!r}: it would "
            "run instead of the combination; leave it unset"
        )
    moo = BucketLevelMoo(chunks, config, assign, losses)
    model_config.finalize_model_grads_func = moo.finalize_model_grads
    return moo


class BucketLevelMoo:
    """The combination installed in one model. Made by :func:`install`.

    Attributes:
        config: the configuration.
        step: the optimizer step whose gradients come next. It counts by itself; a loop that resumes, repeats or skips
            steps sets it before each step.
        aggregator: the method.
        blocks: names of this pipeline stage's blocks.
        num_waves: W.
        record: what the last step resolved, or None before the first.
    """

    def __init__(self, chunks: list[torch.nn.Module], config: MooConfig, assign: Assign, losses: Losses | None) -> None:
        ddp = chunks[0]
        self.config = config
        self.step = 0
        self.record: StepRecord | None = None
        self.aggregator = config.build_aggregator()
        if self.aggregator.needs_losses and losses is None:
            raise ValueError(f"{self.aggregator!r} works with losses: give install(..., losses=...)")
        self._assign, self._losses = assign, losses
        self._model_config = upstream.get_model_config(ddp)
        if config.preference == "tokens" and not self._model_config.calculate_per_token_loss:
            raise ValueError(
                "preference='tokens' needs token counts, which Megatron's schedules hand on only with "
                "--calculate-per-token-loss; add it, or use preference='slots'"
            )
        self._dp_group, self._tp_group, self._pp_group = ddp.intra_dp_cp_group, ddp.tp_group, ddp.pp_group
        self._slots = self._dp_group.size()
        config.check_slots(self._slots)
        self.num_waves = config.waves_for(self._slots)
        self._exchange = Exchange(self.num_waves)
        self._buckets: list[tuple[ExchangeBucketGroup, int]] = []
        self._tokens_W: list[torch.Tensor] = []
        self._waves_run = False
        self._state_before: tuple[int, dict[str, torch.Tensor]] | None = None
        params = self._replace_groups(chunks)
        traits = {param: trait for chunk in chunks for param, trait in upstream.parameter_traits(chunk).items()}
        shard_sizes = [group.shard(group.buckets[i]).numel() for group, i in self._buckets]
        self._block_map = build_block_map(
            params,
            shard_sizes,
            traits,
            config.granularity,
            config.scope,
            ModelRank(self._tp_group.rank(), self._pp_group.rank(), self._dp_group.rank()),
        )
        self.blocks = self._block_map.names
        self._device = self._buckets[0][0].buckets[0].grad_data.device
        self._local_gramian = ShardGramian(self._block_map, shard_sizes, self._device)
        for group in {id(group): group for group, _ in self._buckets}.values():
            group.reserve()

    def _replace_groups(self, chunks: list[torch.nn.Module]) -> list[list[tuple[torch.nn.Parameter, int, int]]]:
        params = []
        for chunk in chunks:
            owner = {id(bucket): buffer for buffer in chunk.buffers for bucket in buffer.buckets}
            groups = upstream.replace_bucket_groups(chunk, lambda group: ExchangeBucketGroup(group, self._exchange))
            for group in groups:
                for i, bucket in enumerate(group.buckets):
                    self._buckets.append((group, i))
                    params.append(list(upstream.bucket_parameters(owner[id(bucket)], bucket)))
        return params

    # -- one step ------------------------------------------------------------------------------------------------

    def waves(self, forward_backward: Callable[..., list]) -> Callable[..., list]:
        """Wrap a Megatron forward/backward function so that a training step runs it once per wave.

        The step's micro-batches are divided evenly; the data iterator delivers wave after wave.
        """

        def run(*, num_microbatches: int, model: Any, forward_only: bool = False, **kwargs: Any) -> list:
            if forward_only or self.num_waves == 1:
                return forward_backward(
                    num_microbatches=num_microbatches, model=model, forward_only=forward_only, **kwargs
                )
            if num_microbatches % self.num_waves:
                raise ValueError(
                    f"{num_microbatches} micro-batches per step cannot be divided into {self.num_waves} waves "
                    f"({len(self.config.objectives)} objectives on {self._slots} data-parallel slots); make the "
                    f"global batch size a multiple of micro batch size * {self._slots} * {self.num_waves}"
                )
            reports = []
            self._waves_run, self._exchange.wave, self._tokens_W = True, 0, []
            for _ in range(self.num_waves):
                reports += forward_backward(
                    num_microbatches=num_microbatches // self.num_waves,
                    model=model,
                    forward_only=False,
                    **kwargs,
                )
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
            num_tokens: this slot's tokens in the wave, valid on the last pipeline stage; None without
                ``calculate_per_token_loss``.
            pg_collection: names the group of the tied embedding; other groups are those the model was wrapped with.
            force_all_reduce: refused.
        """
        if self.num_waves > 1 and not self._waves_run:
            raise RuntimeError(
                f"{len(self.config.objectives)} objectives on {self._slots} data-parallel slots need "
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
            self._exchange.wave += 1
            return
        self._resolve(self._embedding_group(pg_collection))
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

    def _resolve(self, embedding_group: dist.ProcessGroup | None) -> None:
        """Rows -> fix-ups -> Gramian -> weights -> shard."""
        plan = self._row_plan()
        rows = [group.rows(i) for group, i in self._buckets]
        reduce_partial_rows(rows, self._block_map.partial, self._tp_group)
        reduce_tied_rows(rows, self._block_map.tied_buckets, embedding_group)

        gram_BHH = self._reduce_gramian(self._local_gramian(rows, plan))
        # What each objective's summed rows are divided by: its tokens, or its rows where Megatron averaged already.
        count_K = gram_BHH.new_zeros(len(self.config.objectives))
        count_K.index_add_(0, plan.objective_R, self._row_counts(plan))
        scale_K = torch.where(count_K > 0, 1.0 / count_K.clamp(min=1), 0.0)
        fold_KH = torch.nn.functional.one_hot(plan.objective_H, len(scale_K)).T.double() * scale_K[:, None]
        gram_BKK = fold_KH @ gram_BHH @ fold_KH.T

        preference_K = self._preference(plan, count_K)
        active_K = (count_K > 0) & (preference_K > 0)
        noise = self._noise(gram_BHH, plan) if self.aggregator.uses_noise else None
        weights_BK, active_BK = self._solve(gram_BKK, active_K, preference_K, noise)
        self._agree(weights_BK, embedding_group)

        coefficients_BR = (weights_BK * scale_K)[:, plan.objective_R]
        combine(rows, self._block_map, coefficients_BR, [g.shard(g.buckets[i]) for g, i in self._buckets])
        self.record = StepRecord(
            self.step,
            self.blocks,
            gram_BHH,
            plan.objective_H,
            gram_BKK,
            weights_BK,
            active_BK,
            preference_K,
            count_K,
            self.aggregator.kkt_residual_B,
            next((layer.gated_BKK for layer in layers(self.aggregator) if isinstance(layer, NoiseAware)), None),
        )

    def _row_plan(self) -> RowPlan:
        assignment = [[int(k) for k in wave] for wave in self._assign(self.step)]
        k = len(self.config.objectives)
        shape_ok = len(assignment) == self.num_waves and all(len(wave) == self._slots for wave in assignment)
        if not shape_ok or not all(0 <= objective < k for wave in assignment for objective in wave):
            raise ValueError(
                f"assign({self.step}) must be {self.num_waves} waves of {self._slots} objective ids in [0, {k}), "
                f"found {assignment}"
            )
        given = self.config.preference_weights
        if given is not None and not any(given[objective] > 0 for wave in assignment for objective in wave):
            raise ValueError(
                f"step {self.step}: every objective in it has preference weight 0, its gradient would be zero; add "
                "waves, or give weights above 0"
            )
        return RowPlan.from_assignment(assignment, k, self._device)

    def _gather_tokens(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of every slot in this wave: [D] float64."""
        num_tokens = num_tokens.detach().reshape(1).double()
        if self._pp_group.size() > 1:
            dist.broadcast(num_tokens, src=upstream.get_pp_last_rank(self._pp_group), group=self._pp_group)
        tokens_D = num_tokens.new_empty(self._slots)
        dist.all_gather_into_tensor(tokens_D, num_tokens, group=self._dp_group)
        return tokens_D

    def _row_counts(self, plan: RowPlan) -> torch.Tensor:
        """Tokens of each row, or 1 each without token counts: [R] float64."""
        if not self._tokens_W:
            return torch.ones_like(plan.half_R, dtype=torch.float64)
        return torch.cat(self._tokens_W)

    def _noise(self, gram_BHH: torch.Tensor, plan: RowPlan) -> RowNoise:
        """What the halves of each objective tell of its noise."""
        count_H = gram_BHH.new_zeros(plan.num_halves).index_add_(0, plan.half_R, self._row_counts(plan))
        return fold_rows(gram_BHH, plan.objective_H, count_H, len(self.config.objectives))[1]

    def _mean_losses(self) -> torch.Tensor:
        """Loss of every objective in this step, mean over its tokens: [K] float64, the same on all ranks."""
        sums_K2 = torch.zeros(len(self.config.objectives), 2, dtype=torch.float64, device=self._device)
        local = self._losses()
        if local is not None:
            sums_K2 += local
        for group in (self._dp_group, self._pp_group):  # earlier stages add zeros
            dist.all_reduce(sums_K2, group=group)
        return sums_K2[:, 0] / sums_K2[:, 1].clamp(min=1)

    def _preference(self, plan: RowPlan, count_K: torch.Tensor) -> torch.Tensor:
        """The mean's weights among the objectives of this step, [K] float64, summing to 1."""
        kind = self.config.preference
        if kind == "tokens":
            preference = count_K
        elif kind == "slots":
            preference = plan.rows_K.double()
        elif kind == "uniform":
            preference = torch.ones_like(count_K)
        else:
            preference = count_K.new_tensor(self.config.preference_weights)
        preference = torch.where(count_K > 0, preference, 0.0)
        return preference / preference.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def _reduce_gramian(self, gram_BHH: torch.Tensor) -> torch.Tensor:
        """Sum local inner products over the ranks that share the blocks; one all-reduce per group for all blocks."""
        dist.all_reduce(gram_BHH, group=self._dp_group)
        if self.config.scope == "global":
            if self._tp_group.size() > 1:
                dist.all_reduce(gram_BHH, group=self._tp_group)
            if self.config.granularity == "model" and self._pp_group.size() > 1:
                dist.all_reduce(gram_BHH, group=self._pp_group)
        return gram_BHH

    def _solve(
        self, gram_BKK: torch.Tensor, active_K: torch.Tensor, preference_K: torch.Tensor, noise: RowNoise | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [B, K] and who took part [B, K].

        A block with a non-finite Gramian falls back to the mean, so that the non-finite gradient reaches the loss
        scaler or Megatron's own check instead of a solver.
        """
        self._rewind_state()
        finite_B = gram_BKK.isfinite().all((1, 2))
        gram_BKK = torch.where(finite_B[:, None, None], gram_BKK, 0.0)
        active_BK = active_K & finite_B[:, None]
        generators = None
        if self.aggregator.random:
            generators = [_generator(self.config.seed, self.step, name) for name in self.blocks]
        losses_K = self._mean_losses() if self.aggregator.needs_losses else None
        weights_BK = self.aggregator(gram_BKK, active_BK, preference_K, generators, losses_K=losses_K, noise=noise)
        return torch.where(finite_B[:, None], weights_BK, preference_K), active_BK

    def _rewind_state(self) -> None:
        """A step that is computed again (Megatron's rerun machine does that) must not move the method's state twice."""
        if not self.aggregator.stateful:
            return
        if self._state_before is not None and self._state_before[0] == self.step:
            self.aggregator.load_state_dict(self._state_before[1])
        else:
            self._state_before = (self.step, self.aggregator.state_dict())

    def _agree(self, weights_BK: torch.Tensor, embedding_group: dist.ProcessGroup | None) -> None:
        """Make ranks that solve the same block take the same weights, in place.

        Their Gramians come out of reductions in different groups or at different offsets, which may round differently;
        a method that amplifies the last bit would let the copies of a parameter drift apart.
        """
        shared = []
        if embedding_group is not None and self._block_map.tied_blocks:
            shared.append((self._block_map.tied_blocks, embedding_group))
        if self._tp_group.size() > 1 and self._block_map.replicated_blocks:
            shared.append((self._block_map.replicated_blocks, self._tp_group))
        for blocks, group in shared:
            weights = weights_BK[blocks].contiguous()
            dist.broadcast(weights, src=dist.get_global_rank(group, 0), group=group)
            weights_BK[blocks] = weights

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of the method by block name, of all pipeline stages; the same on every rank of a model replica.

        Collective over the model-parallel ranks. Layout-independent: a block is found again by its name.
        """
        stages: list[dict] = [self._state_by_block()]
        for group in (self._tp_group, self._pp_group):
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, stages, group=group)
            stages = [part for parts in gathered for part in parts]
        merged: dict[str, dict[str, torch.Tensor]] = {}
        for part in stages:
            merged.update(part)
        return {"method": self.config.method, "objectives": list(self.config.objectives), "blocks": merged}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take up what :meth:`state_dict` of an earlier run gave; blocks it does not name start afresh.

        Returns:
            Names of this stage's blocks without saved state.

        Raises:
            ValueError: for another method or other objectives, if either has state: it would be misread silently.
        """
        saved = {name: entries for name, entries in state["blocks"].items() if entries}
        if not saved and not self.aggregator.stateful:
            return []
        for key, found, ours in (
            ("method", state["method"], self.config.method),
            ("objectives", list(state["objectives"]), list(self.config.objectives)),
        ):
            if found != ours:
                raise ValueError(
                    f"the checkpoint's aggregator state is for {key} {found}, this run has {ours}; use the same, or "
                    "start from the weights alone (--finetune, or --no-load-optim)"
                )
        self.aggregator.reset()
        self._state_before = None
        if not saved:
            return []
        fresh = self.aggregator.fresh_state(len(self.blocks), len(self.config.objectives), self._device)
        for index, name in enumerate(self.blocks):
            for key, tensor in saved.get(name, {}).items():
                if key in fresh:  # else of a wrapper that this run does not have
                    fresh[key][index] = tensor.to(fresh[key])
        self.aggregator.load_state_dict(fresh)
        return [name for name in self.blocks if name not in saved]

    def _state_by_block(self) -> dict[str, dict[str, torch.Tensor]]:
        state = {key: tensor.cpu() for key, tensor in self.aggregator.state_dict().items()}
        return {name: {key: tensor[b].clone() for key, tensor in state.items()} for b, name in enumerate(self.blocks)}


def _generator(seed: int, step: int, block: str) -> torch.Generator:
    """Random numbers of one block in one step: the same on every rank, independent of which blocks share the rank."""
    digest = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
