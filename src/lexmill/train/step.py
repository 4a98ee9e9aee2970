"""One optimiser step: the loss contract, gradients over micro-batches, one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lexmill.data.batch import Batch, join
from lexmill.models import Model
from lexmill.tasks.base import Task
from lexmill.tasks.inputs import Arrange, packed
from lexmill.train.optimizer import Optimizer
from lexmill.train.passes import Losses, Outputs, Passes, once, plain

Precision = Literal["fp32", "bf16", "fp16"]
ARITHMETIC = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_PACKED = 256 << 20
"""Bytes: more than this, copies of frozen weights for faster products are not worth their memory."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        losses: per head, the weighted mean over the batch; a head without labels in this batch is absent.
        grad_norm: the global L2 norm before clipping.
        tokens: real tokens.
        positions: rows the model computed for them; one that went through half of the layers counts half.
        acted: what the ways of going through the model and of taking the loss say they did, by name.
    """

    losses: Mapping[str, float]
    grad_norm: float
    examples: int
    tokens: int
    positions: float
    acted: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True)
class Manner:
    """How a batch is taken through the model.

    Args:
        precision: of the arithmetic.
        passes: how often a micro-batch goes through.
        losses: what an item's loss is made of.
        arrange: `packed`, or `dense` as the slow oracle.
        scale: what the loss is multiplied by before its backward pass.
    """

    precision: Precision = "fp32"
    passes: Passes = once
    losses: Losses = plain
    arrange: Arrange = packed
    scale: float = 1.0


def accumulate(
    model: Model, task: Task, micro_batches: Sequence[Batch], *, seed: int, manner: Manner | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Add the gradients of one optimiser batch to the model's. Gives the loss per head, and what `manner` did.

    Each head's loss is the sum of its items' weighted losses over the total weight of the whole batch, so how the
    batch is cut into micro-batches does not matter. `seed` alone fixes dropout.
    """
    manner = manner or Manner()
    if manner.losses.couples(task) and len(micro_batches) > 1:
        return _accumulate_coupled(model, task, micro_batches, seed, manner), {}
    weights = [manner.losses.weights(task, batch) for batch in micro_batches]
    totals: dict[str, float] = {}
    for one in weights:
        for head, values in one.items():
            totals[head] = totals.get(head, 0.0) + float(values.sum(dtype=np.float64))
    live = [head for head, total in totals.items() if total > 0]
    losses = dict.fromkeys(live, 0.0)
    shown: dict[str, tuple[float, int]] = {}
    acted: dict[str, float] = {}
    for i, (batch, one) in enumerate(zip(micro_batches, weights, strict=True)):
        shares = {head: one[head].astype(np.float64) / totals[head] for head in live if head in one and one[head].any()}
        if not shares:
            continue
        _seed(model.device, _mix(seed, i))
        parts, did = manner.passes(model, batch, _Pass(model, task, batch, shares, manner, shown))
        for head, part in parts.items():
            losses[head] += part
        for name, value in did.items():
            acted[name] = acted.get(name, 0.0) + value
    return losses, acted | {name: total / count for name, (total, count) in shown.items()}


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass of a micro-batch.

    Args:
        shares: its items' weights in the optimiser batch.
        shown: by name, the sum and the number of the items to report the mean of, over all micro-batches.
    """

    model: Model
    task: Task
    batch: Batch
    shares: Mapping[str, np.ndarray]
    manner: Manner
    shown: dict[str, tuple[float, int]]

    def __call__(self, weight: float) -> dict[str, float]:
        items, shown = self.manner.losses(self.task, self._forward, self.batch)
        parts: dict[str, Tensor] = {h: items[h] @ torch.from_numpy(s).to(items[h]) for h, s in self.shares.items()}
        total = torch.stack(list(parts.values())).sum()
        (total * (weight * self.manner.scale) if weight * self.manner.scale != 1.0 else total).backward()
        for name, values in shown.items():
            total, count = self.shown.get(name, (0.0, 0))
            self.shown[name] = (total + float(values.sum()), count + values.numel())
        return {head: float(part.detach()) for head, part in parts.items()}

    def _forward(self) -> Outputs:
        return _outputs(self.model, self.task, self.batch, self.manner)


def _outputs(model: Model, task: Task, batch: Batch, manner: Manner) -> Outputs:
    """What a task's heads say of a micro-batch, in full precision."""
    reduced = manner.precision != "fp32"
    dtype = ARITHMETIC[manner.precision]
    with torch.autocast(model.device.type, dtype if reduced else torch.bfloat16, enabled=reduced):
        outputs = task.forward(model, batch, manner.arrange)
    return {head: out.float() for head, out in outputs.items()} if reduced else outputs


