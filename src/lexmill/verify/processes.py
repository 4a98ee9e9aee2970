"""Fresh processes that tell what an artefact does: one that loads it, one that serves it. Both end with their block."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_SERVE = "import sys; from lexmill.serve.server import serve; serve([sys.argv[1]], port=0, runtime=sys.argv[2] or None)"
_URL = re.compile(r" at (http://\S+)")


class ProcessFailed(Exception):
    """A process that `verify` started, or a request to it, failed; the message says how."""


def reload(path: Path, timeout: float) -> dict[str, Any]:
    """What `lexmill.verify.probe` finds. Raises `ProcessFailed`."""
    command = [sys.executable, "-P", "-m", "lexmill.verify.probe", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProcessFailed(f"loading it took more than {timeout:.0f} s") from error
    if done.returncode:
        raise ProcessFailed(f"loading it failed: {_last_words(done.stderr)}")
    return json.loads(done.stdout)


@contextmanager
def served(path: Path, timeout: float, runtime: str | None = None) -> Generator[str]:
    """Serve an artefact on a free loopback port, in a runtime, that which it names where None; gives the URL. Raises
    `ProcessFailed` where it does not come up."""
    with tempfile.NamedTemporaryFile(prefix="lexmill-serve-", suffix=".log") as output:
        command = [sys.executable, "-P", "-u", "-c", _SERVE, str(path), runtime or ""]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield _address(process, Path(output.name), timeout)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], output: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while True:
        ended = process.poll() is not None
        said = output.read_text(encoding="utf-8", errors="replace")
        found = _URL.search(said)
        if ended:
            raise ProcessFailed(f"serving it failed: {_last_words(said)}")
        if found:
            return found.group(1)
        if time.monotonic() > deadline:
            raise ProcessFailed(f"the server was not up after {timeout:.0f} s")
        time.sleep(0.05)


def ask(url: str, body: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """POST a request and give its answers. Raises `ProcessFailed`."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        # No proxy: the loopback server is asked, whatever the environment says.
        with build_opener(ProxyHandler({})).open(request, timeout=timeout) as reply:
            return json.loads(reply.read())["answers"]
    except HTTPError as error:
        with error:
            raise ProcessFailed(f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except OSError as error:
        raise ProcessFailed(f"asking {url} failed: {error}") from error


def _last_words(text: str) -> str:
    """The last message of a log, without the traceback above it: its last unindented line and what hangs below."""
    lines = text.rstrip().splitlines() or ["it said nothing"]
    start = max((i for i, line in enumerate(lines) if line[:1].strip()), default=0)
    return "\n".join(lines[start:])
