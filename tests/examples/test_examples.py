"""The examples do what they say, on a small artefact."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.small_classifier import LABELS, small_classifier, write_artifact

from lexmill import models
from lexmill.data.tokenizer import load_tokenizer
from lexmill.verify.processes import served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = ("My card has not arrived", "What is my PIN?")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(small_classifier(), tmp_path_factory.mktemp("examples") / "small").path


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def answers(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    with served(artifact, timeout=60) as url:
        yield url


def test_predict_and_client_say_the_same(artifact: Path, server: str) -> None:
    asked = answers(run("predict.py", str(artifact), *TEXTS))
    assert [text for _, _, text in asked] == list(TEXTS)
    assert all(label in LABELS for label, _, _ in asked)
    assert answers(run("client.py", f"{server}/", *TEXTS)) == asked


def test_the_client_passes_on_what_the_server_says(server: str) -> None:
    done = run("client.py", server)
    assert done.returncode == 1
    assert done.stderr.startswith("HTTP 422: texts - ")


def test_tiny_llama_can_be_started_from(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    answers(run("tiny_llama.py", str(out)))
    model, tokenizer = models.load(out), load_tokenizer(out)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    text = "Why was I charged £5? 为什么"
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
