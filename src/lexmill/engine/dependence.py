"""Whether what a text is answered depends on those beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lexmill.engine.base import Engine, Request


def batch_dependence(engine: Engine, requests: Sequence[Request]) -> float:
    """How far the numbers behind answers to requests asked alone are from those to all asked together.

    Returns:
        The largest max|a-b| / max|b| of a request; 0 where they are the same bit for bit.

    Raises:
        Exception: what an engine gave in the place of an answer.
    """
    alone = [engine.run([request])[0] for request in requests]
    worst = 0.0
    for request, one, among in zip(requests, alone, engine.run(requests), strict=True):
        a, b = (_numbers(engine, request, answer) for answer in (one, among))
        scale = max(map(abs, b.values()), default=0.0)
        gap = max((abs(value - b[name]) for name, value in a.items()), default=0.0)
        worst = max(worst, gap / scale if scale else gap)
    return worst


def _numbers(engine: Engine, request: Request, answer: Any) -> dict[str, float]:
    if isinstance(answer, Exception):
        raise answer
    return engine.task_for(request.adapter).evidence(answer)
