"""Two models on the same rows: the numbers against the obvious count, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from tests.train.parts import classifier, rows, tiny_bert, tokenizer

from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import compare, evaluate
from lexmill.tasks import Embed
from lexmill.tasks.embed import EmbedOptions


def engine_of(seed: int, data: list[dict[str, Any]], **options: Any) -> TorchEngine:
    model = tiny_bert(seed)
    return TorchEngine(Loaded(classifier(data, model, **options), model, tokenizer()))


def labels_of(engine: TorchEngine, data: list[dict[str, Any]]) -> list[str]:
    return [engine.task.render(answer)["label"] for _, answer in engine.run_stream(data)]


def test_the_difference_is_that_of_the_rows_each_got_right() -> None:
    data = [{**row, "label": None if i == 5 else row["label"]} for i, row in enumerate(rows(60))]
    first, second = engine_of(0, data), engine_of(3, data)
    found = compare(first, second, data, names=("a", "b"), top=7)
    right = [
        np.array([one == row["label"] for one, row in zip(labels_of(engine, data), data, strict=True) if row["label"]])
        for engine in (first, second)
    ]
    assert found.rows == 59
    assert found.difference.value == pytest.approx(right[1].mean() - right[0].mean())
    assert found.difference.interval[0] <= found.difference.value <= found.difference.interval[1]
    only = (int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    assert (found.only_first, found.only_second) == only
    assert min(only) > 0
    assert found.p_mcnemar == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    for engine, values in ((first, found.first), (second, found.second)):
        assert values.values == evaluate(engine, data).metrics.values
    assert len(found.disagreements) == min(7, sum(only))
    for one in found.disagreements:
        assert data[one["row"] - 1] == one["columns"]
        assert one["first"]["label"] != one["second"]["label"]
        assert {one["first"]["row_score"], one["second"]["row_score"]} == {0.0, 1.0}
    assert json.loads(json.dumps(found.to_dict()))["rows"] == 59
    assert any("McNemar" in line for line in found.lines())


def test_a_model_is_no_better_than_itself() -> None:
    data = rows(20)
    engine = engine_of(0, data)
    found = compare(engine, engine, data)
    assert (found.difference.value, found.difference.p) == (0, 1)
    assert found.difference.interval[0] < 0 < found.difference.interval[1]
    assert (found.p_mcnemar, found.disagreements) == (1, [])


def test_scores_that_are_not_right_or_wrong_have_no_mcnemar() -> None:
    data = [{"q": a["text"], "a": b["text"]} for a, b in zip(rows(12), rows(16)[4:], strict=True)]
    engines = [
        TorchEngine(Loaded(Embed({"text": "q", "text_pair": "a"}, EmbedOptions()), tiny_bert(seed), tokenizer()))
        for seed in (0, 1)
    ]
    found = compare(engines[0], engines[1], data)
    assert found.p_mcnemar is None
    assert found.difference.value == pytest.approx(found.second.values["mrr"] - found.first.values["mrr"])


def test_what_differs_is_named() -> None:
    data = rows(8)
    engine = engine_of(0, data)
    model = tiny_bert()
    embed = TorchEngine(Loaded(Embed({"text": "text", "text_pair": "label"}, EmbedOptions()), model, tokenizer()))
    with pytest.raises(UserError, match="the task 'classify', 'second' the task 'embed'"):
        compare(engine, embed, data)
    with pytest.raises(UserError, match="the labels of head 'label' differ"):
        compare(engine, engine_of(0, rows(8, classes=3)), data)
    other = [{**row, "sentence": row["text"]} for row in data]
    columns = {"text": "sentence", "label": "label"}
    with pytest.raises(UserError, match="different columns"):
        compare(engine, engine_of(0, other, columns=columns), other)


def test_the_verb_prints_and_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Any) -> None:
    from tests.train.parts import write_rows

    from lexmill.cli.run import compare as verb
    from lexmill.fit import fit

    file = write_rows(tmp_path / "rows.jsonl", rows(24))
    places = [tmp_path / "a", tmp_path / "b"]
    for seed, place in enumerate(places):
        fit(recipe(data_={"train": file}, train_={"seed": seed}), place)
    verb(places[0], places[1], file, json=True, quiet=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 24
    assert {"difference", "p_mcnemar", "disagreements", "first", "second"} <= set(shown)
