"""Where the time of a step goes: functions of Megatron and of this project, wrapped from outside.

Phases do not overlap: what a phase calls of another one counts for that one alone. A name that is gone is an error, so
that no phase is silently empty. One phase runs at a time, on whatever thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_MOO = "megatron_moo.distributed"

# Phase -> (module, attribute) of the functions that are it.
PHASES: dict[str, tuple[tuple[str, str], ...]] = {
    "zero gradients": (
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel.zero_grad_buffer"),
    ),
    "post": (
        (_BUFFERS, "_ParamAndGradBucketGroup.start_grad_sync"),
        (f"{_MOO}.exchange", "ExchangeBucketGroup.start_grad_sync"),
    ),
    "land": (
        (_BUFFERS, "_ParamAndGradBucketGroup.finish_grad_sync"),
        (f"{_MOO}.exchange", "ExchangeBucketGroup.land"),
    ),
    "scale": (("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel.scale_gradients"),),
    "token counts": ((f"{_MOO}.sync", "BucketLevelMoo._gather_tokens"),),
    "fix-ups": ((f"{_MOO}.sync", "reduce_partial_rows"), (f"{_MOO}.sync", "reduce_tied_rows")),
    "Gramian": ((f"{_MOO}.gramian", "ShardGramian.__call__"),),
    "all-reduce": ((f"{_MOO}.sync", "BucketLevelMoo._reduce_gramian"),),
    "faults": ((f"{_MOO}.sync", "BucketLevelMoo._leave_out"),),
    "solve": ((f"{_MOO}.weights", "WeightSolver.__call__"),),
    "combine": ((f"{_MOO}.sync", "BucketLevelMoo._combine"),),
    "resolve, rest": ((f"{_MOO}.sync", "BucketLevelMoo._resolve"), ("_step_variants", "Vectors._combine")),
    "optimizer": (("_step_variants", "Trainer.optimize"),),
}
WAIT, REST = "wait", "forward, backward"


class Clock:
    """Wall and CPU seconds by phase; time inside an inner phase is not the outer one's.

    CPU seconds are those of this thread. On CUDA they are the process's: backward hooks run on autograd's thread.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._cpu_time = time.process_time if cuda else time.thread_time
        self._running: list[str] = []
        self._since = (0.0, 0.0)
        self.seconds: dict[str, list[float]] = {}

    def _switch(self) -> None:
        """Charge the time since the last switch to the innermost phase."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter(), self._cpu_time()
        if self._running:
            spent = self.seconds.setdefault(self._running[-1], [0.0, 0.0])
            for i in (0, 1):
                spent[i] += now[i] - self._since[i]
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


class _TimedHandle:
    """A collective's handle whose ``wait`` is a phase of its own."""

    def __init__(self, handle: Any, clock: Clock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self) -> Any:
        with self._clock.phase(WAIT):
            return self._handle.wait()


@contextlib.contextmanager
def _wrapped(clock: Clock) -> Iterator[None]:
    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            handle = function(*args, **kwargs)
            return None if handle is None else _TimedHandle(handle, clock)

        return call

    with contextlib.ExitStack() as stack:
        for name, places in PHASES.items():
            for module, path in places:
                owner, _, attribute = path.rpartition(".")
                holder = importlib.import_module(module)
                if owner:
                    holder = getattr(holder, owner)
                replacement = clock.wrap(getattr(holder, attribute), name)
                stack.enter_context(mock.patch.object(holder, attribute, replacement))
        for name in ("all_to_all_single", "all_gather_into_tensor"):
            stack.enter_context(mock.patch.object(dist, name, timed(getattr(dist, name))))
        coalesced = importlib.import_module("torch.distributed.distributed_c10d")._CoalescingManager
        stack.enter_context(mock.patch.object(coalesced, "wait", clock.wrap(coalesced.wait, WAIT)))
        yield


def profile(trainers: Mapping[str, Any], steps: int, cuda: bool) -> dict[str, dict[str, list[float]]]:
    """``{label: {phase: [wall, CPU] seconds}}`` of a step: median over steps, mean over ranks."""
    found: dict[str, dict[str, list[list[float]]]] = {label: {} for label in trainers}
    for _ in range(steps):
        for label, trainer in trainers.items():
            dist.barrier()
            clock = Clock(cuda)
            with _wrapped(clock), clock.phase(REST):
                trainer.step()
            for name in (*PHASES, WAIT, REST):
                found[label].setdefault(name, []).append(clock.seconds.get(name, [0.0, 0.0]))
    result = {}
    for label, phases in found.items():
        medians = [[statistics.median(values) for values in zip(*spent, strict=True)] for spent in phases.values()]
        mean = torch.tensor(medians, dtype=torch.float64).cuda()
        dist.all_reduce(mean)
        result[label] = dict(zip(phases, (mean / dist.get_world_size()).tolist(), strict=True))
    return result
