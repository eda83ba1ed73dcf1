"""What an accelerator needs, as far as a CPU can show it: fake tensors say they are on a GPU and hold no values.

A call that asked for a value, made a tensor on the host or copied one would fail here. So there is no synchronisation,
no shape that depends on data, and the sequence of kernels is always the same, as capturing a CUDA graph needs.
"""

import functools
import inspect
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_moo.aggregation import AGGREGATORS, WRAPPERS, build_aggregator, fold_rows, interior
from tests.unit.aggregation.families import B, gramian, make_rows
from tests.unit.aggregation.test_properties import METHODS

K = 4
every_method = pytest.mark.parametrize("method", AGGREGATORS)


class _OneDevice(TorchDispatchMode):
    """Fails at an operation that touches the host."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, torch.Tensor)]
        # Numbers become CPU scalars on the way into an operation; those that are read back do not.
        assert all(tensor.device.type == "cuda" for tensor in tensors), f"{function} touches the host"
        return result


STEPS = ("max_iterations", "pivot_steps", "interior_steps", "polish_steps")


@pytest.fixture
def short_programs(monkeypatch):
    """One or two iterations of each solver: their bound does not matter here, and unrolling it takes long."""
    for module in {sys.modules[kind.__module__] for method in AGGREGATORS.values() for kind in method.__mro__}:
        for name, value in list(vars(module).items()):
            if name.startswith("solve_"):
                bounds = {step: 1 for step in STEPS if step in inspect.signature(value).parameters}
                monkeypatch.setattr(module, name, functools.partial(value, **bounds))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_never_touches_the_host(method, wrapped, short_programs):
    """A tensor made on the CPU, an .item(), a nonzero(): each stalls the GPU, or cannot be captured."""
    # Rarer solves are a decision of the host, by its own counter.
    noise = {"unbiased": "yes", "smoothing": 0.5, "shrink": "yes", "gate": 0.1}
    wrappers = {name: {} for name in WRAPPERS if name != "every"} | {"noise": noise} if wrapped else {}
    name, options = METHODS[method]
    aggregator = build_aggregator(name, wrappers=wrappers, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a table that the noise gate makes when it is built
        gram = torch.empty(B, K, K, device="cuda")
        active = torch.empty(B, K, dtype=torch.bool, device="cuda")
        preference, losses = (torch.empty(K, dtype=torch.float64, device="cuda") for _ in range(2))
        _, noise = fold_rows(
            torch.empty(B, 2 * K, 2 * K, device="cuda"),
            torch.arange(2 * K, device="cuda") % K,
            torch.empty(2 * K, device="cuda"),
            K,
        )
        # The first call takes a table of quantiles to the device; the second finds state.
        weights = aggregator(gram, active, preference, losses_K=losses, noise=noise)
        with _OneDevice():
            weights = aggregator(gram, active, preference, losses_K=losses, noise=noise)
        assert weights.device.type == "cuda" and weights.shape == (B, K) and weights.dtype == torch.float64


@every_method
def test_compiles_into_one_graph(method, short_programs, monkeypatch):
    """Python that depends on values: torch.compile would break the graph there, and recompile."""
    monkeypatch.setattr(interior, "may_look", lambda x: False)
    gram, losses = gramian(make_rows("conflicting", K)), torch.linspace(1, 2, K)
    torch.compiler.reset()
    compiled = torch.compile(build_aggregator(method), backend="eager", fullgraph=True)
    assert torch.equal(compiled(gram, losses_K=losses), build_aggregator(method)(gram, losses_K=losses))
