"""Bad requests, ports and disks."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.cli.conftest import command, lexmill, process, refused

from lexmill.verify.processes import served

TMPFS = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


def test_a_port_in_use_is_named_before_a_model_is_loaded(work: Path, fitted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = process("serve", fitted, "--port", str(port))
    assert said.code == 2
    assert f"error: 127.0.0.1:{port}: port {port} is in use\n  give another --port, or 0 for any\n" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "70000"], ("'--port'", "less than or equal to 65535")),
        (["--port", "0", "--host", "no.such.invalid"], ("host", "unknown host 'no.such.invalid'", "127.0.0.1")),
    ],
)
def test_a_bad_address_is_named(args: list[str], says: tuple[str, ...], fitted: Path) -> None:
    refused(lexmill("serve", fitted, *args), *says)


def test_two_artefacts_of_one_name_are_refused(fitted: Path) -> None:
    refused(lexmill("serve", fitted, fitted, "--port", "0"), "two artefacts are named 'topics'", "rename")


@pytest.fixture(scope="module")
def client(fitted: Path) -> Iterator[httpx.Client]:
    """Of `lexmill serve`, as a process of its own."""
    with served(fitted, timeout=120) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


REQUESTS = {
    "body too large": (b'{"texts": ["' + b"x" * 1_100_000 + b'"]}', "", 413, "body", "larger than 1048576 bytes"),
    "no JSON": (b'{"texts": [', "", 400, "body, character 11", "not valid JSON"),
    "not an object": (b'["hi"]', "", 422, "", ""),
    "unknown field": (b'{"texts": ["hi"], "topk": 2}', "", 422, "topk", "unknown field"),
    "unknown model": (b'{"texts": ["hi"]}', "?model=other", 404, "query.model", "unknown model 'other'"),
    "no texts": (b'{"texts": []}', "", 422, "texts", "at least 1 item"),
    "wrong type": (b'{"texts": ["hi", 3]}', "", 422, "texts[1]", "string"),
    "pair for single texts": (b'{"texts": [["a", "b"]]}', "", 422, "texts[0]", "classifies single texts"),
    "out of range": (b'{"texts": ["hi"], "top_k": 0}', "", 422, "top_k", "greater than or equal to 1"),
    "too many items": (json.dumps({"texts": ["hi"] * 257}).encode(), "", 422, "", "257 items, more than 256"),
    "bad timeout": (b'{"texts": ["hi"]}', "?timeout=-1", 422, "query.timeout", "greater than 0"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_answered_in_words(name: str, client: httpx.Client) -> None:
    body, query, status, where, message = REQUESTS[name]
    answer = client.post(f"/v1/classify{query}", content=body, headers={"Content-Type": "application/json"})
    fault = answer.json()["error"]
    assert answer.status_code == status, fault
    assert where in str(fault["where"])
    assert message in fault["message"]
    assert client.post("/v1/classify", json={"texts": ["hi"]}).status_code == 200


SMALL_DISK = """
mount -t tmpfs -o size="$1"k tmpfs "$2" && cd "$2" && shift 2 || exit 99
"$@"; echo "code $?"; find . -type f -o -type d -name 'step-*' | sort
mount -o remount,size=64m . && "$@" --resume >/dev/null; echo "resumed $?"; find . -maxdepth 1 | sort
"""


@pytest.mark.parametrize(
    ("size", "place", "checkpoints"),
    [
        (300, "out.partial/checkpoints/step-00000001: could not write the checkpoint of step 1", []),
        (1200, "out.partial/checkpoints/step-00000002: could not write the checkpoint of step 2", ["step-00000001"]),
        (1500, "out.partial: disk full", ["step-00000001", "step-00000002"]),
    ],
    ids=["first checkpoint", "second checkpoint", "artefact"],
)
def test_a_full_disk_leaves_whole_checkpoints_to_go_on_from(
    size: int, place: str, checkpoints: list[str], work: Path, tiny: Path
) -> None:
    if not shutil.which("unshare") or subprocess.run([*TMPFS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace for a small disk")
    (work / "disk").mkdir()
    fit = command("fit", work / "train.jsonl", "--model", tiny, "--out", "out", "--epochs", "2", "-q")
    asked = [*TMPFS, SMALL_DISK, "sh", str(size), str(work / "disk"), *fit]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    first, resumed = done.stdout.split("resumed ")
    assert first.startswith("code 1\n"), done
    assert f"disk/{place}" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert "./out/" not in first
    assert sorted(set(re.findall(r"step-\d+", first))) == checkpoints
    assert "safetensors.partial" not in first
    assert resumed.split() == ["0", ".", "./out"]


def test_a_full_disk_for_answers_leaves_no_file(work: Path, fitted: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*TMPFS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace for a small disk")
    (work / "disk").mkdir()
    (work / "many.txt").write_text("my card, please\n" * 3000)
    mount = 'mount -t tmpfs -o size=64k tmpfs "$1" && cd "$1" && shift && "$@"; code=$?; find . -type f; exit $code'
    predict = command("predict", fitted, work / "many.txt", "--out", "answers.jsonl")
    done = subprocess.run(
        [*TMPFS, mount, "sh", str(work / "disk"), *predict], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: answers.jsonl.partial: disk full\n")


def test_a_full_disk_behind_standard_output_is_named(fitted: Path, work: Path) -> None:
    with open("/dev/full", "wb") as full:
        asked = command("predict", fitted, "train.jsonl")
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: output: disk full\n  free some space\n")


def test_a_reader_that_goes_away_ends_predict_quietly(fitted: Path, work: Path) -> None:
    (work / "many.txt").write_text("my card, please\n" * 5000)
    asked = command("predict", fitted, "many.txt")
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith('{"text": "my card, please"')
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, "")
