"""One shape for every error a caller sees: `{"error": {"message", "where", "hint"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from lexmill.engine import Cancelled, Expired, Overloaded
from lexmill.errors import UserError

CLIENT_GONE = 499
"""The status nginx logs for a caller that went away; nobody receives it."""


_EXPIRED, _EXPIRED_HINT = "no answer within the request's timeout", "raise `timeout`, or ask for fewer items"


class Fault(BaseModel):
    """What was wrong, where, and what would be right."""

    message: str
    where: str | None = Field(default=None, description="The place in the request, e.g. `texts[3]`.")
    hint: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: Fault


class UnknownModel(UserError):
    """The request names a model that is not served."""


def error_response(
    status: int,
    message: str,
    where: str | None = None,
    hint: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = ErrorBody(error=Fault(message=message, where=where, hint=hint))
    return JSONResponse(body.model_dump(), status, headers)


def described(fault: BaseException) -> dict[str, Any]:
    """An error that comes after the response has begun, in the shape of all others."""
    match fault:
        case UserError():
            body = Fault(message=fault.message, where=fault.where, hint=fault.hint)
        case Expired():
            body = Fault(message=_EXPIRED, hint=_EXPIRED_HINT)
        case _:
            body = Fault(message="the server failed", hint="its log holds the traceback")
    return ErrorBody(error=body).model_dump()


async def _bad_input(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    status = 404 if isinstance(error, UnknownModel) else 422
    return error_response(status, error.message, error.where, error.hint)


async def _overloaded(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Overloaded)
    return error_response(503, str(error), headers={"Retry-After": str(round(error.retry_after))})


async def _expired(_: Request, error: Exception) -> JSONResponse:
    return error_response(504, _EXPIRED, hint=_EXPIRED_HINT)


async def _gone(_: Request, error: Exception) -> JSONResponse:
    return error_response(CLIENT_GONE, "the caller went away")


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return error_response(500, "the server failed", hint="its log holds the traceback")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    hint = None
    if error.status_code == 404:
        hint = f"routes: {', '.join(sorted(request.app.openapi()['paths']))}"
    return error_response(error.status_code, str(error.detail), request.url.path, hint, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        place = f"body, character {first['loc'][-1]}"
        return error_response(400, f"the body is not valid JSON: {first['ctx']['error']}", place)
    if not request.headers.get("content-type", "").startswith("application/json") and first["loc"] == ("body",):
        return error_response(
            415, "the body is not declared as JSON", "content-type", "send 'content-type: application/json'"
        )
    alike = [one for one in found if one["loc"][:2] == first["loc"][:2]]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(one["loc"] for one in alike), strict=False))
    where = _place([parts[0] for parts in shared])
    messages = list(dict.fromkeys(_message(one) for one in alike))
    return error_response(422, "; or ".join(messages), where)


def _message(error: Mapping[str, Any]) -> str:
    return "unknown field" if error["type"] == "extra_forbidden" else str(error["msg"])


def _place(loc: Sequence[str | int]) -> str:
    """`("body", "texts", 3)` as `texts[3]`, and `("query", "timeout")` as `query.timeout`."""
    parts = loc[1:] if loc[0] == "body" and len(loc) > 1 else loc
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


HANDLERS: dict[int | type[Exception], Any] = {
    UserError: _bad_input,
    Overloaded: _overloaded,
    Expired: _expired,
    Cancelled: _gone,
    RequestValidationError: _invalid,
    HTTPException: _refused,
    Exception: _failed,
}
