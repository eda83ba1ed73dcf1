"""The table of layouts: what is trained does not depend on where it runs.

Each case of the table is a model, a parallel layout and a way of combining. It takes a few optimizer steps; the
combined gradient of every step and the weights after the last one must be those of one process that runs a backward
pass per language (``helpers/reference.py``), for each parameter on each rank that holds a part of it.

All cases of a layout run in one fork of its ranks.

Tolerances. fp32: 1e-5 of the largest entry of the languages' own gradients of the parameter, ten times that once the
weights themselves differ by rounding, after the first step; weights to 1e-3 of a step of Adam's (LEARNING_RATE). For
low precision the reference computes in the same low precision, with the same kernels where no tensor is cut: what is
left is the rounding of sums that are taken in another order, or, with gradients reduced in bf16, of the rows.
"""

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state

from megatron_moo.distributed import MooConfig, install
from tests.helpers import reference, tiny_config, tiny_gpt
from tests.helpers.layout_table import CASES, LAYOUTS, Case, Layout
from tests.helpers.multiprocess import init_megatron, run_ranks


def _references(rank: int, cases: dict[str, Case], maps: dict[str, dict[str, str]]) -> dict[str, reference.Training]:
    init_megatron()
    found = {}
    for name, case in cases.items():
        recipe = case.recipe()
        found[name] = reference.train(replace(recipe, granularity=maps[name]) if name in maps else recipe)
    return found


def _wrapped(case: Case):
    models = tiny_gpt.build_chunks(case.variant)
    return models, tiny_gpt.wrap_chunks(models, **case.wrap)


def _spans(models, chunks):
    """(parameter, model, whole name, this rank's elements of its gradient, from where to where) of this rank."""
    for model, chunk in zip(models, chunks, strict=True):
        names = {param: name for name, param in model.named_parameters()}
        sharded = chunk.ddp_config.use_distributed_optimizer
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = chunk.expt_dp_group if buffer in chunk.expert_parallel_buffers else chunk.dp_cp_group
            for param, (start, end, bucket_id) in buffer.param_index_map.items():
                low, high = start, end
                if sharded:
                    bucket = buffer.buckets[bucket_id]
                    size = bucket.grad_data.numel() // group.size()
                    low = max(start, bucket.offset + group.rank() * size)
                    high = min(end, bucket.offset + (group.rank() + 1) * size)
                if low < high:
                    whole = tiny_gpt.whole_name(model, names[param])
                    yield param, model, whole, buffer.grad_data[low:high], low - start, high - start


def _gradient_error(models, chunks, expected, scales: dict[str, float], loss_scale: float) -> float:
    """Worst error of an element, relative to the largest entry of the parameter's gradients."""
    worst = 0.0
    for param, model, whole, ours, start, end in _spans(models, chunks):
        part = tiny_gpt.tensor_parallel_part(expected[whole], param, model, whole).reshape(-1)[start:end]
        error = float((ours.double() / loss_scale - part).abs().max())
        worst = max(worst, error / scales[whole] if scales[whole] else error)
    return worst


def _weight_error(models, expected: dict[str, torch.Tensor]) -> float:
    """Worst error of a weight of this rank; of low precision relative to the parameter's largest, or 1."""
    worst = 0.0
    for model in models:
        for name, param in model.named_parameters():
            whole = tiny_gpt.whole_name(model, name)
            part = tiny_gpt.tensor_parallel_part(expected[whole], param, model, whole)
            worst = max(worst, float((param.double() - part.double()).abs().max() / max(1, part.abs().max())))
    return worst


def _train(layout: Layout, case: Case, expected: reference.Training) -> dict:
    """Errors of this rank, and what it saw."""
    models, chunks = _wrapped(case)
    moo = install(chunks, case.config(), case.assignment)
    schedule, (slot, peer) = moo.waves(tiny_gpt.stock_schedule()), layout.place()
    optimizer = tiny_gpt.adam(
        chunks,
        lr=reference.LEARNING_RATE,
        weight_decay=reference.WEIGHT_DECAY,
        adam_eps=reference.EPS,
        clip_grad=case.clip,
        initial_loss_scale=case.initial_scale,
        hysteresis=1,
    )
    errors = []
    for step, gradient in enumerate(expected.gradients):
        batches = tiny_gpt.step_batches(
            case.assignment(step), slot, case.per_wave, peer=peer, peers=layout.peers, barred=case.variant.barred
        )
        optimizer.zero_grad()
        loss_scale = float(optimizer.get_loss_scale())
        assert loss_scale == expected.loss_scales[step], (step, loss_scale)
        tiny_gpt.run_step(chunks, schedule, batches)
        if gradient is not None:
            errors.append(_gradient_error(models, chunks, gradient, expected.scales[step], loss_scale))
        updated = optimizer.step()[0]
        assert updated == (gradient is not None), (step, updated)
    return {
        "gradients": errors,
        "weights": _weight_error(models, expected.weights),
        "buffers": _buffer_error(models, expected.buffers),
        "slots": (moo.slots, moo.slot) == (layout.slots, slot),
    }


