"""Early exits for classification: heads after inner layers, and the certainty from which a text leaves at one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.compress.base import Material, Method, Stage, batches, register
from lexmill.compress.states import collecting
from lexmill.compress.teaching import lessons
from lexmill.data.batch import Batch
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import evaluate
from lexmill.hardware import multiplies_fast
from lexmill.models.backbone import initialise
from lexmill.models.exits import Certainty, Exits, certainty
from lexmill.models.heads import ClassifierHead
from lexmill.nn.layout import Packed
from lexmill.nn.pooling import pool
from lexmill.tasks import Record, Task
from lexmill.train import TrainConfig, Trainer
from lexmill.train.passes import Losses, Outputs

_THRESHOLDS = 256
"""Certainties tried, at even shares of those that validation shows."""


@dataclass(frozen=True)
class ExitsOptions:
    """What may be set for `exits`.

    Args:
        layers: after how many layers there is an exit, each; empty for all but the lowest third and the last.
        train: the new `heads` alone, or all weights `joint` with them.
        epochs, learning_rate: of that; the rate is 5e-3 for the heads and 2e-4 for all weights where None.
        by: how sure an exit is: its largest probability, or one less its entropy as a share of the most possible.
        max_drop: the accuracy on validation rows that may be lost, as a share of 1.
    """

    layers: tuple[Annotated[int, Ge(1)], ...] = ()
    train: Literal["heads", "joint"] = "heads"
    epochs: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Gt(0)] | None = None
    by: Certainty = "probability"
    max_drop: Annotated[float, Ge(0)] = 0.005


@register
class EarlyExits(Method):
    """Answer what is easy after fewer layers (Xin et al. 2020, DeeBERT; Schwartz et al. 2020)."""

    name: ClassVar[str] = "exits"
    stage: ClassVar[Stage] = "exits"
    Options: ClassVar[type] = ExitsOptions
    after: ClassVar[Mapping[Stage, str]] = {
        "exits": "since the model has exits already",
        "sparsify": "since training would fill what was set to 0",
        "quantise": "since heads are trained on what layers give in full precision",
    }

    def check(self, subject: Loaded, options: ExitsOptions) -> None:
        _head(subject)
        depth = len(subject.model.trunk.layers)
        layers = options.layers or _usual(depth)
        if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= depth:
            hint = f"give ascending numbers below {depth}"
            raise UserError(f"no exits of a model of {depth} layers: {list(layers)}", where="layers", hint=hint)

    def apply(self, subject: Loaded, material: Material, options: ExitsOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        if not material.validation:
            raise UserError("a threshold is chosen on validation rows", where="validation", hint="give some")
        before = _accuracy(subject, material)
        exits = _attach(subject, options, material.seed)
        _train(subject, exits, material, options)
        told, gold = _answers(subject, exits, material.validation)
        threshold, shares, layers = choose_threshold(told, gold, exits.layers, _depth(subject), options)
        exits.threshold = threshold
        trunk = subject.model.trunk
        start = trunk.layer_rows, trunk.exited_rows
        after = _accuracy(subject, material)
        rows, exited = trunk.layer_rows - start[0], trunk.exited_rows - start[1]
        found = {"threshold": threshold, "layers_mean": layers, "layers_before": float(_depth(subject))}
        found |= {f"left_after_{layer}": share for layer, share in zip(exits.layers, shares, strict=True)}
        found |= {"positions_saved": exited / (rows + exited)}
        return subject, found | {"validation_before": before, "validation_after": after}


def _usual(depth: int) -> tuple[int, ...]:
    return tuple(range(max(1, depth // 3), depth))


def _depth(subject: Loaded) -> int:
    return len(subject.model.trunk.layers)


def _head(subject: Loaded) -> tuple[str, ClassifierHead]:
    """The one head, that gives each text one label. A `UserError` where the task has another kind."""
    [name, *others] = list(subject.model.heads)
    head, trunk = subject.model.heads[name], subject.model.trunk
    single = subject.task.name == "classify" and not subject.task.state()["options"].get("multi_label")
    if others or not single or not isinstance(head, ClassifierHead) or head.pooling is None:
        raise UserError("only one head that gives a text one label can answer early", hint="leave 'exits' out")
    if trunk.sides > 1 or trunk.has_prompt or trunk.exits is not None:
        raise UserError("this trunk cannot have exits, or has them already", hint="leave 'exits' out")
    return name, head


def _attach(subject: Loaded, options: ExitsOptions, seed: int) -> Exits:
    name, head = _head(subject)
    model = subject.model
    # Below the last layer, what a text says is not gathered in one token yet.
    shape = replace(head.shape, transform=None, norm_eps=None, pooling="mean")
    exits = Exits(model.config.hidden_size, name, options.layers or _usual(_depth(subject)), shape, options.by)
    initialise(exits, model.config.initializer_range, torch.Generator().manual_seed(seed))
    model.trunk.exits = exits.to(model.device, model.dtype)
    return exits


@dataclass(frozen=True)
class _ExitLosses(Losses):
    """The task's own loss at every exit, and at the last head where that is trained too."""

    subject: Loaded
    exits: Exits
    joint: bool

    def __call__(self, task: Task, forward: Callable[[], Outputs], batch: Batch) -> tuple[Outputs, Outputs]:
        with collecting(self.subject.model.trunk) as seen:
            outputs = forward()
        found = {**task.item_losses(outputs, batch)} if self.joint else {}
        for layer, logits in zip(self.exits.layers, _logits(self.exits, seen, batch), strict=True):
            found[f"exit.{layer}"] = task.item_losses({self.exits.head: logits}, batch)[self.exits.head]
        return found, {}

    def weights(self, task: Task, batch: Batch) -> Mapping[str, np.ndarray]:
        own = task.item_weights(batch)
        at_exits = {f"exit.{layer}": own[self.exits.head] for layer in self.exits.layers}
        return {**own, **at_exits} if self.joint else at_exits


