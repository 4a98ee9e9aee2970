"""What teachers answer to rows, computed once, ahead, and carried with the rows as a student is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lexmill.data.batch import Batch, Example, collate
from lexmill.engine import Loaded
from lexmill.engine.runtime import micro_batches, num_tokens
from lexmill.engine.torch_engine import CPU_TOKEN_BUDGET
from lexmill.errors import UserError
from lexmill.models import LMHead
from lexmill.nn.linear import pack
from lexmill.tasks.base import Record

TAUGHT = "teachers."
"""What the names of a batch's labels begin with that are teachers' answers; the name of the head follows."""

Answers = Sequence[Mapping[str, np.ndarray]]
"""By example and head the outputs of its items, `[item, …]`."""


class Lessons:
    """A `Dataset` of tokenized examples in memory, each with what its teachers answered, where there are such."""

    def __init__(self, examples: Sequence[Example], answers: Answers | None = None) -> None:
        self.examples, self.answers = examples, answers
        self.lengths = np.array([num_tokens(example) for example in examples], np.int64)
        # A head that no example of a batch has a label for still has its place in the batch.
        self._blanks = {head: np.zeros_like(label) for one in examples for head, label in one.labels.items()}

    def __len__(self) -> int:
        return len(self.examples)

    def classes(self) -> Int[np.ndarray, "example"]:
        """The first label of each example; -1 where it has none."""
        return np.array([int(next(iter(one.labels.values()), np.int64(-1))) for one in self.examples], np.int64)

    def batch(self, indices: Int[np.ndarray, "example"]) -> Batch:
        batch = collate([self.examples[i] for i in indices], self._blanks)
        if self.answers is None:
            return batch
        own = [self.answers[i] for i in indices]
        taught = {TAUGHT + head: np.concatenate([one[head] for one in own]) for head in own[0]}
        return replace(batch, labels={**batch.labels, **taught})


def lessons(
    subject: Loaded, labelled: Sequence[Record], unlabelled: Sequence[Record], teachers: Sequence[Loaded]
) -> Lessons:
    """Rows as the subject's task and tokenizer read them, with the mean of what the teachers say to each: of logits, so
    of several distributions the geometric mean.

    Raises:
        UserError: teachers answer something else than the subject, or answers that cannot be carried.
    """
    examples = [
        *(subject.task.encode(labelled, subject.tokenizer, labelled=True) if labelled else ()),
        *(subject.task.encode(unlabelled, subject.tokenizer, labelled=False) if unlabelled else ()),
    ]
    if not teachers:
        return Lessons(list(subject.task.regroup(examples)))
    for teacher in teachers:
        if teacher.task.name != subject.task.name or teacher.task.labels() != subject.task.labels():
            what = f"'{teacher.name}' does not answer what the student is to learn"
            raise UserError(what, where="teachers", hint="name a teacher of the same task with the same labels")
    found = [answers(teacher, [*labelled, *unlabelled]) for teacher in teachers]
    mean: list[dict[str, np.ndarray]] = []
    for each in zip(*found, strict=True):
        if any(one[head].shape != each[0][head].shape for one in each for head in one):
            hint = "take teachers with the same tokenizer: this task answers for every token"
            raise UserError("the teachers' answers are not about the same items", where="teachers", hint=hint)
        mean.append({head: np.stack([one[head] for one in each]).mean(0) for head in each[0]})
    return Lessons(examples, mean)


def answers(teacher: Loaded, records: Sequence[Record]) -> Answers:
    """What a model's heads say of each record, on the packed path of the engine. A `UserError` where its outputs are
    about the tokens of a vocabulary, which would take too much room."""
    if any(isinstance(head, LMHead) for head in teacher.model.heads.values()):
        hint = "set logits_weight = 0, and let the model learn from its task"
        raise UserError(f"answers of '{teacher.task.name}' are too large to keep", where="logits_weight", hint=hint)
    examples = teacher.task.encode(records, teacher.tokenizer, labelled=False)
    found: list[dict[str, np.ndarray]] = [{} for _ in examples]
    pack(teacher.model.eval(), CPU_TOKEN_BUDGET)
    for part in micro_batches({i: num_tokens(one) for i, one in enumerate(examples)}, CPU_TOKEN_BUDGET):
        batch = collate([examples[i] for i in part])
        with torch.inference_mode(), teacher.acting() as model:
            outputs = teacher.task.forward(model, batch)
        for head, out in outputs.items():
            ends = np.cumsum(_items(batch, len(out)))[:-1]
            for i, own in zip(part, np.split(out.float().cpu().numpy(), ends), strict=True):
                found[i][head] = own
    return found


def wanted(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """By head, what the teachers say of the items of a batch; empty where nobody was asked."""
    own = {name.removeprefix(TAUGHT): given for name, given in batch.labels.items() if name.startswith(TAUGHT)}
    return {head: torch.from_numpy(given).to(device) for head, given in own.items()}


def divergence(subject: Loaded, data: Lessons) -> float:
    """How far the subject's answers are from the teachers', as its task measures it at temperature 1: the mean over
    heads of that over items."""
    apart: dict[str, list[Tensor]] = {}
    training = subject.model.training
    subject.model.eval()
    for part in micro_batches({i: int(length) for i, length in enumerate(data.lengths)}, CPU_TOKEN_BUDGET):
        batch = data.batch(np.array(part))
        with torch.inference_mode():
            outputs = subject.task.forward(subject.model, batch)
            for head, items in imitated(subject, outputs, batch, 1.0).items():
                apart.setdefault(head, []).append(items)
    subject.model.train(training)
    return float(np.mean([float(torch.cat(items).mean()) for items in apart.values()]))


def imitated(subject: Loaded, outputs: Mapping[str, Tensor], batch: Batch, temperature: float) -> Mapping[str, Tensor]:
    """By head and item, how far outputs are from the teachers'. A `UserError` where they are not of the same items."""
    taught = wanted(batch, subject.model.device)
    if any(outputs[head].shape != given.shape for head, given in taught.items()):
        hint = "the task answers for every token: take a teacher with the same tokenizer, or set logits_weight = 0"
        raise UserError("the student's answers are not about the items of its teachers'", where="teachers", hint=hint)
    return subject.task.imitation(outputs, taught, temperature)


def _items(batch: Batch, rows: int) -> Int[np.ndarray, "example"]:
    """How many of so many rows of an output belong to each example: one an example, a sequence or a token."""
    if rows == batch.num_examples:
        return np.ones(rows, np.int64)
    stream = next(iter(batch.streams))
    owner = batch.streams[stream].example
    if rows != len(owner):
        owner = np.repeat(owner, batch.streams[stream].lengths)
    if rows != len(owner):
        what = "a teacher's answers cannot be told apart by example"
        raise UserError(what, where="logits_weight", hint="set logits_weight = 0")
    return np.bincount(owner, minlength=batch.num_examples)
