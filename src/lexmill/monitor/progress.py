"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from lexmill.monitor.events import Event

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressSink:
    """Shows per phase how far it is, the loss, tokens a second and the time left.

    Events without a `phase`, or without a `step`, show nothing. A bar without `steps` has no end.

    Args:
        quiet: show nothing at all, for `--quiet` and `--json`.
        stream: standard error by default, so that standard output stays clean for results.
        every: seconds between plain lines where the stream is not a terminal.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, every: float = 5.0) -> None:
        target: TextIO | None = stream or sys.stderr
        self._display: _Bars | _Lines | None
        if quiet or target is None:
            self._display = None
        elif target.isatty():
            self._display = _Bars(target)
        else:
            self._display = _Lines(target, every)

    def emit(self, event: Event) -> None:
        phase, step, steps = event.get("phase"), event.get("step"), event.get("steps")
        if self._display is not None and isinstance(phase, str) and isinstance(step, int):
            self._display.show(phase, step, steps if isinstance(steps, int) else None, _details(event))

    def close(self) -> None:
        if self._display is not None:
            self._display.close()


def _details(event: Event) -> str:
    loss, speed = event.get("loss"), event.get("tokens_per_second")
    parts = [f"loss {loss:.4f}"] if isinstance(loss, (int, float)) else []
    parts += [f"{speed:,.0f} tokens/s"] if isinstance(speed, (int, float)) else []
    return "  ".join(parts)


class _Bars:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def show(self, phase: str, step: int, steps: int | None, details: str) -> None:
        progress = self._progress = self._progress or self._start()
        if phase not in self._bars:
            for bar in self._bars.values():
                progress.stop_task(bar)
            self._bars[phase] = progress.add_task(phase, total=steps, details="")
        bar = self._bars[phase]
        if step < progress.tasks[progress.task_ids.index(bar)].completed:
            progress.reset(bar)
        progress.update(bar, completed=step, total=steps)
        if details:
            progress.update(bar, details=details)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=self._stream),
        )
        progress.start()
        return progress


@dataclass
class _Lines:
    stream: TextIO
    every: float
    _phase: str = ""
    _first: tuple[float, int] = (0.0, 0)
    _said: float = field(default=float("-inf"))

    def show(self, phase: str, step: int, steps: int | None, details: str) -> None:
        now = time.monotonic()
        if phase != self._phase or step < self._first[1]:
            self._phase, self._first, self._said = phase, (now, step), float("-inf")
        if now - self._said < self.every and step != steps:
            return
        self._said = now
        of = f"/{steps}" if steps is not None else ""
        parts = [f"{phase} {step}{of}", details, self._left(now, step, steps)]
        self.stream.write("  ".join(filter(None, parts)) + "\n")
        self.stream.flush()

    def _left(self, now: float, step: int, steps: int | None) -> str:
        start, first = self._first
        if steps is None or step <= first or step >= steps:
            return ""
        left = round((now - start) / (step - first) * (steps - step))
        return f"{left // 60}:{left % 60:02d} left"

    def close(self) -> None:
        self.stream.flush()
