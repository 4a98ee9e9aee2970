"""Events and where they go. An event is a flat table of JSON, so that a line of `events.jsonl` is the event itself."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

from lexmill.errors import UserError

JSON = str | int | float | bool | None | Sequence["JSON"] | Mapping[str, "JSON"]
Event = Mapping[str, JSON]
"""Names that sinks know: `phase` (`tokenize`, `train`, `evaluate`, …), `step` (how far the phase is; in `train` the
optimiser step), `steps` (how far it goes), `loss`, `tokens_per_second`. Any other name is kept as it is."""


class Sink(Protocol):
    """A place for events. `close` is called once, also after a failure."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Fanout:
    """One sink that passes events on to several, in order."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def emit(self, event: Event) -> None:
        for sink in self._sinks:
            sink.emit(event)

    def close(self) -> None:
        """Close all sinks, the rest too where one fails."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)


class JsonlSink:
    """Appends each event to a file as one line of JSON, with the `time` it came (Unix seconds) in front.

    JSON has no word for a number that is not finite: such a one is written as the text `NaN`, `Infinity`, `-Infinity`.

    Args:
        path: may exist, from the run that this one resumes. A last line that a crash cut short is dropped.
        last_step: the step of the checkpoint resumed from. What was recorded since then is dropped: everything from
            the first event of `phase` with a later `step`. Without it, every whole line is kept.
        phase: the phase whose steps are counted.
    """

    def __init__(self, path: Path, *, last_step: int | None = None, phase: str = "train") -> None:
        if path.exists():
            os.truncate(path, _keep(path, last_step, phase))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def emit(self, event: Event) -> None:
        row = {"time": round(time.time(), 3), **event}
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def _finite(value: JSON) -> JSON:
    match value:
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case str():
            return value
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case Sequence():
            return [_finite(inner) for inner in value]
        case _:
            return value


def _keep(path: Path, last_step: int | None, phase: str) -> int:
    """How many bytes of an event file a resumed run keeps."""
    end = 0
    for start, stop, event in _events(path):
        step = event.get("step")
        later = last_step is not None and isinstance(step, int) and step > last_step
        if later and event.get("phase") == phase:
            return start
        end = stop
    return end


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file, oldest first; a last line cut short by a crash is left out. Raises `UserError` with
    `file:line` for a line that is not a JSON object."""
    return [event for _, _, event in _events(path)]


def _events(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Each event with the byte positions of its line."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except ValueError as error:
                raise UserError(f"not JSON: {error}", where=f"{path}:{number}", hint="remove the line") from error
            if not isinstance(event, dict):
                raise UserError("not a JSON object", where=f"{path}:{number}", hint="remove the line")
            yield position, position + len(line), cast("dict[str, Any]", event)
            position += len(line)
