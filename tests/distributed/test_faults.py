"""Faults in the gradient path: values that are not finite, objectives without tokens, ranks that disagree.

A language is spoilt in one of two ways: its loss is NaN (so are all its gradients), or a single element of one
parameter's gradient is, on a single rank.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_moo.aggregation import build_aggregator
from megatron_moo.distributed import BucketLevelMoo, MooConfig, install
from tests.helpers import reference, tiny_gpt
from tests.helpers.entry import entry_argv, entry_main, prepare_data
from tests.helpers.multiprocess import RanksFailed, init_megatron, run_ranks
from tests.helpers.pretraining import run_pretrain

NAMES = ["l0", "l1", "l2"]
SPOILT = 1


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout, and where in it a single gradient element is spoilt.

    Attributes:
        peers: data-parallel ranks of a slot.
        where: parameter (name on its rank), and which of its model-parallel ranks spoils it.
    """

    slots: int
    waves: int
    where: tuple[str, Mapping[str, int]]
    tp: int = 1
    pp: int = 1
    ep: int = 1
    peers: int = 1
    variant: tiny_gpt.Variant = field(default_factory=tiny_gpt.Variant)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.slots * self.peers

    @property
    def assignment(self) -> list[list[int]]:
        return [[(wave * self.slots + slot) % 3 for slot in range(self.slots)] for wave in range(self.waves)]

    def init(self) -> None:
        init_megatron(self.tp, self.pp, ep=self.ep)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """What this rank reads in a step, one micro-batch a wave."""
        slot, peer = divmod(parallel_state.get_data_parallel_rank(), self.peers)
        return tiny_gpt.step_batches(self.assignment, slot, 1, peer=peer, peers=self.peers)

    def languages(self) -> list[int]:
        """Language of each micro-batch of this rank."""
        slot = parallel_state.get_data_parallel_rank() // self.peers
        return [wave[slot] for wave in self.assignment]


FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
LAYOUTS = {
    "dp4": Layout(4, 1, (FC2, {})),
    "dp2-two-waves": Layout(2, 2, (FC2, {})),
    # A part that only the second tensor-parallel rank holds; a stage of the other end.
    "tp2-two-waves": Layout(2, 2, (FC2, {"tp": 1}), tp=2, variant=tiny_gpt.Variant(sequence_parallel=True)),
    # A copy that the first tensor-parallel rank counts, spoilt on the second alone.
    "tp2-copy": Layout(2, 2, ("decoder.layers.1.mlp.linear_fc2.bias", {"tp": 1}), tp=2),
    "pp2-two-waves": Layout(2, 2, (FC2, {"pp": 1}), pp=2),
    "ep2-two-waves": Layout(
        2,
        2,
        ("decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight", {"ep": 1}),
        ep=2,
        peers=2,
        variant=tiny_gpt.Variant(experts=4),
    ),
}
BLOCKS = [
    (granularity, scope) for granularity in ("bucket", "layer", "tensor", "model") for scope in ("global", "local")
]


def _here(ranks: Mapping[str, int]) -> bool:
    mine = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
    }
    return all(mine[name] == rank for name, rank in ranks.items())


def _spoil_losses() -> None:
    """In this rank, from now on: a micro-batch that says so has a NaN loss."""
    stock = tiny_gpt.losses

    def losses(model, batch):
        output = stock(model, batch)
        spoilt = parallel_state.is_pipeline_last_stage() and bool(batch.get("spoilt", torch.zeros(1)).any())
        return output * float("nan") if spoilt else output

    tiny_gpt.losses = losses


def _plant(kind: str, layout: Layout, chunk, batches: list[dict[str, torch.Tensor]]) -> None:
    """Spoil the language SPOILT in one of the ways, or take its tokens away (``masked``)."""
    languages = layout.languages()
    for batch, language in zip(batches, languages, strict=True):
        if kind == "loss":
            batch["spoilt"] = torch.full_like(batch["loss_mask"], float(language == SPOILT))
        if kind == "masked" and language == SPOILT:
            batch["loss_mask"].zero_()
    name, ranks = layout.where
    if kind == "element" and _here(ranks):
        seen = iter(languages)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if next(seen) == SPOILT:
                gradient = gradient.clone()
                gradient.view(-1)[0] = float("inf")
            return gradient

        dict(chunk.module.named_parameters())[name].register_hook(spoil)


