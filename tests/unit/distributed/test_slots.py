"""Slots: which ranks work on one objective, asked of the ranks themselves and stated from the sizes alone."""

import math

import pytest
import torch
from megatron.core import parallel_state

from megatron_moo.distributed.slots import SlotMap, num_slots
from tests.helpers.multiprocess import init_megatron, run_ranks


@pytest.mark.parametrize(
    ("stage_ranks", "sizes", "slots"),
    [
        (8, {}, 8),
        (8, {"tp": 2, "cp": 2}, 2),
        (8, {"ep": 4}, 2),
        (8, {"tp": 2, "ep": 2}, 2),  # experts are cut like the rest: two data-parallel ranks a slot
        (8, {"tp": 2, "ep": 2, "etp": 1}, 4),  # an expert group is the tensor-parallel group of one data-parallel rank
        (8, {"tp": 4, "ep": 2, "etp": 1}, 2),
        (8, {"cp": 2, "ep": 2}, 4),
        (8, {"cp": 2, "ep": 8}, 1),
        (12, {"tp": 2, "ep": 3, "etp": 1}, 2),  # neither divides the other
        (4096, {"tp": 8, "cp": 4, "ep": 64, "etp": 1}, 64),
    ],
)
def test_number_of_slots(stage_ranks, sizes, slots):
    """Would catch a planner that promises more objectives a wave than the run has slots for."""
    assert num_slots(stage_ranks, **sizes) == slots


@pytest.mark.parametrize("sizes", [{"tp": 3}, {"cp": 16}, {"ep": 3}, {"tp": 2, "ep": 8}])
def test_sizes_that_do_not_divide_are_refused(sizes):
    """Would catch a number of slots rounded down, and ranks that belong to none."""
    with pytest.raises(ValueError, match="8 ranks of a pipeline stage cannot be divided by"):
        num_slots(8, **sizes)


def _find(rank: int, layouts: list[dict]) -> list[dict]:
    """What this rank finds on every layout, and which ranks it shares what with."""
    found = []
    for sizes in layouts:
        init_megatron(**sizes)
        groups = {
            "tp": parallel_state.get_tensor_model_parallel_group(),
            "cp": parallel_state.get_context_parallel_group(),
            "ep": parallel_state.get_expert_model_parallel_group(),
            "etp": parallel_state.get_expert_tensor_parallel_group(),
            "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "expt_dp": parallel_state.get_expert_data_parallel_group(),
            "pp": parallel_state.get_pipeline_model_parallel_group(),
        }
        slots = SlotMap.find(
            parallel_state.get_data_parallel_group(),
            groups["dp_cp"],
            (groups["ep"], groups["etp"]),
            groups["expt_dp"],
            groups["tp"],
        )
        members = {name: torch.distributed.get_process_group_ranks(group) for name, group in groups.items()}
        found.append({"slots": slots, "stage": parallel_state.get_pipeline_model_parallel_rank(), **members})
    return found


LAYOUTS = {
    4: [
        {},
        {"tp": 2},
        {"cp": 2},
        {"ep": 2},
        {"ep": 4},
        {"tp": 2, "ep": 2},
        {"tp": 2, "ep": 2, "etp": 1},
        {"tp": 2, "ep": 4, "etp": 1},
        {"cp": 2, "ep": 2},
        {"cp": 2, "ep": 4},
        {"etp": 2},
        {"pp": 2, "ep": 2},
    ],
    8: [
        {"tp": 2, "cp": 2, "ep": 2},
        {"tp": 2, "cp": 2, "ep": 4, "etp": 1},
        {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
        {"pp": 2, "cp": 2, "ep": 4},
        {"tp": 4, "ep": 2, "etp": 1},
    ],
    6: [{"tp": 2, "ep": 3, "etp": 1}, {"cp": 3, "ep": 2}],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_slots_are_what_the_groups_say(world_size):
    """Would catch ranks whose tokens meet in one gradient and that are told to work on different objectives, slots
    joined for no reason, and rows attributed to the wrong slot."""
    layouts = LAYOUTS[world_size]
    results = run_ranks(_find, world_size, layouts)
    for index, sizes in enumerate(layouts):
        ranks = [found[index] for found in results]
        etp = sizes.get("etp", sizes.get("tp", 1))
        stage_ranks = world_size // sizes.get("pp", 1)
        expected = num_slots(stage_ranks, sizes.get("tp", 1), sizes.get("cp", 1), sizes.get("ep", 1), etp)
        joined = math.lcm(sizes.get("tp", 1) * sizes.get("cp", 1), etp * sizes.get("ep", 1))
        for rank, found in enumerate(ranks):
            slots, place = found["slots"], (sizes, rank)
            assert slots.count == expected, place
            # Megatron numbers the ranks of a stage in a row.
            assert slots.mine == rank % stage_ranks // joined, place
            for kind in ("tp", "cp", "ep", "etp", "pp"):
                assert {ranks[other]["slots"].mine for other in found[kind]} == {slots.mine}, (place, kind)
            assert slots.dense_members == tuple(ranks[other]["slots"].mine for other in found["dp_cp"]), place
            assert slots.expert_members == tuple(ranks[other]["slots"].mine for other in found["expt_dp"]), place
            assert sorted(set(slots.dense_members)) == list(range(slots.count)), place
