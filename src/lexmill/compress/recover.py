"""Training a compressed model on: by its task, by what teachers answer, and by what goes on inside one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt

from lexmill.compress.base import Material
from lexmill.compress.states import States, collecting, states_of
from lexmill.compress.teaching import TAUGHT, Lessons, divergence, imitated, lessons
from lexmill.data.batch import Batch
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import evaluate
from lexmill.hardware import multiplies_fast
from lexmill.tasks import Task
from lexmill.train import TrainConfig, Trainer
from lexmill.train.companion import Companion
from lexmill.train.passes import Losses, Outputs

MOST_COMPARED = 512
"""Rows that the divergence from the teachers is measured on."""


@dataclass(frozen=True)
class Recovery:
    """How a compressed model is trained on.

    Args:
        epochs: over the training rows and those without labels.
        task_weight: of the task's own loss, on labelled rows.
        logits_weight: of the divergence from the teachers' answers (Hinton et al. 2015), on all rows.
        temperature: that both answers are divided by for it.
        hidden_weight: of the mean squared distance of hidden states, those after every layer of the student from those
            at the same share of the first teacher's depth, by a learnt projection where they differ in width (Jiao et
            al. 2020, TinyBERT).
        relations_weight: of the divergence between the relations of queries, of keys and of values among the tokens
            of a text, in the last layers of the student and of the first teacher (Wang et al. 2021, MiniLMv2).
        warmup: the share of the steps in which the learning rate rises.
        patience: stop after so many epochs in which validation found nothing better; None to go on to the end.
    """

    epochs: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    batch_size: Annotated[int, Ge(1)] = 32
    task_weight: Annotated[float, Ge(0)] = 0.5
    logits_weight: Annotated[float, Ge(0)] = 1.0
    temperature: Annotated[float, Gt(0)] = 2.0
    hidden_weight: Annotated[float, Ge(0)] = 0.0
    relations_weight: Annotated[float, Ge(0)] = 0.0
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    patience: Annotated[int, Ge(1)] | None = None

    @property
    def imitates(self) -> bool:
        """Whether it learns from teachers."""
        return bool(self.logits_weight or self.hidden_weight or self.relations_weight)

    def check(self) -> None:
        """Raise a `UserError` where nothing would be learnt from."""
        if not (self.task_weight or self.imitates):
            raise UserError("nothing to learn from", where="task_weight", hint="raise one of the weights above 0")


@dataclass(frozen=True)
class Imitation(Losses):
    """Loss by head: the task's own, on labelled rows, under its own names; the divergence from the teachers' answers
    under `imitated.HEAD`; that from the teacher's states under `hidden` and `relations`. Each is a mean of its own."""

    subject: Loaded
    recovery: Recovery
    states: States | None

    def __call__(self, task: Task, forward: Callable[[], Outputs], batch: Batch) -> tuple[Outputs, Outputs]:
        with nullcontext([]) if self.states is None else collecting(self.subject.model.trunk) as seen:
            outputs = forward()
        found: dict[str, torch.Tensor] = {}
        if self.recovery.task_weight:
            weight = self.recovery.task_weight
            found |= {head: weight * items for head, items in task.item_losses(outputs, batch).items()}
        if self.recovery.logits_weight:
            apart = imitated(self.subject, outputs, batch, self.recovery.temperature)
            found |= {f"imitated.{head}": self.recovery.logits_weight * items for head, items in apart.items()}
        return found if self.states is None else found | self.states.losses(batch, seen), {}

    def weights(self, task: Task, batch: Batch) -> Mapping[str, np.ndarray]:
        found = dict(task.item_weights(batch)) if self.recovery.task_weight else {}
        for name, given in batch.labels.items():
            if name.startswith(TAUGHT):
                found[f"imitated.{name.removeprefix(TAUGHT)}"] = np.ones(len(given), np.float32)
        if self.states is not None:
            (stream,) = batch.streams.values()
            found |= {name: np.ones(len(stream.example), np.float32) for name in self.states.names}
        return found

    def couples(self, task: Task) -> bool:
        return False


