"""What one step resolved, kept on the device until somebody looks.

Legend: B blocks, K objectives, H half rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepRecord:
    """Gramians and weights of one optimizer step on this rank's pipeline stage.

    Attributes:
        step: optimizer step, counted from 0.
        blocks: names of the B blocks.
        gram_BHH: inner products of unnormalised half rows.
        objective_H: objective id of each half row.
        gram_BKK: inner products of the objectives' gradients.
        weights_BK: what the aggregator returned.
        active_BK: objectives that took part.
        preference_K: the mean's weights.
        count_K: tokens (or rows, without per-token loss) of each objective in the step.
        kkt_residual_B: how far each block's solution is from optimal, for methods that solve a program.
        gated_BKK: pairs whose conflict was left alone as noise, if the noise gate is on.
        quarantined_K: objectives left out because their gradient was not finite.
    """

    step: int
    blocks: list[str]
    gram_BHH: torch.Tensor
    objective_H: torch.Tensor
    gram_BKK: torch.Tensor
    weights_BK: torch.Tensor
    active_BK: torch.Tensor
    preference_K: torch.Tensor
    count_K: torch.Tensor
    kkt_residual_B: torch.Tensor | None = None
    gated_BKK: torch.Tensor | None = None
    quarantined_K: torch.Tensor | None = None

    def cosine_BKK(self) -> torch.Tensor:
        """Cosines between objectives; NaN where one took no part or its gradient is zero."""
        return _cosine(self.gram_BKK)

    def norm_BK(self) -> torch.Tensor:
        """Lengths of the objectives' gradients; with the cosines, the Gramian."""
        return self.gram_BKK.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    def conflict_share_B(self) -> torch.Tensor:
        """Share of pairs of different objectives with a negative inner product; NaN without a pair."""
        k = self.gram_BKK.shape[-1]
        pair_KK = torch.ones(k, k, dtype=torch.bool, device=self.gram_BKK.device).triu(1)
        pair_BKK = pair_KK & self.active_BK[:, :, None] & self.active_BK[:, None, :]
        return _share_negative(self.gram_BKK, pair_BKK)

    def gated_share_B(self) -> torch.Tensor | None:
        """Share of conflicting pairs that the noise gate left alone; NaN without conflict, None without a gate."""
        if self.gated_BKK is None:
            return None
        conflict_BKK = (self.gram_BKK < 0).triu(1) & self.active_BK[:, :, None] & self.active_BK[:, None, :]
        return (self.gated_BKK & conflict_BKK).sum((1, 2)) / conflict_BKK.sum((1, 2))

    def control_share_B(self) -> torch.Tensor:
        """The same share among pairs of half rows of *one* objective: what sampling noise alone gives."""
        return _share_negative(self.gram_BHH, self._control_pairs_HH().expand_as(self.gram_BHH))

    def control_cosine_B(self) -> torch.Tensor:
        """Mean cosine of two halves of one objective; NaN where no objective has two rows."""
        cosine = _cosine(self.gram_BHH)
        pair = self._control_pairs_HH() & ~cosine.isnan()
        return torch.where(pair, cosine, 0.0).sum((1, 2)) / pair.sum((1, 2))

    def norm_ratio_B(self) -> torch.Tensor:
        """Length of the combined gradient over that of the plain mean."""
        return (_square(self.gram_BKK, self.weights_BK) / _square(self.gram_BKK, self.preference_K)).sqrt()

    def _control_pairs_HH(self) -> torch.Tensor:
        return (self.objective_H[:, None] == self.objective_H[None, :]).triu(1)


def _cosine(gram: torch.Tensor) -> torch.Tensor:
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return (gram / (norm[..., :, None] * norm[..., None, :])).clamp(-1, 1)


def _share_negative(gram: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    return ((gram < 0) & pair).sum((1, 2)) / pair.sum((1, 2))


def _square(gram_BKK: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weights_BK = weights.expand(gram_BKK.shape[0], -1)
    return torch.einsum("bk,bkl,bl->b", weights_BK, gram_BKK, weights_BK).clamp(min=0)
