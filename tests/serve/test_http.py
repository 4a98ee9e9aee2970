from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.small_classifier import small_classifier

from lexmill.engine import Loaded, Request, TorchEngine, Work
from lexmill.errors import UserError
from lexmill.serve.http.app import create_app
from lexmill.serve.http.limits import Limits
from lexmill.tasks import Task
from lexmill.verify.compare import relative_error

Start = Callable[..., httpx.Client]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return small_classifier()


class Held:
    """A real engine that stops before each run until it is let go."""

    def __init__(self, loaded: Loaded) -> None:
        self._engine = TorchEngine(loaded)
        self.sizes: list[int] = []
        self.cancelled: list[bool] = []
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    @property
    def task(self) -> Task:
        return self._engine.task

    @property
    def adapters(self) -> Sequence[str]:
        return ()

    def task_for(self, adapter: str | None) -> Task:
        return self._engine.task_for(adapter)

    @property
    def work(self) -> Work:
        return self._engine.work

    def run(self, requests: Sequence[Request]) -> list[Any]:
        self.sizes.append(len(requests))
        self.started.release()
        assert self.go.acquire(timeout=20)
        self.cancelled += [request.cancel.is_set() for request in requests]
        return self._engine.run(requests)


@pytest.fixture
def held(loaded: Loaded) -> Iterator[Held]:
    engine = Held(loaded)
    yield engine
    engine.go.release(1000)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "where", "hint"}
    return body["error"]


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_answers_are_those_of_the_engine(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)})
    texts = ["where is my card", "refund?", "余额"]
    reply = client.post("/v1/classify", json={"texts": texts, "raw": True})
    assert reply.status_code == 200
    alone = TorchEngine(loaded).run([Request({"question": text}) for text in texts])
    body = loaded.task.Request.model_validate({"texts": texts, "raw": True})
    assert reply.json() == {"model": "small", "answers": [loaded.task.render(answer, body) for answer in alone]}


def test_concurrent_callers_are_batched_together_and_get_the_answers_they_get_alone(start: Start, held: Held) -> None:
    client = start({"small": held})
    texts = [f"question number {i} about my card" for i in range(12)]

    def ask(text: str) -> Any:
        return client.post("/v1/classify", json={"texts": [text], "raw": True}).json()["answers"][0]["logits"]

    with ThreadPoolExecutor(12) as callers:
        first = callers.submit(ask, texts[0])
        assert held.started.acquire(timeout=10)
        rest = [callers.submit(ask, text) for text in texts[1:]]
        while metric(client, "lexmill_queue_depth") < 11:
            time.sleep(0.005)
        held.go.release(1000)
        together = [one.result(20) for one in (first, *rest)]
    assert held.sizes == [1, 11]
    assert metric(client, "lexmill_batch_size_sum") > metric(client, "lexmill_batch_size_count")
    for text, answer in zip(texts, together, strict=True):
        assert relative_error(ask(text), answer)[0] <= 1e-5


def test_health_ready_metrics(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)})
    assert client.get("/health").json() == {"status": "ok"}
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "models": {"small": {"task": "classify", "ready": True}}}
    client.post("/v1/classify", json={"texts": ["a b c"]})
    client.post("/v1/classify", json={"texts": []})
    text = client.get("/metrics").text
    assert 'lexmill_requests_total{route="/v1/classify",status="200"} 1.0' in text
    assert 'lexmill_requests_total{route="/v1/classify",status="422"} 1.0' in text
    assert metric(client, "lexmill_tokens_total") >= 5


