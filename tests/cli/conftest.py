"""The real command line, called in this process for speed or started as one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.small_classifier import small_classifier

from lexmill import cli, models


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def lexmill(*args: str | Path, stdin: str = "") -> Said:
    """One command in this process. What `main` does not turn into an exit code fails the test, with its traceback."""
    out, err, argv, keyboard = io.StringIO(), io.StringIO(), sys.argv, sys.stdin
    reading, writing = os.pipe()
    os.write(writing, stdin.encode())
    os.close(writing)
    sys.argv, sys.stdin = ["lexmill", *map(str, args)], os.fdopen(reading)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        return Said(int(ended.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.stdin.close()
        sys.argv, sys.stdin = argv, keyboard
    return Said(0, out.getvalue(), err.getvalue())


def command(*args: str | Path) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from lexmill.cli import main; main()", *map(str, args)]


def process(*args: str | Path, stdin: str | bytes = b"", **env: str) -> Said:
    """One command as a process of its own."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        command(*args), input=given, capture_output=True, env={**os.environ, **env}, timeout=120, check=False
    )
    return Said(done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(said: Said, *parts: str, code: int = 2) -> None:
    """It failed with this code, on standard error alone, without a traceback, and said all of these."""
    assert said.code == code, said
    assert said.out == ""
    assert "Traceback" not in said.err
    missing = [part for part in parts if part not in said.err]
    assert not missing, f"{missing} not in {said.err}"


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def rows(count: int = 24, labels: Iterable[str] = ("card", "pin")) -> list[dict[str, Any]]:
    """Labelled questions, no two alike."""
    names = list(labels)
    return [
        {"text": f"question {i} about my {names[i % len(names)]}", "label": names[i % len(names)]} for i in range(count)
    ]


def jsonl(content: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny BERT with new weights and its tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    known = small_classifier()
    models.save(models.init(known.model.config, "bert", 0), directory)
    known.tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def fitted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that `lexmill fit` made of a few rows. Not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "train.jsonl").write_text(jsonl(rows()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEXMILL_CACHE", str(folder / "cache"))
        said = lexmill(
            "fit", folder / "train.jsonl", "--model", tiny, "--out", folder / "topics", "--epochs", "1", "-q"
        )
    assert said.code == 0, said
    return folder / "topics"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a command, with everything it may leave anywhere: caches and temporary files too."""
    here = tmp_path / "work"
    for name in ("tmp", "cache"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TMPDIR", str(here / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("LEXMILL_CACHE", str(here / "cache"))
    (here / "train.jsonl").write_text(jsonl(rows()))
    return here
