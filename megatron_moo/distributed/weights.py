"""From the Gramian to the weights: what the objectives count, who takes part, and what the method says.

Small numbers on every rank; all blocks of a pipeline stage in one batched call.

Legend: B blocks, K objectives, R rows, H half rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moo.aggregation import Aggregator, RowNoise, fold_rows
from megatron_moo.distributed.blocks import BlockMap
from megatron_moo.distributed.config import MooConfig
from megatron_moo.distributed.rows import RowPlan

Losses = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Solution:
    """What was decided in one step.

    Attributes:
        weights_BK: weight of each objective's mean gradient.
        active_BK: who took part.
        gram_BKK: inner products of the objectives' mean gradients.
        preference_K: the mean's weights.
        count_K: tokens (or rows, without per-token loss) of each objective.
        scale_K: what its summed rows are multiplied by: 1 / count, or 0.
    """

    weights_BK: torch.Tensor
    active_BK: torch.Tensor
    gram_BKK: torch.Tensor
    preference_K: torch.Tensor
    count_K: torch.Tensor
    scale_K: torch.Tensor


class WeightSolver:
    """The method, applied to the blocks of one pipeline stage.

    Args:
        config: preference, seed.
        aggregator: the method; its state moves with each call.
        blocks: their names, and which of them several ranks solve.
        tp_group: tensor-parallel ranks.
        loss_groups: the ranks among which losses are found, a group for each dimension.
        losses: see :func:`megatron_moo.distributed.install`.
        device: where Gramians are.
    """

    def __init__(
        self,
        config: MooConfig,
        aggregator: Aggregator,
        blocks: BlockMap,
        tp_group: dist.ProcessGroup,
        loss_groups: Sequence[dist.ProcessGroup],
        losses: Losses | None,
        device: torch.device,
    ) -> None:
        self._config, self._aggregator, self._blocks = config, aggregator, blocks
        self._tp_group, self._loss_groups, self._losses = tp_group, loss_groups, losses
        self._state_before: tuple[int, dict[str, torch.Tensor]] | None = None
        # Made once: a list handed to the device makes the host wait for it.
        self._given_K: torch.Tensor | None = None
        if config.preference_weights is not None:
            self._given_K = torch.tensor(config.preference_weights, dtype=torch.float64, device=device)
        self._tied_blocks = torch.tensor(blocks.tied_blocks, dtype=torch.long, device=device)
        self._replicated_blocks = torch.tensor(blocks.replicated_blocks, dtype=torch.long, device=device)

    def __call__(
        self,
        step: int,
        gram_BHH: torch.Tensor,
        plan: RowPlan,
        count_R: torch.Tensor,
        embedding_group: dist.ProcessGroup | None,
    ) -> Solution:
        """Weights of one step, the same on all ranks that solve a block.

        Args:
            step: its number.
            gram_BHH: inner products of half rows, reduced over ranks.
            plan: the rows of the data-parallel ranks.
            count_R: tokens of each of them, 0 for those left out.
            embedding_group: the stages of a tied embedding.
        """
        k = len(self._config.objectives)
        count_K = count_R.new_zeros(k).index_add_(0, plan.objective_R, count_R)
        scale_K = torch.where(count_K > 0, 1.0 / count_K.clamp(min=1), 0.0)
        fold_KH = torch.nn.functional.one_hot(plan.objective_H, k).T.double() * scale_K[:, None]
        gram_BKK = fold_KH @ gram_BHH @ fold_KH.T
        preference_K = self._preference(plan, count_K)
        noise = None
        if self._aggregator.uses_noise:
            count_H = gram_BHH.new_zeros(plan.num_halves).index_add_(0, plan.half_R, count_R)
            noise = fold_rows(gram_BHH, plan.objective_H, count_H, k)[1]
        active_K = (count_K > 0) & (preference_K > 0)
        weights_BK, active_BK = self._solve(step, gram_BKK, active_K, preference_K, noise)
        self._agree(weights_BK, embedding_group)
        return Solution(weights_BK, active_BK, gram_BKK, preference_K, count_K, scale_K)

    def forget_step(self) -> None:
        """The method's state was set from outside: no step is computed again from before that."""
        self._state_before = None

    def _preference(self, plan: RowPlan, count_K: torch.Tensor) -> torch.Tensor:
        """The mean's weights among the objectives of this step, [K] float64, summing to 1."""
        kind = self._config.preference
        if kind == "tokens":
            preference = count_K
        elif kind == "slots":
            preference = plan.rows_K.double()
        elif kind == "uniform":
            preference = torch.ones_like(count_K)
        else:
            preference = self._given_K
        preference = torch.where(count_K > 0, preference, 0.0)
        return preference / preference.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def _solve(
        self,
        step: int,
        gram_BKK: torch.Tensor,
        active_K: torch.Tensor,
        preference_K: torch.Tensor,
        noise: RowNoise | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [B, K] and who took part [B, K].

        An objective whose gradient is zero throughout a block takes no part there: an expert that saw none of its
        tokens, an adapter of other languages. A zero row would make MGDA and CAGrad return zero. A block with a
        non-finite Gramian falls back to the mean, so that the non-finite gradient reaches the loss scaler or
        Megatron's own check instead of a solver; so does one in which nobody takes part.
        """
        self._rewind_state(step)
        finite_B = gram_BKK.isfinite().all((1, 2))
        gram_BKK = torch.where(finite_B[:, None, None], gram_BKK, 0.0)
        active_BK = active_K & finite_B[:, None] & (gram_BKK.diagonal(dim1=1, dim2=2) > 0)
        generators = None
        if self._aggregator.random:
            generators = [_generator(self._config.seed, step, name) for name in self._blocks.names]
        losses_K = self._mean_losses(gram_BKK.device) if self._aggregator.needs_losses else None
        weights_BK = self._aggregator(gram_BKK, active_BK, preference_K, generators, losses_K=losses_K, noise=noise)
        return torch.where(active_BK.any(1, keepdim=True), weights_BK, preference_K), active_BK

    def _mean_losses(self, device: torch.device) -> torch.Tensor:
        """Loss of every objective in this step, mean over its tokens: [K] float64, the same on all ranks."""
        sums_K2 = torch.zeros(len(self._config.objectives), 2, dtype=torch.float64, device=device)
        local = self._losses() if self._losses is not None else None
        if local is not None:
            sums_K2 += local
        for group in self._loss_groups:  # earlier stages add zeros
            dist.all_reduce(sums_K2, group=group)
        # One that is not finite belongs to an objective that is left out; the others must not see it.
        return (sums_K2[:, 0] / sums_K2[:, 1].clamp(min=1)).nan_to_num()

    def _rewind_state(self, step: int) -> None:
        """A step that is computed again (Megatron's rerun machine does that) must not move the method's state twice."""
        if not self._aggregator.stateful:
            return
        if self._state_before is not None and self._state_before[0] == step:
            self._aggregator.load_state_dict(self._state_before[1])
        else:
            self._state_before = (step, self._aggregator.state_dict())

    def _agree(self, weights_BK: torch.Tensor, embedding_group: dist.ProcessGroup | None) -> None:
        """Make ranks that solve the same block take the same weights, in place.

        Their Gramians come out of reductions in different groups or at different offsets, which may round differently;
        a method that amplifies the last bit would let the copies of a parameter drift apart.
        """
        shared = []
        if embedding_group is not None and self._tied_blocks.numel():
            shared.append((self._tied_blocks, embedding_group))
        if self._tp_group.size() > 1 and self._replicated_blocks.numel():
            shared.append((self._replicated_blocks, self._tp_group))
        for blocks, group in shared:
            weights = weights_BK[blocks].contiguous()
            dist.broadcast(weights, src=dist.get_global_rank(group, 0), group=group)
            weights_BK[blocks] = weights


def _generator(seed: int, step: int, block: str) -> torch.Generator:
    """Random numbers of one block in one step: the same on every rank, independent of which blocks share the rank."""
    digest = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
