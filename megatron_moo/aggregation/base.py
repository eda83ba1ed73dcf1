"""What every method shares: options, the masking rule, the view of one step that a method solves.

Shapes: B blocks, K objectives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import interior
from .noise import RowNoise

Generators = torch.Generator | Sequence[torch.Generator] | None

# A row shorter than this fraction of its block's longest is lost in float64 sums with it: it counts as zero.
_ZERO_ROW = 1e-14


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, what it does, and which values it takes.

    Attributes:
        default: the value if the user gives none; its type (float or str) is the option's type.
        help: one line for ``--help``.
        choices: the allowed strings, for a string.
        low, high: bounds of a number, for a number.
        low_open, high_open: whether the bound itself is excluded.
    """

    default: float | str
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    @property
    def rule(self) -> str:
        """The allowed values in words, e.g. ``a number in [0, 1)``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"

    def check(self, label: str, value: Any) -> float | str:
        """``value`` in the option's type.

        Raises:
            ValueError: if it breaks the rule; the message names ``label``, the rule and the value.
        """
        if self.choices:
            if value in self.choices:
                return value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            above = value > self.low if self.low_open else value >= self.low
            below = value < self.high if self.high_open else value <= self.high
            if above and below and math.isfinite(value):
                return float(value)
        raise ValueError(f"{label} must be {self.rule}, found {value!r}")


@dataclass(frozen=True)
class Problem:
    """One step as a method sees it: masked, symmetric, scaled, in float64.

    Attributes:
        gram_BKK: inner products, scaled so that the longest active row of each block has length 1; zero in
            the rows and columns of inactive objectives.
        active_BK: who takes part: not masked out, preference above zero, row not zero.
        preference_BK: the caller's preference, zero for inactive objectives; it need not sum to 1.
        share_BK: the preference renormalised among the active objectives (sums to 1; all zero if nobody is
            active).
        mass_B1: the active preference, summed: ``preference_BK = mass_B1 * share_BK``.
        generator: source of random choices, see :class:`Aggregator`.
        losses_BK: losses of the objectives, 1 for inactive ones; None if the caller gave none.
        noise: what several rows of one objective tell of noise, in the units of ``gram_BKK``; None if the
            caller gave none.
    """

    gram_BKK: Tensor
    active_BK: Tensor
    preference_BK: Tensor
    share_BK: Tensor
    mass_B1: Tensor
    generator: Generators
    losses_BK: Tensor | None = None
    noise: RowNoise | None = None

    @property
    def norm_BK(self) -> Tensor:
        """Row lengths; 1 for inactive objectives, so that they can be divided by."""
        diagonal = self.gram_BKK.diagonal(dim1=1, dim2=2)
        return torch.where(self.active_BK, diagonal, 1.0).sqrt()


class Aggregator(ABC):
    """Maps the Gramian of each block to the weights of its rows: ``d_b = sum_k w_bk g_bk``.

    The rules that hold for every method:

    - *Masking.* A block is solved on its active objectives, the preference renormalised among them, and the
      weights multiplied by the active preference. An objective is active if its mask is set, its preference
      is above zero and (for every method but the mean) its row is not zero, i.e. not shorter than 1e-14 of
      the block's longest. Others get weight 0 and change nothing; a block without active objectives gets
      zeros. A block that one objective touches keeps the mean's ``u_k g_k``.
    - *Scale.* Weights do not change when all gradients are multiplied by a number. They are *mean-like*:
      where all rows are equal, the combined gradient is the mean's.
    - *Numbers.* Solved in float64 on the Gramian's device, batched over blocks, without waiting for the
      device. Masked rows of the Gramian may hold anything, NaN too. An unmasked row that is not finite is
      masked, and reported in ``nonfinite_BK``.
    - *Randomness.* Only from ``generator``: CPU generators, one for all blocks or one per block. With one per
      block a block's draw does not depend on which other blocks share the call. ``None`` means a fixed order
      (:func:`megatron_moo.aggregation.order.visit_order`), never the global random state.

    Attributes:
        options: the method's options by name.
        state_keys: names of what the method keeps between calls: tensors with the blocks as their leading axis, in
            ``_state``.
        stateful: whether weights depend on earlier calls.
        random: whether ``generator`` is used.
        needs_losses: whether ``losses_K`` must be given.
        uses_noise: whether ``noise`` is looked at.
        nonfinite_BK: objectives left out of the last call because their row was not finite [B, K] (left on the
            device); None before the first call.
        kkt_residual_B: for methods that solve a program, the relative optimality gap of each block at the
            last call (left on the device); None for others.
    """

    options: ClassVar[dict[str, Option]] = {}
    state_keys: tuple[str, ...] = ()
    stateful: bool = False
    random: bool = False
    needs_losses: bool = False
    uses_noise: bool = False

    def __init__(self, **options: float | str) -> None:
        """Take the options, by name; those not given have their defaults.

        Raises:
            ValueError: for an unknown option, or a value that breaks its rule.
        """
        label = type(self).__name__
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{label} has no option {name!r}; it knows: {known}")
        self.settings: dict[str, Any] = {
            name: option.check(f"{label} option {name!r}", options.get(name, option.default))
            for name, option in self.options.items()
        }
        self._state: dict[str, Tensor] = {}
        self.kkt_residual_B: Tensor | None = None
        self.nonfinite_BK: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self,
        gram_BKK: Tensor,
        active_BK: Tensor | None = None,
        preference_K: Tensor | None = None,
        generator: Generators = None,
        *,
        losses_K: Tensor | None = None,
        noise: RowNoise | None = None,
    ) -> Tensor:
        """Weights [B, K] in float64 on the Gramian's device.

        Args:
            gram_BKK: inner products of the rows of each block [B, K, K], any floating dtype.
            active_BK: boolean mask of the objectives that take part [B, K]; default: all.
            preference_K: non-negative preference [K] or [B, K]; default: 1/K each.
            generator: a CPU ``torch.Generator``, or a sequence of B of them, or None.
            losses_K: the objectives' losses, mean over their tokens, [K] or [B, K]; for methods that use them.
            noise: what :func:`~megatron_moo.aggregation.fold_rows` found beside the Gramian, for
                :class:`~megatron_moo.aggregation.NoiseAware`.

        Raises:
            ValueError: for shapes, a dtype or a generator that do not fit, for missing losses, and for a
                negative preference on the CPU.
        """
        active, preference = _check_inputs(gram_BKK, active_BK, preference_K)
        _check_generator(generator, len(gram_BKK))
        if self.needs_losses and losses_K is None:
            raise ValueError(f"{self!r} works with losses: give losses_K")
        losses = None if losses_K is None else _per_block(losses_K, "losses_K", gram_BKK)
        return self._weights(self._problem(gram_BKK, active, preference, generator, losses, noise))

    @abstractmethod
    def _weights(self, problem: Problem) -> Tensor:
        """Weights [B, K] with the active preference as their scale."""

    def _problem(
        self,
        gram_BKK: Tensor,
        active_BK: Tensor,
        preference_BK: Tensor,
        generator: Generators,
        losses_BK: Tensor | None,
        noise: RowNoise | None,
    ) -> Problem:
        finite = _finite_rows(gram_BKK, active_BK)
        self.nonfinite_BK = active_BK & ~finite
        active_BK = active_BK & finite
        # where, not a product: a masked row may be NaN.
        gram = torch.where(_pairs(active_BK), gram_BKK.double(), 0.0)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        longest = diagonal.amax(1, keepdim=True)
        active = active_BK & (diagonal > _ZERO_ROW**2 * longest)
        scale = torch.where(longest > 0, longest, 1.0)[:, :, None]
        gram = gram / scale  # before the sum, which could overflow
        gram = torch.where(_pairs(active), (gram + gram.mT) / 2, 0.0)
        preference = torch.where(active, preference_BK, 0.0)
        mass = preference.sum(1, keepdim=True)
        share = preference / torch.where(mass > 0, mass, 1.0)
        if losses_BK is not None:
            losses_BK = torch.where(active, losses_BK, 1.0)
        if noise is not None:
            noise = noise.divided_by(scale)
        return Problem(gram, active, preference, share, mass, generator, losses_BK, noise)

    def state_dict(self) -> dict[str, Tensor]:
        """State, every tensor with the blocks as its leading axis; empty if there is none yet."""
        return {key: value.clone() for key, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave; an empty dictionary is a fresh start.

        Raises:
            ValueError: for entries that the method does not keep.
        """
        if set(state) - set(self.state_keys):
            kept = ", ".join(self.state_keys)
            raise ValueError(
                f"{type(self).__name__} "
                + (f"keeps {kept}" if kept else "has no state")
                + f", found {', '.join(state)}"
            )
        self._state = {key: value.detach().clone() for key, value in state.items()}

    def fresh_state(self, blocks: int, objectives: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The state of a method that has seen nothing yet, in its shapes; the method itself is reset.

        Into it a checkpoint's entries of single blocks can be put, for :meth:`load_state_dict`.
        """
        self.reset()
        # A call in which nobody takes part makes the state and leaves it fresh.
        self(
            torch.zeros(blocks, objectives, objectives, device=device),
            torch.zeros(blocks, objectives, dtype=torch.bool, device=device),
            losses_K=torch.ones(objectives, device=device),
        )
        self._forget_calls()
        state = self.state_dict()
        self.reset()
        return state

    def _forget_calls(self) -> None:  # noqa: B027  most have nothing to do
        """Undo what a call in which nobody takes part leaves in the state."""

    def _check_state(self, problem: Problem) -> None:
        """Raise a ValueError if the state is for other blocks or objectives than the problem's."""
        blocks, objectives = problem.active_BK.shape
        for key, value in self._state.items():
            if value.shape[0] != blocks or value.shape[-1] not in (objectives, 1):  # 1: one number per block
                raise ValueError(
                    f"{type(self).__name__}'s {key} is for {list(value.shape)}, found {blocks} blocks of {objectives} "
                    "objectives; call reset() when they change"
                )

    def reset(self) -> None:
        """Forget all state."""
        self.load_state_dict({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


def _check_inputs(gram_BKK: Tensor, active_BK: Tensor | None, preference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask and preference as [B, K] on the Gramian's device, the preference zero where masked."""
    if gram_BKK.dim() != 3 or gram_BKK.shape[1] != gram_BKK.shape[2] or gram_BKK.shape[1] == 0:
        raise ValueError(f"gram_BKK must have shape [B, K, K] with K >= 1, found {list(gram_BKK.shape)}")
    if not gram_BKK.is_floating_point():
        raise ValueError(f"gram_BKK must be of a floating dtype, found {gram_BKK.dtype}")
    shape = gram_BKK.shape[:2]
    if active_BK is None:
        active_BK = torch.ones(shape, dtype=torch.bool, device=gram_BKK.device)
    if active_BK.shape != shape or active_BK.dtype != torch.bool:
        raise ValueError(
            f"active_BK must be boolean of shape {list(shape)}, found {active_BK.dtype} of {list(active_BK.shape)}"
        )
    if preference is None:
        preference = torch.full(shape, 1 / shape[1], dtype=torch.float64, device=gram_BKK.device)
    if interior.may_look(preference) and not bool((preference.isfinite() & (preference >= 0)).all()):
        raise ValueError(f"preference_K must be finite and not negative, found {preference.tolist()}")
    preference = _per_block(preference, "preference_K", gram_BKK)
    active_BK = active_BK.to(gram_BKK.device) & (preference > 0)
    return active_BK, torch.where(active_BK, preference, 0.0)


def _per_block(values: Tensor, label: str, gram_BKK: Tensor) -> Tensor:
    """Values given as [K] or [B, K], as [B, K] in float64 on the Gramian's device."""
    shape = gram_BKK.shape[:2]
    if values.shape not in (shape, shape[1:]):
        raise ValueError(f"{label} must have shape [{shape[1]}] or {list(shape)}, found {list(values.shape)}")
    return values.to(gram_BKK.device, torch.float64).expand(shape)


def _pairs(active_BK: Tensor) -> Tensor:
    """Pairs of active objectives [B, K, K]."""
    return active_BK[:, :, None] & active_BK[:, None, :]


def _finite_rows(gram_BKK: Tensor, active_BK: Tensor) -> Tensor:
    """Which rows are finite [B, K]. One that is not spoils its own square; its products are not held against others."""
    finite = gram_BKK.isfinite() & gram_BKK.mT.isfinite()
    whole = finite.diagonal(dim1=1, dim2=2)
    # Sums in low precision may overflow off the diagonal alone; then both rows are suspect.
    return whole & (finite | ~_pairs(active_BK & whole)).all(2)


def _check_generator(generator: Generators, blocks: int) -> None:
    if generator is None:
        return
    single = isinstance(generator, torch.Generator)
    if not single and len(generator) != blocks:
        raise ValueError(f"generator must be one, or one per block: {blocks} blocks, found {len(generator)} generators")
    for one in [generator] if single else generator:
        if one.device.type != "cpu":
            raise ValueError(
                f"generator must be a CPU generator (the draw is then device-independent), found {one.device}"
            )
