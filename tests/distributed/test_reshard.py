"""A run that is saved on one layout goes on upon another as if nothing had happened: weights, Adam moments and
aggregator state arrive at their places, and the data go on where they were. What cannot go on says so, at the start."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.helpers.entry import aggregator_state, entry_argv, prepare_data, run_entry, start

STEPS, STOP = 4, 2  # a step or two beyond: the second depends on moments and state that the first has moved on
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
# Relative; rounding alone, as the order of sums differs between layouts.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four languages, tokenised as bytes."""
    return prepare_data(tmp_path_factory.mktemp("data"), ("de", "en", "ru", "sw"))


@dataclass(frozen=True)
class Layout:
    """A place to run: parallel sizes and the flags that go with them."""

    ranks: int = 4
    tp: int = 1
    pp: int = 1
    flags: str = ""
    reshardable: bool = True

    def argv(self, data: Path, *extra: str, steps: int = STEPS) -> list[str]:
        # The loss knows the padded vocabulary: 512 entries on every layout.
        common = (
            "--moo-method gradvac --moo-smooth-decay 0.5 --moo-granularity layer --calculate-per-token-loss "
            f"--num-layers 4 --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by {512 // self.tp} "
            f"--sequence-parallel {RESHARDABLE * self.reshardable} {self.flags}"
        )
        argv = entry_argv(data, *common.split(), *extra, tp=self.tp, pp=self.pp, steps=steps)
        return [item for item in argv if item != "--sequence-parallel" or self.tp > 1]


EXPERTS = (
    "--num-experts 2 --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --disable-bias-linear"
)
VIRTUAL = "--num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = {
    "dp4": Layout(),
    "dp2": Layout(ranks=2),  # two waves
    "dp4-other-buckets": Layout(flags="--ddp-bucket-size 20000 --overlap-grad-reduce"),
    "dp1-host": Layout(ranks=1, flags="--moo-wave-memory host"),  # four waves
    "tp2pp2": Layout(tp=2, pp=2),
    "pp2": Layout(pp=2, flags="--distrib-optim-fully-reshardable-mem-efficient"),
    "pp2-interleaved": Layout(pp=2, flags=VIRTUAL),
    "ep2": Layout(flags=f"{EXPERTS} --expert-model-parallel-size 2"),
    "ep1": Layout(flags=EXPERTS),
}
PAIRS = {
    "tp2pp2": ["dp4"],
    "dp4": ["tp2pp2", "dp2", "dp1-host", "dp4-other-buckets"],
    "pp2": ["pp2-interleaved"],
    "pp2-interleaved": ["pp2"],
    "ep2": ["ep1"],
    "ep1": ["ep2"],
}


@pytest.mark.parametrize("saved_on", PAIRS)
def test_run_goes_on_upon_another_layout(data, tmp_path, saved_on):
    """Would catch: optimizer or aggregator state that reaches another parameter or none, data that start elsewhere."""
    first = LAYOUTS[saved_on]
    # Two micro-batches for each of four languages, so that an interleaved pipeline has enough of them.
    batch = ("--global-batch-size", "16")
    run_dir = ("--moo-run-dir", str(tmp_path / "whole"))
    whole = run_entry(
        first.argv(data, *batch, *run_dir, "--save-interval", str(STOP)), first.ranks, inspect=_aggregator
    )
    load = ("--load", str(tmp_path / "whole" / "checkpoints"), "--ckpt-step", str(STOP))
    for name in PAIRS[saved_on]:
        second = LAYOUTS[name]
        resumed = run_entry(
            second.argv(data, *batch, *load, "--moo-run-dir", str(tmp_path / name)), second.ranks, inspect=_aggregator
        )
        assert resumed[-1].losses == pytest.approx(whole[-1].losses[STOP:], rel=TOLERANCE), name
        assert resumed[-1].grad_norms == pytest.approx(whole[-1].grad_norms[STOP:], rel=TOLERANCE), name
        _same_state(whole[0].inspected, resumed[0].inspected)
        assert "start afresh" not in resumed[0].output
        assert "are not those of the interrupted run" not in resumed[0].output


def _aggregator(model: list[torch.nn.Module], optimizer: object) -> dict[str, torch.Tensor]:
    return aggregator_state(model)


def _same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-5), key