def _accumulate_coupled(
    model: Model, task: Task, micro_batches: Sequence[Batch], seed: int, manner: Manner
) -> dict[str, float]:
    """`accumulate` where the loss of an example depends on the outputs of others (Gao et al. 2021, GradCache).

    All outputs are computed, their graphs dropped, and gathered; the loss is that of the whole batch and gives the
    gradient of each output; then every micro-batch is computed once more, with the same dropout, and its own share is
    sent back. Costs one forward pass more, and the memory of one micro-batch.
    """
    batch = join(micro_batches)
    weights = {head: one.astype(np.float64) for head, one in task.item_weights(batch).items() if one.any()}
    if not weights:
        return {}

    def outputs(i: int) -> Outputs:
        _seed(model.device, _mix(seed, i))
        return _outputs(model, task, micro_batches[i], manner)

    # With gradients enabled, since without them attention is another kernel that draws other dropout.
    parts = [{head: out.detach() for head, out in outputs(i).items()} for i in range(len(micro_batches))]
    gathered = {head: torch.cat([part[head] for part in parts]).requires_grad_() for head in parts[0]}
    items = task.item_losses(gathered, batch)
    losses = {head: items[head] @ torch.from_numpy(one / one.sum()).to(items[head]) for head, one in weights.items()}
    (torch.stack(list(losses.values())).sum() * manner.scale).backward()
    shares = {
        head: torch.split(out.grad, [len(part[head]) for part in parts])
        for head, out in gathered.items()
        if out.grad is not None
    }
    for i in range(len(micro_batches)):
        again = outputs(i)
        torch.autograd.backward([again[head] for head in shares], [share[i] for share in shares.values()])
    return {head: float(loss.detach()) for head, loss in losses.items()}


def train_step(
    model: Model,
    task: Task,
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    learning_rate: float,
    seed: int,
    manner: Manner | None = None,
    before_update: Callable[[float], None] = lambda scale: None,
) -> StepResult:
    """Gradients of one optimiser batch, then one update. The model must be in training mode.

    Where a scaled loss overflowed, nothing is updated, and the gradient norm is infinite.

    Args:
        before_update: is called when all gradients are there, with what the loss was multiplied by.
    """
    manner, trunk = manner or Manner(), model.trunk
    computed, known = trunk.layer_rows, trunk.known_rows
    losses, acted = accumulate(model, task, micro_batches, seed=seed, manner=manner)
    if losses:
        before_update(manner.scale)
    norm = optimizer.step(learning_rate, manner.scale) if losses else 0.0
    computed, known = trunk.layer_rows - computed, trunk.known_rows - known
    if known:
        acted["forward_known"] = known / (known + computed)
    return StepResult(
        losses,
        norm if math.isfinite(norm) else math.inf,
        sum(batch.num_examples for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
        computed / len(trunk.layers),
        acted,
    )


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed`, which also visits every other kind of device: longer, on a CPU, than the seeding."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _mix(seed: int, index: int) -> int:
    """A seed for one micro-batch; neighbours share no stream (numpy's SeedSequence, O'Neill 2015)."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def step_seed(seed: int, step: int) -> int:
    """The seed of step `step` of a run."""
    return _mix(seed, step)
