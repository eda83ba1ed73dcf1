"""The CPU shim: what it answers, and that it keeps away where CUDA is."""

import subprocess
import sys

import pytest
import torch

from megatron_moo.platform import cpu
from tests.helpers.multiprocess import run_ranks


def test_forcing_it_on_a_cuda_machine_is_an_error(monkeypatch):
    """Would catch: a GPU job that runs on the host without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="force=True.*CUDA is available.*CUDA_VISIBLE_DEVICES"):
        cpu.install(force=True)


def test_without_force_it_leaves_a_cuda_machine_alone(monkeypatch):
    """Would catch: a shim that patches torch before it looks for CUDA."""
    before = (torch.cuda.Stream, torch.cuda.current_device, torch.zeros, torch.Tensor.to, torch.Tensor.type)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.install() is False and not cpu.installed()
    assert before == (torch.cuda.Stream, torch.cuda.current_device, torch.zeros, torch.Tensor.to, torch.Tensor.type)


def test_installing_twice_wraps_once():
    """Would catch: wrappers that pile up when tests and the entry both install."""

    def twice(rank: int) -> bool:
        assert cpu.install() and cpu.installed()
        before = (torch.zeros, torch.Tensor.to, torch.cuda.Stream)
        assert cpu.install(force=True)
        return before == (torch.zeros, torch.Tensor.to, torch.cuda.Stream)

    assert run_ranks(twice, 1) == [True]


def test_cuda_names_mean_the_host():
    """Would catch: a spelling of the device that still reaches CUDA, or another device being redirected."""

    def devices(rank: int) -> None:
        cpu.install()
        here = torch.zeros(2, device="cuda")
        made = [
            here,
            torch.empty(2, device=torch.device("cuda", 0)),
            torch.arange(3, device=torch.cuda.current_device()),
            torch.tensor([1.0], device="cuda:0"),
            torch.rand_like(here, device="cuda"),
            here.new_zeros(2, device="cuda"),
            here.to("cuda"),
            here.to(device=torch.device("cuda"), dtype=torch.bfloat16),
            here.to(torch.device("cuda:1"), torch.float64),
            here.cuda(non_blocking=True),
            torch.nn.Linear(2, 2).cuda(0).to("cuda").weight,
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert here.cuda() is here
        assert torch.zeros(1, device="meta").is_meta and here.to("meta").is_meta
        with torch.device("meta"):
            assert torch.zeros(1).is_meta and torch.tensor(1.0).is_meta

    run_ranks(devices, 1)


def test_type_names_and_casts():
    """Would catch: optimizers that refuse a parameter by its type name, or a cast by `type` that stopped casting."""

    def types(rank: int) -> None:
        cpu.install()
        floats = torch.zeros(1)
        assert floats.type() == "torch.cuda.FloatTensor"
        assert floats.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert floats.half().type() == "torch.cuda.HalfTensor"
        assert floats.long().type() == "torch.LongTensor"
        assert floats.type(torch.float64).dtype == floats.type("torch.DoubleTensor").dtype == torch.float64

    run_ranks(types, 1)


def test_streams_events_and_statistics():
    """Would catch: a no-op that returns None where Megatron uses the answer."""

    def use(rank: int) -> None:
        cpu.install()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            event = stream.record_event()
        event.wait()
        torch.cuda.current_stream().wait_event(event)
        stream.wait_stream(torch.cuda.default_stream())
        assert event.query() and event.elapsed_time(torch.cuda.Event(enable_timing=True)) == 0.0
        assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0 == torch.cuda.max_memory_allocated()
        assert torch.cuda.get_device_properties(0).major == 0 and torch.cuda.device_count() == 1
        assert not torch.cuda.is_available()
        torch.cuda.nvtx.range_push("x")
        torch.cuda.synchronize()

    run_ranks(use, 1)


def test_random_state_is_the_hosts():
    """Would catch: a saved and restored CUDA state that does not bring dropout back."""

    def states(rank: int) -> None:
        cpu.install()
        torch.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(4, device="cuda"))
        torch.cuda.manual_seed(5)
        assert torch.equal(first, torch.rand(4))

    run_ranks(states, 1)


def test_compiled_functions_run_eagerly():
    """Would catch: a C++ compiler run in every process at start-up."""

    def compiled(rank: int) -> bool:
        cpu.install()
        calls = []

        @torch.compile
        def double(x: torch.Tensor) -> torch.Tensor:
            calls.append(type(x))
            return 2 * x

        return double(torch.ones(1)).item() == 2 and calls == [torch.Tensor]

    assert run_ranks(compiled, 1) == [True]


def test_importing_the_package_does_not_import_megatron():
    """Would catch: an import that costs seconds, or that fails where Megatron is not installed."""
    code = "import sys, megatron_moo.platform, megatron_moo.platform.cpu; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