ONE = Layout(ranks=1, reshardable=False, flags="--moo-granularity bucket")  # as Megatron saves by default


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The run directory and the losses of a run on one rank, which left a checkpoint behind after STOP steps."""
    run_dir = tmp_path_factory.mktemp("saved")
    (trace,) = run_entry(ONE.argv(data, "--moo-run-dir", str(run_dir), "--save-interval", str(STOP)), 1)
    return run_dir, trace.losses


def _load(run_dir: Path, step: int = STOP) -> tuple[str, ...]:
    return "--load", str(run_dir / "checkpoints"), "--ckpt-step", str(step)


def test_optimizer_state_by_bucket_is_converted_by_one_step(data, saved, tmp_path):
    """Would catch: a conversion, as the error text asks for it, that does not end in a checkpoint for every layout."""
    run_dir, losses = saved
    two = replace(LAYOUTS["tp2pp2"], ranks=2, pp=1)
    refused = start(two.argv(data, *_load(run_dir), "--moo-run-dir", str(tmp_path / "refused")), 2)
    assert refused.code == 2 and not (tmp_path / "refused").exists()
    for part in (f"{RESHARDABLE} --exit-interval 1", "--tensor-model-parallel-size 1 -> 2", "--no-load-optim"):
        assert part in refused.error

    convert = (RESHARDABLE, "--exit-interval", "1", "--moo-run-dir", str(tmp_path / "converted"))
    (trace,) = run_entry(ONE.argv(data, *_load(run_dir), *convert), 1)
    assert trace.exit_code == 0 and trace.losses == losses[STOP : STOP + 1]
    resumed = run_entry(two.argv(data, "--moo-granularity", "bucket", "--moo-run-dir", str(tmp_path / "converted")), 2)
    assert resumed[0].losses == pytest.approx(losses[STOP + 1 :], rel=TOLERANCE)


REFUSED = {
    "bucket size": (("--ddp-bucket-size", "9000"), ("--ddp-bucket-size 3000 -> 9000", RESHARDABLE)),
    "method": (("--moo-method", "pcgrad"), ("--moo-method gradvac", "pcgrad", "--finetune")),
    "languages": (("--moo-languages", "de,en"), ("--moo-languages de,en,ru,sw", "--no-load-optim")),
    "model": (("--num-layers", "2"), ("another model", "--num-layers 4 -> 2")),
    "step": (("--ckpt-step", "3"), ("iter_0000003 does not exist", "--ckpt-step")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_built(data, saved, tmp_path, case):
    """Would catch: a traceback per rank, after minutes, in place of one line; a run directory that is overwritten."""
    flags, parts = REFUSED[case]
    run_dir = tmp_path / "run"
    refused = start(ONE.argv(data, *_load(saved[0]), *flags, "--moo-run-dir", str(run_dir)))
    assert refused.code == 2 and not run_dir.exists()
    assert all(part in refused.error for part in parts), refused.error


def test_all_reduce_and_distributed_optimizer_do_not_read_each_other(data, saved, tmp_path):
    """Would catch: a failure deep in Megatron, that names a parameter group or a sharded tensor."""
    run_dir = ("--moo-run-dir", str(tmp_path / "run"))
    argv = [flag for flag in ONE.argv(data, *_load(saved[0]), *run_dir) if flag != "--use-distributed-optimizer"]
    assert "go on with it" in start(argv).error


def test_what_does_not_carry_over_is_said(data, saved, tmp_path):
    """Would catch: aggregator state dropped, started afresh, or data that jump, without a word."""
    flags = "--moo-noise-smoothing 0.5 --global-batch-size 16 --override-opt-param-scheduler"
    argv = ONE.argv(data, *_load(saved[0]), *flags.split(), "--moo-run-dir", str(tmp_path / "run"))
    argv[argv.index("--moo-smooth-decay") : argv.index("--moo-smooth-decay") + 2] = []
    (trace,) = run_entry(argv, 1)
    for part in ("state of Smoothed", "NoiseAware (noise_cosine_BKK)", "--global-batch-size 8 -> 16"):
        assert part in trace.output


def test_another_learning_rate_schedule_is_one_line(data, saved, tmp_path):
    """Would catch: Megatron's assertion about the schedule, on every rank, for a run that is to be longer."""
    longer = ("--train-iters", "8", "--moo-run-dir", str(tmp_path / "run"))
    (trace,) = run_entry(ONE.argv(data, *_load(saved[0]), *longer), 1)
    assert trace.exit_code == 2 and trace.losses == []
    assert trace.output.count("error: ") == 1 and "Traceback" not in trace.output
    assert "--override-opt-param-scheduler" in trace.output
