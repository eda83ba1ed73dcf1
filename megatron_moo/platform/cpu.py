"""Run Megatron on a machine without CUDA: one explicit shim, `install()`.

Megatron-core 0.19 addresses "the current CUDA device" in a few hundred places, so on a machine without CUDA it
stops at the first allocation.  `install()` replaces what is missing there, and only that, by what a device that
happens to be the host would do.  Under it `megatron.core` and `megatron.training.pretrain` run unchanged over gloo
(give Megatron `CPU_FLAGS` as well).  Where CUDA is available `install()` does nothing.

What is covered, and why:

- `torch.cuda.current_device()` is `torch.device("cpu")`: Megatron passes it to `device=` and `.to()` everywhere.
- Device names.  `device="cuda"`, a cuda `torch.device` or a device index mean the host in tensor factories and in
  `Tensor.to` / `Tensor.new_*`; `Tensor.cuda()` returns its tensor.
- `Tensor.type()` answers "torch.cuda.FloatTensor" (and Half, BFloat16): the optimizers sort parameters by it.
- Streams and events exist and do nothing: there is one queue, and every operation is finished when it returns.
- Random state.  There is one generator, so the CUDA state is the CPU state.  Tensor-parallel regions draw from
  Megatron's tracker exactly as on a GPU, because the tracker saves and restores that state.
- Device queries and memory statistics answer with harmless values (one device, nothing allocated).
- NVTX ranges do nothing.
- `initialize_megatron` is called with `allow_no_cuda=True`, and the start-up build of the dataset helpers is
  skipped when the compiled extension imports: the wheel ships the extension but not the Makefile, and Megatron
  ends the process when `make` fails.
- Numbers of tokens per expert, by which tokens are exchanged, are handed on as arrays: Megatron makes arrays of those
  that it has to bring to the host, and these are there.
- `torch.compile` regions run eagerly and their warm-up is skipped: Megatron compiles its fused activations on first
  use whatever the flags say, which on a CPU costs a C++ compiler run per process and gains nothing.
- `CUDA_DEVICE_MAX_CONNECTIONS` is set to 1 if unset, which Megatron checks when it uses tensor parallelism.
- What is missing without Transformer Engine and Apex: `repairs.py`, which is of use on GPUs too.

Not covered: CUDA graphs, NCCL memory pools, FP8 and everything that needs Transformer Engine or Apex.
"""

import contextlib
import functools
import logging
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from megatron_moo.platform import repairs
from megatron_moo.platform.probes import cuda_available

CPU_FLAGS: tuple[str, ...] = (
    "--transformer-impl",
    "local",
    "--distributed-backend",
    "gloo",
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--attention-backend",
    "unfused",
)
"""Megatron's own flags without which a CPU run stops: they name fused CUDA kernels, NCCL or Transformer Engine."""

_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like randint "
    "randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros zeros_like"
).split()
_TENSOR_METHODS = "new_empty new_full new_ones new_tensor new_zeros".split()
_CUDA_TYPE_NAMES = {f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}

_installed = False


def installed() -> bool:
    """Whether the shim is in place in this process."""
    return _installed


def install(force: bool = False) -> bool:
    """Put the shim in place; a second call changes nothing.

    Call it before building models or process groups, in every process.  It imports Megatron.

    Args:
        force: insist on the shim.

    Returns:
        Whether the shim is in place: False where CUDA is available, which is left as it is.

    Raises:
        RuntimeError: `force` is given and CUDA is available.
    """
    global _installed
    if cuda_available():
        if force:
            raise RuntimeError(
                "platform.cpu.install(force=True): CUDA is available, and the shim would send GPU work to the host "
                "silently. Drop force=True, or hide the devices with CUDA_VISIBLE_DEVICES= to run on the CPU."
            )
        return False
    if _installed:
        return True
    torch.compiler.set_stance("force_eager")  # first: it imports Dynamo, which tabulates the functions of torch.cuda
    _replace_cuda_namespace()
    _replace_random_state()
    _replace_device_names()
    _adapt_megatron()
    repairs.install()
    # A queue length of CUDA that Megatron requires of tensor-parallel runs; nothing reads it here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _installed = True
    return True


class Stream:
    """A stream of a device that has one queue: waiting and synchronising are already true."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0
        self.priority = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event if event is not None else Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None: ...


class Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        return 0.0


def _answer(value: Any) -> Any:
    """A function of any arguments that returns `value`; a new one per name, as tools tabulate functions by identity."""
    return lambda *args, **kwargs: value


def _replace_cuda_namespace() -> None:
    cuda = torch.cuda
    stream = Stream()
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1, warp_size=1
    )
    replacements: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        # a fresh context each time: code may hold two of them
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "device": lambda *args, **kwargs: contextlib.nullcontext(),
        "current_device": _answer(torch.device("cpu")),
        "device_count": _answer(1),
        "current_stream": _answer(stream),
        "default_stream": _answer(stream),
        "get_device_capability": _answer((0, 0)),
        "get_device_name": _answer("cpu"),
        "get_device_properties": _answer(properties),
        "is_current_stream_capturing": _answer(False),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        replacements[name] = _answer(None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        replacements[name] = _answer(0)
    for name, value in replacements.items():
        setattr(cuda, name, value)
        if hasattr(cuda.memory, name):
            setattr(cuda.memory, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _answer(None))
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all
    torch.default_generator.manual_seed(int(seed))


def _replace_random_state() -> None:
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = _get_rng_state
        module.set_rng_state = _set_rng_state
        module.get_rng_state_all = lambda: [_get_rng_state()]
        module.set_rng_state_all = lambda states: _set_rng_state(states[0])
        module.manual_seed = _manual_seed
        module.manual_seed_all = _manual_seed
        module.initial_seed = lambda: torch.default_generator.initial_seed()


def _host(device: Any) -> Any:
    """`device`, or the host where it names a CUDA device (by name, object or index)."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return torch.device("cpu") if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    return device


def _with_host_device(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


def _replace_device_names() -> None:
    # `with torch.device("meta")` compares functions with a table that is filled on first use: fill it with the
    # originals, which is what reaches it from inside the wrappers.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_host_device(getattr(torch, name)))
    for name in _TENSOR_METHODS:
        setattr(torch.Tensor, name, _with_host_device(getattr(torch.Tensor, name)))

    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.Tensor, torch.dtype)):
            args = (_host(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _host(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original_type(self)
            return _CUDA_TYPE_NAMES.get(name, name)
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _adapt_megatron() -> None:
    import megatron.training
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize, training

    # These two go around torch.cuda.get_rng_state, to spare a copy on the GPU.
    tensor_parallel_random._get_cuda_rng_state = _get_rng_state
    tensor_parallel_random._set_cuda_rng_state = _set_rng_state

    # With one generator a draw inside the tracker's context does change the CPU state; Megatron would say so each time.
    logging.getLogger(tensor_parallel_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    original_initialize = initialize.initialize_megatron

    @functools.wraps(original_initialize)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs["allow_no_cuda"] = True
        return original_initialize(*args, **kwargs)

    for module in (initialize, training, megatron.training):
        if hasattr(module, "initialize_megatron"):
            module.initialize_megatron = initialize_megatron

    original_compile = dataset_utils.compile_helpers

    @functools.wraps(original_compile)
    def compile_helpers() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            original_compile()

    dataset_utils.compile_helpers = compile_helpers

    original_move = token_dispatcher.maybe_move_tensor_to_cpu

    @functools.wraps(original_move)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original_move(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move
    # Nothing is compiled here, and its draws would come from the generator that initialises the weights.
    initialize._warmup_jit_function = lambda *args, **kwargs: None
