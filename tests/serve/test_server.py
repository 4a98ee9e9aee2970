from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from tests.small_classifier import small_classifier, write_artifact

from lexmill.errors import UserError
from lexmill.serve import serve


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(small_classifier(), tmp_path_factory.mktemp("serve") / "tickets").path


Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts `serve` in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def begin(*paths: Path, host: str = "127.0.0.1") -> subprocess.Popen[str]:
        code = "import sys; from lexmill.serve import serve; serve(sys.argv[2:], sys.argv[1], port=0)"
        command = [sys.executable, "-u", "-c", code, host, *map(str, paths)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    found = re.search(r" at (http://\S+)", lines[0])
    assert found, lines
    return found.group(1), lines


@pytest.mark.parametrize(("host", "number"), [("127.0.0.1", signal.SIGTERM), ("0.0.0.0", signal.SIGINT)])
def test_serves_until_a_signal_and_ends_cleanly(artifact: Path, run: Run, host: str, number: signal.Signals) -> None:
    process = run(artifact, host=host)
    url, lines = address(process)
    assert "tickets (classify)" in lines[0]
    assert f"curl {url}/v1/classify" in lines[1]
    example = re.search(r"--json '(.*)'", lines[1])
    assert example
    request = Request(f"{url}/v1/classify", example.group(1).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as reply:
        (answer,) = json.loads(reply.read())["answers"]
    assert set(answer) == {"label", "score"}
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stdout is not None
    runs_in, _, rest = process.stdout.read().partition("\n")
    assert runs_in.startswith("  tickets runs in torch ")
    if host == "127.0.0.1":
        assert rest == ""
    else:
        assert "there are no keys: anyone may ask" in rest


def test_a_port_in_use_is_named_before_any_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(UserError, match=f"port {port} is in use"):
            serve([tmp_path / "not there"], port=port)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", 70000, "not a port"),
        ("192.0.2.1", 0, "cannot listen"),
        ("no.host.invalid", 0, "unknown host"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_named(tmp_path: Path, host: str, port: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        serve([tmp_path], host=host, port=port)


def test_two_artefacts_of_one_name_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two artefacts are named 'tickets'"):
        serve([artifact, artifact], port=0)


def test_what_is_no_artefact_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        serve([tmp_path / "missing"], port=0)
