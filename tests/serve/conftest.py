"""A real server in this process, on a free loopback port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn

from lexmill.engine import Engine
from lexmill.serve.http.app import create_app
from lexmill.serve.http.limits import Limits

Start = Callable[..., httpx.Client]


@contextmanager
def running(engines: Mapping[str, Engine], limits: Limits | None) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engines, limits), log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server for engines by name; gives a client of it."""
    with ExitStack() as stack:

        def begin(engines: Mapping[str, Engine], limits: Limits | None = None) -> httpx.Client:
            url = stack.enter_context(running(engines, limits))
            return stack.enter_context(httpx.Client(base_url=url, timeout=20, trust_env=False))

        yield begin
