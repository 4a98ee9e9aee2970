"""Answers over HTTP in pieces, and the same from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from tests.small_classifier import small_classifier
from tests.train.parts import tiny_llama, tokenizer

from lexmill.api import OpenArtifact
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.tasks import Generate
from lexmill.tasks.generate import GenerateOptions

Start = Callable[..., httpx.Client]
ASKED: dict[str, Any] = {"prompts": ["where is it", "and when"], "max_new_tokens": 10, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    model = tiny_llama()
    task = Generate({"text": "text"}, GenerateOptions())
    torch.manual_seed(1)
    task.attach(model)
    return TorchEngine(Loaded(task, model, tokenizer()))


def events(reply: httpx.Response) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for block in reply.text.strip().split("\n\n"):
        *kind, data = block.split("\n")
        found.append((kind[0].removeprefix("event: ") if kind else "", json.loads(data.removeprefix("data: "))))
    return found


def test_pieces_then_the_answers_that_would_have_come_at_once(start: Start, engine: TorchEngine) -> None:
    client = start({"lm": engine})
    plain = client.post("/v1/generate", json=ASKED).json()
    reply = client.post("/v1/generate", json=ASKED | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, (kind, last) = events(reply)
    assert (kind, last) == ("answers", plain)
    assert {kind for kind, _ in pieces} == {""}
    for item, answer in enumerate(plain["answers"]):
        own = [piece["text"] for _, piece in pieces if piece["item"] == item]
        assert "".join(own) == answer["text"]
        assert len(own) > 3


def test_a_fault_is_an_event(start: Start, engine: TorchEngine) -> None:
    client = start({"lm": engine})
    reply = client.post("/v1/generate", json=ASKED | {"stream": True, "prompts": ["long " * 300]})
    [(kind, body)] = events(reply)
    assert kind == "error"
    assert "tokens" in body["error"]["message"]
    late = client.post("/v1/generate?timeout=0.000001", json=ASKED | {"stream": True})
    assert events(late)[-1][1]["error"]["message"] == "no answer within the request's timeout"


def test_dialogues_are_checked_like_everything_else(start: Start, engine: TorchEngine) -> None:
    client = start({"lm": engine})
    wrong = client.post("/v1/generate", json={"prompts": [[{"role": "king", "content": "x"}]]})
    assert wrong.status_code == 422
    untaught = client.post("/v1/generate", json={"prompts": [[{"role": "user", "content": "x"}]]})
    assert untaught.status_code == 422
    assert "no chat template" in untaught.json()["error"]["message"]


def test_python_iterates_over_the_pieces(engine: TorchEngine) -> None:
    opened = OpenArtifact(None, engine)  # pyright: ignore[reportArgumentType]
    options = {key: value for key, value in ASKED.items() if key != "prompts"}
    [answer] = opened.predict(["where is it"], **options)
    pieces = list(opened.stream("where is it", **options))
    assert "".join(pieces) == answer["text"]
    assert len(pieces) > 3
    closed = opened.stream("where is it", max_new_tokens=100)
    assert next(closed)
    closed.close()
    with pytest.raises(UserError, match="tokens"):
        list(opened.stream("long " * 300))


def test_a_task_that_answers_at_once_says_so() -> None:
    opened = OpenArtifact(None, TorchEngine(small_classifier()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="come all at once"):
        list(opened.stream("where is it"))
