"""Several models asked at once, whose answers are made into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lexmill.engine.base import Request, Work
from lexmill.engine.runtime import CHUNK, Runtime
from lexmill.errors import UserError
from lexmill.tasks.base import Record, Task


class Ensemble:
    """An `Engine` of several others that were trained for the same answers.

    Raises:
        UserError: where their tasks or labels differ.
    """

    def __init__(self, members: Sequence[Runtime]) -> None:
        if len(members) < 2:
            raise UserError("an ensemble has at least two members", hint="name another artefact")
        first = members[0].task
        for member in members[1:]:
            same = member.task.name == first.name and dict(member.task.labels()) == dict(first.labels())
            if not same:
                raise UserError(
                    f"'{member.name}' does not answer as '{members[0].name}' does",
                    hint="the members of an ensemble need the same task and the same labels",
                )
        self.members = tuple(members)

    @property
    def task(self) -> Task:
        return self.members[0].task

    @property
    def adapters(self) -> Sequence[str]:
        return ()

    def task_for(self, adapter: str | None) -> Task:
        if adapter is not None:
            raise UserError("an ensemble answers without adapters", where="adapter", hint="ask one artefact for it")
        return self.task

    @property
    def work(self) -> Work:
        done = [member.work for member in self.members]
        return Work(sum(one.tokens for one in done), sum(one.positions for one in done))

    @property
    def record(self) -> Mapping[str, Any]:
        """Those of the members; see `Runtime.record`."""
        return {"members": [dict(member.record) for member in self.members]}

    def run(self, requests: Sequence[Request]) -> list[Any]:
        return self._combined([member.run(requests) for member in self.members])

    def run_stream(
        self, records: Iterable[Record], *, chunk: int = CHUNK, labelled: bool = False, adapter: str | None = None
    ) -> Iterator[tuple[Record, Any]]:
        """See `Runtime.run_stream`."""
        self.task_for(adapter)
        source = iter(records)
        while rows := list(islice(source, chunk)):
            found = [[a for _, a in m.run_stream(rows, chunk=chunk, labelled=labelled)] for m in self.members]
            yield from zip(rows, self._combined(found), strict=True)

    def _combined(self, found: Sequence[Sequence[Any]]) -> list[Any]:
        """One answer an item; the first exception of a member stands in its place."""
        combined: list[Any] = []
        for answers in zip(*found, strict=True):
            fault = next((answer for answer in answers if isinstance(answer, Exception)), None)
            combined.append(self.task.combine(answers) if fault is None else fault)
        return combined
