"""The protocol between whoever asks (CLI, HTTP, verify, Python) and whatever runs a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lexmill.tasks.base import Hear, Record, Task


class Expired(Exception):
    """The request's deadline passed before it was run."""


class Cancelled(Exception):
    """The caller went away before the request was run."""


class Overloaded(Exception):
    """The queue is full. `retry_after` (seconds) is about how long the waiting work will take."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Request:
    """One item asked of an engine.

    Args:
        record: the item, by column name.
        artifact: which artefact, where an engine holds several; empty for its only one.
        head: which head answers; all of them where None.
        adapter: which adapter, where the artefact has several over its trunk; none where None.
        deadline: `time.monotonic()` after which the answer is of no use.
        cancel: set when the caller has gone.
        hear: is told the answer in pieces while it comes into being, in the thread of the engine.
    """

    record: Record
    artifact: str = ""
    head: str | None = None
    adapter: str | None = None
    deadline: float | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    hear: Hear | None = None


@dataclass(frozen=True)
class Work:
    """What an engine has computed since it was opened: real tokens, and positions for them, fillers included.
    A position that left after half of the layers counts half."""

    tokens: int = 0
    positions: int = 0


class Engine(Protocol):
    """Runs requests. An engine is not thread-safe: one caller at a time, which `Batcher` arranges."""

    @property
    def task(self) -> Task: ...

    @property
    def adapters(self) -> Sequence[str]:
        """The names of the adapters over its trunk; the first is the one to show in examples."""
        ...

    def task_for(self, adapter: str | None) -> Task:
        """What is done with this adapter; `task` where None. A `UserError` for an unknown one lists the known ones."""
        ...

    @property
    def work(self) -> Work: ...

    def run(self, requests: Sequence[Request]) -> list[Any]:
        """One answer of the task a request, in order. A request that cannot be answered gets its own exception in the
        place of its answer, so that one bad item does not fail its neighbours."""
        ...
