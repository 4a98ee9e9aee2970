"""The application: one route a task, made from its `Request` and `Answer` schemas."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any, Generic, TypeVar

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from lexmill.engine import Batcher, Cancelled, Engine, Expired, Request
from lexmill.errors import UserError
from lexmill.monitor import ServingMetrics
from lexmill.serve.http.errors import HANDLERS, ErrorBody, UnknownModel
from lexmill.serve.http.limits import BodyLimit, Limits
from lexmill.serve.http.metrics import QueueDepth, Timed, batches_of
from lexmill.serve.http.stream import stream
from lexmill.tasks.base import Task

A = TypeVar("A", bound=BaseModel)


class Answers(BaseModel, Generic[A]):
    """The answers of one model, in the order of the items."""

    model: str
    answers: list[A]


def create_app(engines: Mapping[str, Engine], limits: Limits | None = None) -> FastAPI:
    """The application that serves these engines by name. Their worker threads live as long as its lifespan.

    Raises:
        UserError: where no engine is given, or two of them have different tasks of one name.
    """
    if not engines:
        raise UserError("nothing to serve", hint="name at least one artefact")
    limits = limits or Limits()
    metrics = ServingMetrics()
    depths = QueueDepth(metrics)
    batchers: dict[str, Batcher] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        for name, engine in engines.items():
            batchers[name] = Batcher(
                engine,
                max_batch=limits.max_batch,
                max_queue=limits.max_queue,
                on_depth=depths.of(name),
                on_batch=batches_of(engine, metrics),
            )
        yield
        for batcher in batchers.values():
            await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="Lexmill",
        version=version("lexmill"),
        lifespan=lifespan,
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        exception_handlers=HANDLERS,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(BodyLimit, body_bytes=limits.body_bytes)
    app.add_middleware(Timed, metrics=metrics)
    for task, names in _by_task(engines).items():
        app.add_api_route(
            f"/v1/{task.name}",
            _ask(task, names, batchers, limits),
            methods=["POST"],
            operation_id=task.name,
            summary=(task.__doc__ or task.name).strip().splitlines()[0],
            responses={200: {"model": Answers[task.Answer]}},
            response_class=JSONResponse,
        )
    _add_status_routes(app, engines, batchers, metrics)
    return app


def _by_task(engines: Mapping[str, Engine]) -> dict[type[Task], list[str]]:
    found: dict[type[Task], list[str]] = {}
    for name, engine in engines.items():
        found.setdefault(type(engine.task), []).append(name)
    verbs = [task.name for task in found]
    for verb in verbs:
        if verbs.count(verb) > 1:
            raise UserError(f"two different tasks are both named '{verb}'", hint="serve them in two processes")
    return found


def _ask(
    task: type[Task], names: Sequence[str], batchers: Mapping[str, Batcher], limits: Limits
) -> Callable[..., Awaitable[Response]]:
    """The endpoint of one task."""

    async def ask(
        http: HttpRequest,
        body: BaseModel,
        model: Annotated[str | None, Query(description="Which model, where several are served.")] = None,
        adapter: Annotated[list[str] | None, Query(description="Which adapter.")] = None,
        timeout: Annotated[float, Query(gt=0, le=limits.max_timeout, description="Seconds.")] = limits.timeout,
    ) -> Response:
        name = _pick(names, model)
        batcher = batchers[name]
        items = _items(batcher.engine, body, adapter)
        if len(items) > limits.items:
            raise UserError(f"the request holds {len(items)} items, more than {limits.items}", hint="send several")
        if getattr(body, "stream", False):
            return stream(
                batcher, items, lambda answers: _rendered(name, batcher.engine, items, answers, body), timeout
            )
        answers = await _answers(batcher, items, http, timeout)
        content = await asyncio.to_thread(_rendered, name, batcher.engine, items, answers, body)
        return Response(content, media_type="application/json")

    # The signature is the schema: FastAPI reads the body's type from here, for parsing and for OpenAPI.
    ask.__annotations__ = {
        "http": HttpRequest,
        "body": task.Request,
        "model": Annotated[str | None, Query(description="Which model, where several are served.")],
        "adapter": Annotated[
            list[str] | None,
            Query(description="Which adapter, where a model has several; given once, or once an item."),
        ],
        "timeout": Annotated[float, Query(gt=0, le=limits.max_timeout, description="Seconds until it is given up.")],
    }
    return ask


def _pick(names: Sequence[str], model: str | None) -> str:
    known = f"served for this task: {', '.join(names)}"
    if model is None:
        if len(names) > 1:
            raise UserError("several models are served for this task", where="query.model", hint=f"name one; {known}")
        return names[0]
    if model not in names:
        raise UnknownModel(f"unknown model '{model}'", where="query.model", hint=known)
    return model


def _items(engine: Engine, body: BaseModel, adapters: Sequence[str] | None) -> list[Request]:
    """The items of a request, each for its own adapter."""
    named: Sequence[str | None] = adapters or [None]
    read = {name: engine.task_for(name).items(body) for name in named}
    count = len(read[named[0]])
    if len(named) not in (1, count):
        hint = "give one for all, or one for each"
        raise UserError(f"{len(named)} adapters for {count} items", where="query.adapter", hint=hint)
    each = [named[0]] * count if len(named) == 1 else named
    return [Request(read[name][i], adapter=name) for i, name in enumerate(each)]


async def _answers(batcher: Batcher, items: Sequence[Request], http: HttpRequest, timeout: float) -> list[Any]:
    """Wait for the answers, no longer than the caller does.

    Raises:
        Expired: after `timeout` seconds.
        Cancelled: where the caller went away.
        Exception: the first item's that could not be answered.
    """
    cancel = threading.Event()
    deadline = time.monotonic() + timeout
    futures = batcher.submit_all([replace(item, deadline=deadline, cancel=cancel) for item in items])
    answered = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({answered, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise Cancelled if gone.done() else Expired
        answers = answered.result()
    finally:
        gone.cancel()
        if not answered.done():
            cancel.set()
            answered.cancel()
    for i, answer in enumerate(answers):
        if isinstance(answer, UserError):
            raise UserError(answer.message, where=answer.where or f"item {i}", hint=answer.hint) from answer
        if isinstance(answer, BaseException):
            raise answer
    return answers


async def _disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _rendered(name: str, engine: Engine, items: Sequence[Request], answers: Sequence[Any], body: BaseModel) -> bytes:
    tasks = {item.adapter: engine.task_for(item.adapter) for item in items}
    shown = [tasks[item.adapter].render(answer, body) for item, answer in zip(items, answers, strict=True)]
    content = {"model": name, "answers": shown}
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _add_status_routes(
    app: FastAPI, engines: Mapping[str, Engine], batchers: Mapping[str, Batcher], metrics: ServingMetrics
) -> None:
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    async def ready() -> JSONResponse:
        """Whether every model is loaded and its worker answers; 503 otherwise."""
        models = {
            name: {"task": engine.task.name, "ready": name in batchers and batchers[name].alive}
            for name, engine in engines.items()
        }
        ok = all(model["ready"] for model in models.values())
        return JSONResponse({"ready": ok, "models": models}, 200 if ok else 503)

    async def scrape() -> Response:
        """Metrics in the text format of Prometheus."""
        content, media_type = metrics.render()
        return Response(content, media_type=media_type)

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"], response_class=JSONResponse)
    app.add_api_route("/metrics", scrape, methods=["GET"], response_class=Response)