def _step(layout: Layout, config: MooConfig, kind: str, overlap: bool) -> tuple[torch.nn.Module, BucketLevelMoo]:
    chunk = tiny_gpt.wrap(tiny_gpt.build(layout.variant), overlap=overlap)
    moo = install([chunk], config, lambda step: layout.assignment)
    batches = layout.batches()
    _plant(kind, layout, chunk, batches)
    tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    return chunk, moo


def _spans(chunk) -> Iterator[tuple[torch.nn.Parameter, str, int, int, torch.Tensor]]:
    """(parameter, name, start and end inside it, combined gradient there) of this rank's shards."""
    names = {param: name for name, param in chunk.module.named_parameters()}
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = chunk.expt_dp_group if buffer in chunk.expert_parallel_buffers else chunk.dp_cp_group
        for param, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            size = bucket.grad_data.numel() // group.size()
            low = max(bucket.offset + group.rank() * size, start)
            high = min(bucket.offset + (group.rank() + 1) * size, end)
            if low < high:
                yield param, names[param], low - start, high - start, buffer.grad_data[low:high]


def _others_combined(layout: Layout, granularity: str) -> dict[str, torch.Tensor]:
    """What the languages but SPOILT make, by one process."""
    model = tiny_gpt.build(layout.variant)
    plan = reference.Plan(peers=layout.peers)
    gradients, counts = reference.gradients_of(model, model, layout.variant, layout.assignment, len(NAMES), plan)
    others = [k for k in range(len(NAMES)) if k != SPOILT]
    rows = {name: gradient[others] for name, gradient in gradients.items()}
    return reference.combined_gradient(
        rows,
        build_aggregator("cagrad"),
        granularity,
        counts[others] / counts[others].sum(),
        lambda name: torch.Generator(),
        None,
    )


def _error(chunk, expected: dict[str, torch.Tensor]) -> float:
    """Worst error of this rank's shards, relative to the largest entry of a parameter's gradient."""
    worst, model = 0.0, chunk.module
    for param, name, start, end, ours in _spans(chunk):
        whole = tiny_gpt.whole_name(model, name)
        part = tiny_gpt.tensor_parallel_part(expected[whole], param, model, whole).reshape(-1)[start:end]
        worst = max(worst, float((ours.double() - part).abs().max() / expected[whole].abs().max()))
    return worst


