"""What one caller may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lexmill.engine.batcher import MAX_BATCH, MAX_QUEUE
from lexmill.serve.http.errors import error_response


@dataclass(frozen=True)
class Limits:
    """Bounds of a request and of the queue.

    Args:
        body_bytes: most bytes of a body.
        items: most items of one request.
        timeout: seconds until a request is given up (HTTP 504), where it does not say.
        max_timeout: most seconds a request may ask for.
        max_batch: most items run together.
        max_queue: most items waiting for one model; more are refused (HTTP 503).
    """

    body_bytes: int = 1 << 20
    items: int = 256
    timeout: float = 30.0
    max_timeout: float = 600.0
    max_batch: int = MAX_BATCH
    max_queue: int = MAX_QUEUE

    def __post_init__(self) -> None:
        if not 0 < self.items <= self.max_queue:
            raise ValueError(f"need 0 < items ({self.items}) <= max_queue ({self.max_queue})")


class BodyLimit:
    """ASGI middleware: refuses a body that is too large, declared (before reading it) or chunked (once it is over)."""

    def __init__(self, app: ASGIApp, body_bytes: int) -> None:
        self._app = app
        self._most = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            # The connection cannot be kept: the rest of the body would be read as the next request.
            refusal = error_response(413, self._message, "body", self._hint, {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, self._message, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"the body is larger than {self._most} bytes"

    @property
    def _hint(self) -> str:
        return "send fewer or shorter items, or start the server with a larger limit"
