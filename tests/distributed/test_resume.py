"""A run that is interrupted and resumed ends bit for bit like one that was not, however its steps are made.

`test_entry.py` stops by both signals with tensor and pipeline parallelism; here are the ways to make a step: waves,
their memory, rotating languages, accumulation, chunks of a pipeline, optimizers and number formats.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from megatron_moo.analysis import read_metrics
from tests.helpers.entry import differing, entry_argv, entry_main, prepare_data, run_entry, weights

STEPS, STOP = 4, 2
NOISE = "--moo-noise-smoothing 0.5 --moo-noise-unbiased yes --moo-smooth-decay 0.5"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three languages, tokenised as bytes."""
    return prepare_data(tmp_path_factory.mktemp("data"))


@dataclass(frozen=True)
class Case:
    """Flags of a run, and how it is stopped after STOP steps.

    `later`: not at all, it resumes from a checkpoint that a run left behind which went on (two runs instead of three).
    """

    flags: str
    ranks: int = 2
    pp: int = 1
    stopped_by: str = "later"
    without: tuple[str, ...] = ()
    waves: int = 1


CASES = {
    "one-wave": Case("--moo-method famo --moo-languages de,en"),
    "accumulation-2-waves-in-host-memory": Case(
        f"--moo-method gradvac --moo-wave-memory host --global-batch-size 16 {NOISE}", waves=2
    ),
    "3-waves": Case(
        f"--moo-method gradvac --moo-waves 3 --global-batch-size 12 {NOISE}", waves=3, stopped_by="SIGTERM"
    ),
    "rotating": Case("--moo-method gradvac --moo-active 2 --moo-smooth-decay 0.5", stopped_by="interval"),
    "rotating-waves-in-host-memory": Case("--moo-method dwa --moo-active 2 --moo-wave-memory host", ranks=1, waves=2),
    "interleaved-2-waves": Case(
        "--moo-method pcgrad --moo-every-n 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--global-batch-size 16",
        ranks=4,
        pp=2,
        waves=2,
    ),
    "all-reduce-bf16": Case(
        "--moo-method famo --bf16 --accumulate-allreduce-grads-in-fp32",
        waves=2,
        without=("--use-distributed-optimizer",),
    ),
    "fp16-overlap": Case("--moo-method gradvac --fp16 --initial-loss-scale 1024 --overlap-grad-reduce", waves=2),
    "experts": Case(
        "--moo-method gradvac --num-experts 2 --expert-model-parallel-size 2 --moe-router-load-balancing-type none "
        "--moe-token-dispatcher-type alltoall --disable-bias-linear --global-batch-size 12",
        waves=3,
    ),
}


def _terminated() -> None:
    """The entry, which a SIGTERM reaches on one rank in step STOP."""
    from megatron.training import training

    stock, steps = training.train_step, []

    def train_step(*args, **kwargs):
        steps.append(None)
        if len(steps) == STOP and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(*args, **kwargs)

    training.train_step = train_step
    entry_main()


def _argv(case: Case, data, run_dir, *extra: str) -> list[str]:
    flags = "--moo-granularity tensor --hidden-dropout 0.1 --attention-dropout 0.1 --calculate-per-token-loss "
    argv = entry_argv(data, *(flags + case.flags).split(), "--moo-run-dir", str(run_dir), pp=case.pp, steps=STEPS)
    return [item for item in (*argv, *extra) if item not in case.without]


STOPS: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "interval": (("--exit-interval", str(STOP)), entry_main),
    "SIGTERM": (("--exit-signal-handler",), _terminated),
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_ends_bit_for_bit_alike(data, tmp_path, name):
    """Would catch: rows, counts, aggregator state, rotation or random orders that a checkpoint misses."""
    case = CASES[name]
    saving = ("--save-interval", str(STOP)) if case.stopped_by == "later" else ()
    whole = run_entry(_argv(case, data, tmp_path / "whole", *saving), case.ranks, inspect=weights)
    if case.stopped_by == "later":
        load = ("--load", str(tmp_path / "whole" / "checkpoints"), "--ckpt-step", str(STOP))
        second = run_entry(_argv(case, data, tmp_path / "second", *load), case.ranks, inspect=weights)
    else:
        flags, main = STOPS[case.stopped_by]
        first = run_entry(_argv(case, data, tmp_path / "second", *flags), case.ranks, main=main)
        assert [trace.exit_code for trace in first] == [0] * case.ranks
        assert [len(trace.grad_norms) for trace in first] == [STOP] * case.ranks
        second = run_entry(_argv(case, data, tmp_path / "second", *flags), case.ranks, inspect=weights)
    for rank, (one, two) in enumerate(zip(whole, second, strict=True)):
        assert two.grad_norms == one.grad_norms[STOP:], rank
        assert differing(one.inspected, two.inspected) == [], rank
        assert any(key.startswith("aggregator/") for key in one.inspected)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["waves"] == case.waves
    _same_metrics(tmp_path, STOP if case.stopped_by == "later" else 0)


def _same_metrics(folder, after: int) -> None:
    """Every line that both runs wrote is the same, and none is missing."""
    whole, second = (read_metrics(folder / name / "metrics.jsonl") for name in ("whole", "second"))
    for kind in ("steps", "blocks"):
        one, two = ([record | {"time": 0} for record in getattr(lines, kind)] for lines in (whole, second))
        assert [record["step"] for record in two] == list(range(after + 1, STEPS + 1))
        assert two == one[after:]