def _buffer_error(models, expected: dict[str, torch.Tensor]) -> float:
    """Worst error of the routers' expert biases."""
    pairs = [
        (buffer, expected[tiny_gpt.whole_name(model, name)])
        for model in models
        for name, buffer in model.named_buffers()
        if name.endswith("expert_bias")
    ]
    return max((float((ours - theirs).abs().max()) for ours, theirs in pairs), default=0.0)


def _bucket_maps(rank: int, layout: Layout, cases: dict[str, Case]) -> dict[str, dict[str, str]]:
    """Bucket of every parameter of this rank, by whole name."""
    layout.init()
    maps = {}
    for name, case in cases.items():
        models, chunks = _wrapped(case)
        maps[name] = {}
        for i, (model, chunk) in enumerate(zip(models, chunks, strict=True)):
            names = {param: tiny_gpt.whole_name(model, n) for n, param in model.named_parameters()}
            for j, buffer in enumerate(chunk.buffers + chunk.expert_parallel_buffers):
                for param, (_, _, bucket) in buffer.param_index_map.items():
                    place = (parallel_state.get_pipeline_model_parallel_rank(), i, j, bucket)
                    maps[name].setdefault(names[param], str(place))
    return maps


def _run(rank: int, layout: Layout, cases: dict[str, Case], expected: dict[str, reference.Training]) -> dict[str, dict]:
    layout.init()
    return {name: _train(layout, case, expected[name]) for name, case in cases.items()}


def _explicit_maps(layout: Layout, cases: dict[str, Case]) -> dict[str, dict[str, str]]:
    cases = {name: case for name, case in cases.items() if case.granularity == "bucket"}
    merged: dict[str, dict[str, str]] = {name: {} for name in cases}
    if cases:
        for maps in run_ranks(_bucket_maps, layout.world_size, layout, cases):
            for name, found in maps.items():
                merged[name] = {**found, **merged[name]}  # of a tied embedding the first stage's
    return merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout(layout):
    """Would catch: rows mixed up or counted twice, a fix-up left out or after the combination, a mean over the wrong
    count, a group of ranks taken for another, weights updated from a stale or an unsynchronised gradient."""
    sizes, cases = LAYOUTS[layout], {name: case for name, case in CASES.items() if case.layout == layout}
    expected = run_ranks(_references, 1, cases, _explicit_maps(sizes, cases), timeout=240)[0]
    _check_plants(cases, expected)
    failures = {}
    for rank, results in enumerate(run_ranks(_run, sizes.world_size, sizes, cases, expected, timeout=240)):
        for name, found in results.items():
            case = cases[name]
            first, *later = found["gradients"]
            good = first < case.gradient_tolerance and max(later, default=0.0) < 10 * case.gradient_tolerance
            if not (good and found["weights"] < case.weight_tolerance and found["buffers"] < 1e-6 and found["slots"]):
                failures[f"{name} rank {rank}"] = found
    assert not failures, "\n".join(f"{name}: {found}" for name, found in failures.items())


def _check_plants(cases: dict[str, Case], expected: dict[str, reference.Training]) -> None:
    """What a case is there for has happened."""
    for name, case in cases.items():
        found = expected[name]
        skipped = sum(gradient is None for gradient in found.gradients)
        assert (min(found.clipped) < 1) == (case.clip > 0), found.clipped
        if case.variant.dtype == "fp16":
            assert 0 < skipped <= len(found.gradients) - 2, found.loss_scales
        else:
            assert skipped == 0
        if case.variant.barred:
            expert = f".local_experts.{tiny_config.BARRED_EXPERT}."
            barred = {n for k, n in found.empty if expert in n and k == tiny_config.BARRED_LANGUAGE}
            assert len(barred) == 2 * tiny_config.LAYERS, sorted(found.empty)
            assert any(found.scales[0][n] > 0 for n in barred)


def _refusal(rank: int) -> str:
    init_megatron(pp=2)
    models = tiny_gpt.build_chunks(tiny_config.Variant())
    chunks = tiny_gpt.wrap_chunks(models, distributed_optimizer=False, padded=False)
    with pytest.raises(ValueError) as raised:
        install(chunks, MooConfig(["a"]), lambda step: [[0]])
    return str(raised.value)


def test_stock_buckets_without_distributed_optimizer_are_refused():
    """Would catch rows of a tied embedding added to those of whatever shares its bucket on the other stage."""
    for message in run_ranks(_refusal, 2):
        assert "wrap_padded" in message and "--use-distributed-optimizer" in message


def test_the_table_is_wide_enough():
    """Would catch a case lost in an edit."""
    assert len(CASES) >= 28 and {case.layout for case in CASES.values()} == set(LAYOUTS)