def recover(
    subject: Loaded, material: Material, recovery: Recovery, *, companion: Companion | None = None
) -> dict[str, float]:
    """Train the subject's model, in place, on `Material.train` and, where it learns from teachers, on `unlabelled`.

    The model ends with the weights of the best epoch where there are validation rows, and in evaluation mode.

    Args:
        companion: takes part in each step, such as one that keeps taken-out weights at 0.

    Returns:
        `epochs`, `steps`, `final_loss`, `recovery_seconds`, `taught_rows`; where there are validation rows, the task's
        metric on them as `validation_before` and `validation_after`, and `best_epoch`; where answers of teachers are
        learnt from, how far the model's are from theirs, in nats at temperature 1, as `divergence_before` and
        `divergence_after`.

    Raises:
        UserError: the task's answers cannot be imitated, the teachers' states cannot be compared with the model's, or
            there is nothing to learn from.
    """
    _check(subject, material, recovery)
    teachers = material.teachers if recovery.logits_weight else ()
    unlabelled = material.unlabelled if recovery.imitates else ()
    data = lessons(subject, material.train, unlabelled, teachers)
    shown = list(material.validation or material.train)[:MOST_COMPARED]
    compared = lessons(subject, shown, (), teachers) if teachers else None
    states = None
    if recovery.hidden_weight or recovery.relations_weight:
        weights = recovery.hidden_weight, recovery.relations_weight
        states = states_of(subject, material.teachers[0], material.train, *weights)
    found = _measured(subject, material, compared, "before")
    with nullcontext() if states is None else states.projecting():
        trainer = _trainer(subject, material, recovery, data, states, companion)
        result = trainer.run(lambda event: material.progress(min(1.0, (event["step"] + 1) / trainer.total_steps)))
    found |= _measured(subject, material, compared, "after")
    found |= {"epochs": result.epochs, "steps": float(result.steps), "final_loss": result.final_loss}
    found |= {"recovery_seconds": result.seconds, "taught_rows": float(len(data) if recovery.imitates else 0)}
    return found if result.best_epoch is None else found | {"best_epoch": float(result.best_epoch)}


def _check(subject: Loaded, material: Material, recovery: Recovery) -> None:
    recovery.check()
    if not material.train and not (material.unlabelled and recovery.imitates):
        raise UserError("there are no rows to train on", where="train")
    if recovery.imitates and not material.teachers:
        raise UserError("there is no teacher to learn from", where="teachers", hint="name one, or set its weights to 0")
    if recovery.imitates and recovery.task_weight and subject.task.couples:
        hint = "set task_weight = 0, or the weights of what teachers say"
        what = f"'{subject.task.name}' compares the examples of a batch, and cannot be joined with what teachers say"
        raise UserError(what, where="task_weight", hint=hint)


def _trainer(
    subject: Loaded,
    material: Material,
    recovery: Recovery,
    data: Lessons,
    states: States | None,
    companion: Companion | None,
) -> Trainer:
    config = TrainConfig(
        epochs=recovery.epochs,
        seed=material.seed,
        batch_size=recovery.batch_size,
        learning_rate=recovery.learning_rate,
        warmup=recovery.warmup,
        patience=recovery.patience if material.validation else None,
        precision="bf16" if multiplies_fast(torch.bfloat16, subject.model.device) else "fp32",
    )
    torch.manual_seed(material.seed)
    return Trainer(
        subject.model,
        subject.task,
        data,
        config,
        validate=(lambda: _metrics(subject, material)) if material.validation else None,
        companion=companion,
        losses=Imitation(subject, recovery, states) if recovery.imitates else None,
    )


def _measured(subject: Loaded, material: Material, compared: Lessons | None, when: str) -> dict[str, float]:
    found: dict[str, float] = {}
    if material.validation:
        found[f"validation_{when}"] = _metrics(subject, material)[subject.task.metric]
    if compared is not None:
        found[f"divergence_{when}"] = divergence(subject, compared)
    return found


def _metrics(subject: Loaded, material: Material) -> Mapping[str, float]:
    return evaluate(TorchEngine(subject, device=str(subject.model.device)), material.validation).metrics.values
