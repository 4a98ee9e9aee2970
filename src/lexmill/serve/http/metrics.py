"""What `/metrics` shows of one application: requests, batches, waiting items and tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lexmill.engine import Engine, Work
from lexmill.monitor import ServingMetrics


class QueueDepth:
    """The waiting items of all models together."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self._metrics = metrics
        self._depths: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> Callable[[int], None]:
        """Takes the depth of one model's queue."""

        def observe(depth: int) -> None:
            with self._lock:
                self._depths[model] = depth
                self._metrics.queue(sum(self._depths.values()))

        return observe


def batches_of(engine: Engine, metrics: ServingMetrics) -> Callable[[int], None]:
    """Takes the size of each batch of an engine, and adds what the engine computed for it."""
    seen = Work()

    def observe(size: int) -> None:
        nonlocal seen
        now = engine.work
        metrics.batch(size, now.tokens - seen.tokens, now.positions - seen.positions)
        seen = now

    return observe


class Timed:
    """ASGI middleware: counts and times every request, by route; a path of no route counts as `other`."""

    def __init__(self, app: ASGIApp, metrics: ServingMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - started)
