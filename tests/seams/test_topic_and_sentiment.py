"""Topic and sentiment of real financial posts: two tables joined, two heads, one pass through the trunk."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fit.conftest import Recipe
from tests.train.parts import write_rows

from lexmill.data import open_source
from lexmill.engine import Request, TorchEngine, load
from lexmill.fit import fit
from lexmill.monitor import read_events


def test_two_tables_train_two_heads_that_answer_in_one_pass(recipe: Recipe, shared_data: Path, tmp_path: Path) -> None:
    joined: dict[str, dict[str, str | None]] = {}
    for name, folder in (("topic", "twitter_fin_topic"), ("sentiment", "twitter_fin_sentiment")):
        source = open_source(shared_data / folder / "valid.jsonl.xz")
        for row in list(source)[::60]:
            blank: dict[str, str | None] = {"text": row.values["text"], "topic": None, "sentiment": None}
            joined.setdefault(row.values["text"], blank)[name] = row.values["label"]
    data = list(joined.values())
    assert sum(row["topic"] is None for row in data) > 20 < sum(row["sentiment"] is None for row in data)
    train = write_rows(tmp_path / "train.jsonl", data)
    config = recipe(
        data_={"train": train, "test": train},
        train_={"batch_size": 16, "epochs": 2},
        options={"heads": ["topic", "sentiment"]},
    )
    artifact = fit(config, tmp_path / "out").artifact
    found = artifact.manifest.metrics["test"]
    assert {"topic/accuracy", "sentiment/accuracy", "topic/macro_f1", "sentiment/macro_f1"} <= set(found)
    events = [e for e in read_events(artifact.path / "run" / "events.jsonl") if e["phase"] == "train"]
    assert any({"loss/topic", "loss/sentiment"} <= set(event) for event in events)
    assert all(event["positions_per_token"] < 1.1 for event in events)
    loaded = load(artifact)
    engine, trunk = TorchEngine(loaded), loaded.model.trunk
    before = trunk.layer_rows
    [answer] = engine.run([Request({"text": data[0]["text"]})])
    assert set(engine.task.render(answer)["heads"]) == {"topic", "sentiment"}
    tokens = engine.work.tokens
    # Every token goes at most once through each layer, the last one for the first token alone: not once a head.
    assert 0 < trunk.layer_rows - before <= tokens * len(trunk.layers) * 1.1 + len(trunk.layers)
    assert answer["topic"].shape == (len(engine.task.labels()["topic"]),)
    assert artifact.manifest.metrics["test"]["accuracy"].value == pytest.approx(
        (found["topic/accuracy"].value + found["sentiment/accuracy"].value) / 2
    )
