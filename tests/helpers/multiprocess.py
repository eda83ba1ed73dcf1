"""Run a function on N gloo ranks of one machine: the one helper of all multi-process tests.

`run_ranks(function, world_size, *args)` forks the ranks from this process, which has torch and Megatron imported
already, so a rank starts in milliseconds.  Each rank joins a gloo process group over the loopback, calls
`function(rank, *args)`, and hands its (pickled) return value back.  The ranks' output goes to files, shown on failure.

When a rank raises, or the time is up, every rank is killed, and the error holds the traceback of each rank that
raised, and for each that did not the line it stood in: a hang names the collective it hung in.

A forked rank inherits this process's state, so tests must not initialise a process group, install the CPU shim or use
several torch threads in the parent (`conftest.py` sets one thread).
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

GRACE_SECONDS = 3.0  # for the other ranks to fail by themselves once one has
LOG_LINES = 15


class RanksFailed(AssertionError):
    """A rank raised, died or did not end in time; the message is tagged by rank."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` forked ranks and return their results in rank order.

    Args:
        function: any callable, closures included; its result must be picklable (tensors travel by value).
        world_size: number of ranks.
        timeout: seconds until all ranks are killed.

    Raises:
        RanksFailed: a rank raised, died or was too slow.
    """
    __tracebackhide__ = True
    import megatron.training.training  # noqa: F401  warms the parent

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(world_size)
        ranks = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(function, rank, world_size, args, listener, sender, Path(directory), timeout),
                    name=f"rank{rank}",
                )
                process.start()
                sender.close()
                ranks.append(_Rank(process, receiver, Path(directory)))
            _collect(ranks, time.monotonic() + timeout)
            failed = any(rank.outcome is None or rank.outcome[0] != "result" for rank in ranks)
            if failed:
                _ask_where(ranks)
                # The first to fail comes first: the others often fail for want of it.
                raise RanksFailed("\n".join(rank.report(timeout) for rank in sorted(ranks, key=lambda r: r.ended)))
            return [rank.outcome[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()


class _Rank:
    """The parent's end of a rank."""

    def __init__(self, process: Any, receiver: Any, directory: Path) -> None:
        self.process = process
        self.receiver = receiver
        self.log = directory / f"{process.name}.log"
        self.stack = directory / f"{process.name}.stack"
        self.outcome: tuple[str, Any] | None = None
        self.ended = float("inf")

    def receive(self) -> None:
        self.ended = time.monotonic()
        try:
            self.outcome = pickle.loads(self.receiver.recv_bytes())
        except (EOFError, OSError):
            self.process.join(GRACE_SECONDS)
            self.outcome = ("died", f"exit code {self.process.exitcode}")

    def kill(self) -> None:
        # The group: a rank may have started processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.receiver.close()

    def report(self, timeout: float) -> str:
        if self.outcome is None:
            kind = f"did not end (time limit {timeout:g} s, or another rank failed); it stood here:"
            detail = _tail(self.stack, 200).partition(" in _rank_main")[0]
            detail += "\n--- its output ends:\n" + _tail(self.log, LOG_LINES)
        elif self.outcome[0] == "result":
            kind, detail = "returned", ""
        else:
            kind, detail = self.outcome
            detail += "\n--- its output ends:\n" + _tail(self.log, LOG_LINES)
        return "\n".join(f"[{self.process.name}] {line}" for line in [kind, *detail.splitlines()])


def _tail(path: Path, lines: int) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Receive outcomes until all are in, the time is up, or GRACE_SECONDS after the first failure."""
    waiting = {rank.receiver: rank for rank in ranks}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for receiver in ready:
            rank = waiting.pop(receiver)
            rank.receive()
            if rank.outcome[0] != "result":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _ask_where(ranks: list[_Rank]) -> None:
    """Have the ranks that are still running write down their stacks."""
    running = [rank for rank in ranks if rank.outcome is None and rank.process.is_alive()]
    for rank in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, signal.SIGUSR1)
    if running:
        time.sleep(0.5)


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple,
    listener: socket.socket,
    sender: Any,
    directory: Path,
    timeout: float,
) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a killed test run
    name = f"rank{rank}"
    log = open(directory / f"{name}.log", "w", buffering=1)  # noqa: SIM115  open until the process ends
    sys.stdout.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    stack = open(directory / f"{name}.stack", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    # What spawns a process from here must not import the test runner's main module again.
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        _join_group(rank, world_size, listener, timeout)
        outcome = ("result", function(rank, *args))
        torch.distributed.barrier()
        message = pickle.dumps(outcome)
    except BaseException:  # the parent reports it
        message = pickle.dumps(("raised", traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
    with contextlib.suppress(Exception):
        _destroy()


def _join_group(rank: int, world_size: int, listener: socket.socket, timeout: float) -> None:
    host, port = listener.getsockname()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    if rank == 0:
        # The store serves on the socket that the parent bound, so no port can be lost between choosing and using it.
        fd = os.dup(listener.fileno())
        store = torch.distributed.TCPStore(host, port, world_size, True, limit, False, master_listen_fd=fd)
    else:
        store = torch.distributed.TCPStore(host, port, world_size, False, limit)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)


def _destroy() -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def init_megatron(
    tp: int = 1,
    pp: int = 1,
    virtual_pp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    *,
    seed: int = 1234,
    **kwargs: Any,
) -> None:
    """Inside a rank: the CPU shim, Megatron's process groups and its random states.

    Args:
        tp, pp, cp, ep: tensor-, pipeline-, context- and expert-parallel sizes; the rest is data-parallel.
        virtual_pp: pipeline chunks per stage.
        etp: tensor-parallel size of experts; default: tp.
        seed: of the tensor-parallel random states.
        kwargs: further arguments of `parallel_state.initialize_model_parallel`.

    A second call replaces the groups.  `run_ranks` destroys them when the rank ends.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_moo.platform import cpu

    cpu.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        virtual_pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        **kwargs,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
