"""Ctrl-C during a run is never lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to stand. Where that is a finaliser or a callback out
of C code, Python prints the exception or drops it, and the work goes on as if nobody had asked it to stop (Python's
documentation, `signal`, "Note on Signal Handlers and Exceptions"). So it is remembered too, and raised again between
two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Generator[Callable[[], None]]:
    """Yield what to call between two steps: it raises `KeyboardInterrupt` if SIGINT has come since the beginning.

    Outside the main thread, and where the program handles SIGINT in its own way, nothing is changed."""
    came = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    def between_steps() -> None:
        if came:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield between_steps
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield between_steps
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
