"""What goes on inside a student beside what goes on inside its teacher: hidden states, and relations among tokens."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.data.batch import Batch, collate
from lexmill.data.tokenizer import fingerprint
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.trunk import Trunk
from lexmill.nn.layout import Packed
from lexmill.nn.linear import Linear
from lexmill.nn.pooling import select
from lexmill.tasks import Record

Seen = list[dict[str, Tensor]]
_PROJECTIONS = "projections"
_RELATED = ("query", "key", "value")


@contextmanager
def collecting(trunk: Trunk) -> Generator[Seen]:
    """What the layers of a trunk tell while it runs, of every row, whatever rows its caller wants."""
    seen: Seen = []
    asked: list[Any] = []

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        asked.append(named.get("only", "all"))
        return given, {**named, "only": "all", "collect": seen}

    def after(module: nn.Module, given: tuple[Any, ...], hidden: Tensor) -> Tensor:
        only = asked.pop()
        return hidden if only == "all" else select(hidden, given[2], only)

    hooks = [trunk.register_forward_pre_hook(before, with_kwargs=True), trunk.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class States:
    """Losses between a student's and a teacher's states.

    Args:
        pairs: which hidden state of the student, 0 being the embeddings, is to be like which of the teacher.
        projections: by pair, what takes the student's width to the teacher's; the identity where they are equal.
        hidden, relations: the weights of both losses; 0 for none.
    """

    student: Loaded
    teacher: Loaded
    pairs: Sequence[tuple[int, int]]
    projections: nn.ModuleList
    hidden: float
    relations: float

    @property
    def names(self) -> list[str]:
        """Of the losses."""
        return [name for name, weight in (("hidden", self.hidden), ("relations", self.relations)) if weight]

    @contextmanager
    def projecting(self) -> Generator[None]:
        """While it is trained, the student has the projections; afterwards it is as before."""
        model: Model = self.student.model
        model.add_module(_PROJECTIONS, self.projections.to(model.device))
        try:
            yield
        finally:
            delattr(model, _PROJECTIONS)

    def losses(self, batch: Batch, seen: Seen) -> dict[str, Float[Tensor, "seq"]]:
        """By name, the weighted loss of each sequence, given what the student's layers told of this batch."""
        with torch.no_grad(), collecting(self.teacher.model.trunk) as shown:
            self.teacher.task.forward(self.teacher.model, batch)
        layout = Packed.of(torch.from_numpy(_lengths(batch)), self.student.model.device)
        found: dict[str, Tensor] = {}
        if self.hidden:
            apart = (
                (project(seen[own]["hidden"].float()) - shown[theirs]["hidden"].float()).square().mean(-1)
                for (own, theirs), project in zip(self.pairs, self.projections, strict=True)
            )
            found["hidden"] = self.hidden * _means(torch.stack(list(apart)).mean(0), layout)
        if self.relations:
            found["relations"] = self.relations * relations_apart(seen[-1], shown[-1], layout)
        return found


def states_of(student: Loaded, teacher: Loaded, rows: Sequence[Record], hidden: float, relations: float) -> States:
    """Which states of a student are to be like which of its teacher.

    Raises:
        UserError: they do not read texts as the same tokens, or one has no attention to relate tokens by.
    """
    if fingerprint(student.tokenizer) != fingerprint(teacher.tokenizer):
        hint = "set hidden_weight and relations_weight to 0: answers are compared text by text"
        raise UserError("student and teacher read texts as other tokens", where="teachers", hint=hint)
    batch = collate(student.task.encode(rows[:1], student.tokenizer, labelled=False))
    if len(batch.streams) > 1:
        raise UserError(f"'{student.task.name}' reads more than one text an example", where="hidden_weight")
    own, theirs = (_told(one, batch) for one in (student, teacher))
    if relations and not all(name in told[-1] for told in (own, theirs) for name in _RELATED):
        hint = "set relations_weight = 0"
        raise UserError("student and teacher must both attend", where="relations_weight", hint=hint)
    depth, below = len(theirs) - 1, len(own) - 1
    pairs = [(layer, round(layer * depth / below)) for layer in range(below + 1)] if hidden else []
    widths = [(own[a]["hidden"].shape[-1], theirs[b]["hidden"].shape[-1]) for a, b in pairs]
    projections = nn.ModuleList(nn.Identity() if a == b else Linear(a, b, bias=False) for a, b in widths)
    return States(student, teacher, pairs, projections, hidden, relations)


def relations_apart(student: dict[str, Tensor], teacher: dict[str, Tensor], layout: Packed) -> Float[Tensor, "seq"]:
    """The divergence of a student's relations from a teacher's: for queries, keys and values each the softmax of
    scaled products of every token's with every token's of the same text, in as many heads as both can be cut into,
    however many either attends by (Wang et al. 2021, MiniLMv2, section 3). The mean over heads and tokens, in nats,
    summed over the three."""
    found: list[Tensor] = []
    for name in _RELATED:
        p, q = (_related(one[name].float(), layout, _heads(student, teacher, name)) for one in (teacher, student))
        each = (p.exp() * (p - q)).masked_fill(~_there(layout)[:, None, None, :], 0.0).sum(-1).mean(1)
        rows = each.masked_fill(~_there(layout), 0.0)
        found.append(rows.sum(-1) / layout.lengths.to(rows))
    return torch.stack(found).sum(0)


def _heads(student: dict[str, Tensor], teacher: dict[str, Tensor], name: str) -> int:
    return math.gcd(student[name].shape[1], teacher[name].shape[1])


def _there(layout: Packed) -> Tensor:
    return (torch.arange(layout.max_length) < layout.lengths[:, None]).to(layout.device)


def _related(rows: Float[Tensor, "tok head dim"], layout: Packed, heads: int) -> Float[Tensor, "seq rel pos other"]:
    """The logarithm of the relations of every token with every other of its text; tokens that are not there get
    none of it."""
    there = _there(layout)
    flat = rows.reshape(len(rows), heads, -1)
    wide = flat.new_zeros(*there.shape, *flat.shape[1:])
    wide[there] = flat
    wide = wide.transpose(1, 2)
    scores = wide @ wide.transpose(-1, -2) / math.sqrt(flat.shape[-1])
    return F.log_softmax(scores.masked_fill(~there[:, None, None, :], -1e9), -1)


def _means(rows: Float[Tensor, "tok"], layout: Packed) -> Float[Tensor, "seq"]:
    total = rows.new_zeros(layout.num_sequences).index_add(0, layout.sequence, rows)
    return total / layout.lengths.to(total)


def _lengths(batch: Batch) -> np.ndarray:
    (stream,) = batch.streams.values()
    return stream.lengths


def _told(one: Loaded, batch: Batch) -> Seen:
    training = one.model.training
    one.model.eval()
    with torch.no_grad(), collecting(one.model.trunk) as seen:
        one.task.forward(one.model, batch)
    one.model.train(training)
    return seen
