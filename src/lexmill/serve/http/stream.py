"""Answers in pieces, as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi.responses import StreamingResponse

from lexmill.engine import Batcher, Expired, Request
from lexmill.serve.http.errors import described
from lexmill.tasks.base import Hear

_End = None


def stream(
    batcher: Batcher, items: Sequence[Request], render: Callable[[Sequence[Any]], bytes], timeout: float
) -> StreamingResponse:
    """Each piece is an event `{"item": i, "text": …}`; at the end comes one of the kind `answers`, which holds what the
    request would have been answered without streaming, or one of the kind `error`.

    Raises:
        Overloaded: where the queue is full.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
    cancel, deadline = threading.Event(), time.monotonic() + timeout

    def hear(item: int) -> Hear:
        def put(piece: str) -> bool:
            loop.call_soon_threadsafe(pieces.put_nowait, (item, piece))
            return not cancel.is_set()

        return put

    asked = [replace(item, deadline=deadline, cancel=cancel, hear=hear(i)) for i, item in enumerate(items)]
    futures = [asyncio.wrap_future(future) for future in batcher.submit_all(asked)]
    answered = asyncio.gather(*futures, return_exceptions=True)
    answered.add_done_callback(lambda _: pieces.put_nowait(_End))

    async def events() -> AsyncGenerator[bytes]:
        try:
            while (piece := await asyncio.wait_for(pieces.get(), deadline - time.monotonic())) is not None:
                yield _event(_coded({"item": piece[0], "text": piece[1]}))
            answers = answered.result()
            fault = next((answer for answer in answers if isinstance(answer, BaseException)), None)
            if fault is None:
                yield _event(await asyncio.to_thread(render, answers), "answers")
            else:
                yield _event(_coded(described(fault)), "error")
        except TimeoutError:
            yield _event(_coded(described(Expired())), "error")
        finally:
            cancel.set()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _coded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _event(data: bytes, kind: str | None = None) -> bytes:
    return b"%bdata: %b\n\n" % (f"event: {kind}\n".encode() if kind else b"", data)
