"""What models cost on this machine: bytes, the time of one text alone, texts a second, energy. They take turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from lexmill.engine import Loaded, Request, Runtime, TorchEngine
from lexmill.hardware import EnergyMeter
from lexmill.tasks import Record

ALONE = 128
"""Texts that are asked one by one in a round: enough that one in a hundred is among them."""
TOGETHER = 512
"""Texts that are asked as a stream in a round."""
BUSY = 1.25
"""Rounds further apart than this, slowest to fastest, mean that something else was running."""


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds, tokenizing included.

    Args:
        bytes: of the weights, or the graph, and the tokenizer's file, as they are stored.
        p50_ms, p99_ms: of one text alone, in milliseconds.
        texts_per_second: as a stream.
        spread: the slowest round's time of the stream as a multiple of the fastest's.
        energy_mj: of the processors, for a text of the stream, in millijoules; None where the machine does not say.
    """

    bytes: int
    p50_ms: float
    p99_ms: float
    texts_per_second: float
    spread: float
    energy_mj: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items() if value is not None}

    def beside(self, then: Cost, now: Cost) -> Cost:
        """What it would have been while another model, measured in turns with it and costing `now`, cost `then`: how
        busy the machine was falls out."""
        return replace(
            self,
            p50_ms=self.p50_ms * then.p50_ms / now.p50_ms,
            p99_ms=self.p99_ms * then.p99_ms / now.p99_ms,
            texts_per_second=self.texts_per_second * then.texts_per_second / now.texts_per_second,
        )

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Cost:
        return cls(**{**stated, "bytes": int(stated["bytes"])})


@dataclass(frozen=True)
class Contestant:
    """What takes part: an engine, and the bytes that it loads."""

    engine: Runtime
    bytes: int

    @classmethod
    def of(cls, loaded: Loaded) -> Contestant:
        """A model in torch."""
        return cls(TorchEngine(loaded), loaded_bytes(loaded))


def loaded_bytes(loaded: Loaded) -> int:
    """The bytes of weights, those that are shared once, and of the tokenizer as JSON."""
    model = loaded.model
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensors.values()) + len(loaded.tokenizer.to_str().encode())


def measure(contestants: Mapping[str, Contestant], rows: Sequence[Record], *, rounds: int = 5) -> dict[str, Cost]:
    """Let each answer the same rows, one after the other in each round, after a first one that is not counted."""
    meter = EnergyMeter.find()
    alone, together = rows[:ALONE], rows[:TOGETHER]
    times: dict[str, list[list[float]]] = {name: [] for name in contestants}
    streams: dict[str, list[float]] = {name: [] for name in contestants}
    joules: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, one in contestants.items():
            singles = [_timed_alone(one.engine, row) for row in alone]
            taken, began = meter and meter.joules(), time.perf_counter()
            for _ in one.engine.run_stream(together):
                pass
            seconds = time.perf_counter() - began
            if not turn:
                continue
            times[name].append(singles)
            streams[name].append(seconds)
            if meter is not None and taken is not None:
                joules[name].append(meter.joules() - taken)
    return {
        name: Cost(
            one.bytes,
            1000 * median(float(np.median(singles)) for singles in times[name]),
            1000 * median(float(np.quantile(singles, 0.99)) for singles in times[name]),
            len(together) / median(streams[name]),
            max(streams[name]) / min(streams[name]),
            1000 * median(joules[name]) / len(together) if joules[name] else None,
        )
        for name, one in contestants.items()
    }


def _timed_alone(engine: Runtime, row: Record) -> float:
    began = time.perf_counter()
    engine.run([Request(row)])
    return time.perf_counter() - began


def table(before: Cost, after: Cost) -> list[str]:
    """For people: both, and what has become of each figure."""
    lines = [f"{'':<24}{'before':>12}{'after':>12}"]
    rows = (
        ("loaded, MB", before.bytes / 1e6, after.bytes / 1e6),
        ("one text alone, p50, ms", before.p50_ms, after.p50_ms),
        ("one text alone, p99, ms", before.p99_ms, after.p99_ms),
        ("a stream, texts/s", before.texts_per_second, after.texts_per_second),
    )
    if before.energy_mj is not None and after.energy_mj is not None:
        rows = (*rows, ("a text of a stream, mJ", before.energy_mj, after.energy_mj))
    for what, old, new in rows:
        lines.append(f"{what:<24}{old:>12,.2f}{new:>12,.2f}{new / old:>8.2f}x")
    if max(before.spread, after.spread) > BUSY:
        lines.append(f"rounds differ by up to {max(before.spread, after.spread):.1f} times: something else was running")
    return lines
