"""One optimiser step: the loss contract, gradients over micro-batches, one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lexmill.data.batch import Batch
from lexmill.models import Model
from lexmill.tasks.base import Task
from lexmill.tasks.inputs import Arrange, packed
from lexmill.train.optimizer import Optimizer

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        losses: per head, the weighted mean over the batch; a head without labels in this batch is absent.
        grad_norm: the global L2 norm before clipping.
        tokens: real tokens.
        positions: rows the model computed for them.
    """

    losses: Mapping[str, float]
    grad_norm: float
    examples: int
    tokens: int
    positions: int

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


def accumulate(
    model: Model,
    task: Task,
    micro_batches: Sequence[Batch],
    *,
    seed: int,
    precision: Precision = "fp32",
    arrange: Arrange = packed,
) -> dict[str, float]:
    """Add the gradients of one optimiser batch to the model's, and return the loss per head.

    Each head's loss is the sum of its items' weighted losses over the total weight of the whole batch, so how the
    batch is cut into micro-batches does not matter. `seed` alone fixes dropout.
    """
    weights = [task.item_weights(batch) for batch in micro_batches]
    totals: dict[str, float] = {}
    for one in weights:
        for head, values in one.items():
            totals[head] = totals.get(head, 0.0) + float(values.sum(dtype=np.float64))
    live = [head for head, total in totals.items() if total > 0]
    losses = dict.fromkeys(live, 0.0)
    for i, (batch, one) in enumerate(zip(micro_batches, weights, strict=True)):
        present = [head for head in live if one[head].any()]
        if not present:
            continue
        torch.manual_seed(_mix(seed, i))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = task.forward(model, batch, arrange)
        if precision == "bf16":
            outputs = {head: out.float() for head, out in outputs.items()}
        items = task.item_losses(outputs, batch)
        parts = {h: items[h] @ torch.from_numpy(one[h].astype(np.float64) / totals[h]).to(items[h]) for h in present}
        torch.stack(list(parts.values())).sum().backward()
        for head, part in parts.items():
            losses[head] += float(part.detach())
    return losses


def train_step(
    model: Model,
    task: Task,
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    learning_rate: float,
    seed: int,
    precision: Precision = "fp32",
    arrange: Arrange = packed,
) -> StepResult:
    """Gradients of one optimiser batch, then one update. The model must be in training mode."""
    before = model.trunk.positions_computed
    losses = accumulate(model, task, micro_batches, seed=seed, precision=precision, arrange=arrange)
    norm = optimizer.step(learning_rate) if losses else 0.0
    return StepResult(
        losses,
        norm,
        sum(batch.num_examples for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
        model.trunk.positions_computed - before,
    )


def _mix(seed: int, index: int) -> int:
    """A seed for one micro-batch; neighbours share no stream (numpy's SeedSequence, O'Neill 2015)."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def step_seed(seed: int, step: int) -> int:
    """The seed of step `step` of a run."""
    return _mix(seed, step)
