"""A model that ONNX Runtime computes, which tasks ask as they ask one in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.engine.base import Work
from lexmill.errors import MissingExtra, UserError
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.pooling import Pooling

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
POOLED = "pooled"
"""The output that is a hidden state, and not what a head makes of it."""
MOST_POSITIONS = 1.05
"""Positions a real token: sequences are run side by side as long as the shorter ones are padded no further."""


class OnnxModel:
    """The outputs of an ONNX file, for packed sequences.

    Args:
        threads: of the session; as ONNX Runtime has them where None.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        UserError: the file is missing, or none that it can run.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MissingExtra("onnx", "running ONNX files") from error
        if not file.is_file():
            hint = "write it with: lexmill export ARTEFACT --format onnx --out DIR"
            raise UserError("there is no such file", where=str(file), hint=hint)
        options: Any = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base class of their own
            raise UserError(f"ONNX Runtime cannot run it: {error}", where=str(file), hint="export it again") from error
        self._where = str(file)
        self._inputs = {one.name for one in self._session.get_inputs()}
        self._ranks = {one.name: len(one.shape) for one in self._session.get_outputs()}
        self.work = Work()

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
        names = [name for name in self._ranks if name != POOLED] if heads is None else list(heads)
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
        if missing := [name for name in names if name not in self._ranks]:
            hint = f"it has: {', '.join(self._ranks)}; export the artefact again"
            raise UserError(f"the file has no output '{missing[0]}'", where=self._where, hint=hint)
        if not isinstance(layout, Packed):
            raise TypeError("it wants a packed layout")
        found: dict[str, np.ndarray] = {}
        for sequences in grouped(layout.lengths.numpy()):
            rows, given = self._given(ids, layout, types, sequences)
            mask = given[MASK].astype(bool)
            for name, out in zip(names, self._session.run(list(names), given), strict=True):
                by_token = self._ranks[name] == 3
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
            if name in self._inputs:
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
