"""Events: what a file keeps over a crash, what people see, what Prometheus reads."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import UserError
from lexmill.monitor import Event, Fanout, JsonlSink, ProgressSink, ServingMetrics, read_events


def train(step: int, **more: float) -> dict[str, str | int | float]:
    return {"phase": "train", "step": step, **more}


def record(path: Path, *events: Event, last_step: int | None = None) -> None:
    sink = JsonlSink(path, last_step=last_step)
    for event in events:
        sink.emit(event)
    sink.close()


def seen(path: Path) -> list[tuple[str, int]]:
    return [(event["phase"], event["step"]) for event in read_events(path)]


def test_events_are_on_disk_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    sink = JsonlSink(path)
    sink.emit(train(1, loss=0.5))
    (event,) = read_events(path)
    assert event.pop("time") > 1e9
    assert event == train(1, loss=0.5)
    sink.emit({"phase": "evaluate", "text": "naïve", "loss": float("nan"), "list": [float("-inf"), 1]})
    sink.close()
    last = json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)
    assert (last["text"], last["loss"], last["list"]) == ("naïve", "NaN", ["-Infinity", 1])


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record(path, train(1), train(2), {"phase": "evaluate", "step": 9}, train(3), {"phase": "evaluate", "step": 9})
    record(path, train(3), train(4), last_step=2)
    assert seen(path) == [("train", 1), ("train", 2), ("evaluate", 9), ("train", 3), ("train", 4)]
    record(path, train(5))
    assert seen(path)[-2:] == [("train", 4), ("train", 5)]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 200), checkpoint=st.integers(0, 4))
def test_a_crash_at_any_byte_loses_nothing_that_a_resume_needs(
    tmp_path_factory: pytest.TempPathFactory, cut: int, checkpoint: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    record(path, *map(train, range(1, 5)))
    os.truncate(path, max(0, path.stat().st_size - cut))
    recorded = [step for _, step in seen(path)]
    record(path, *map(train, range(checkpoint + 1, 7)), last_step=checkpoint)
    assert [step for _, step in seen(path)] == [*[s for s in recorded if s <= checkpoint], *range(checkpoint + 1, 7)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"phase": "train"}\nnonsense\n{}\n')
    with pytest.raises(UserError) as caught:
        JsonlSink(path)
    assert caught.value.where == f"{path}:2"
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="not a JSON object"):
        read_events(path)


def test_fanout_passes_all_on_and_closes_the_rest_where_one_fails(tmp_path: Path) -> None:
    class Failing:
        def emit(self, event: Event) -> None:
            pass

        def close(self) -> None:
            raise OSError("unplugged")

    path = tmp_path / "events.jsonl"
    jsonl = JsonlSink(path)
    fanout = Fanout(Failing(), jsonl)
    fanout.emit(train(1))
    with pytest.raises(OSError, match="unplugged"):
        fanout.close()
    with pytest.raises(ValueError, match="closed"):
        jsonl.emit(train(2))
    assert seen(path) == [("train", 1)]


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    sink = ProgressSink(stream=stream, every=1000)
    sink.emit({"phase": "train"})
    for step in range(1, 6):
        sink.emit({**train(step, loss=0.25, tokens_per_second=12345.6), "steps": 5})
    sink.emit({"phase": "evaluate", "step": 1, "steps": 2})
    sink.close()
    assert stream.getvalue().splitlines() == [
        "train 1/5  loss 0.2500  12,346 tokens/s",
        "train 5/5  loss 0.2500  12,346 tokens/s",
        "evaluate 1/2",
    ]


def test_progress_says_the_time_left() -> None:
    stream = io.StringIO()
    sink = ProgressSink(stream=stream, every=0)
    sink.emit({**train(1), "steps": 3})
    sink.emit({**train(2), "steps": 3})
    sink.emit(train(3))
    assert stream.getvalue().splitlines() == ["train 1/3", "train 2/3  0:00 left", "train 3"]


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    sink = ProgressSink(quiet=True, stream=stream)
    sink.emit(train(1))
    sink.close()
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_per_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        sink = ProgressSink(stream=stream)
        for step in (1, 2, 4):
            sink.emit({**train(step, loss=0.5, tokens_per_second=1000.0), "steps": 4})
        for step in (2, 1, 2):
            sink.emit({"phase": "evaluate", "step": step, "steps": 2})
        sink.close()
        shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert "train" in shown
    assert "4/4" in shown
    assert "loss 0.5000  1,000 tokens/s" in shown
    assert "evaluate" in shown


def test_serving_metrics_are_counted_per_app() -> None:
    first, second = ServingMetrics(), ServingMetrics()
    first.request("/v1/classify", 200, 0.02)
    first.request("/v1/classify", 422, 0.0)
    first.batch(items=3, tokens=40, positions=42)
    first.batch(items=1, tokens=0, positions=0)
    first.queue(7)
    body, kind = first.render()
    text = body.decode()
    assert kind.startswith("text/plain")
    for line in (
        'lexmill_requests_total{route="/v1/classify",status="200"} 1.0',
        'lexmill_request_seconds_bucket{le="0.025",route="/v1/classify"} 2.0',
        'lexmill_batch_size_bucket{le="4.0"} 2.0',
        "lexmill_tokens_total 40.0",
        "lexmill_queue_depth 7.0",
        "lexmill_positions_per_token 1.05",
    ):
        assert line in text
    assert "lexmill_tokens_total 0.0" in second.render()[0].decode()


def test_the_room_imports_only_what_it_needs() -> None:
    code = "import sys, lexmill.monitor; assert not {'torch', 'rich', 'prometheus_client'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
