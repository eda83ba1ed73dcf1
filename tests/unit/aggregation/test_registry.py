"""Methods of others: by import path, by entry point, and the errors on the way."""

import importlib.metadata
import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_moo.aggregation import Aggregator, aggregator_options, build_aggregator, find_aggregator, registry

MODULE = """
from megatron_moo.aggregation import Aggregator, Option

class ShortestFirst(Aggregator):
    options = {"power": Option(1.0, "how strongly short rows are preferred", low=0.0)}

    def _weights(self, problem):
        weights = problem.share_BK * problem.norm_BK ** -self.settings["power"]
        total = weights.sum(1, keepdim=True)
        return problem.mass_B1 * weights / total.where(total > 0, 1.0)

class Unfinished(Aggregator):
    pass

NOT_ONE = 3
"""


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    (tmp_path / "own_methods.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_methods"
    sys.modules.pop("own_methods", None)


def test_a_method_of_ones_own_by_its_path(own_methods):
    """A path that is not understood, or whose options are not checked."""
    gram = torch.diag_embed(torch.tensor([[1.0, 4.0], [4.0, 4.0]]))
    weights = build_aggregator(f"{own_methods}:ShortestFirst", power=1.0, wrappers={"cap": {}})(gram)
    assert torch.allclose(weights, torch.tensor([[2 / 3, 1 / 3], [0.5, 0.5]], dtype=torch.float64))
    assert set(aggregator_options(f"{own_methods}:ShortestFirst")) == {"power"}
    with pytest.raises(ValueError, match="ShortestFirst has no option 'pwoer'; it knows: power"):
        build_aggregator(f"{own_methods}:ShortestFirst", pwoer=1.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_methods:Missing", "cannot be imported .*Missing.*package.module:Class"),
        ("no_such_package.at_all:Thing", "cannot be imported .*no_such_package"),
        (":Thing", "must read package.module:Class"),
        (".own:Thing", "must read package.module:Class"),
        ("own_methods:NOT_ONE", "is 3; it must be a subclass"),
        ("own_methods:Unfinished", "does not define _weights"),
        ("megatron_moo.aggregation:Smoothed", "must be a subclass"),
    ],
)
def test_bad_paths_are_explained(own_methods, path, message):
    """A traceback out of importlib."""
    with pytest.raises(ValueError, match=message):
        find_aggregator(path)


def test_entry_points(own_methods, monkeypatch):
    """An installed method that nobody finds, or that is missing from the list of known ones."""
    point = importlib.metadata.EntryPoint("shortest", f"{own_methods}:ShortestFirst", registry.ENTRY_POINTS)

    def entry_points(group):
        return [point] if group == registry.ENTRY_POINTS else []

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", entry_points)
    assert issubclass(find_aggregator("shortest"), Aggregator)
    with pytest.raises(ValueError, match="known: mean, .*shortest, or package.module:Class"):
        find_aggregator("shortst")


def test_the_package_needs_torch_alone():
    """An import of Megatron, numpy or anything else creeping in: people depend on this package by itself."""
    script = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                if top in ("megatron", "transformers", "sentencepiece", "safetensors", "rich", "torchjd", "scipy"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        import torch
        from megatron_moo.aggregation import AGGREGATORS, build_aggregator
        for name in AGGREGATORS:
            weights = build_aggregator(name)(torch.eye(3)[None], losses_K=torch.ones(3))
            assert weights.isfinite().all(), name
        assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
        print("fine")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stderr
