"""Counting of objectives that are left out."""

import pytest

from megatron_moo.distributed.faults import Quarantine


def test_a_step_that_is_computed_again_counts_once():
    """Would catch: a run that Megatron's rerun machine brings to its end in half the steps."""
    quarantine = Quarantine(["a", "b"], limit=2)
    for step in (0, 0, 1, 1, 1):
        quarantine.count(step, [True, False], [True, True])
    assert quarantine.total == {"a": 2, "b": 0}
    with pytest.raises(RuntimeError, match="a was not finite in 3 steps in a row"):
        quarantine.count(2, [True, False], [True, True])


def test_absence_neither_adds_to_a_streak_nor_ends_it():
    """Would catch: a language that is in every second step alone, and is never stopped for."""
    quarantine = Quarantine(["a", "b"], limit=1)
    quarantine.count(0, [True, False], [True, True])
    quarantine.count(1, [False, False], [False, True])
    with pytest.raises(RuntimeError, match="a was not finite in 2 steps"):
        quarantine.count(2, [True, False], [True, True])
