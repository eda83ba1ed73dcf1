"""The public interface: names, options, errors, state."""

import doctest

import pytest
import torch

from megatron_moo import aggregation
from megatron_moo.aggregation import AGGREGATORS, aggregator_options, build_aggregator
from tests.unit.aggregation.families import gramian, make_rows

NAMES = ["mean", "mgda", "pcgrad", "cagrad", "gradvac", "upgrad", "dualproj", "nash-mtl", "fairgrad"]
NAMES += ["imtl-g", "config", "aligned-mtl", "random", "famo", "dwa"]


def test_names():
    """A method that was renamed or left out of the table would break --moo-method."""
    assert list(AGGREGATORS) == NAMES
    for name in NAMES:
        assert isinstance(build_aggregator(name), AGGREGATORS[name])


def test_unknown_name_lists_the_known_ones():
    """A KeyError instead of a message that helps."""
    for call in (build_aggregator, aggregator_options):
        with pytest.raises(ValueError, match="unknown aggregator 'pcgard'; known: mean, mgda, pcgrad, cagrad, gradvac"):
            call("pcgard")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {"c": 0.4}, "Mean has no option 'c'; it knows: none"),
        ("cagrad", {"alpha": 0.4}, "CAGrad has no option 'alpha'; it knows: c, rescale"),
        ("cagrad", {"c": 1.0}, r"CAGrad option 'c' must be a number in \[0, 1\), found 1.0"),
        ("cagrad", {"c": float("nan")}, "found nan"),
        ("cagrad", {"c": True}, "found True"),
        ("cagrad", {"rescale": "yes"}, "must be one of linear, quadratic, none, found 'yes'"),
        ("mgda", {"normalise": "l1"}, "must be one of none, l2, loss, loss\\+, found 'l1'"),
        ("gradvac", {"beta": -0.1}, r"must be a number in \[0, 1\], found -0.1"),
        ("gradvac", {"beta": "much"}, "found 'much'"),
        ("gradvac", {"target": 1.0}, "found 1.0"),
    ],
)
def test_bad_options(name, options, message):
    """An option that is silently ignored or accepted out of range."""
    with pytest.raises(ValueError, match=message):
        build_aggregator(name, **options)


def test_options_describe_themselves():
    """Defaults that break their own rule, or flags without help."""
    for name in NAMES:
        options = aggregator_options(name)
        defaults = {key: option.default for key, option in options.items()}
        assert build_aggregator(name, **defaults).settings == build_aggregator(name).settings == defaults
        assert all(option.help and type(option.default) in (float, str) for option in options.values())
    assert aggregator_options("gradvac")["beta"].default == 0.01
    assert aggregator_options("cagrad")["c"].default == 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gram_BKK": torch.eye(3)}, r"gram_BKK must have shape \[B, K, K\] with K >= 1, found \[3, 3\]"),
        ({"gram_BKK": torch.ones(1, 3, 2)}, "gram_BKK must have shape"),
        ({"gram_BKK": torch.ones(1, 2, 2, dtype=torch.int64)}, "floating dtype, found torch.int64"),
        ({"active_BK": torch.ones(1, 3)}, "active_BK must be boolean"),
        ({"active_BK": torch.ones(2, 3, dtype=torch.bool)}, r"of shape \[1, 3\]"),
        ({"preference_K": torch.ones(2)}, r"preference_K must have shape \[3\] or \[1, 3\], found \[2\]"),
        ({"preference_K": torch.tensor([0.5, -0.5, 1.0])}, "must be finite and not negative, found"),
        ({"generator": [torch.Generator()] * 2}, "1 blocks, found 2 generators"),
    ],
)
def test_bad_inputs(arguments, message):
    """Shapes that would broadcast into a wrong answer."""
    for name in NAMES:
        with pytest.raises(ValueError, match=message):
            build_aggregator(name)(**{"gram_BKK": torch.eye(3)[None], **arguments})


def test_stateless_state_is_empty():
    """A checkpoint of one method loaded into another without a word."""
    for name in ("mean", "mgda", "pcgrad", "cagrad"):
        aggregator = build_aggregator(name)
        assert not aggregator.stateful and aggregator.state_dict() == {}
        aggregator.load_state_dict({})
        aggregator.reset()
        with pytest.raises(ValueError, match="has no state, found target_BKK"):
            aggregator.load_state_dict({"target_BKK": torch.zeros(1, 2, 2)})


def test_gradvac_state():
    """State that is lost, shared by reference with the checkpoint, or applied to the wrong blocks."""
    gram = gramian(make_rows("random", 4))
    aggregator = build_aggregator("gradvac", beta=0.3)
    assert aggregator.stateful and aggregator.state_dict() == {}
    aggregator(gram)
    saved = aggregator.state_dict()
    assert set(saved) == {"target_BKK"} and saved["target_BKK"].shape == gram.shape
    kept = saved["target_BKK"].clone()
    expected = aggregator(gram)
    assert torch.equal(saved["target_BKK"], kept)

    resumed = build_aggregator("gradvac", beta=0.3)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(gram), expected)
    assert torch.equal(resumed.state_dict()["target_BKK"], aggregator.state_dict()["target_BKK"])

    with pytest.raises(ValueError, match=r"call reset\(\)"):
        aggregator(gram[:2])
    with pytest.raises(ValueError, match="GradVac keeps target_BKK, found other"):
        aggregator.load_state_dict({"other": kept})
    aggregator.reset()
    assert aggregator.state_dict() == {}
    aggregator(gram[:2])
    aggregator.load_state_dict({})
    assert torch.equal(aggregator(gram), build_aggregator("gradvac", beta=0.3)(gram))


def test_state_of_a_call_without_anyone():
    """The exchange makes fresh state of the right shape by a call in which nobody takes part."""
    aggregator = build_aggregator("gradvac", target=0.25)
    aggregator(torch.zeros(3, 2, 2), torch.zeros(3, 2, dtype=torch.bool))
    assert torch.equal(aggregator.state_dict()["target_BKK"], torch.full((3, 2, 2), 0.25, dtype=torch.float64))


def test_output_dtype_and_inputs_untouched():
    """Weights in the Gramian's low precision, or a caller's tensor changed in place."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        gram = gramian(make_rows("conflicting", 3)).to(dtype)
        mask = torch.tensor([True, True, False]).expand(len(gram), 3)
        copies = gram.clone(), mask.clone()
        for name in NAMES:
            weights = build_aggregator(name)(gram, mask, torch.tensor([0.5, 0.3, 0.2]), losses_K=torch.ones(3))
            assert weights.dtype == torch.float64 and weights.isfinite().all()
            assert torch.equal(gram, copies[0]) and torch.equal(mask, copies[1])


def test_tutorial():
    """A package docstring whose example no longer runs."""
    failed, attempted = doctest.testmod(aggregation)
    assert attempted > 5 and not failed