def _references(rank: int, layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    init_megatron()
    return {granularity: _others_combined(layout, granularity) for granularity in ("layer", "tensor", "model")}


def _quarantine(rank: int, layout: Layout, expected: dict[str, dict[str, torch.Tensor]]) -> list[dict]:
    """For all blocks and both ways of spoiling: how this rank's part of the result differs from what it must be."""
    layout.init()
    _spoil_losses()
    found = []
    for index, (granularity, scope) in enumerate(BLOCKS):
        config = MooConfig(
            NAMES,
            "cagrad",
            granularity=granularity,
            scope=scope,
            preference="tokens",
            waves=layout.waves,
            wave_memory=("device", "host")[index % 2],
        )
        masked, masked_moo = _step(layout, config, "masked", overlap=False)
        ours = list(_spans(masked))
        kind = ("loss", "element")[(index // 2 + index) % 2]
        chunk, moo = _step(layout, config, kind, overlap=index % 3 == 0)
        known = expected.get(granularity) if scope == "global" else None
        found.append(
            {
                "case": (granularity, scope, kind),
                "differs": [
                    name
                    for (_, name, _, _, one), (*_, other) in zip(_spans(chunk), ours, strict=True)
                    if not torch.equal(one, other)
                ],
                "weights": torch.equal(moo.record.weights_BK, masked_moo.record.weights_BK),
                "preference": torch.equal(moo.record.preference_K, masked_moo.record.preference_K),
                "left out": moo.record.quarantined_K.tolist(),
                "counted": moo.quarantined_steps,
                "masked": masked_moo.record.quarantined_K.tolist(),
                "error": _error(chunk, known) if known else 0.0,
            }
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spoilt_language_is_left_out_as_if_it_had_no_tokens(layout):
    """Would catch: a NaN that reaches another language through a solver, a block, a stage or a tensor-parallel rank
    that did not hear of it, or through tokens that still count in the preference."""
    expected = run_ranks(_references, 1, LAYOUTS[layout])[0]
    for rank in run_ranks(_quarantine, LAYOUTS[layout].world_size, LAYOUTS[layout], expected):
        for found in rank:
            assert found["differs"] == [], found
            assert found["weights"] and found["preference"], found
            assert found["left out"] == [False, True, False], found
            assert found["masked"] == [False, False, False], found
            assert found["counted"] == {"l0": 0, "l1": 1, "l2": 0}, found
            assert found["error"] < 1e-5, found


def _losses_of_methods(rank: int) -> list[float]:
    """FAMO works with losses: largest weight and state after two steps in which a language's loss is NaN."""
    layout = LAYOUTS["dp4"]
    layout.init()
    chunk = tiny_gpt.wrap(tiny_gpt.build(layout.variant))
    bad = layout.languages()[0] == SPOILT

    def losses() -> torch.Tensor:
        sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)
        sums[layout.languages()[0]] = torch.tensor([float("nan") if bad else 5.0, 4.0])
        return sums

    moo = install([chunk], MooConfig(NAMES, "famo", preference="tokens"), lambda step: layout.assignment, losses)
    _spoil_losses()
    for _ in range(2):
        batches = layout.batches()
        _plant("loss", layout, chunk, batches)
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    state = [value.abs().max() for value in moo.aggregator.state_dict().values() if value.is_floating_point()]
    return [float(moo.record.weights_BK.abs().max()), *map(float, state)]


def test_a_nan_loss_does_not_enter_the_state_of_a_method():
    """Would catch: weights or a moving average that a quarantined language's loss makes NaN for good."""
    for values in run_ranks(_losses_of_methods, 4):
        assert all(value == value and value < float("inf") for value in values), values


def _stop(rank: int, limit: int, spoilt_steps: list[bool]) -> tuple[list[int], str]:
    """Counts after each step, and the error that ended the run."""
    layout = LAYOUTS["pp2-two-waves"]
    layout.init()
    _spoil_losses()
    chunk = tiny_gpt.wrap(tiny_gpt.build(layout.variant))
    config = MooConfig(NAMES, preference="tokens", waves=layout.waves, max_quarantined=limit)
    moo = install([chunk], config, lambda step: layout.assignment)
    counts: list[int] = []
    try:
        for spoilt in spoilt_steps:
            batches = layout.batches()
            _plant("loss" if spoilt else "", layout, chunk, batches)
            tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
            counts.append(moo.quarantined_steps["l1"])
    except RuntimeError as error:
        return counts, str(error)
    return counts, ""


def test_too_many_steps_in_a_row_stop_every_rank():
    """Would catch: a run that goes on without a language, a count that a good step does not reset, or ranks that wait
    for one that has stopped."""
    for counts, error in run_ranks(_stop, 4, 2, [True, True, False, True, True, True, True]):
        assert counts == [1, 2, 2, 3, 4]
        assert all(part in error for part in ("step 5", "l1", "3 steps in a row", "--moo-max-quarantined")), error
        assert "l0" not in error and "l2" not in error


def _all_bad(rank: int, empty: bool) -> str:
    """Every language that has tokens is spoilt; with ``empty`` there is one without tokens, too."""
    init_megatron()
    _spoil_losses()
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    moo = install([chunk], MooConfig(["a", "b"], preference="tokens"), lambda step: [[0, 1]])
    batches = tiny_gpt.step_batches([[0, 1]], rank, 1)
    if empty and rank == 0:
        batches[0]["loss_mask"].zero_()
    else:
        batches[0]["spoilt"] = torch.ones_like(batches[0]["loss_mask"])
    with pytest.raises(RuntimeError) as raised:
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    return str(raised.value)


@pytest.mark.parametrize("empty", [False, True], ids=["all spoilt", "the rest empty"])
def test_a_step_with_nothing_left_is_an_error(empty):
    """Would catch: a zero gradient, on which Adam goes on moving and decaying."""
    for error in run_ranks(_all_bad, 2, empty):
        assert "step 0" in error and "finite" in error


def _passed_on(rank: int, fp16: bool) -> dict:
    """A NaN that nobody quarantines: what the optimizer makes of it."""
    layout = LAYOUTS["dp2-two-waves"]
    if fp16:
        layout = replace(layout, variant=replace(layout.variant, dtype="fp16"))
    layout.init()
    _spoil_losses()
    chunk = tiny_gpt.wrap(tiny_gpt.build(layout.variant))
    options = {} if fp16 else {"nonfinite": "pass"}
    config = MooConfig(NAMES, "mgda", granularity="tensor", preference="tokens", waves=layout.waves, **options)
    moo = install([chunk], config, lambda step: layout.assignment)
    optimizer = tiny_gpt.adam(chunk, initial_loss_scale=64.0, hysteresis=1)
    found: dict = {"scales": [], "updated": [], "finite": []}
    for kind in ("", "loss", ""):
        batches = layout.batches()
        _plant(kind, layout, chunk, batches)
        optimizer.zero_grad()
        found["scales"].append(float(optimizer.get_loss_scale()))
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
        found["finite"].append(all(bool(ours.isfinite().all()) for *_, ours in _spans(chunk)))
        if not fp16 and not found["finite"][-1]:
            break
        found["updated"].append(bool(optimizer.step()[0]))
    return found | {"counted": moo.quarantined_steps}


def test_fp16_leaves_it_to_the_loss_scaler():
    """Would catch: an overflow that is quarantined, so that the scale never comes down."""
    for found in run_ranks(_passed_on, 2, True):
        assert found["finite"] == [True, False, True]
        assert found["updated"] == [True, False, True]
        assert found["scales"] == [64.0, 64.0, 32.0]
        assert set(found["counted"].values()) == {0}


def test_pass_hands_the_value_on():
    """Would catch: a solver that turns NaN into numbers where the user wants to see it."""
    assert not all(found["finite"][-1] for found in run_ranks(_passed_on, 2, False))


def _empty_objective(rank: int) -> list[tuple[list[float], list[bool], dict]]:
    """Two steps in which a language has no token, then one with all."""
    layout = LAYOUTS["dp4"]
    layout.init()
    chunk = tiny_gpt.wrap(tiny_gpt.build(layout.variant))
    config = MooConfig(NAMES, "mgda", granularity="model", preference="tokens", max_quarantined=0)
    moo = install([chunk], config, lambda step: layout.assignment)
    found = []
    for kind in ("masked", "masked", ""):
        batches = layout.batches()
        _plant(kind, layout, chunk, batches)
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
        assert all(bool(ours.isfinite().all()) for *_, ours in _spans(chunk))
        weights, active = moo.record.weights_BK[0].tolist(), moo.record.active_BK[0].tolist()
        found.append((weights, active, moo.quarantined_steps))
    return found


def test_an_objective_without_tokens_is_no_fault():
    """Would catch: an empty language that is counted as quarantined, divides by zero, or weighs on the others."""
    for first, second, last in run_ranks(_empty_objective, 4):
        for weights, active, counted in (first, second):
            assert active == [True, False, True] and weights[SPOILT] == 0
            assert sum(weights) == pytest.approx(1)
            assert set(counted.values()) == {0}
        assert last[1] == [True, True, True]


def _disagreement(rank: int, step: int, debug: bool, tp: int, pp: int) -> tuple[int, str, int]:
    """A run in which rank 3 has another assignment from a step on: steps done, error, exchanges posted in the last."""
    init_megatron(tp, pp)
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    size = parallel_state.get_data_parallel_world_size()

    def assign(current: int) -> list[list[int]]:
        shift = 1 if rank == 3 and current >= step else 0
        return [[(slot + current + shift) % 3 for slot in range(size)] for _ in range(2)]

    moo = install([chunk], MooConfig(NAMES, preference="tokens", waves=2, check_assignment=debug), assign)
    posted = []
    stock = torch.distributed.all_to_all_single

    def counting(*args, **kwargs):
        posted.append(moo.step)
        return stock(*args, **kwargs)

    torch.distributed.all_to_all_single = counting
    error = ""
    try:
        for _ in range(3):
            slot = parallel_state.get_data_parallel_rank()
            batches = tiny_gpt.step_batches(assign(moo.step), slot, 1)
            tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    except RuntimeError as raised:
        error = str(raised)
    finally:
        torch.distributed.all_to_all_single = stock
    return moo.step, error, posted.count(moo.step)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["dp4", "tp2dp2", "pp2dp2"])
def test_a_rank_with_another_assignment_stops_all_at_the_start(tp, pp):
    """Would catch: gradients under another language's name, or a check that sees one group of ranks alone."""
    for steps, error, posted in run_ranks(_disagreement, 4, 0, False, tp, pp):
        assert (steps, posted) == (0, 0)
        assert "step 0" in error and "3 differ" in error, error


def test_in_debug_mode_a_later_disagreement_is_found_in_its_step():
    """Would catch: a sampler that drifts apart after the first step, as long as one looks."""
    for steps, error, posted in run_ranks(_disagreement, 4, 2, True, 1, 1):
        assert (steps, posted) == (2, 0)
        assert "step 2" in error and "3 differ" in error, error
    assert all(steps == 3 and not error for steps, error, _ in run_ranks(_disagreement, 4, 2, False, 1, 1))


def _other_shape(rank: int) -> str:
    init_megatron()
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    moo = install([chunk], MooConfig(NAMES, waves=2), lambda step: [[0, 1]] * (3 if rank == 1 else 2))
    with pytest.raises((RuntimeError, ValueError)) as raised:
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), tiny_gpt.step_batches([[0, 1]] * 2, rank, 1))
    return str(raised.value)


