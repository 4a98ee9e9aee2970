"""The ceiling: how fast this machine multiplies matrices of a model's own shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch


def matmul_rate(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    repeats: int = 20,
) -> float:
    """Multiply-add operations a second (each counted as 2) of `[rows, in] @ [in, out]`, over all `(in, out)` shapes.

    Each shape counts by its share of the work. The best of `repeats` rounds: a ceiling, not what is usual.
    """
    device = device or torch.device("cpu")
    pairs = [
        (torch.randn(rows, i, device=device, dtype=dtype), torch.randn(i, o, device=device, dtype=dtype))
        for i, o in shapes
    ]
    work = sum(2 * rows * i * o for i, o in shapes)
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        for a, b in pairs:
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return work / min(seconds)
