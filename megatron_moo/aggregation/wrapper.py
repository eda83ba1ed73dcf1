"""What goes around a method: an aggregator that looks at another one's problem before, or at its weights after.

Wrappers compose with every method and with each other. They see the same :class:`~megatron_moo.aggregation.Problem`,
and their state lies beside the method's in one dictionary.
"""

from __future__ import annotations

from torch import Tensor

from .base import Aggregator, Problem


class Wrapper(Aggregator):
    """Base of all wrappers: subclass it, name the keys of its state, and implement ``_weights``.

    Attributes:
        inner: the aggregator inside.
        state_keys: what the wrapper itself keeps; other entries of a state are the inner aggregator's.
    """

    def __init__(self, inner: Aggregator, **options: float | str) -> None:
        """Put the wrapper around ``inner``.

        Raises:
            ValueError: for bad options, or where ``inner`` holds a wrapper of the same kind already.
        """
        super().__init__(**options)
        if any(isinstance(layer, type(self)) for layer in layers(inner)):
            raise ValueError(f"{type(self).__name__} is there already: {inner!r}")
        self.inner = inner
        self.stateful = bool(self.state_keys) or inner.stateful
        self.random = inner.random
        self.needs_losses = inner.needs_losses
        self.uses_noise = inner.uses_noise

    def _inner_weights(self, problem: Problem) -> Tensor:
        """The inner aggregator's weights [B, K]."""
        weights = self.inner._weights(problem)
        self.kkt_residual_B = self.inner.kkt_residual_B
        return weights

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if key in self.state_keys})
        self.inner.load_state_dict({key: value for key, value in state.items() if key not in self.state_keys})

    def _forget_calls(self) -> None:
        self.inner._forget_calls()

    def __repr__(self) -> str:
        settings = "".join(f", {key}={value!r}" for key, value in self.settings.items())
        return f"{type(self).__name__}({self.inner!r}{settings})"


def layers(aggregator: Aggregator) -> list[Aggregator]:
    """An aggregator and what it is wrapped around, outermost first."""
    found = [aggregator]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].inner)
    return found
