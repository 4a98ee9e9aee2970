"""One process that serves artefacts over HTTP until it is told to stop."""

from __future__ import annotations

import errno
import ipaddress
import json
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from lexmill.engine import Engine, Runtime, open_engine
from lexmill.errors import MissingExtra, UserError
from lexmill.tasks.base import Task

if TYPE_CHECKING:
    from lexmill.serve.http.limits import Limits

PORT = 8100
_EXTRA = {"fastapi", "starlette", "uvicorn", "prometheus_client"}


def serve(
    paths: Sequence[Path | str],
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve artefacts until SIGINT or SIGTERM, which lets the requests in progress end first.

    Args:
        paths: artefacts; each is called by the name of its directory.
        runtime: by name; where None, what each artefact names.
        port: 0 takes a free one. The address is printed once the models are loaded.
        threads: of the runtimes; as they have them where None.
        say: takes what people should read.

    Raises:
        UserError: where the port is in use (known before a model is loaded), two artefacts have one name, or one
            cannot be read.
    """
    try:
        import uvicorn

        from lexmill.serve.http.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _EXTRA:
            raise MissingExtra("serve", "serving") from error
        raise
    with _listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        engines = _open(paths, runtime, device, threads)
        app = create_app(engines, limits)
        shown = f"[{address}]" if ":" in address else address
        for line in _welcome(f"http://{shown}:{port}", engines):
            say(line)
        if not ipaddress.ip_address(address).is_loopback:
            say(f"warning: {address} can be reached from other machines, and there are no keys: anyone may ask")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30, lifespan="on")
        )
        with _signals_absorbed():
            server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"{port} is not a port", where="port", hint="a port is between 0 and 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise UserError(f"unknown host '{host}'", where="host", hint="127.0.0.1 is this machine alone") from error
    except OSError as error:
        place = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use", where=place, hint="give another --port, or 0 for any") from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed", where=place, hint="give a port from 1024 up") from error
        raise UserError(f"cannot listen there: {error.strerror}", where=place, hint="check --host") from error


def _open(paths: Sequence[Path | str], runtime: str | None, device: str, threads: int | None) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    for path in paths:
        name = Path(path).resolve().name
        if name in engines:
            raise UserError(f"two artefacts are named '{name}'", where=str(path), hint="rename one of the directories")
        engines[name] = open_engine(path, runtime, device=device, threads=threads)
    return engines


def _welcome(url: str, engines: dict[str, Engine]) -> Iterator[str]:
    names = ", ".join(f"{name} ({engine.task.name})" for name, engine in engines.items())
    yield f"serving {names} at {url} - the interface is at {url}/openapi.json"
    tasks = [engine.task for engine in engines.values()]
    for name, engine in engines.items():
        several = sum(task.name == engine.task.name for task in tasks) > 1
        chosen = [("model", name)] if several else []
        chosen += [("adapter", adapter) for adapter in engine.adapters[:1]]
        query = f"?{urlencode(chosen)}" if chosen else ""
        body = shlex.quote(json.dumps(_example(engine.task), ensure_ascii=False))
        yield f"  curl {shlex.quote(f'{url}/v1/{engine.task.name}{query}')} --json {body}"
    for name, engine in engines.items():
        if isinstance(engine, Runtime):
            yield f"  {name} runs in {_told(engine.record)}"


def _told(record: Mapping[str, object]) -> str:
    """The record of a runtime in one line."""
    runtime, version, *rest = record
    parts = [f"{name} {json.dumps(record[name])}" for name in rest]
    return ", ".join([f"{record[runtime]} {record[version]}", *parts])


def _example(task: Task) -> dict[str, object]:
    return task.probe(["How do I reset my PIN?"]).model_dump(mode="json", exclude={"raw"}, exclude_defaults=True)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


@contextmanager
def _signals_absorbed() -> Generator[None]:
    """uvicorn sends itself again, after its clean shutdown, the signal that ended it. Here that is the end of the work,
    not of the process, so nothing happens the second time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _ignore) for number in wanted]
    try:
        yield
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
