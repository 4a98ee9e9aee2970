"""Takes the requests of many callers together: one worker thread runs whatever has arrived while it was busy."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from lexmill.engine.base import Engine, Overloaded, Request

MAX_BATCH = 64
MAX_QUEUE = 1024


class Batcher:
    """Runs an engine for concurrent callers, without a timer.

    An idle engine runs a request at once. What arrives meanwhile is taken together next, so that batches grow with the
    load and a lone caller never waits.

    Args:
        engine: called from one thread only.
        max_batch: most requests taken together.
        max_queue: most requests that may wait; more are refused with `Overloaded`.
        on_depth: told how many requests wait, whenever that changes.
        on_batch: told the size of each batch, after it was run, in the worker thread.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        on_depth: Callable[[int], None] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if not 0 < max_batch <= max_queue:
            raise ValueError(f"need 0 < max_batch ({max_batch}) <= max_queue ({max_queue})")
        self._engine = engine
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._on_depth = on_depth
        self._on_batch = on_batch
        self._waiting: deque[tuple[Request, Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_each = 0.01
        self._worker = threading.Thread(target=self._work, name="lexmill-batcher", daemon=True)
        self._worker.start()

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def alive(self) -> bool:
        """Whether requests are still taken and answered."""
        return self._worker.is_alive() and not self._closed

    def submit(self, request: Request) -> Future[Any]:
        """Queue one request; its future holds the answer, or raises what stands in its place."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Future[Any]]:
        """Queue several requests, or none of them.

        Raises:
            Overloaded: where the queue has no room for all of them.
            RuntimeError: after `close`.
        """
        futures: list[Future[Any]] = [Future() for _ in requests]
        with self._changed:
            if not self.alive:
                raise RuntimeError("the batcher is closed")
            if len(self._waiting) + len(requests) > self._max_queue:
                raise Overloaded(max(1.0, len(self._waiting) * self._seconds_each))
            self._waiting.extend(zip(requests, futures, strict=True))
            depth = len(self._waiting)
            self._changed.notify()
        self._tell_depth(depth)
        return futures

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer those that wait, end the worker. Waits at most `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while taken := self._take():
                self._answer(taken)
        finally:
            with self._changed:
                self._closed = True
                for _, future in self._waiting:
                    future.cancel()

    def _answer(self, taken: Sequence[tuple[Request, Future[Any]]]) -> None:
        started = time.monotonic()
        answers: list[Any]
        try:
            answers = self._engine.run([request for request, _ in taken])
            if len(answers) != len(taken):
                raise RuntimeError(f"the engine gave {len(answers)} answers to {len(taken)} requests")
        except Exception as fault:  # noqa: BLE001 - handed to every caller of this batch
            answers = [fault] * len(taken)
        seconds = time.monotonic() - started
        self._seconds_each += 0.2 * (seconds / len(taken) - self._seconds_each)
        for (_, future), answer in zip(taken, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        if self._on_batch is not None:
            self._on_batch(len(taken))

    def _take(self) -> list[tuple[Request, Future[Any]]]:
        """Wait for work, and take what is there. Empty once the batcher is closed and drained."""
        taken: list[tuple[Request, Future[Any]]] = []
        with self._changed:
            while not taken:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                while self._waiting and len(taken) < self._max_batch:
                    request, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        taken.append((request, future))
            depth = len(self._waiting)
        self._tell_depth(depth)
        return taken

    def _tell_depth(self, depth: int) -> None:
        if self._on_depth is not None:
            self._on_depth(depth)