def test_openapi_holds_the_schemas_of_the_task(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)})
    spec = client.get("/openapi.json").json()
    schemas = spec["components"]["schemas"]
    assert set(schemas["ClassifyRequest"]["properties"]) == {"texts", "top_k", "raw"}
    assert {"label", "score"} <= set(schemas["ClassifyAnswer"]["properties"])
    asked = spec["paths"]["/v1/classify"]["post"]
    assert asked["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ClassifyRequest")
    answered = asked["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert schemas[answered.rsplit("/", 1)[1]]["properties"]["answers"]["items"]["$ref"].endswith("/ClassifyAnswer")
    assert client.get("/docs").status_code == 404, "a page that fetches scripts from elsewhere"


def test_a_model_is_picked_by_name(start: Start, loaded: Loaded) -> None:
    other = small_classifier(seed=1)
    client = start({"one": TorchEngine(loaded), "two": TorchEngine(other)})
    body = {"texts": ["my card"], "raw": True}
    answers = {name: client.post(f"/v1/classify?model={name}", json=body).json() for name in ("one", "two")}
    assert answers["two"]["model"] == "two"
    assert answers["one"]["answers"] != answers["two"]["answers"]
    unknown = client.post("/v1/classify?model=three", json=body)
    assert unknown.status_code == 404
    assert "one, two" in error_of(unknown)["hint"]
    unnamed = client.post("/v1/classify", json=body)
    assert unnamed.status_code == 422
    assert "one, two" in error_of(unnamed)["hint"]


@pytest.mark.parametrize(
    ("body", "status", "where", "says"),
    [
        ("", 422, "body", "required"),
        ("{", 400, "body, character 1", "JSON"),
        ('{"texts": ["a"', 400, "body, character", "JSON"),
        ("[1]", 422, "body", "object"),
        ("{}", 422, "texts", "required"),
        ('{"texts": []}', 422, "texts", "at least 1"),
        ('{"texts": ["a", 5]}', 422, "texts[1]", "string"),
        ('{"texts": [["a", "b"]]}', 422, "texts[0]", "single texts"),
        ('{"texts": ["a"], "top_l": 2}', 422, "top_l", "unknown field"),
        ('{"texts": ["a"], "top_k": 0}', 422, "top_k", "greater"),
        ("[" * 5000, 400, "", "pars"),
    ],
)
def test_bad_bodies_get_a_plain_message_naming_the_place(
    start: Start, loaded: Loaded, body: str, status: int, where: str, says: str
) -> None:
    client = start({"small": TorchEngine(loaded)})
    reply = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    error = error_of(reply)
    assert (error["where"] or "").startswith(where)
    assert says in error["message"]


def test_half_of_a_surrogate_pair_is_the_callers_mistake(start: Start, loaded: Loaded) -> None:
    client = start({"one": TorchEngine(loaded)})
    body = b'{"texts": ["all is well", "\\ud800"]}'
    reply = client.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert "half of a surrogate pair" in error_of(reply)["message"]


def test_other_bad_requests(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)}, Limits(items=3))
    form = client.post("/v1/classify", content='{"texts": ["a"]}', headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert "application/json" in error_of(form)["hint"]
    many = client.post("/v1/classify", json={"texts": ["a"] * 4})
    assert many.status_code == 422
    assert "4 items" in error_of(many)["message"]
    missing = client.post("/v1/clasify", json={})
    assert missing.status_code == 404
    assert "/v1/classify" in error_of(missing)["hint"]
    assert client.get("/v1/classify").status_code == 405
    assert error_of(client.post("/v1/classify?timeout=-1", json={"texts": ["a"]}))["where"] == "query.timeout"
    assert client.post("/v1/classify", json={"texts": ["a"]}).status_code == 200


def test_a_body_declared_too_large_is_refused_before_it_is_sent(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)}, Limits(body_bytes=1000))
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as line:
        line.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_refused_once_it_is_over(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)}, Limits(body_bytes=1000))
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(3):
            sent += 1
            yield b"x" * 600

    reply = client.post("/v1/classify", content=chunks(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert "1000 bytes" in error_of(reply)["message"]
    assert client.post("/v1/classify", json={"texts": ["a"]}).status_code == 200


def test_a_large_body_gets_its_answer_not_a_broken_connection(start: Start, loaded: Loaded) -> None:
    client = start({"small": TorchEngine(loaded)})
    for _ in range(5):
        reply = client.post("/v1/classify", json={"texts": ["x" * (3 << 20)]})
        assert reply.status_code == 413


def test_a_request_that_takes_too_long_is_given_up(start: Start, held: Held) -> None:
    client = start({"small": held})
    reply = client.post("/v1/classify?timeout=0.1", json={"texts": ["a"]})
    assert reply.status_code == 504
    assert "timeout" in error_of(reply)["message"]
    held.go.release(1000)
    assert client.post("/v1/classify", json={"texts": ["a"]}).status_code == 200
    assert held.cancelled == [True, False]


def test_a_caller_that_goes_away_cancels_its_work(start: Start, held: Held) -> None:
    client = start({"small": held})
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as line:
        body = json.dumps({"texts": ["a"]}).encode()
        length = f"Content-Length: {len(body)}\r\n\r\n".encode()
        line.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + length + body)
        assert held.started.acquire(timeout=10)
    while 'status="499"' not in client.get("/metrics").text:
        time.sleep(0.005)
    held.go.release(1000)
    client.post("/v1/classify", json={"texts": ["b"]})
    assert held.cancelled == [True, False]


def test_a_full_queue_is_refused_with_a_time_to_come_back(start: Start, held: Held) -> None:
    client = start({"small": held}, Limits(items=2, max_batch=2, max_queue=2))
    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(client.post, "/v1/classify", json={"texts": ["a"]})
        assert held.started.acquire(timeout=10)
        waiting = callers.submit(client.post, "/v1/classify", json={"texts": ["b", "c"]})
        while metric(client, "lexmill_queue_depth") < 2:
            time.sleep(0.005)
        refused = client.post("/v1/classify", json={"texts": ["d"]})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert error_of(refused)
        held.go.release(1000)
        assert running.result(20).status_code == waiting.result(20).status_code == 200


def test_pairs_are_asked_as_pairs(start: Start) -> None:
    client = start({"pair": TorchEngine(small_classifier(pair=True))})
    assert client.post("/v1/classify", json={"texts": [["a", "b"]]}).status_code == 200
    wrong = client.post("/v1/classify", json={"texts": [["a", "b"], "c"]})
    assert wrong.status_code == 422
    assert error_of(wrong)["where"] == "texts[1]"


def test_an_application_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to serve"):
        create_app({})
