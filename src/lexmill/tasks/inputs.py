"""From a stream of a `Batch` to what a model's forward takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lexmill.data.batch import Stream
from lexmill.nn.layout import Dense, Layout, Packed


class Inputs(NamedTuple):
    """Token ids `[tok]` (packed) or `[seq, len]` (dense), with positions and segment types of the same shape."""

    ids: Int[Tensor, "*shape"]
    positions: Int[Tensor, "*shape"]
    types: Int[Tensor, "*shape"]
    layout: Layout


def packed(stream: Stream, device: torch.device) -> Inputs:
    """The stream as it is: no position is computed that holds no token."""
    ids, positions, types = (torch.from_numpy(a).to(device) for a in (stream.ids, stream.positions, stream.types))
    return Inputs(ids, positions, types, Packed(torch.from_numpy(stream.offsets), device))


def dense(stream: Stream, device: torch.device, pad_id: int = 0) -> Inputs:
    """The stream padded at the right to its longest sequence."""
    lengths = stream.lengths
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    padded = [np.full(mask.shape, fill, np.int64) for fill in (pad_id, 0, 0)]
    for target, flat in zip(padded, (stream.ids, stream.positions, stream.types), strict=True):
        target[mask] = flat
    ids, positions, types = (torch.from_numpy(a).to(device) for a in padded)
    return Inputs(ids, positions, types, Dense(torch.from_numpy(mask).to(device)))


Arrange = Callable[[Stream, torch.device], Inputs]