def test_an_assignment_that_only_one_rank_finds_invalid_stops_all():
    """Would catch: one rank that stops by itself, while the others wait for it in the comparison."""
    for error in run_ranks(_other_shape, 2, timeout=30):
        assert "assign" in error or "disagree" in error


OTHER_CONFIG = {
    "method": ({"method": "cagrad"}, 1),
    "granularity": ({"granularity": "tensor"}, 1),
    "scope": ({"scope": "local"}, 2),
    "waves": ({"waves": 4}, 1),
    "preference": ({"preference": "uniform"}, 1),
}


def _other_config(rank: int, options: dict, tp: int) -> str:
    init_megatron(tp)
    chunk = tiny_gpt.wrap(tiny_gpt.build(tiny_gpt.Variant()))
    settings = {"preference": "tokens", "waves": 2} | (options if rank == 1 else {})
    config = MooConfig(NAMES, **settings)
    assignment = [[k % 3] * parallel_state.get_data_parallel_world_size() for k in range(config.waves)]
    batches = tiny_gpt.step_batches(assignment, parallel_state.get_data_parallel_rank(), 1)
    with pytest.raises(RuntimeError) as raised:
        moo = install([chunk], config, lambda step: assignment)
        tiny_gpt.run_step(chunk, moo.waves(tiny_gpt.stock_schedule()), batches)
    return str(raised.value)


