"""Methods without gradients: random weights, FAMO, DWA."""

import math

import pytest
import torch

from megatron_moo.aggregation import build_aggregator
from tests.unit.aggregation.families import gramian, make_preference, make_rows

GRAM = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1)
EVEN = torch.full((3,), 1 / 3, dtype=torch.float64)


def run(aggregator, losses, **keywords):
    """Weights of the last of several steps."""
    for row in losses:
        weights = aggregator(GRAM, losses_K=torch.tensor(row, dtype=torch.float64), **keywords)
    return weights


def test_random_weights_are_the_softmax_of_normal_numbers():
    """A uniform draw, a draw that ignores the preference, or one that changes the size of the update."""
    preference = make_preference(5)
    gram = gramian(make_rows("random", 5))
    weights = build_aggregator("random")(gram, None, preference, torch.Generator().manual_seed(3))
    normal = torch.randn(len(gram), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(weights, torch.softmax(normal + preference.log(), 1))
    logs = torch.cat(
        [
            (w / w.sum(1, keepdim=True)).log()
            for w in (build_aggregator("random")(gram, generator=torch.Generator().manual_seed(s)) for s in range(300))
        ]
    )
    assert (logs[:, 0] - logs[:, 1]).std().item() == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_equal_histories_give_the_preference(method):
    """Weights that drift although no language falls behind."""
    preference = make_preference(3)
    aggregator = build_aggregator(method, **({"window": 2.0} if method == "dwa" else {}))
    for step in range(10):
        losses = torch.full((3,), 2.0 * 0.9**step, dtype=torch.float64)
        weights = aggregator(GRAM, None, preference, losses_K=losses)
        torch.testing.assert_close(weights, preference.expand(2, 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_a_loss_that_does_not_fall_gains_weight(method):
    """Progress with the wrong sign: the language that is left behind would be left further behind."""
    aggregator = build_aggregator(method, **({"window": 5.0} if method == "dwa" else {"lr": 0.1}))
    weights = run(aggregator, [[0.9**t, 0.9**t, 1.0] for t in range(20)])
    relative = weights * torch.tensor([0.9**19, 0.9**19, 1.0]) if method == "famo" else weights
    assert (relative[:, 2] > 1.05 * relative[:, 0]).all() and torch.allclose(relative[:, 0], relative[:, 1])


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_the_unit_of_a_loss_does_not_matter(method):
    """A loss in bits instead of nats that changes what is done."""
    options = {"window": 3.0} if method == "dwa" else {}
    losses = [[1 + 0.1 * t, 2 - 0.05 * t, 3.0] for t in range(8)]
    weights = run(build_aggregator(method, **options), losses)
    scaled = run(build_aggregator(method, **options), [[a, 7 * b, c] for a, b, c in losses])
    if method == "famo":  # which divides by the loss, so that the products with it agree
        scaled = scaled * torch.tensor([1.0, 7.0, 1.0])
        scaled = scaled / scaled.sum(1, keepdim=True)
    torch.testing.assert_close(scaled, weights)


def test_famo_follows_adam_on_the_logits():
    """Moments, decay or the derivative of the softmax wrong: compared with torch's Adam, and the softmax's Jacobian."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.9, 1.9, 3.1], [0.7, 2.0, 2.0], [0.8, 1.0, 1.9]], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05, weight_decay=0.01)
    aggregator = build_aggregator("famo", lr=0.05)
    for before, now in zip([None, *losses[:-1]], losses, strict=True):
        if before is not None:
            z = torch.softmax(logits.detach(), 0)  # not by autograd: its threads would break tests that fork later
            logits.grad = (torch.diag(z) - torch.outer(z, z)) @ (before.log() - now.log())
            optimizer.step()
        expected = torch.softmax(logits.detach(), 0) / now
        weights = aggregator(GRAM, losses_K=now)
        torch.testing.assert_close(weights, (expected / expected.sum()).expand(2, 3))


def test_dwa_compares_the_means_of_windows():
    """Ratios of single batches, or of the wrong two windows."""
    aggregator = build_aggregator("dwa", window=2.0, temperature=2.0)
    history = [[1.0, 4.0, 2.0], [3.0, 4.0, 2.0], [1.0, 5.0, 2.0], [1.0, 7.0, 2.0], [9.0, 9.0, 9.0]]
    torch.testing.assert_close(run(aggregator, history[:4]), EVEN.expand(2, 3))  # its two windows are complete only now
    expected = torch.softmax(torch.tensor([1 / 2, 6 / 4, 1.0], dtype=torch.float64) / 2, 0)
    torch.testing.assert_close(run(aggregator, history[4:]), expected.expand(2, 3))


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_an_absent_language_keeps_its_history(method):
    """An absence that counts as a loss of zero: infinite progress, or none."""
    options = {"window": 2.0} if method == "dwa" else {}
    aggregator = build_aggregator(method, **options)
    run(aggregator, [[1.0, 1.0, 1.0]] * 4)
    mask = torch.tensor([True, True, False]).expand(2, 3)
    weights = run(aggregator, [[1.0, 1.0, float("nan")]] * 4, active_BK=mask)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 0.0], dtype=torch.float64).expand(2, 3))
    torch.testing.assert_close(run(aggregator, [[1.0, 1.0, 1.0]] * 3), EVEN.expand(2, 3))


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_losses_are_asked_for(method):
    """A method that quietly becomes the mean because nobody hands it losses."""
    with pytest.raises(ValueError, match="works with losses: give losses_K"):
        build_aggregator(method)(GRAM)
    with pytest.raises(ValueError, match=r"losses_K must have shape \[3\] or \[2, 3\], found \[2\]"):
        build_aggregator(method)(GRAM, losses_K=torch.ones(2))


def test_losses_of_zero_are_survived():
    """A perfect language whose logarithm is infinite."""
    for method in ("famo", "dwa"):
        weights = run(build_aggregator(method), [[0.0, 1.0, 2.0], [0.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
        assert weights.isfinite().all()


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_state_survives_a_checkpoint(method):
    """A resumed run that starts its history anew, or a fresh state of another shape than a used one."""
    history = [[1.0, 2.0, 3.0], [0.9, 2.0, 2.5], [0.9, 1.8, 2.4], [0.7, 1.8, 2.0], [0.6, 1.7, 2.0]]
    options = {"window": 1.0} if method == "dwa" else {}
    straight, first, resumed, fresh = (build_aggregator(method, **options) for _ in range(4))
    run(first, history[:3])
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(run(resumed, history[3:]), run(straight, history))
    nobody = run(fresh, history[:1], active_BK=torch.zeros(2, 3, dtype=torch.bool))
    assert (nobody == 0).all() and set(fresh.state_dict()) == set(first.state_dict()) == set(first.state_keys)
    assert all(value.shape == (2, 3) and value.dtype == torch.float64 for value in fresh.state_dict().values())
    assert torch.equal(run(fresh, history), run(build_aggregator(method, **options), history))
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        first(GRAM[:1], losses_K=torch.ones(3))


@pytest.mark.parametrize("method", ["famo", "dwa"])
def test_a_loss_that_is_not_finite_leaves_no_trace(method):
    """One overflow that poisons the history, and with it all later weights."""
    options = {"window": 1.0} if method == "dwa" else {}
    history = [[1.0, 2.0, 3.0], [0.9, 1.9, 2.5], [0.8, 1.9, 2.4]]
    clean, hit = build_aggregator(method, **options), build_aggregator(method, **options)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert run(hit, [[bad, 2.0, 3.0]]).isfinite().all()
        hit.reset()
    run(clean, history)
    run(hit, history)
    assert run(hit, [[float("nan")] * 3]).isfinite().all()
    assert torch.equal(run(hit, history[::-1]), run(clean, history[::-1]))
