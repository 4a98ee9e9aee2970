"""Searching settings: real runs of a tiny model on real questions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.train.parts import rows, stored, tiny_bert, write_rows

import lexmill as lm
from lexmill.errors import UserError
from lexmill.learn import Range, parse_space


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and some rows; the token cache is the session's own."""
    place = tmp_path_factory.mktemp("search")
    stored(tiny_bert(), place / "bert")
    write_rows(place / "train.jsonl", rows(64))
    write_rows(place / "test.jsonl", rows(24))
    return place


@pytest.fixture(autouse=True)
def _own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEXMILL_CACHE", str(place / "cache"))


COMMON = {"train.epochs": 2, "train.batch_size": 8, "data.validation_fraction": 0.25}


def test_values_and_ranges_are_read() -> None:
    given = [
        "train.learning_rate=1e-5..1e-3:log",
        "train.epochs=2..6",
        "train.schedule=linear,cosine",
        "train.ema=0,0.9",
    ]
    assert parse_space(given) == {
        "train.learning_rate": Range(1e-5, 1e-3, log=True),
        "train.epochs": Range(2, 6),
        "train.schedule": ["linear", "cosine"],
        "train.ema": [0, 0.9],
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("train.epochs", "not KEY=VALUES"),
        ("train.epochs=6..2", "holds nothing"),
        ("train.learning_rate=0..1:log", "holds nothing"),
        ("train.epochs=two..three", "'two' is not a number"),
        ("train.learning_rate=1e-5..1e-3:logarithmic", "no scale 'logarithmic'"),
    ],
)
def test_other_values_are_refused(given: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_space([given])


def test_the_best_of_several_runs_is_kept_tested_and_written_down(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    space = {"train.learning_rate": [1e-6, 3e-3], "train.dropout": Range(0.0, 0.2)}
    found = lm.search(
        place / "train.jsonl",
        out=out,
        space=space,
        trials=5,
        model=place / "bert",
        test=place / "test.jsonl",
        set=COMMON,
    )
    values = [trial["value"] for trial in found.trials if trial["state"] == "complete"]
    assert found.value == max(values)
    assert len(set(values)) > 1
    assert found.best["train.learning_rate"] == 3e-3
    assert json.loads((out / "search.json").read_text())["best"] == found.best
    assert {path.name for path in out.iterdir()} == {"asked.json", "best", "search.json", "study.log"}
    artifact = lm.load(out / "best").artifact
    chosen = artifact.manifest.history[-1].parameters["train"]
    assert chosen["learning_rate"] == 3e-3
    assert chosen["dropout"] == found.best["train.dropout"]
    assert found.test is not None
    assert found.test["accuracy"] == lm.evaluate(out / "best", place / "test.jsonl").metrics.values["accuracy"]


@pytest.mark.slow
def test_runs_that_fall_behind_are_stopped_early(place: Path, tmp_path: Path) -> None:
    space = {"train.learning_rate": [3e-3, 1e-7], "train.seed": Range(0, 50)}
    common = {**COMMON, "train.epochs": 4}
    found = lm.search(
        place / "train.jsonl", out=tmp_path / "out", space=space, trials=14, model=place / "bert", set=common
    )
    pruned = [trial for trial in found.trials if trial["state"] == "pruned"]
    assert pruned
    assert all(trial["number"] >= 5 for trial in pruned)
    assert "stopped early" in found.lines()[0]


@pytest.mark.slow
def test_two_processes_search_together(place: Path, tmp_path: Path) -> None:
    space = {"train.learning_rate": Range(1e-5, 1e-2, log=True)}
    found = lm.search(
        place / "train.jsonl", out=tmp_path / "out", space=space, trials=4, jobs=2, model=place / "bert", set=COMMON
    )
    assert len(found.trials) == 4
    assert (tmp_path / "out" / "best" / "manifest.json").is_file()


def test_another_search_does_not_go_on_in_the_same_folder(place: Path, tmp_path: Path) -> None:
    out, space = tmp_path / "out", {"train.learning_rate": [1e-3, 3e-3]}
    given: dict[str, Any] = {"out": out, "model": place / "bert", "set": COMMON}
    lm.search(place / "train.jsonl", space=space, trials=1, **given)
    before = (out / "study.log").read_bytes()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((place / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    for data, changed, says in (
        (place / "train.jsonl", {"space": {"train.learning_rate": [1e-3, 1e-2]}}, "other space: train.learning_rate"),
        (place / "train.jsonl", {"space": space, "set": {**COMMON, "train.epochs": 3}}, "other settings: train.epochs"),
        (fewer, {"space": space}, "other data: train has changed"),
    ):
        with pytest.raises(UserError, match=says):
            lm.search(data, trials=2, resume=True, **{**given, **changed})
    assert (out / "study.log").read_bytes() == before
    found = lm.search(place / "train.jsonl", space=space, trials=2, resume=True, **given)
    assert len(found.trials) == 2


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from lexmill.cli import main; main()", "search", str(place / "train.jsonl")]
    command += ["--out", str(out), "--trials", "4", "--model", str(place / "bert"), "--json"]
    command += ["--try", "train.learning_rate=1e-5..1e-2:log"]
    command += [part for key, value in COMMON.items() for part in ("--set", f"{key}={value}")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not (out / "trials" / "1.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (out / "study.log").is_file()
    again = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert again.returncode == 2
    assert "give --resume" in again.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=os.environ, check=False)
    assert resumed.returncode == 0, resumed.stderr
    trials = json.loads(resumed.stdout)["trials"]
    assert sum(trial["state"] in ("complete", "pruned") for trial in trials) == 4
    lost = [trial["settings"] for trial in trials if trial["state"] == "fail"]
    assert all(settings in [t["settings"] for t in trials if t["state"] != "fail"] for settings in lost)


@pytest.mark.parametrize(
    ("space", "common", "says"),
    [
        ({"train.learning_rat": [1.0]}, COMMON, "learning_rate"),
        ({"train.learning_rate": [1e-3]}, {"train.epochs": 1}, "needs validation rows"),
        ({"train.epochs": [1, 2]}, COMMON, "is set and searched"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_it_starts(
    space: dict[str, list[float]], common: dict[str, float], says: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        lm.search(place / "train.jsonl", out=tmp_path / "out", space=space, model=place / "bert", set=common)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()
