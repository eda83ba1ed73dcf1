"""Counts what a rank puts on the wire, by wrapping torch.distributed's collectives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core.distributed.param_and_grad_buffer as buffers
import torch.distributed as dist

# Name, position and name of the counted argument (the larger one: gathered output, scattered input), and how often it
# passes: a bandwidth-optimal all-reduce is a reduce-scatter and an all-gather.
COLLECTIVES = (
    ("all_reduce", 0, "tensor", 2),
    ("all_to_all_single", 0, "output", 1),
    ("reduce_scatter_tensor", 1, "input", 1),
    ("all_gather_into_tensor", 0, "output_tensor", 1),
)


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Bytes that this rank sends, by collective and group size: ``{("all_to_all_single", 4): 1234, ...}``.

    Computed from the tensors' sizes for bandwidth-optimal algorithms: (D - 1) / D of the tensor for reduce-scatter,
    all-gather and all-to-all, twice that for all-reduce. What a backend really sends may be more.
    """
    sent: Counter = Counter()

    def counting(name: str, position: int, argument: str, passes: int) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else kwargs[argument]
            size = dist.get_world_size(group)
            sent[name, size] += passes * tensor.numel() * (size - 1) // size * tensor.element_size()
            return real(*args, group=group, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, position, argument, passes in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counting(name, position, argument, passes)))
        # Megatron binds these two at import.
        stack.enter_context(mock.patch.object(buffers, "dist_reduce_scatter_func", dist.reduce_scatter_tensor))
        stack.enter_context(mock.patch.object(buffers, "dist_all_gather_func", dist.all_gather_into_tensor))
        yield sent


def loopback_bytes() -> int:
    """Bytes that went over this machine's (or network namespace's) loopback since it came up.

    Raises:
        RuntimeError: where the system does not say.
    """
    path = Path("/proc/net/dev")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])  # transmitted
    raise RuntimeError(f"{path} holds no counter of the loopback: this system cannot say what was sent")
