"""What takes part in each step of a run beside the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Companion(Protocol):
    """What goes along with a run and takes part in each step, such as a method that moves weights about.

    What it does must be a function of the step and of its state, so that a resumed run does the same.
    """

    def before_update(self, step: int, steps: int, scale: float) -> None:
        """All gradients of step `step` of `steps` are there, `scale` times as large, and may be changed."""
        ...

    def after_update(self, step: int, steps: int) -> Mapping[str, float]:
        """The weights are updated, and may be changed; gives what the step's event shall say of it."""
        ...

    def settled(self, step: int, steps: int) -> bool:
        """Whether the weights have the form that they are to end in after step `step` of `steps`."""
        ...

    def state(self) -> Mapping[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...
