"""Two heads over one trunk, trained from a table in which either label may be missing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.fit.conftest import Recipe
from tests.train.parts import rows

from lexmill.engine import Request, TorchEngine
from lexmill.fit import fit
from lexmill.monitor import read_events


@pytest.mark.parametrize("suffix", [".csv", pytest.param(".tsv", marks=pytest.mark.slow)])
def test_two_heads_are_trained_from_a_table_with_empty_cells(recipe: Recipe, tmp_path: Path, suffix: str) -> None:
    data = [
        {
            "text": row["text"],
            "intent": "" if i % 3 == 0 else row["label"],
            # The first batches of an epoch may hold no label of this head at all.
            "urgent": "yes" if i == 7 else "no" if i == 30 else "",
        }
        for i, row in enumerate(rows(48))
    ]
    file = tmp_path / f"train{suffix}"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(data[0]), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(data)
    config = recipe(
        data_={"train": file, "test": file},
        train_={"batch_size": 4, "epochs": 3},
        options={"heads": ["intent", "urgent"], "class_weights": "balanced"},
    )
    artifact = fit(config, tmp_path / "out").artifact

    heads = {head["name"]: head["labels"] for head in artifact.manifest.task.state["heads"]}  # pyright: ignore
    assert heads == {"intent": sorted({row["intent"] for row in data if row["intent"]}), "urgent": ["no", "yes"]}
    events = [e for e in read_events(artifact.path / "run" / "events.jsonl") if e["phase"] == "train"]
    alone = [e for e in events if "loss/urgent" not in e]
    both = [e for e in events if "loss/urgent" in e]
    assert len(alone) + len(both) == 36
    assert 3 <= len(both) <= 6
    assert all(e["loss"] == pytest.approx(e["loss/intent"] + e["loss/urgent"]) for e in both)
    found = artifact.manifest.metrics["test"]
    assert {"intent/accuracy", "urgent/accuracy", "accuracy"} <= set(found)
    assert found["urgent/accuracy"].value in (0, 0.5, 1)
    engine = TorchEngine(artifact)
    [answer] = engine.run([Request({"text": "where is my card"})])
    assert set(engine.task.render(answer)["heads"]) == {"intent", "urgent"}
