"""Whole runs of `megatron.training.pretrain` in forked ranks, on a tiny GPT.

Every run has fresh global state, because its ranks are forked.  `run_pretrain(argv, world_size)` trains with stock
Megatron; give it another `main` to run an entry of this project in the same way.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.helpers.multiprocess import run_ranks

VOCABULARY = 64  # of the NullTokenizer below: 63 and its end-of-document token


def tiny_argv(*extra: str, tp: int = 1, pp: int = 1, steps: int = 6, layers: int = 4) -> list[str]:
    """Megatron's flags for a tiny GPT on CPU; later flags win, so `extra` may change any of them."""
    from megatron_moo.platform.cpu import CPU_FLAGS

    flags = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --train-iters {steps} "
        f"--num-layers {layers} --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
        "--max-position-embeddings 16 --position-embedding-type rope --micro-batch-size 2 --global-batch-size 8 "
        "--lr 1e-2 --lr-decay-style constant --use-distributed-optimizer --calculate-per-token-loss "
        "--tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 16 "
        "--dataloader-type external --eval-iters 0 --eval-interval 1000 --log-interval 1 --no-one-logger "
        "--distributed-timeout-minutes 2"
    )
    return [*CPU_FLAGS, *flags.split(), *extra]


@dataclass
class Trace:
    """What one rank saw of a run: values per step, and what `inspect` returned at the end."""

    losses: list[float] = field(default_factory=list)  # the last pipeline stage alone
    grad_norms: list[float] = field(default_factory=list)
    exit_code: int | None = None  # where the run ended by sys.exit
    output: str = ""  # what the rank wrote to stdout and stderr
    inspected: Any = None


def run_pretrain(
    argv: list[str],
    world_size: int,
    main: Callable[[], None] | None = None,
    inspect: Callable[[list[torch.nn.Module], Any], Any] | None = None,
    timeout: float = 180,
) -> list[Trace]:
    """Run `main` (default: stock Megatron on counting sequences) with `argv` on forked ranks.

    Args:
        argv: the options, without the program's name.
        world_size: number of ranks.
        main: reads `sys.argv` and ends in Megatron's `pretrain`.
        inspect: called with the model chunks and the optimizer when `main` is done.
        timeout: see `run_ranks`.

    Returns:
        One Trace per rank.
    """
    return run_ranks(_pretrain_rank, world_size, argv, main or stock_main, inspect, timeout=timeout)


def _pretrain_rank(rank: int, argv: list[str], main: Callable[[], None], inspect: Any) -> Trace:
    from megatron_moo.platform import cpu

    cpu.install()
    sys.argv = ["pretrain", *argv]
    trace, built = Trace(), []
    _record(trace, built)
    try:
        main()
    except SystemExit as exit_:
        trace.exit_code = exit_.code or 0
    sys.stdout.flush()
    trace.output = Path(sys.stdout.name).read_text(errors="replace")  # run_ranks sends both there
    if inspect is not None:
        assert built, f"ended with {trace.exit_code} before there was a model: {trace.output[-1000:]}"
        trace.inspected = inspect(*built[0][:2])
    return trace


def _record(trace: Trace, built: list[tuple]) -> None:
    from megatron.training import training

    original_step, original_setup = training.train_step, training.setup_model_and_optimizer

    def train_step(*args: Any, **kwargs: Any) -> tuple:
        result = original_step(*args, **kwargs)
        trace.losses += [float(result[0]["lm loss"])] if result[0] else []
        trace.grad_norms.append(float(result[5]))
        return result

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> tuple:
        built.append(original_setup(*args, **kwargs))
        return built[-1]

    training.train_step, training.setup_model_and_optimizer = train_step, setup_model_and_optimizer


def stock_main() -> None:
    """Megatron's own training program for a GPT, its data apart."""
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.training import pretrain

    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, _counting_data, ModelType.encoder_or_decoder, forward_step)


def _counting_data(sizes: tuple, vp_stage: int | None = None) -> tuple[Iterator[dict[str, torch.Tensor]], None, None]:
    from megatron.core import parallel_state
    from megatron.training import get_args

    args = get_args()
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return (
        _count(args.consumed_train_samples, rank, ranks, args.micro_batch_size, args.seq_length),
        None,
        None,
    )


_counting_data.is_distributed = True  # every rank makes its own batches


def _count(consumed: int, rank: int, ranks: int, rows: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of sequences that count up from a start which depends on the sample's number alone."""
    first = consumed + rank * rows
    while True:
        starts = torch.tensor([(37 * (first + row)) % VOCABULARY for row in range(rows)])
        tokens = (starts[:, None] + torch.arange(length + 1)) % VOCABULARY
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        }
        first += ranks * rows


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: token losses, and the function that sums them up."""
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_sum_up, batch["labels"].numel())


def _sum_up(tokens: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = output.float().sum()
    return (
        total,
        torch.tensor(tokens, dtype=torch.int),
        {"lm loss": torch.stack([total.detach(), torch.tensor(float(tokens))])},
    )
