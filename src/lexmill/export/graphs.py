"""What every format shares that writes one graph: what a task asks of its model, and what stands beside the graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lexmill.data.batch import collate
from lexmill.data.tokenizer import fingerprint, load_tokenizer
from lexmill.engine import Loaded, probes
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.pooling import Pooling

ANSWERS = "answers.json"
"""What a program needs to know to make answers of outputs."""
TOKENIZER = "tokenizer.json"


@dataclass
class Asked:
    """Stands in for a model, to learn what a task asks of it.

    Args:
        heads: the names of the heads that were asked.
        pooling: how the vector of a sequence was asked for; None where it was not.
    """

    model: Model
    heads: list[str] = field(default_factory=list[str])
    pooling: Pooling | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, *inputs: Any, heads: Sequence[str] | None = None, **named: Any) -> Any:
        self.heads += list(self.model.heads if heads is None else heads)
        return self.model(*inputs, heads=heads, **named)

    def pooled(self, *inputs: Any, how: Pooling | None = None, **named: Any) -> Any:
        self.pooling = how or self.model.pooling
        return self.model.pooled(*inputs, how=how, **named)

    def __getattr__(self, name: str) -> Any:
        hint = "classify, tag, rank, embed and answer can; export this one in another format"
        raise UserError("what this task asks of its model cannot be one graph", where="export", hint=hint)


def asked(subject: Loaded) -> Asked:
    """What the task asks of its model for a text."""
    [record, *_] = probes.probe_records(subject.task)
    found = Asked(subject.model)
    with torch.inference_mode():
        batch = collate(subject.task.encode([record], subject.tokenizer, labelled=False))
        subject.task.answer(cast("Model", found), batch, [record], subject.tokenizer)
    return found


def write_beside(subject: Loaded, folder: Path, **told: Any) -> None:
    """Write the tokenizer, and how texts are cut and outputs become answers, with what else is `told` of the graph."""
    whole = {"task": subject.task.name, **told, **subject.task.reading()}
    (folder / ANSWERS).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    subject.tokenizer.no_truncation()
    subject.tokenizer.save(str(folder / TOKENIZER))


def check_beside(subject: Loaded, folder: Path) -> None:
    """Raise a `UserError` where what stands beside a graph is not what the task and the tokenizer are."""
    told = json.loads((folder / ANSWERS).read_text("utf-8"))
    for name, value in json.loads(json.dumps(subject.task.reading())).items():
        if told.get(name) != value:
            raise UserError(f"'{name}' is not what the task says", where=str(folder / ANSWERS))
    if fingerprint(load_tokenizer(folder / TOKENIZER)) != fingerprint(subject.tokenizer):
        raise UserError("the tokenizer is another one", where=str(folder / TOKENIZER))
