"""What a user decides about the combination of gradients: one dataclass, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_moo.aggregation import Aggregator, build_aggregator

Granularity = Literal["bucket", "layer", "tensor", "model"]
Scope = Literal["global", "local"]
PreferenceKind = Literal["tokens", "slots", "uniform", "given"]
WaveMemory = Literal["device", "host"]
NonFinite = Literal["quarantine", "pass"]

GRANULARITIES: tuple[str, ...] = get_args(Granularity)
SCOPES: tuple[str, ...] = get_args(Scope)
PREFERENCES: tuple[str, ...] = get_args(PreferenceKind)
WAVE_MEMORIES: tuple[str, ...] = get_args(WaveMemory)
NON_FINITE: tuple[str, ...] = get_args(NonFinite)


@dataclass(frozen=True)
class MooConfig:
    """How the per-objective gradients of a step become one.

    Args:
        objectives: names of the K objectives, in the order of their ids.
        method: a name of ``megatron_moo.aggregation.AGGREGATORS``, an entry point's, or ``package.module:Class``.
        method_options: keyword arguments of that method.
        wrappers: options by name of ``megatron_moo.aggregation.WRAPPERS``, for what goes around the method.
        granularity: the block within which a conflict is resolved. ``bucket`` is Megatron's communication
            bucket; ``layer``, ``tensor`` and ``model`` do not depend on the parallel layout.
        scope: ``global`` reduces inner products over tensor-parallel ranks (and over pipeline stages for
            ``model``), so that a block means whole tensors whatever the layout; ``local`` lets every
            model-parallel rank decide for its own shards, for comparison.
        preference: the mean that a method falls back to without conflict. ``tokens`` weighs an objective by its
            tokens in the step (stock Megatron with ``--calculate-per-token-loss``), ``slots`` by its number of
            gradient rows (stock Megatron without), ``uniform`` equally, ``given`` by ``preference_weights``.
        preference_weights: one non-negative number per objective, for ``preference="given"``.
        active: objectives of a step, a rotating subset of all K; ``assign`` chooses which. Default: all.
        waves: forward/backward passes per step; each slot works on one objective per wave. Default: as few as
            give every objective of the step a slot, ``ceil((active or K) / slots)``.
        wave_memory: where the rows of all waves but the last are kept: ``device``, or ``host`` (one bucket at a time
            comes back; two copies over the bus per row).
        nonfinite: what happens to an objective whose gradient is not finite. ``quarantine`` leaves it out of the step,
            in all blocks; ``pass`` hands the value on. With fp16 it is always handed on, to the loss scaler.
        max_quarantined: steps in a row that an objective may be left out; one more stops the run.
        check_assignment: compare the assignment over all ranks before every step, not only before the first.
        seed: seeds the random choices of methods (with the step and the block).

    Raises:
        ValueError: naming the field, the rule and the value found.
    """

    objectives: Sequence[str]
    method: str = "mean"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    granularity: Granularity = "bucket"
    scope: Scope = "global"
    preference: PreferenceKind = "slots"
    preference_weights: Sequence[float] | None = None
    active: int | None = None
    waves: int | None = None
    wave_memory: WaveMemory = "device"
    nonfinite: NonFinite = "quarantine"
    max_quarantined: int = 5
    check_assignment: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives must be distinct and not empty, found {list(self.objectives)}")
        for name, value, known in (
            ("granularity", self.granularity, GRANULARITIES),
            ("scope", self.scope, SCOPES),
            ("preference", self.preference, PREFERENCES),
            ("wave_memory", self.wave_memory, WAVE_MEMORIES),
            ("nonfinite", self.nonfinite, NON_FINITE),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; found {value!r}")
        if self.waves is not None and self.waves < 1:
            raise ValueError(f"waves must be at least 1, found {self.waves}")
        if self.max_quarantined < 0:
            raise ValueError(f"max_quarantined must not be negative, found {self.max_quarantined}")
        if self.active is not None and not 1 <= self.active <= len(self.objectives):
            raise ValueError(
                f"active must be from 1 to the number of objectives ({len(self.objectives)}), found {self.active}"
            )
        self._check_preference_weights()

    def _check_preference_weights(self) -> None:
        if (self.preference == "given") != (self.preference_weights is not None):
            raise ValueError("preference_weights belong to preference='given', and that needs them")
        if self.preference_weights is None:
            return
        weights = list(self.preference_weights)
        if len(weights) != len(self.objectives):
            raise ValueError(
                f"preference_weights needs one number per objective ({len(self.objectives)}: "
                f"{', '.join(self.objectives)}), found {len(weights)}"
            )
        if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise ValueError(f"preference_weights must be finite, >= 0 and not all zero, found {weights}")

    def build_aggregator(self) -> Aggregator:
        """The method with its options and wrappers.

        Raises:
            ValueError: for a name or option that does not exist, or a value that breaks the option's rule.
        """
        return build_aggregator(self.method, wrappers=self.wrappers, **self.method_options)

    def check_slots(self, slots: int) -> None:
        """Refuse what ``slots`` data-parallel slots cannot give.

        Raises:
            ValueError: if a step has fewer rows than active objectives, or noise is to be measured, but no objective
                has two rows in a step.
        """
        rows = self.waves_for(slots) * slots
        if self.active is not None and rows < self.active:
            raise ValueError(
                f"active (--moo-active) asks for {self.active} objectives in a step, but it has {rows} rows ({slots} "
                f"slots x {self.waves_for(slots)} waves); set waves (--moo-waves) to {math.ceil(self.active / slots)} "
                f"or active to {rows}"
            )
        idle = [name for name, w in zip(self.objectives, self.preference_weights or (), strict=False) if w == 0]
        if self.active is not None and len(idle) >= self.active:
            raise ValueError(
                f"active (--moo-active) is {self.active}, and {len(idle)} objectives have preference weight 0 "
                f"({', '.join(idle)}): a step may have only those, and no gradient; leave them out"
            )
        if self.build_aggregator().uses_noise and rows <= self.step_objectives:
            raise ValueError(
                f"noise is measured between rows of one objective, but a step has {rows} rows ({slots} slots x "
                f"{self.waves_for(slots)} waves) for {self.step_objectives} objectives; set waves (--moo-waves) to "
                f"{math.ceil(2 * self.step_objectives / slots)} for two rows each, or drop unbiased, shrink and gate"
            )

    @property
    def step_objectives(self) -> int:
        """Objectives that a step is made for."""
        return self.active or len(self.objectives)

    def waves_for(self, slots: int) -> int:
        """Waves of a step on ``slots`` slots."""
        return self.waves if self.waves is not None else math.ceil(self.step_objectives / slots)
