"""Configuration is checked when it is made."""

import pytest

from megatron_moo.distributed import MooConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": []}, "objectives must be distinct"),
        ({"objectives": ["en", "en"]}, "objectives must be distinct"),
        (
            {"granularity": "layers"},
            "granularity must be one of bucket, layer, tensor, model; found 'layers'",
        ),
        ({"scope": "world"}, "scope must be one of"),
        ({"preference": "size"}, "preference must be one of"),
        ({"waves": 0}, "waves must be at least 1"),
        ({"preference": "given"}, "preference_weights belong to"),
        ({"preference_weights": [1, 1]}, "preference_weights belong to"),
        ({"preference": "given", "preference_weights": [1]}, "one number per objective"),
        ({"preference": "given", "preference_weights": [1, -1]}, "finite, >= 0"),
        ({"preference": "given", "preference_weights": [0, 0]}, "not all zero"),
        ({"preference": "given", "preference_weights": [1, float("nan")]}, "finite"),
    ],
)
def test_bad_fields_are_named(fields, message):
    """Would catch a misspelt option that silently means the default."""
    with pytest.raises(ValueError, match=message):
        MooConfig(**({"objectives": ["en", "sw"]} | fields))


@pytest.mark.parametrize(("slots", "waves"), [(1, 5), (2, 3), (5, 1), (8, 1)])
def test_waves_give_every_objective_a_slot(slots, waves):
    """Would catch a step in which some language is never met."""
    assert MooConfig(objectives=list("abcde")).waves_for(slots) == waves
    assert MooConfig(objectives=list("abcde"), waves=7).waves_for(slots) == 7


def test_noise_needs_two_rows_of_an_objective():
    """Would catch: a gate that is asked for and never acts, because every language has a single row."""
    for wrappers, waves, fine in (({"noise": {"gate": 0.1}}, None, False), ({"noise": {"gate": 0.1}}, 4, True)):
        config = MooConfig(["a", "b", "c", "d"], "pcgrad", wrappers=wrappers, waves=waves)
        if fine:
            config.check_slots(2)
        else:
            with pytest.raises(ValueError, match=r"4 rows \(2 slots x 2 waves\) for 4 objectives; set waves .* to 4"):
                config.check_slots(2)
    MooConfig(["a", "b"], "pcgrad", wrappers={"noise": {"smoothing": 0.9}}).check_slots(2)
