from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any, cast

import pytest

from lexmill.engine import Batcher, Overloaded, Request, Work
from lexmill.tasks import Task


class Slow:
    """An engine that answers each text with itself, and stops before each run until it is let go."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    @property
    def task(self) -> Task:
        return cast(Task, None)

    @property
    def adapters(self) -> Sequence[str]:
        return ()

    def task_for(self, adapter: str | None) -> Task:
        return self.task

    @property
    def work(self) -> Work:
        return Work()

    def run(self, requests: Sequence[Request]) -> list[Any]:
        self.sizes.append(len(requests))
        self.started.release()
        assert self.go.acquire(timeout=10)
        texts = [request.record["text"] for request in requests]
        if "burn" in texts:
            raise RuntimeError("burnt")
        return [ValueError("bad") if text == "bad" else text for text in texts]

    def let(self, runs: int) -> None:
        self.go.release(runs)


def text(value: str) -> Request:
    return Request({"text": value})


def busy(batcher: Batcher, engine: Slow) -> Any:
    """A request that occupies the engine until it is let go."""
    first = batcher.submit(text("first"))
    assert engine.started.acquire(timeout=10)
    return first


def test_an_idle_engine_runs_a_request_at_once_and_what_arrives_meanwhile_is_taken_together() -> None:
    engine, batches = Slow(), []
    with Batcher(engine, on_batch=batches.append) as batcher:
        first = busy(batcher, engine)
        later = [batcher.submit(text(str(i))) for i in range(10)]
        engine.let(2)
        assert first.result(10) == "first"
        assert [one.result(10) for one in later] == [str(i) for i in range(10)]
    assert engine.sizes == [1, 10]
    assert batches == [1, 10]


def test_no_batch_is_larger_than_max_batch_and_order_is_kept() -> None:
    engine = Slow()
    with Batcher(engine, max_batch=4) as batcher:
        busy(batcher, engine)
        later = batcher.submit_all([text(str(i)) for i in range(9)])
        engine.let(4)
        assert [one.result(10) for one in later] == [str(i) for i in range(9)]
    assert engine.sizes == [1, 4, 4, 1]


def test_a_full_queue_refuses_all_of_a_group_and_says_when_to_come_back() -> None:
    engine, depths = Slow(), []
    with Batcher(engine, max_batch=2, max_queue=3, on_depth=depths.append) as batcher:
        busy(batcher, engine)
        kept = batcher.submit_all([text("a"), text("b")])
        with pytest.raises(Overloaded) as refused:
            batcher.submit_all([text("c"), text("d")])
        assert refused.value.retry_after >= 1
        kept.append(batcher.submit(text("e")))
        engine.let(3)
        assert [one.result(10) for one in kept] == ["a", "b", "e"]
    assert max(depths) == 3
    assert depths[-1] == 0


def test_a_failing_batch_reaches_its_own_callers_and_the_worker_lives_on() -> None:
    engine = Slow()
    with Batcher(engine) as batcher:
        busy(batcher, engine)
        burnt = [batcher.submit(text("burn")), batcher.submit(text("beside"))]
        engine.let(2)
        for one in burnt:
            with pytest.raises(RuntimeError, match="burnt"):
                one.result(10)
        assert batcher.alive
        engine.let(1)
        assert batcher.submit(text("after")).result(10) == "after"


def test_an_item_that_cannot_be_answered_does_not_fail_its_neighbours() -> None:
    engine = Slow()
    engine.let(10)
    with Batcher(engine) as batcher:
        good, bad, fine = batcher.submit_all([text("good"), text("bad"), text("fine")])
        assert good.result(10) == "good"
        assert fine.result(10) == "fine"
        with pytest.raises(ValueError, match="bad"):
            bad.result(10)


def test_a_cancelled_future_is_not_run() -> None:
    engine = Slow()
    with Batcher(engine) as batcher:
        busy(batcher, engine)
        dropped, kept = batcher.submit_all([text("dropped"), text("kept")])
        assert dropped.cancel()
        engine.let(2)
        assert kept.result(10) == "kept"
        with pytest.raises(CancelledError):
            dropped.result(0)
    assert engine.sizes == [1, 1]


def test_closing_answers_what_waits_and_refuses_what_comes_later() -> None:
    engine = Slow()
    batcher = Batcher(engine)
    busy(batcher, engine)
    waiting = [batcher.submit(text(str(i))) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    engine.let(2)
    closing.join(10)
    assert not closing.is_alive()
    assert [one.result(0) for one in waiting] == [str(i) for i in range(5)]
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(text("late"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_leaves_nobody_waiting() -> None:
    engine = Slow()

    def fail(size: int) -> None:
        raise RuntimeError("a fault outside the engine")

    batcher = Batcher(engine, on_batch=fail)
    first = busy(batcher, engine)
    waiting = batcher.submit(text("waiting"))
    engine.let(1)
    assert first.result(10) == "first"
    with pytest.raises(CancelledError):
        waiting.result(10)
    batcher.close()
    assert not batcher.alive


def test_a_queue_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch"):
        Batcher(Slow(), max_batch=8, max_queue=4)


def test_many_threads_get_their_own_answers() -> None:
    engine = Slow()
    engine.let(1000)
    found: dict[str, Any] = {}

    def ask(name: int) -> None:
        for i in range(20):
            found[f"{name}-{i}"] = batcher.submit(text(f"{name}-{i}")).result(10)

    with Batcher(engine) as batcher:
        callers = [threading.Thread(target=ask, args=(name,)) for name in range(16)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(20)
    assert len(found) == 320
    assert all(key == value for key, value in found.items())
    assert sum(engine.sizes) == 320
