"""Several models as one, and labels from models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.train.parts import rows, write_rows

import lexmill as lm
from lexmill.cli import main
from lexmill.engine import Ensemble, Request
from lexmill.errors import UserError

TEXTS = [row["text"] for row in rows(12)]


def probabilities(place: Path) -> np.ndarray:
    logits = [answer["logits"] for answer in lm.load(place).predict(TEXTS, raw=True)]
    table = np.array([list(one.values()) for one in logits], dtype=np.float64)
    odds = np.exp(table - table.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def test_an_ensemble_answers_with_the_mean_of_the_probabilities(trained: Path) -> None:
    both = lm.load(trained / "a", others=[trained / "b"])
    found = both.predict(TEXTS, top_k=4)
    wanted = (probabilities(trained / "a") + probabilities(trained / "b")) / 2
    labels = both.engine.task.labels()["label"]
    for answer, mean in zip(found, wanted, strict=True):
        scores = {one["label"]: one["score"] for one in answer["labels"]}
        assert [scores[label] for label in labels] == pytest.approx(mean, abs=1e-6)
    assert not np.allclose(probabilities(trained / "a"), probabilities(trained / "b"), atol=1e-3)


def test_an_ensemble_of_several_labels_takes_the_mean_of_each() -> None:
    from lexmill.tasks import Classify
    from lexmill.tasks.classify import ClassifyOptions

    data = [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "y"]}]
    task = Classify.from_records(data, {"text": "text", "label": "label"}, ClassifyOptions(multi_label=True))
    one, other = np.array([2.0, -1.0], np.float32), np.array([0.0, -3.0], np.float32)
    mean = 1 / (1 + np.exp(-task.combine([{"label": one}, {"label": other}])["label"]))
    assert mean == pytest.approx((1 / (1 + np.exp(-one)) + 1 / (1 + np.exp(-other))) / 2, rel=1e-6)


def test_the_command_evaluates_and_predicts_with_several(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(12))
    wanted = lm.evaluate(trained / "a", data, others=[trained / "b"]).metrics.values["accuracy"]
    monkeypatch.setattr(
        "sys.argv", ["lexmill", "evaluate", *map(str, (trained / "a", data, "--with", trained / "b")), "--json"]
    )
    main_quietly()
    assert json.loads(capsys.readouterr().out)["accuracy"] == wanted
    monkeypatch.setattr("sys.argv", ["lexmill", "predict", *map(str, (trained / "a", data, "--with", trained / "b"))])
    main_quietly()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["label"] for one in said] == [
        a["label"] for a in lm.load(trained / "a", others=[trained / "b"]).predict(TEXTS)
    ]


def main_quietly() -> None:
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_models_of_other_labels_are_no_ensemble(trained: Path) -> None:
    with pytest.raises(UserError, match="'c' does not answer as 'a' does"):
        lm.load(trained / "a", others=[trained / "c"])


def test_a_fault_of_one_item_stays_with_that_item(trained: Path) -> None:
    engine = lm.load(trained / "a", others=[trained / "b"]).engine
    assert isinstance(engine, Ensemble)
    good, bad = engine.run([Request({"text": TEXTS[0]}), Request({"text": None})])
    assert not isinstance(good, Exception)
    assert isinstance(bad, Exception)
    assert engine.work.tokens > 0


def test_rows_of_which_a_model_is_sure_are_labelled_and_can_be_trained_on(trained: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in rows(100)[64:]])
    answers = lm.load(trained / "a").predict([row["text"] for row in rows(100)[64:]])
    bar = sorted(answer["score"] for answer in answers)[len(answers) // 2]
    found = lm.label(trained / "a", data, out=tmp_path / "labelled.jsonl", min_score=bar)
    written = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    sure = [answer for answer in answers if answer["score"] >= bar]
    assert found["rows"] == 36
    assert found["labelled"] == len(written) == len(sure)
    assert [row["label"] for row in written] == [answer["label"] for answer in sure]
    assert sum(found["labels"].values()) == len(written)
    assert lm.check(tmp_path / "labelled.jsonl").ok


def test_labelling_nothing_is_an_error_that_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": "hello there"}])
    with pytest.raises(UserError, match="sure of none of 1 rows"):
        lm.label(trained / "a", data, out=tmp_path / "out.jsonl", min_score=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl"}


def test_augmenting_a_file_writes_originals_and_copies(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(10))
    counts = lm.augment(data, out=tmp_path / "more.jsonl", copies=2, seed=1)
    written = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert counts.pop("original") == 10
    assert sum(counts.values()) == len(written) - 10 > 10
    assert lm.augment(data, out=tmp_path / "again.jsonl", copies=2, seed=1)["original"] == 10
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "more.jsonl").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        lm.augment(data, out=tmp_path / "more.jsonl")
    with pytest.raises(UserError, match="needs two artefacts"):
        lm.augment(data, out=tmp_path / "x.jsonl", there=tmp_path)