@pytest.mark.parametrize("field", OTHER_CONFIG)
def test_ranks_with_different_configurations_stop_at_the_start(field):
    """Would catch: blocks or weights that differ between ranks, or a hang in a collective that only some enter."""
    for error in run_ranks(_other_config, 2, *OTHER_CONFIG[field], timeout=30):
        assert "disagree" in error and "configuration" in error, error


# -- through the entry -------------------------------------------------------------------------------------------


def _spoilt_entry(language: str, steps: range) -> Callable[[], None]:
    """The entry, where the loss of a language is NaN in some steps."""

    def main() -> None:
        from megatron.training import get_args

        from megatron_moo.training import finetune

        stock = finetune.Run._loss

        def loss(self, mask, objective, training, losses):
            names = self.plan.objectives
            if training and names[objective] == language and get_args().curr_iteration in steps:
                losses = losses * float("nan")
            return stock(self, mask, objective, training, losses)

        finetune.Run._loss = loss
        entry_main()

    return main


def _steps(run_dir: Path) -> list[dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def test_a_run_goes_on_without_the_language_and_stops_in_the_end(tmp_path):
    """Would catch: Megatron's own NaN check that ends the run first, a file without a trace of it, NaN in the metrics
    of other languages, or an exit code of 0."""
    data = prepare_data(tmp_path)
    flags = (
        "--moo-method",
        "cagrad",
        "--calculate-per-token-loss",
        "--moo-max-quarantined",
        "2",
        "--overlap-grad-reduce",
    )
    argv = entry_argv(data, *flags, "--moo-run-dir", str(tmp_path / "some"), steps=5)
    traces = run_pretrain(argv, 2, main=_spoilt_entry("en", range(1, 3)))
    assert all(len(trace.grad_norms) == 5 and all(norm == norm for norm in trace.grad_norms) for trace in traces)
    lines = _steps(tmp_path / "some")
    assert [line.get("quarantined", []) for line in lines] == [[], ["en"], ["en"], [], []]
    for line in lines:
        losses = {name: values["loss"] for name, values in line["objectives"].items()}
        assert [name for name, loss in losses.items() if loss is None] == line.get("quarantined", [])
        assert line["loss"] is not None and line["grad_norm"] is not None

    argv = entry_argv(data, *flags, "--moo-run-dir", str(tmp_path / "all"), steps=5)
    with pytest.raises(RanksFailed, match="the gradient of en was not finite in 3 steps in a row"):
        run_pretrain(argv, 2, main=_spoilt_entry("en", range(5)))
