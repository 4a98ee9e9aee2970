"""What models cost on this machine: bytes, the time of one text alone, texts a second. They take turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from lexmill.engine import Loaded, TorchEngine
from lexmill.engine.base import Request
from lexmill.tasks import Record

ALONE = 40
"""Texts that are asked one by one in a round."""
TOGETHER = 512
"""Texts that are asked as a stream in a round."""
BUSY = 1.25
"""Rounds further apart than this, slowest to fastest, mean that something else was running."""


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds, tokenizing included.

    Args:
        bytes: of the weights and the tokenizer's file, as they are stored.
        p50_ms, p99_ms: of one text alone, in milliseconds.
        texts_per_second: as a stream.
        spread: the slowest round's time of the stream as a multiple of the fastest's.
    """

    bytes: int
    p50_ms: float
    p99_ms: float
    texts_per_second: float
    spread: float

    def to_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


def loaded_bytes(loaded: Loaded) -> int:
    """The bytes of weights, those that are shared once, and of the tokenizer as JSON."""
    model = loaded.model
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensors.values()) + len(loaded.tokenizer.to_str().encode())


def measure(models: Mapping[str, Loaded], rows: Sequence[Record], *, rounds: int = 5) -> dict[str, Cost]:
    """Let each answer the same rows, one after the other in each round, after a first one that is not counted."""
    engines = {name: TorchEngine(loaded) for name, loaded in models.items()}
    alone, together = rows[:ALONE], rows[:TOGETHER]
    times: dict[str, list[list[float]]] = {name: [] for name in engines}
    streams: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            singles: list[float] = []
            for row in alone:
                began = time.perf_counter()
                engine.run([Request(row)])
                singles.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in engine.run_stream(together):
                pass
            if turn:
                times[name].append(singles)
                streams[name].append(time.perf_counter() - began)
    return {
        name: Cost(
            loaded_bytes(models[name]),
            1000 * median(float(np.median(one)) for one in times[name]),
            1000 * median(float(np.quantile(one, 0.99)) for one in times[name]),
            len(together) / median(streams[name]),
            max(streams[name]) / min(streams[name]),
        )
        for name in models
    }


def table(before: Cost, after: Cost) -> list[str]:
    """For people: both, and what has become of each figure."""
    lines = [f"{'':<24}{'before':>12}{'after':>12}"]
    rows = (
        ("loaded, MB", before.bytes / 1e6, after.bytes / 1e6),
        ("one text alone, p50, ms", before.p50_ms, after.p50_ms),
        ("one text alone, p99, ms", before.p99_ms, after.p99_ms),
        ("a stream, texts/s", before.texts_per_second, after.texts_per_second),
    )
    for what, old, new in rows:
        lines.append(f"{what:<24}{old:>12,.2f}{new:>12,.2f}{new / old:>8.2f}x")
    if max(before.spread, after.spread) > BUSY:
        lines.append(f"rounds differ by up to {max(before.spread, after.spread):.1f} times: something else was running")
    return lines
