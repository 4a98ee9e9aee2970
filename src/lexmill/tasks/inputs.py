"""From a stream of a `Batch` to what a model's forward takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lexmill.data.batch import Kept, Stream
from lexmill.nn.layout import Dense, Known, Layout, Packed


class Inputs(NamedTuple):
    """Token ids `[tok]` (packed) or `[seq, len]` (dense), with positions and segment types of the same shape."""

    ids: Int[Tensor, "*shape"]
    positions: Int[Tensor, "*shape"]
    types: Int[Tensor, "*shape"]
    layout: Layout


def packed(stream: Stream, device: torch.device) -> Inputs:
    """The stream as it is: no position is computed that holds no token, nor a layer whose result was kept."""
    ids, positions, types = (torch.from_numpy(a).to(device) for a in (stream.ids, stream.positions, stream.types))
    known = None if stream.kept is None else _known(stream.kept, device)
    return Inputs(ids, positions, types, Packed(torch.from_numpy(stream.offsets), device, known))


def _known(kept: Kept, device: torch.device) -> Known:
    ids, rows = torch.from_numpy(kept.ids).to(device), torch.from_numpy(kept.rows).to(device)
    return Known(kept.layer, ids, rows.view(torch.bfloat16).float() if rows.dtype == torch.int16 else rows)


def dense(stream: Stream, device: torch.device, pad_id: int = 0) -> Inputs:
    """The stream padded at the right to its longest sequence. What was kept of it is computed anew."""
    lengths = stream.lengths
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    padded = [np.full(mask.shape, fill, np.int64) for fill in (pad_id, 0, 0)]
    for target, flat in zip(padded, (stream.ids, stream.positions, stream.types), strict=True):
        target[mask] = flat
    ids, positions, types = (torch.from_numpy(a).to(device) for a in padded)
    return Inputs(ids, positions, types, Dense(torch.from_numpy(mask).to(device)))


Arrange = Callable[[Stream, torch.device], Inputs]
