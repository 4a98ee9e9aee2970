"""Mined negatives are those of the full matrix, never a right answer, and `fit` learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train.parts import rows, stored, tiny_bert, write_rows
from typer.testing import CliRunner

import lexmill as lm
from lexmill.artifact import Artifact
from lexmill.cli import app
from lexmill.errors import UserError
from lexmill.learn import mine as room
from lexmill.learn.mine import Mining, hard_negatives
from lexmill.monitor import Fanout


def pairs(count: int) -> list[dict[str, Any]]:
    """Questions with another of the same intent; the first has two right answers, one of them with a space more."""
    data = rows(2 * count, classes=count)
    made = [{"question": data[i]["text"], "answer": data[count + i]["text"]} for i in range(count)]
    again = {"question": made[0]["question"], "answer": made[1]["answer"] + " "}
    return [*made, again]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tiny_bert(), tmp_path_factory.mktemp("mine") / "bert")


def by_hand(queries, passages, query, own, excluded, mining: Mining) -> list[list[int]]:
    found = []
    for row, asked in enumerate(query):
        scores = passages @ queries[asked]
        positive = float(scores[own[row]])
        ranked = [int(i) for i in np.argsort(-scores, kind="stable") if i not in excluded[row]][mining.skip_top :]
        fit = [i for i in ranked if scores[i] <= positive - mining.margin * abs(positive)]
        found.append(fit[: mining.negatives])
    return found


@pytest.mark.parametrize("mining", [Mining(), Mining(3, 2, 0.0), Mining(7, 30, 0.3), Mining(100, 0, 0.0)])
def test_mined_in_parts_are_those_of_the_full_matrix(mining: Mining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_ROWS", 7)
    monkeypatch.setattr(room, "_PASSAGES", 13)
    generator = np.random.default_rng(0)
    passages = generator.normal(size=(60, 8))
    query = generator.integers(0, 20, 40).tolist()
    own = generator.integers(0, 60, 40).tolist()
    queries = np.stack([passages[own[query.index(i)]] if i in query else passages[0] for i in range(20)])
    queries = queries + generator.normal(size=queries.shape) * 0.5
    queries, passages = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, passages))
    excluded = [np.unique([own[row], *generator.integers(0, 60, row % 3)]) for row in range(40)]
    found = hard_negatives(queries, passages, query, own, excluded, mining, Fanout())
    assert found == by_hand(queries, passages, query, own, excluded, mining)
    assert any(found)


def test_a_right_answer_is_never_mined_and_what_is_written_counts(bert: Path, tmp_path: Path) -> None:
    data = pairs(20)
    data[3]["negatives"] = [data[5]["answer"]]
    source, out = write_rows(tmp_path / "pairs.jsonl", data), tmp_path / "mined.jsonl"
    found = lm.mine(bert, source, out=out, negatives=3, margin=0.0)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    right: dict[str, set[str]] = {}
    for row in data:
        right.setdefault(row["question"], set()).add(row["answer"].strip())
    for before, row in zip(data, written, strict=True):
        assert {**row, "negatives": before.get("negatives")} == {**before, "negatives": before.get("negatives")}
        assert not right[row["question"]] & {text.strip() for text in row["negatives"]}
        assert len(set(row["negatives"])) == len(row["negatives"])
    assert written[3]["negatives"][0] == data[5]["answer"]
    mined = [len(row["negatives"]) - ("negatives" in before) for before, row in zip(data, written, strict=True)]
    short = sum(count < 3 for count in mined)
    assert found == {"rows": 21, "passages": 20, "mined": sum(mined), "short": short}
    assert sum(mined) > 0


def test_fit_reads_what_was_mined_and_its_record_names_the_negatives(bert: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path / "cache"))
    source, out = write_rows(tmp_path / "pairs.jsonl", pairs(12)), tmp_path / "mined.jsonl"
    asked = ["mine", str(bert), str(source), "--out", str(out), "--negatives", "2", "--margin", "0", "--json"]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["rows"] == 13
    fitted = lm.fit(out, out=tmp_path / "run", task="embed", model=bert, epochs=1, batch_size=8, max_length=64)
    assert Artifact.open(tmp_path / "run").manifest.task.state["columns"]["negatives"] == "negatives"
    plain = lm.fit(source, out=tmp_path / "plain", task="embed", model=bert, epochs=1, batch_size=8, max_length=64)
    assert fitted.training["final_loss"] > plain.training["final_loss"]
    again = lm.mine(tmp_path / "run", out, out=tmp_path / "more.jsonl", negatives=1, margin=0.0)
    assert again["rows"] == 13


def test_what_cannot_be_mined_is_said_and_nothing_is_written(bert: Path, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "pairs.jsonl", pairs(6)), tmp_path / "out.jsonl"
    scored = write_rows(tmp_path / "scored.jsonl", [{**row, "score": 1} for row in pairs(6)])
    with pytest.raises(UserError, match="no use for negatives"):
        lm.mine(bert, scored, out=out)
    gap = write_rows(tmp_path / "gap.jsonl", [*pairs(6), {"question": "?", "answer": None}])
    with pytest.raises(UserError, match="'answer' of a record is null") as error:
        lm.mine(bert, gap, out=out)
    assert str(error.value.where).endswith("gap.jsonl:8")
    with pytest.raises(UserError, match="none of 7 rows has a negative"):
        lm.mine(bert, source, out=out, skip_top=100)
    for wrong in ({"negatives": 0}, {"skip_top": -1}, {"margin": 1.0}):
        with pytest.raises(UserError, match=r"is no|cannot"):
            lm.mine(bert, source, out=out, **wrong)
    assert not list(tmp_path.glob("out*"))
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        lm.mine(bert, source, out=out)
    assert out.read_text() == "mine"


def test_an_artefact_of_another_task_is_refused(trained: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pairs(6))
    with pytest.raises(UserError, match="the task 'classify' has no vectors"):
        lm.mine(trained / "a", source, out=tmp_path / "out.jsonl")
