"""What the layers below the lowest trained one make of each example, computed once and kept for all epochs.

The hidden states lie in one flat file of rows, a row a token, in the order of the examples. The file has no name: it
goes with the process, however that ends, and a resumed run makes it again, bit for bit.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lexmill.data.batch import Batch, Kept
from lexmill.data.packing import micro_batches
from lexmill.models import Model
from lexmill.nn.linear import pack
from lexmill.tasks.inputs import packed
from lexmill.train.step import ARITHMETIC, MOST_PACKED, Precision

TOKENS_AT_ONCE = 2048
"""As many as are best in inference; see `docs/log.md`."""

Stored = Literal["fp32", "bf16"]
_STORED: dict[Stored, type[np.generic]] = {"fp32": np.float32, "bf16": np.int16}


class Dataset(Protocol):
    """Tokenized examples by index; `lengths` are tokens per example, `classes` their one label as a number."""

    @property
    def lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def classes(self) -> np.ndarray: ...
    def batch(self, indices: np.ndarray) -> Batch: ...


@dataclass(frozen=True)
class HeadStart:
    """What was computed before the first step, so that no step need do it.

    Args:
        layers: of the model, from below.
        positions: rows computed; one that goes through half of all layers counts half.
        seconds: that took.
        bytes: kept of it.
    """

    layers: int = 0
    positions: float = 0.0
    seconds: float = 0.0
    bytes: int = 0


def kept_bytes(model: Model, data: Dataset, stored: Stored) -> int:
    """The size of the file for these examples."""
    return int(data.lengths.sum()) * model.config.hidden_size * np.dtype(_STORED[stored]).itemsize


class KeptActivations:
    """A `Dataset` whose batches hold the hidden states that enter layer `start.layers`."""

    def __init__(self, data: Dataset, rows: np.ndarray, start: HeadStart) -> None:
        self.data, self.rows, self.start = data, rows, start
        self.lengths = data.lengths
        self._starts = _starts(data)

    def __len__(self) -> int:
        return len(self.data)

    def classes(self) -> np.ndarray:
        return self.data.classes()

    def batch(self, indices: Int[np.ndarray, "example"]) -> Batch:
        batch = self.data.batch(indices)
        places = _places(batch, self._starts[indices])
        streams = {
            name: replace(stream, kept=Kept(self.start.layers, stream.ids, self.rows[places[name]]))
            for name, stream in batch.streams.items()
        }
        return replace(batch, streams=streams)


@contextmanager
def keep_activations(
    model: Model, data: Dataset, layers: int, folder: Path, *, stored: Stored = "fp32", precision: Precision = "fp32"
) -> Generator[KeptActivations]:
    """Run the lowest `layers` once over every example, as in evaluation, and keep what they give.

    Examples go in order of length, many at a time, which is faster than as training comes by them. What is kept depends
    on the examples alone, not on when or how often it is made.

    Args:
        folder: where the file lies.
        stored: the precision of what is kept; `precision` that of computing.

    Raises:
        OSError: the disk is full.
    """
    began, before = time.perf_counter(), model.trunk.layer_rows
    shape = (int(data.lengths.sum()), model.config.hidden_size)
    with tempfile.TemporaryFile(dir=folder) as file:
        # All of the space is taken here, where a full disk is an error; in the mapped file it would be a signal.
        os.posix_fallocate(file.fileno(), 0, max(1, kept_bytes(model, data, stored)))
        rows = np.asarray(np.memmap(file, _STORED[stored], "r+", shape=shape))
        starts, training = _starts(data), model.training
        model.eval()
        pack(model.trunk.layers[:layers], TOKENS_AT_ONCE, dtype=ARITHMETIC[precision], most=MOST_PACKED)
        for indices in micro_batches(np.arange(len(data)), data.lengths, TOKENS_AT_ONCE):
            batch = data.batch(indices)
            for name, places in _places(batch, starts[indices]).items():
                ids, positions, types, layout = packed(batch.streams[name], model.device)
                with torch.inference_mode(), _arithmetic(model, precision):
                    hidden = model.trunk(ids, positions, layout, types=types, until=layers)
                rows[places] = _as_stored(hidden, stored)
        model.train(training)
        computed = (model.trunk.layer_rows - before) / len(model.trunk.layers)
        yield KeptActivations(data, rows, HeadStart(layers, computed, time.perf_counter() - began, rows.nbytes))


def _arithmetic(model: Model, precision: Precision) -> torch.autocast:
    """As in training."""
    reduced = precision != "fp32"
    return torch.autocast(model.device.type, ARITHMETIC[precision] if reduced else torch.bfloat16, reduced)


def _as_stored(hidden: Tensor, stored: Stored) -> np.ndarray:
    hidden = hidden.cpu()
    return hidden.float().numpy() if stored == "fp32" else hidden.bfloat16().view(torch.int16).numpy()


def _starts(data: Dataset) -> Int[np.ndarray, "example"]:
    """The first row of each example."""
    return np.cumsum(data.lengths, dtype=np.int64) - data.lengths


def _places(batch: Batch, starts: Int[np.ndarray, "example"]) -> dict[str, Int[np.ndarray, "tok"]]:
    """By stream, the row of each token. The streams of an example follow one another in order of their names."""
    free, found = starts.astype(np.int64), {}
    for name in sorted(batch.streams):
        stream = batch.streams[name]
        owner = np.repeat(stream.example, stream.lengths)
        tokens = np.bincount(owner, minlength=len(starts))
        found[name] = (free - np.cumsum(tokens) + tokens)[owner] + np.arange(len(owner))
        free = free + tokens
    return found