def _logits(exits: Exits, seen: Sequence[Mapping[str, Tensor]], batch: Batch) -> list[Float[Tensor, "seq label"]]:
    (stream,) = batch.streams.values()
    layout = Packed.of(torch.from_numpy(stream.lengths), seen[0]["hidden"].device)
    how: Any = exits.shape.pooling
    hidden = (seen[layer]["hidden"].float() for layer in exits.layers)
    return [head(pool(rows, layout, how)) for head, rows in zip(exits.heads, hidden, strict=True)]


def _train(subject: Loaded, exits: Exits, material: Material, options: ExitsOptions) -> None:
    model, joint = subject.model, options.train == "joint"
    learnt = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(joint or name.startswith("trunk.exits."))
    config = TrainConfig(
        epochs=options.epochs,
        seed=material.seed,
        learning_rate=options.learning_rate or (2e-4 if joint else 5e-3),
        precision="bf16" if multiplies_fast(torch.bfloat16, model.device) else "fp32",
    )
    data = lessons(subject, material.train, (), ())
    losses = _ExitLosses(subject, exits, joint)
    trainer = Trainer(model, subject.task, data, config, losses=losses)
    trainer.run(lambda event: material.progress((event["step"] + 1) / trainer.total_steps))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learnt[name])


def _answers(
    subject: Loaded, exits: Exits, rows: Sequence[Record]
) -> tuple[Float[Tensor, "exit row label"], Int[Tensor, "row"]]:
    """What every exit and, last, the head says of rows, and their labels."""
    told: list[Tensor] = []
    gold: list[np.ndarray] = []
    for batch in batches(subject, rows, labelled=True):
        with torch.inference_mode(), collecting(subject.model.trunk) as seen:
            last = subject.task.forward(subject.model, batch)[exits.head]
            told.append(torch.stack([*_logits(exits, seen, batch), last]))
        there = batch.masks[exits.head]
        told[-1] = told[-1][:, torch.from_numpy(there)]
        gold.append(batch.labels[exits.head][there])
    return torch.cat(told, 1), torch.from_numpy(np.concatenate(gold))


def choose_threshold(
    told: Float[Tensor, "exit row label"],
    gold: Int[Tensor, "row"],
    layers: Sequence[int],
    depth: int,
    options: ExitsOptions,
) -> tuple[float, list[float], float]:
    """The certainty at which texts go through the fewest layers in the mean, with no more lost than `max_drop`.

    Returns:
        It, the share of texts that leaves at each exit, and the layers that a text goes through in the mean.

    Raises:
        UserError: no text may leave.
    """
    right = told.argmax(-1) == gold
    sure = certainty(told[:-1], options.by)
    least = float(right[-1].float().mean()) - options.max_drop
    through = torch.tensor([*layers, depth], dtype=torch.float32)
    best: tuple[float, list[float], float] | None = None
    for threshold in torch.quantile(
        sure.flatten()[:: max(1, sure.numel() // 100_000)], torch.linspace(0, 1, _THRESHOLDS)
    ):
        leaves = torch.cat([sure >= threshold, torch.ones_like(right[-1:])])
        at = leaves.int().argmax(0)
        if float(right.gather(0, at[None]).float().mean()) < least - 1e-9:
            continue
        shares = [float((at == index).float().mean()) for index in range(len(layers))]
        mean = float(through[at].mean())
        if sum(shares) and (best is None or mean < best[2]):
            best = float(threshold), shares, mean
    if best is None:
        hint = "raise max_drop, or train longer"
        raise UserError("no text can leave early at this loss", where="max_drop", hint=hint)
    return best


def _accuracy(subject: Loaded, material: Material) -> float:
    engine = TorchEngine(subject, device=str(subject.model.device))
    return evaluate(engine, material.validation).metrics.values[subject.task.metric]
