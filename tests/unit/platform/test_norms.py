"""Norms: PyTorch's numbers, Megatron's mark, clear refusals."""

import types

import pytest
import torch

from megatron_moo.platform import norms


def _config(**fields: object) -> types.SimpleNamespace:
    defaults = dict(
        normalization="RMSNorm",
        sequence_parallel=True,
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    return types.SimpleNamespace(**(defaults | fields))


@pytest.mark.parametrize(("name", "reference"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
@pytest.mark.parametrize("parallel", [True, False])
def test_numbers_names_and_mark(name, reference, parallel):
    """Would catch: an epsilon or parameter name that differs from PyTorch's, or a bias left without the mark."""
    config = _config(normalization=name, sequence_parallel=parallel)
    ours = norms.build_norm(object, config=config, hidden_size=8, eps=1e-3)
    theirs = reference(8, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    assert all(parameter.sequence_parallel is parallel for parameter in ours.parameters())


@pytest.mark.parametrize(
    "fields", [dict(layernorm_zero_centered_gamma=True), dict(persist_layer_norm=True), dict(normalization="L3Norm")]
)
def test_refusals_name_the_field_and_the_remedy(fields):
    """Would catch: a setting that is silently ignored."""
    ((field, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{field}.*{value}.*--"):
        norms.build_norm(object, _config(**fields), 8)
