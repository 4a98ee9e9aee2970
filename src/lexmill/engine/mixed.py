"""One forward pass for texts that are answered with different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lexmill.adapt import rows_of, using
from lexmill.data.batch import Batch, Example, Kept, collate
from lexmill.models import Model
from lexmill.nn.layout import Packed
from lexmill.tasks.inputs import packed


def batches_by_adapter(
    model: Model, examples: Sequence[Example], adapters: Sequence[str | None]
) -> dict[str | None, tuple[list[int], Batch]]:
    """For each adapter, the indices of its examples, and a batch of them that knows what enters the last layer.

    All examples go through the lower layers together, packed; the rows of each are changed by its own adapter alone.
    The last layer is left to each task, which may want one token a text of it. Texts that a causal model goes on
    with are not computed here: decoding keeps keys and values of every layer.
    """
    names = list(dict.fromkeys(adapters))
    owned = {name: [i for i, own in enumerate(adapters) if own == name] for name in names}
    parts = {name: collate([examples[i] for i in chosen]) for name, chosen in owned.items()}
    layers = len(model.trunk.layers) - 1
    if len(names) > 1 and layers and not model.config.causal:
        whole = collate(examples)
        place = np.array([names.index(name) for name in adapters])
        for stream_name, stream in whole.streams.items():
            ids, positions, types, layout = packed(stream, model.device)
            assert isinstance(layout, Packed)
            owner = np.repeat(place[stream.example], stream.lengths)
            placed = rows_of(layout, torch.from_numpy(owner).to(model.device), names)
            with using(model.trunk, placed):
                hidden = model.trunk(ids, positions, layout, types=types, until=layers)
            rows = hidden.float().cpu().numpy()
            for index, name in enumerate(names):
                parts[name] = _knowing(parts[name], stream_name, layers, rows[owner == index])
    return {name: (chosen, parts[name]) for name, chosen in owned.items()}


def _knowing(batch: Batch, stream: str, layer: int, rows: np.ndarray) -> Batch:
    if stream not in batch.streams:
        return batch
    own = batch.streams[stream]
    return replace(batch, streams={**batch.streams, stream: replace(own, kept=Kept(layer, own.ids, rows))})
