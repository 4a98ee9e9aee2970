"""Distilling: a student of fewer layers, less width or another family learns from what teachers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from lexmill import models
from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.narrow import (
    Choose,
    Width,
    chosen_layers,
    keep_layers,
    narrow,
    narrowed,
    plain_transformer,
)
from lexmill.compress.recover import Recovery, recover
from lexmill.compress.units import num_weights
from lexmill.data.augment import MARK, Edit, Editor, augment
from lexmill.engine import Loaded
from lexmill.engine.loaded import load
from lexmill.errors import UserError
from lexmill.models import Model, RecurrentConfig
from lexmill.tasks import Record

_SINCE = "since a student is cut out of matrices that are whole, and trained"


@dataclass(frozen=True)
class Augment:
    """Changed copies of training texts, without labels, which the teachers answer too (Wei and Zou 2019, EDA).

    Args:
        copies: of each text; 0 for none.
        share: of a text's words that an edit changes.
    """

    copies: Annotated[int, Ge(0)] = 0
    edits: tuple[Edit, ...] = ("swap", "delete", "keyboard")
    share: Annotated[float, Gt(0), Le(1)] = 0.15


@dataclass(frozen=True)
class Learning(Recovery):
    """How a student is trained: longer than what was changed little, and more by its teachers."""

    epochs: Annotated[int, Ge(1)] = 10
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    task_weight: Annotated[float, Ge(0)] = 0.3


@dataclass(frozen=True)
class DistilOptions:
    """What may be set for `distil`.

    Args:
        layers: how many the student has; those of its teacher where None. Of another family, 1 where None.
        choose: which of the teacher's layers it begins with.
        hidden_size, intermediate_size, num_heads: of a narrower student; those of its teacher where None. Of another
            family `hidden_size` is the width of what its heads are given, 512 where None.
        start: whether a narrower student begins with weights `cut` out of its teacher or with `new` ones.
        family: `lstm` or `gru` for a recurrent student, whose embeddings are made of the teacher's.
        embedding_size: of such a student.
        dropout: of such a student.
        teachers: artefacts to learn from besides.
        augment: further texts to learn from.
        recovery: how it is trained.
    """

    layers: Annotated[int, Ge(1)] | None = None
    choose: Choose = "spaced"
    hidden_size: Annotated[int, Ge(1)] | None = None
    intermediate_size: Annotated[int, Ge(1)] | None = None
    num_heads: Annotated[int, Ge(1)] | None = None
    start: Literal["cut", "new"] = "cut"
    family: Literal["lstm", "gru"] | None = None
    embedding_size: Annotated[int, Ge(1)] = 128
    dropout: Annotated[float, Ge(0), Le(0.9)] = 0.1
    teachers: tuple[str, ...] = ()
    augment: Augment = Augment()
    recovery: Learning = Learning()

    @property
    def width(self) -> Width:
        return Width(self.hidden_size, self.intermediate_size, self.num_heads)


@register
class Distil(Method):
    """Train a smaller student on what teachers say (Hinton et al. 2015)."""

    name: ClassVar[str] = "distil"
    stage: ClassVar[Stage] = "distil"
    Options: ClassVar[type] = DistilOptions
    after: ClassVar[Mapping[Stage, str]] = {
        "factorise": _SINCE,
        "exits": "since heads stand on layers that a student may not have",
        "sparsify": "since training would fill what was set to 0",
        "quantise": _SINCE,
    }

    def check(self, subject: Loaded, options: DistilOptions) -> None:
        if options.family is not None:
            _recurrent_config(subject, options)
            return
        config = plain_transformer(subject.model, "layers").config
        if options.layers is not None and options.layers > config.num_layers:
            hint = f"give fewer than {config.num_layers}"
            raise UserError(f"is {options.layers}, and the teacher has {config.num_layers}", where="layers", hint=hint)
        same = options.layers in (None, config.num_layers)
        if same and (not options.width.asked or narrowed(config, options.width) == config):
            hint = "give fewer layers, a smaller width, or another family"
            raise UserError("the student would be as large as its teacher", where="layers", hint=hint)
        if options.width.asked:
            narrowed(config, options.width)

    def apply(self, subject: Loaded, material: Material, options: DistilOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        before, layers = num_weights(subject.model), subject.model.config.num_layers
        teachers = [*material.teachers, *(load(Path(path)) for path in options.teachers)]
        changed = _changed(subject, material, options.augment)
        material = replace(material, teachers=teachers, unlabelled=[*material.unlabelled, *changed])
        student = replace(subject, model=_student(subject, options, material.seed))
        after = num_weights(student.model)
        material.note(f"training a student of {after:,} weights on {len(teachers)} teacher(s) of {before:,}")
        effect = recover(student, material, options.recovery)
        found = {"layers_before": layers, "layers_after": student.model.config.num_layers}
        found |= {"weights_before": before, "weights_after": after, "teachers": len(teachers)}
        found |= {"unlabelled_rows": len(material.unlabelled), "augmented_rows": len(changed)}
        return student, {name: float(value) for name, value in found.items()} | effect


def _student(subject: Loaded, options: DistilOptions, seed: int) -> Model:
    """The student as training begins."""
    if options.family is not None:
        return _recurrent(subject, options, seed)
    layers = subject.model.config.num_layers
    if options.layers is not None and options.layers < layers:
        keep_layers(subject.model, chosen_layers(layers, options.layers, options.choose))
    if options.width.asked:
        return narrow(subject, options.width, seed=seed, cut=options.start == "cut")
    return subject.model


def _recurrent_config(subject: Loaded, options: DistilOptions) -> RecurrentConfig:
    teacher = subject.model.config
    if options.intermediate_size is not None or options.num_heads is not None:
        raise UserError("a recurrent student has neither", where="intermediate_size, num_heads", hint="leave them out")
    width = options.hidden_size or 512
    ways = 1 if teacher.causal else 2
    if width % ways:
        raise UserError(f"{width} cannot be shared by both directions", where="hidden_size", hint="give an even number")
    return RecurrentConfig(
        vocab_size=teacher.vocab_size,
        cell=options.family or "lstm",
        embedding_size=options.embedding_size,
        state_size=width // ways,
        num_layers=options.layers or 1,
        bidirectional=ways == 2,
        max_positions=subject.model.trunk.max_tokens,
        dropout=options.dropout,
    )


def _recurrent(subject: Loaded, options: DistilOptions, seed: int) -> Model:
    config = _recurrent_config(subject, options)
    model = models.init(config, config.cell, seed)
    torch.manual_seed(seed)
    subject.task.attach(model)
    with torch.no_grad():
        table = model.trunk.embeddings.token.weight
        made = projected(subject.model.trunk.embeddings.token.weight.detach().float(), config.embedding_size)
        table[:, : made.shape[1]] = made * (config.initializer_range / made.std())
    return model.eval()


def projected(table: Float[Tensor, "vocab dim"], size: int) -> Float[Tensor, "vocab size"]:
    """The coordinates of embeddings, less their mean, along the directions in which they vary most; all of the table
    where it is no wider than that."""
    centred = table - table.mean(0)
    if size >= table.shape[1]:
        return centred
    _, directions = torch.linalg.eigh(centred.t() @ centred)
    return centred @ directions[:, -size:].flip(1)


def _changed(subject: Loaded, material: Material, options: Augment) -> Sequence[Record]:
    """Changed copies of the training texts."""
    if not options.copies:
        return []
    column = subject.task.state().get("columns", {}).get("text")
    if column is None:
        hint = "set augment.copies = 0"
        raise UserError(f"'{subject.task.name}' has no single text to change", where="augment.copies", hint=hint)
    editor = Editor(options.edits, options.share, material.seed)
    found: list[dict[str, Any]] = [row for row in augment(material.train, column, editor, options.copies) if row[MARK]]
    if not found:
        raise UserError("no text could be changed", where="augment.edits", hint="give further edits")
    return found
