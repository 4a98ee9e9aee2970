"""A model that another program computes from a graph, which tasks ask as they ask one in torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.engine.base import Work
from lexmill.errors import UserError
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.pooling import Pooling

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
POOLED = "pooled"
"""The output that is a hidden state, and not what a head makes of it."""
MOST_POSITIONS = 1.05
"""Positions a real token: sequences are run side by side as long as the shorter ones are padded no further."""


class GraphModel(ABC):
    """The outputs of a graph that `export --format onnx` wrote, for packed sequences.

    Attributes:
        inputs: their names.
        ranks: how many dimensions each output has.

    Raises:
        UserError: the file is missing.
    """

    device = torch.device("cpu")
    inputs: Sequence[str]
    ranks: Mapping[str, int]

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            hint = "write it with: lexmill export ARTEFACT --format onnx --out DIR"
            raise UserError("there is no such file", where=str(file), hint=hint)
        self._where = str(file)
        self.work = Work()

    @property
    @abstractmethod
    def record(self) -> Mapping[str, Any]:
        """What computes it, for `Runtime.record`."""

    @abstractmethod
    def compute(self, names: Sequence[str], given: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        """These outputs, of sequences side by side, `[seq, len]`, padded at the right."""

    def __call__(
        self,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Layout,
        *,
        types: Int[Tensor, "tok"] | None = None,
        heads: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "*some_rows out"]]:
        """As `Model.forward`, for packed sequences, each of which is at positions from 0 on."""
        names = [name for name in self.ranks if name != POOLED] if heads is None else list(heads)
        return self._run(ids, layout, types, names)

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
        return self._run(ids, layout, types, [POOLED])[POOLED]

    def _run(self, ids: Tensor, layout: Layout, types: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
        if missing := [name for name in names if name not in self.ranks]:
            hint = f"it has: {', '.join(self.ranks)}; export the artefact again"
            raise UserError(f"the file has no output '{missing[0]}'", where=self._where, hint=hint)
        if not isinstance(layout, Packed):
            raise TypeError("it wants a packed layout")
        found: dict[str, np.ndarray] = {}
        for sequences in grouped(layout.lengths.numpy()):
            rows, given = self._given(ids, layout, types, sequences)
            mask = given[MASK].astype(bool)
            for name, out in zip(names, self.compute(names, given), strict=True):
                by_token = self.ranks[name] == 3
                size = len(ids) if by_token else layout.num_sequences
                whole = found.setdefault(name, np.empty((size, out.shape[-1]), out.dtype))
                whole[rows if by_token else sequences] = out[mask] if by_token else out
            self.work = Work(self.work.tokens + len(rows), self.work.positions + mask.size)
        return {name: torch.from_numpy(found[name]) for name in names}

    def _given(
        self, ids: Tensor, layout: Packed, types: Tensor | None, sequences: Int[np.ndarray, "some"]
    ) -> tuple[Int[np.ndarray, "some_tok"], dict[str, np.ndarray]]:
        """The rows of these sequences, and the same side by side, padded at the right."""
        lengths = layout.lengths.numpy()[sequences]
        mask = np.arange(lengths.max()) < lengths[:, None]
        rows = layout.rows_of(torch.from_numpy(sequences)).numpy()
        given = {MASK: mask.astype(np.int64)}
        for name, flat in ((IDS, ids), (TYPES, types)):
            if name in self.inputs:
                given[name] = np.zeros(mask.shape, np.int64)
                if flat is not None:
                    given[name][mask] = flat.numpy()[rows]
        return rows, given


def grouped(lengths: Int[np.ndarray, "seq"]) -> Iterator[Int[np.ndarray, "some"]]:
    """Sequences by length, cut into groups that are padded to at most `MOST_POSITIONS` of their tokens."""
    order = np.argsort(lengths, kind="stable")
    start, tokens = 0, 0
    for end, length in enumerate(lengths[order].tolist()):
        if length * (end - start + 1) > MOST_POSITIONS * (tokens + length):
            yield order[start:end]
            start, tokens = end, 0
        tokens += length
    if start < len(order):
        yield order[start:]
