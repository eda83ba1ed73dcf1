"""The entry's part of context parallelism, by groups alone: Megatron's attention needs Transformer Engine for it."""

import types

import pytest
import torch

from tests.helpers.multiprocess import init_megatron, run_ranks

S = 8


class _Echo(torch.nn.Module):
    """A chunk that is both ends of the pipeline; its token losses are the labels."""

    pre_process = post_process = True
    vp_stage = None

    def forward(self, tokens, positions, mask, labels, packed_seq_params):
        assert torch.equal(labels, tokens + 1) and torch.equal(positions, tokens % 100)
        return labels.float()


def _batch(slot: int) -> dict[str, torch.Tensor]:
    """Two samples of the slot's objective; a target mask that the parts of a sequence share unevenly."""
    positions = torch.arange(S).expand(2, -1)
    tokens = positions + 100 * (slot + 1)
    mask = (positions > 4).float()
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": mask,
        "position_ids": positions,
        "objective": torch.tensor([slot]),
    }


def _forward(rank: int) -> tuple:
    from megatron.core import parallel_state

    from megatron_moo.training import finetune

    init_megatron(cp=2)
    args = types.SimpleNamespace(context_parallel_size=2, curr_iteration=0)
    finetune.get_args = lambda: args
    sampler = types.SimpleNamespace(assign=lambda step: torch.tensor([[0, 1]]))
    config = types.SimpleNamespace(objectives=["de", "en"])
    plan = finetune.Plan(None, config, sampler, sampler, peers=1, micro_batches_per_wave=1, evaluation={})
    run = finetune.Run(plan)
    slot = parallel_state.get_data_parallel_rank()
    losses, loss = run.forward_step(iter([_batch(slot)]), _Echo())
    total, tokens, report = loss(losses)
    assert losses.shape == (2, S // 2)
    sums = run._losses.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
    return slot, float(total), int(tokens), sums.tolist()


def test_losses_of_the_parts_of_a_sequence_add_up():
    """Would catch: a part that is read twice or not at all, targets or masks of another part than the tokens', or a
    report over one part."""
    ranks = run_ranks(_forward, 4)
    expected = {}
    for slot in (0, 1):
        batch = _batch(slot)
        total = float((batch["labels"] * batch["loss_mask"]).sum())
        expected[slot] = [total, float(batch["loss_mask"].sum())]
        parts = [(loss, tokens) for of, loss, tokens, _ in ranks if of == slot]
        assert len(parts) == 2 and len(set(parts)) == 2
        assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(expected[slot])
    for *_, sums in ranks:
        assert sums == [expected[0], expected[1]]
