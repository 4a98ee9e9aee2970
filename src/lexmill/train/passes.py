"""How often a micro-batch goes through the model, and what its items' losses are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lexmill.data.batch import Batch
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks.base import Task

Outputs = Mapping[str, Tensor]
Backward = Callable[[float], Mapping[str, float]]
"""One forward and backward pass of a micro-batch, its loss counting this much. Gives the loss by head."""


class Passes(Protocol):
    """Runs a micro-batch through the model one or more times.

    Gives the losses to report, by head, and further numbers that show what it did: shares of those of the optimiser
    batch, as the losses are.
    """

    def __call__(
        self, model: Model, batch: Batch, backward: Backward
    ) -> tuple[Mapping[str, float], dict[str, float]]: ...


def once(model: Model, batch: Batch, backward: Backward) -> tuple[Mapping[str, float], dict[str, float]]:
    """One pass."""
    return backward(1.0), {}


class Losses(ABC):
    """What each item's loss is, and how much it weighs."""

    @abstractmethod
    def __call__(self, task: Task, forward: Callable[[], Outputs], batch: Batch) -> tuple[Outputs, Outputs]:
        """By head the unreduced losses, in the order of `weights`, and further items by name to report the mean of."""

    def weights(self, task: Task, batch: Batch) -> Mapping[str, np.ndarray]:
        """By head the weight of each item's loss, known before the forward pass: the task's own."""
        return task.item_weights(batch)

    def couples(self, task: Task) -> bool:
        """Whether the loss of an example depends on the others of its batch: as the task says."""
        return task.couples


class Plain(Losses):
    """The task's own."""

    def __call__(self, task: Task, forward: Callable[[], Outputs], batch: Batch) -> tuple[Outputs, Outputs]:
        outputs = forward()
        return task.item_losses(outputs, batch), task.shown(outputs, batch)


plain = Plain()


@dataclass(frozen=True)
class RDrop(Losses):
    """Two passes under different dropout that must agree (Liang et al. 2021): the mean of their losses, and `weight`
    times half the symmetric divergence between what they say."""

    weight: float

    def __call__(self, task: Task, forward: Callable[[], Outputs], batch: Batch) -> tuple[Outputs, Outputs]:
        first, second = forward(), forward()
        apart = task.divergence(first, second)
        a, b = task.item_losses(first, batch), task.item_losses(second, batch)
        if any(apart[head].shape != a[head].shape for head in a):
            raise UserError(f"the task '{task.name}' has no divergence", where="train.r_drop", hint="leave it out")
        losses = {head: (a[head] + b[head]) / 2 + self.weight * apart[head] for head in a}
        r_drop = torch.cat([items.detach().reshape(-1) for items in apart.values()])
        return losses, {**task.shown(first, batch), "r_drop": r_drop}
