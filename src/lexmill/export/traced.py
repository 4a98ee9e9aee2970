"""The forward pass of a task as one `torch.export` program, and a program on disk asked as a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim

from lexmill.engine import Loaded
from lexmill.engine.graph_model import IDS, MASK, POOLED, TYPES
from lexmill.errors import UserError
from lexmill.export.graphs import Asked, asked
from lexmill.nn.addition import additions
from lexmill.nn.layout import Dense, Layout, Packed
from lexmill.nn.pooling import Pooling

_UNTRACED = ("int8", "weight_only", "exits")
"""Additions that are more than a graph: kernels of one machine, or a choice by text."""


def traced(
    subject: Loaded, what: str, *, batch: int | None = None, longest: int | None = None
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The program, and the names of its inputs: `[batch, length]` whole numbers, padded at the right.

    Args:
        what: the kind of file it becomes, as an error names it.
        batch: how many sequences it takes; any number where not given.
        longest: tokens of the longest sequence; as many as the model takes where not given.

    Raises:
        UserError: the model, or what its task asks of it, is more than a graph.
    """
    model = subject.model
    for place, addition in additions(model.trunk):
        if addition.addition in _UNTRACED:
            hint = "export it as onnx, or export the artefact that it was made from"
            told = f"{what} cannot hold the {addition.addition} at '{place}'"
            raise UserError(told, where="export", hint=hint)
    graph = _Graph(asked(subject))
    free = {1: Dim("length", max=longest or model.trunk.max_tokens)}
    if batch is None:
        free[0] = Dim("batch")
    # One tensor given several times would be one input.
    given = {name: torch.ones(batch or 2, 8, dtype=torch.int64) for name in graph.inputs}
    with torch.no_grad():
        try:
            shapes = dict.fromkeys(graph.inputs, free)
            return torch.export.export(graph, (), given, dynamic_shapes=shapes, strict=False), graph.inputs
        except Exception as error:  # its errors have no base class of their own
            told = str(error).strip().splitlines()[0]
            hint = "export it in another format"
            raise UserError(f"torch.export cannot trace this model: {told}", where="export", hint=hint) from error


class _Graph(nn.Module):
    """What a task asks of its model, for sequences side by side, padded at the right."""

    def __init__(self, wanted: Asked) -> None:
        super().__init__()
        self.model, self.heads = wanted.model, wanted.heads
        self.pooling: Pooling | None = wanted.pooling
        typed = getattr(self.model.config, "type_vocab_size", 0) > 1
        self.inputs = [IDS, MASK, *([TYPES] if typed else [])]

    def forward(
        self,
        input_ids: Int[Tensor, "seq len"],
        attention_mask: Int[Tensor, "seq len"],
        token_type_ids: Int[Tensor, "seq len"] | None = None,
    ) -> dict[str, Tensor]:
        """`[seq, label]` or `[seq, len, label]` by the name of the head, or the vectors as `pooled`."""
        layout = Dense(attention_mask.bool())
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if self.pooling is not None:
            vectors = self.model.pooled(input_ids, positions, layout, types=token_type_ids, how=self.pooling)
            return {POOLED: vectors}
        return self.model(input_ids, positions, layout, types=token_type_ids, heads=self.heads)


class Program(nn.Module):
    """The outputs of a package, for packed sequences, asked as a model is."""

    device = torch.device("cpu")

    def __init__(self, run: Callable[..., Mapping[str, Tensor]], inputs: Sequence[str]) -> None:
        super().__init__()
        self._given = run, tuple(inputs)

    def forward(
        self,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Layout,
        *,
        types: Int[Tensor, "tok"] | None = None,
        heads: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "*some_rows out"]]:
        """As `Model.forward`, for sequences at positions from 0 on."""
        if not isinstance(layout, Packed):
            raise TypeError("it wants a packed layout")
        run, inputs = self._given
        side = layout.padded
        known = {IDS: ids, MASK: torch.ones_like(ids), TYPES: torch.zeros_like(ids) if types is None else types}
        given = {name: torch.where(side.mask, known[name][side.rows], 0) for name in inputs}
        return {name: out.flatten(0, 1)[side.cells] if out.dim() == 3 else out for name, out in run(**given).items()}

    def pooled(
        self,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Layout,
        *,
        types: Int[Tensor, "tok"] | None = None,
        how: Pooling | None = None,
    ) -> Float[Tensor, "seq dim"]:
        """As `Model.pooled`; how it pools was settled when the file was written."""
        return self(ids, positions, layout, types=types)[POOLED]
