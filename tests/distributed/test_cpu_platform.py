"""Stock Megatron under the CPU shim: it trains, saves, resumes and lays out its ranks as on GPUs."""

import multiprocessing

import pytest
import torch

from tests.helpers.multiprocess import RanksFailed, init_megatron, run_ranks
from tests.helpers.pretraining import Trace, run_pretrain

STEPS, SAVED = 6, 4
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


def _weights(chunks: list, optimizer: object) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def _losses(traces: list[Trace]) -> list[float]:
    """The losses, which the ranks of the last stage must agree on."""
    losses = [trace.losses for trace in traces if trace.losses]
    assert losses and all(other == losses[0] for other in losses)
    return losses[0]


@pytest.mark.parametrize(
    ("world", "layout", "flags"),
    [
        pytest.param(
            8, dict(tp=2, pp=2), (*OVERLAP, "--sequence-parallel", "--normalization", "RMSNorm"), id="fp32-sp"
        ),
        pytest.param(
            4, dict(pp=2), (*OVERLAP, "--bf16", "--num-layers-per-virtual-pipeline-stage", "1"), id="bf16-vpp"
        ),
    ],
)
def test_pretrain_learns_saves_and_resumes_bit_for_bit(world, layout, flags, tiny_argv, tmp_path):
    """Would catch: what the shim lacks for Megatron; dropout state, Adam's step or a weight lost in a save."""
    save = ("--save", str(tmp_path), "--save-interval", str(SAVED), "--ckpt-format", "torch_dist")
    argv = tiny_argv(*flags, *save, "--ckpt-fully-parallel-save", steps=STEPS, **layout)
    whole = run_pretrain(argv, world, inspect=_weights)
    losses = _losses(whole)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2

    resumed = run_pretrain([*argv, "--load", str(tmp_path), "--ckpt-step", str(SAVED)], world, inspect=_weights)
    assert _losses(resumed) == losses[SAVED:]
    for rank, (a, b) in enumerate(zip(whole, resumed, strict=True)):
        assert a.grad_norms[SAVED:] == b.grad_norms, rank
        assert all(torch.equal(x, y) for x, y in zip(a.inspected, b.inspected, strict=True)), rank


def test_resumes_on_another_layout(tiny_argv, tmp_path):
    """Would catch: optimizer state that is lost, or refuses to load, when stages and shards are cut differently."""
    shared = (
        "--attention-dropout",
        "0",
        "--hidden-dropout",
        "0",
        "--ckpt-format",
        "torch_dist",
        "--save-interval",
        "2",
    )
    shared += ("--dist-ckpt-optim-fully-reshardable",)
    saved = run_pretrain(tiny_argv(*shared, "--save", str(tmp_path), tp=2, steps=4, layers=2), 2)
    resume = (*shared, "--load", str(tmp_path), "--ckpt-step", "2")
    resumed = run_pretrain(tiny_argv(*resume, pp=2, steps=4, layers=2), 4)
    assert _losses(resumed) == pytest.approx(_losses(saved)[2:], rel=1e-5)


def test_sequence_parallel_equals_none(tiny_argv):
    """Would catch: a norm whose weight is not marked, so that ranks keep partial gradients and drift apart."""
    quiet = (
        "--attention-dropout",
        "0",
        "--hidden-dropout",
        "0",
        "--normalization",
        "RMSNorm",
        "--global-batch-size",
        "2",
    )
    plain, parallel = (
        run_pretrain(tiny_argv(*quiet, *extra, tp=2, steps=4, layers=1), 2) for extra in ((), ("--sequence-parallel",))
    )
    for field in ("losses", "grad_norms"):
        assert getattr(parallel[0], field) == pytest.approx(getattr(plain[0], field), rel=1e-5)


def test_exit_interval_ends_by_exit_after_saving(tiny_argv, tmp_path):
    """Would catch: Megatron's own sys.exit taken for a failure, an exit before the save, a server left by the save."""
    argv = tiny_argv("--save", str(tmp_path), "--ckpt-format", "torch_dist", "--save-interval", "9", layers=1)
    argv += ["--exit-interval", "2"]
    (trace,) = run_pretrain(argv, 1, inspect=lambda *_: len(multiprocessing.active_children()))
    assert trace.exit_code == 0 and trace.inspected == 0
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def _draws(rank: int) -> dict[str, list[float]]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    init_megatron(tp=2)
    ambient = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    init_megatron(tp=2)
    again = torch.rand(3)
    return {"ambient": ambient.tolist(), "inside": inside.tolist(), "again": again.tolist()}


def test_random_states_follow_the_layout():
    """Would catch: dropout equal inside the tracker or unequal outside across tensor parallelism, a leaking fork."""
    ranks = run_ranks(_draws, 4)
    assert len({tuple(rank["ambient"]) for rank in ranks}) == 1
    assert ranks[0]["inside"] == ranks[2]["inside"] != ranks[1]["inside"]
    assert all(rank["again"] == rank["ambient"] for rank in ranks)


def test_helper_names_the_rank_that_failed_and_the_one_that_hangs():
    """Would catch: a failing or hanging rank that stops the whole suite, or is reported without its place."""

    def wait_in_vain(rank: int) -> None:
        if rank == 1:
            raise ValueError("no such language")
        torch.distributed.TCPStore.wait(torch.distributed.distributed_c10d._get_default_store(), ["never"])

    with pytest.raises(RanksFailed) as failure:
        run_ranks(wait_in_vain, 2, timeout=60)
    report = str(failure.value)
    assert "[rank1] ValueError: no such language" in report
    assert "[rank0] did not end" in report and "in wait_in_vain" in report
