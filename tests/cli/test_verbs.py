"""Every verb once, for people and for machines, on a tiny artefact; and the same from Python."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from tests.cli.conftest import command, jsonl, lexmill, process, refused, rows

import lexmill as lm
from lexmill import api
from lexmill.cli import data, fit, run
from lexmill.cli import inspect as looking

Fit = list[str | Path]


@pytest.fixture
def short(tiny: Path) -> Fit:
    return ["fit", "train.jsonl", "--model", tiny, "--out", "out"]


# --- looking ----------------------------------------------------------------------------------------------------
def test_check(work: Path, tiny: Path) -> None:
    said = lexmill("check", "train.jsonl", "--test", "train.jsonl", "--model", tiny)
    assert (said.code, said.err) == (0, "")
    assert "label: column 'label' (by name)" in said.out
    assert "24 test texts are in the training data too" in said.out
    found = lexmill("check", "train.jsonl", "--json").json
    assert found["train"]["labels"] == {"label": {"card": 12, "pin": 12}}
    assert found["columns"] == {"text": "text", "label": "label"}


def test_show(fitted: Path) -> None:
    said = lexmill("show", fitted)
    assert (said.code, said.err) == (0, "")
    assert "labels       label: 2 (card, pin)" in said.out
    assert lexmill("show", fitted, "--json").json["task"]["name"] == "classify"


def test_tokenizer(work: Path) -> None:
    said = lexmill(
        "tokenizer", "train.jsonl", "--text", "text", "--text", "label", "--vocab-size", "260", "--out", "tok", "--json"
    )
    rows = len((work / "train.jsonl").read_text().splitlines())
    assert (said.json["texts"], said.json["vocab_size"]) == (2 * rows, 260)
    assert (work / "tok" / "tokenizer.json").exists()
    assert lexmill("tokenizer", "train.jsonl", "--text", "txet", "--out", "other").code == 2


# --- asking -----------------------------------------------------------------------------------------------------
def test_evaluate(work: Path, fitted: Path) -> None:
    said = lexmill("evaluate", fitted, "train.jsonl", "--report", "report.html")
    assert (said.code, said.err) == (0, "")
    assert re.search(r"^24 rows\naccuracy +\d\.\d{4}  \(95 % interval ", said.out)
    page = (work / "report.html").read_text()
    assert "topics on train.jsonl" in page
    found = lexmill("evaluate", fitted, "train.jsonl", "--json", "--quiet")
    assert {"accuracy", "macro_f1", "f1", "rows", "intervals", "tables"} <= found.json.keys()
    assert found.err == ""


def test_predict_answers_files_and_standard_input_alike(work: Path, fitted: Path) -> None:
    from_file = lexmill("predict", fitted, "train.jsonl")
    assert (from_file.code, from_file.err) == (0, "")
    answers = [json.loads(line) for line in from_file.out.splitlines()]
    assert [answer["text"] for answer in answers] == [row["text"] for row in rows()]
    assert all(answer.keys() == {"text", "label", "score"} for answer in answers)
    piped = lexmill("predict", fitted, stdin=(work / "train.jsonl").read_text())
    texts = lexmill("predict", fitted, "-", stdin="".join(row["text"] + "\n" for row in rows()))
    assert lexmill("predict", fitted, "train.jsonl", "--out", "answers.jsonl").out == ""
    for other in (piped.out, texts.out, (work / "answers.jsonl").read_text()):
        found = [json.loads(line) for line in other.splitlines()]
        assert [answer["label"] for answer in found] == [answer["label"] for answer in answers]
        assert [answer["score"] for answer in found] == pytest.approx([answer["score"] for answer in answers], rel=1e-5)


def test_predict_takes_another_column(work: Path, fitted: Path) -> None:
    (work / "a.csv").write_text("question\nwhere is my card\n")
    [answer] = lexmill("predict", fitted, "a.csv", "--text", "question").out.splitlines()
    assert json.loads(answer)["text"] == "where is my card"


def test_predict_answers_a_line_before_the_next_one_comes(fitted: Path) -> None:
    with subprocess.Popen(
        command("predict", fitted), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as asked:
        assert asked.stdin is not None
        assert asked.stdout is not None
        for text in ("my card", "my pin"):
            asked.stdin.write(json.dumps({"text": text}) + "\n")
            asked.stdin.flush()
            assert json.loads(asked.stdout.readline())["text"] == text
        asked.stdin.write("{broken\n")  # standard input stays open: the error may not wait for its end
        asked.stdin.flush()
        assert asked.wait(60) == 2


def test_verify(fitted: Path) -> None:
    said = lexmill("verify", fitted, "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["ok"] is True
    assert [check["name"] for check in said.json["checks"]][-1] == "trained = served"


def test_serve_answers_until_it_is_told_to_stop(fitted: Path) -> None:
    started = command("serve", fitted, "--port", "0")
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as serving:
        assert serving.stdout is not None
        assert serving.stderr is not None
        found = re.search(r"serving topics \(classify\) at (http://127\.0\.0\.1:\d+)", serving.stdout.readline())
        assert found, serving.stderr.read()
        body = json.dumps({"texts": ["my card", "my pin"], "top_k": 2}).encode()
        with urlopen(Request(f"{found[1]}/v1/classify", body, {"Content-Type": "application/json"})) as reply:
            served = json.load(reply)["answers"]
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
        assert "Traceback" not in serving.stderr.read()
    predicted = lm.load(fitted).predict(["my card", "my pin"], top_k=2)
    assert [answer["label"] for answer in served] == [answer["label"] for answer in predicted]
    assert [answer["score"] for answer in served] == pytest.approx([answer["score"] for answer in predicted], rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------
def test_fit_composes_recipe_flags_and_set_and_records_where_each_came_from(work: Path, short: Fit) -> None:
    (work / "recipe.toml").write_text('[train]\nepochs = 9\nschedule = "cosine"\n\n[options]\nmax_length = 32\n')
    said = lexmill(
        *short, "--config", "recipe.toml", "--epochs", "1", "--set", "train.warmup=0.1", "--test", "train.jsonl"
    )
    assert said.code == 0
    assert "test accuracy: " in said.out
    assert "text: column 'text' (by name)" in said.err
    origins = json.loads((work / "out" / "run" / "origins.json").read_text())
    assert origins["train.epochs"] == "--epochs"
    assert origins["train.schedule"] == "recipe.toml:3"
    assert origins["train.warmup"] == "--set"
    assert origins["options"] == "recipe.toml:5"
    assert origins["train.seed"] == "default"
    shown = lexmill("show", "out", "--json").json["history"][-1]["parameters"]
    assert (shown["train"]["epochs"], shown["train"]["warmup"], shown["options"]) == (1, 0.1, {"max_length": 32})


def test_fit_for_machines_and_in_silence(work: Path, short: Fit) -> None:
    said = process(*short, "--epochs", "1", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["artifact"].endswith("out")
    assert said.json["training"]["steps"] == 1
    quiet = lexmill(*short[:-1], "again", "--epochs", "1", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_an_interrupted_fit_goes_on_where_it_stood(work: Path, short: Fit) -> None:
    (work / "train.jsonl").write_text(jsonl(rows(100)))
    many = [*short, "--epochs", "10", "--batch-size", "4", "--set", "train.checkpoint_every=5"]
    with subprocess.Popen(command(*many), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not list(work.glob("out.partial/checkpoints/step-*[0-9]")):
            assert running.poll() is None, running.communicate()
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130, err
    assert err.endswith("interrupted\n")
    assert not (work / "out").exists()
    refused(lexmill(*many), "out.partial", "--resume")
    again = lexmill(*many, "--resume")
    assert again.code == 0
    assert re.search(r"going on from step [\d,]+ of 250", again.err)
    steps = [json.loads(line)["step"] for line in (work / "out" / "run" / "events.jsonl").read_text().splitlines()]
    assert steps == list(range(250))
    assert not (work / "out.partial").exists()


# --- Python -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("verb", "function"),
    [
        (fit.fit, api.fit),
        (data.check, api.check),
        (run.evaluate, api.evaluate),
        (looking.verify, api.verify),
        (run.serve, api.serve),
    ],
    ids=["fit", "check", "evaluate", "verify", "serve"],
)
def test_python_takes_what_the_command_line_takes(verb: Any, function: Any) -> None:
    mine = {name.rstrip("_"): p.default for name, p in inspect.signature(verb).parameters.items()}
    theirs = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for shown in ("json", "quiet"):
        mine.pop(shown, None)
    assert mine.keys() == theirs.keys() - {"watch", "progress"}
    differ = {name for name in mine if mine[name] != theirs[name]}
    assert differ <= {"out", "set"}  # `out` is required in both, `set` is empty in both


def test_python_from_text_to_answers(work: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lm.check("train.jsonl").train.rows == 24
    result = lm.fit("train.jsonl", out="out", model=tiny, epochs=1, test="train.jsonl", set={"train.warmup": 0.1})
    assert capsys.readouterr() == ("", "")
    model = lm.load("out")
    assert result.artifact.path == model.artifact.path
    answers = model.predict(["where is my card", "my pin"])
    assert [answer.keys() for answer in answers] == [{"label", "score"}] * 2
    assert model.predict([]) == []
    assert model.evaluate("train.jsonl").metrics.values == lm.evaluate("out", "train.jsonl").metrics.values
    model.show()
    assert "labels       label: 2 (card, pin)" in capsys.readouterr().out
    assert lm.verify("out").ok


def test_python_errors_say_what_the_command_line_says(fitted: Path, work: Path, tiny: Path) -> None:
    with pytest.raises(lm.UserError, match="did you mean"):
        lm.fit("train.jsonl", out="out", model=tiny, set={"train.epoch": 3})
    with pytest.raises(lm.UserError, match="given twice"):
        lm.fit("train.jsonl", out="out", model=tiny, epochs=2, set={"train.epochs": 3})
    with pytest.raises(lm.UserError, match="it takes: texts, top_k, raw"):
        lm.load(fitted).predict(["hi"], topk=2)
    with pytest.raises(lm.UserError, match=r"texts\.1"):
        lm.load(fitted).predict(["hi", 3])
