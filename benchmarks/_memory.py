"""What a rank holds: live tensor bytes, followed operation by operation, and the process's resident memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside it that are still alive.

    Exact and free of noise, unlike a process's resident memory; blind to what a library allocates below torch (gloo's
    staging buffers).

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at a time since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def reset_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory now, and the most it ever was; zeros where the system does not say."""
    path = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
    now, most = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most
