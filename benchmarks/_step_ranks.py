"""What the ranks of `step.py` do: train in one way or another, and write down what it took."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _step_model import Settings
from _step_variants import K_PASS, PLAIN, RECONSTRUCT, Trainer, Variant, make_trainer

OTHERS_EVERY = 3  # rounds: their times need no third digit


@contextlib.contextmanager
def _group(rank: int, settings: Settings, name: str) -> Iterator[None]:
    """The shim, a process group, and Megatron's groups in it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_moo.platform import cpu, repairs

    quiet()
    torch.set_num_threads(1)
    if settings.cuda:
        repairs.install()
        torch.cuda.set_device(rank)
    else:
        cpu.install()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if settings.cuda else "gloo",
        init_method=f"file://{settings.directory}/{name.replace(' ', '-')}.store",
        rank=rank,
        world_size=settings.dp,
        timeout=datetime.timedelta(minutes=3),
    )
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def measure_memory(rank: int, settings: Settings, variant: Variant) -> None:
    """One variant alone in fresh processes; the mean over ranks goes to a file."""
    from _memory import TensorBytes, resident_bytes

    before, _ = resident_bytes()
    with _group(rank, settings, f"memory {variant.label}"):
        with TensorBytes() as tensors:
            trainer = make_trainer(variant, settings)
            for _ in range(2):
                tensors.reset_peak()
                if settings.cuda:
                    torch.cuda.reset_peak_memory_stats()
                trainer.step()
        peak, live = tensors.peak, tensors.live
        if settings.cuda:
            peak, live = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        numbers = torch.tensor([live, peak, resident_bytes()[1] - before], dtype=torch.float64).cuda()
        dist.all_reduce(numbers)
        if rank == 0:
            live, peak, rss = (numbers / settings.dp).tolist()
            _write(settings, f"memory {variant.label}", {"live": live, "peak": peak, "rss": rss})


def measure_steps(rank: int, settings: Settings, ways: Sequence[Variant]) -> None:
    """Gradients, bytes and time of all variants in the same processes; rank 0 writes what it found to a file."""
    from _step_profile import profile

    with _group(rank, settings, "steps"):
        trainers = {way.label: make_trainer(way, settings) for way in ways}
        results: dict[str, dict[str, Any]] = {label: _facts(trainer) for label, trainer in trainers.items()}
        shards = {}
        for label, trainer in trainers.items():
            results[label]["sent"], shards[label] = _first_steps(trainer, settings)
        for label, found in _distances(shards).items():
            results[label]["difference"] = found
        if settings.loopback:
            from _wire import loopback_bytes

            for label, trainer in trainers.items():
                dist.barrier()
                results[label]["loopback"] = _between_barriers(trainer.step, loopback_bytes) / settings.dp
        for label, seconds in _times(trainers, settings).items():
            results[label] |= seconds
        if settings.profile:
            phases = profile(trainers, settings.profile, settings.cuda)
            for label, found in phases.items():
                results[label]["phases"] = found
        if rank == 0:
            _write(settings, "steps", results)


def _facts(trainer: Trainer) -> dict[str, Any]:
    buckets = trainer.buckets
    return {
        "blocks": trainer.blocks,
        "parameters": trainer.parameters,
        "gradient_bytes": sum(bucket.nbytes for bucket in buckets),
        "largest_bucket_bytes": max(bucket.nbytes for bucket in buckets),
    }


def _first_steps(trainer: Trainer, settings: Settings) -> tuple[dict[str, float], torch.Tensor]:
    """Bytes a rank sends in a step, by collective (the mean over ranks), and this rank's shards of the gradient.

    The first step's gradient is computed twice: buckets learn their order in the first backward pass, and
    communication overlaps from the second one on.
    """
    from _wire import COLLECTIVES, counted

    trainer.gradients(0)
    with counted() as sent:
        trainer.gradients(0)
        shards = trainer.shards().double()
        trainer.optimize()
    names = [name for name, *_ in COLLECTIVES]
    counts = [sum(count for (name, _), count in sent.items() if name == wanted) for wanted in names]
    total = torch.tensor(counts, dtype=torch.float64).cuda()
    dist.all_reduce(total)
    return dict(zip(names, (total / settings.dp).tolist(), strict=True)), shards


def _distances(shards: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Relative distance of every variant's gradient to every other's, over all ranks."""
    found: dict[str, dict[str, float]] = {}
    for label, shard in shards.items():
        found[label] = {}
        for name, other in shards.items():
            squares = torch.stack([(shard - other).square().sum(), other.square().sum()])
            dist.all_reduce(squares)
            found[label][name] = float((squares[0] / squares[1]).sqrt())
    return found


def _times(trainers: dict[str, Trainer], settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Wall seconds of the slowest rank and CPU seconds of all ranks, for every step of every variant.

    Variants take turns: each round starts one further, every second one runs backwards. Plain Megatron has two turns a
    round, half a round apart; their mean is what the others of the round are compared with. K-pass and reconstruct
    take part in every third round only; NaN elsewhere.
    """
    wall: dict[str, list[float]] = {label: [] for label in trainers}
    cpu: dict[str, list[float]] = {label: [] for label in trainers}
    order = list(trainers)
    order.insert(len(order) // 2 + 1, PLAIN)
    for number in range(settings.rounds):
        for label in order if number % 2 == 0 else order[::-1]:
            if label in (K_PASS, RECONSTRUCT) and number % OTHERS_EVERY:
                took = used = float("nan")
            else:
                start = time.process_time()
                took = _between_barriers(trainers[label].step, time.perf_counter)
                used = time.process_time() - start
            wall[label].append(took)
            cpu[label].append(used)
        order = order[1:] + order[:1]  # nobody always comes after the same one
    for seconds in (wall, cpu):
        pairs = zip(seconds[PLAIN][::2], seconds[PLAIN][1::2], strict=True)
        seconds[PLAIN] = [(a + b) / 2 for a, b in pairs]
    slowest = torch.tensor(list(wall.values()), dtype=torch.float64).cuda()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    total = torch.tensor(list(cpu.values()), dtype=torch.float64).cuda()
    dist.all_reduce(total)
    both = zip(trainers, slowest.tolist(), total.tolist(), strict=True)
    return {label: {"seconds": _taken(seconds), "cpu_seconds": _taken(used)} for label, seconds, used in both}


def _taken(seconds: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in seconds]


def _between_barriers(run: Callable[[], None], clock: Callable[[], float]) -> float:
    dist.barrier()
    start = clock()
    run()
    dist.barrier()
    return clock() - start


def quiet() -> None:
    """A rank reports by file; Megatron's listing of every bucket is of no use here."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _write(settings: Settings, name: str, value: Any) -> None:
    Path(settings.directory, f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
