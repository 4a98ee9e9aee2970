"""A whole run on real preferences: the reference is asked once, and the record says so."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from tests.train.parts import stored, tiny_llama, write_rows

from lexmill.engine import TorchEngine
from lexmill.evaluate import evaluate
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.train import TrainConfig


def test_preferences_are_learnt_against_the_starting_model(shared_data: Path, tmp_path: Path) -> None:
    with lzma.open(shared_data / "llama_factory_sft" / "dpo_en.jsonl.xz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    rows = sorted(found, key=lambda row: len(row["prompt"] + row["chosen"] + row["rejected"]))[:16]
    train = write_rows(tmp_path / "train.jsonl", rows)
    model = stored(tiny_llama(), tmp_path / "model")
    data = DataConfig(train, test=train, validation_fraction=0.25)
    training = TrainConfig(epochs=4, batch_size=4, learning_rate=3e-3)
    config = FitConfig(data, str(model), task="generate", options={"max_length": 80, "beta": 0.5}, train=training)
    result = fit(config, tmp_path / "out")
    assert result.test is not None
    assert result.artifact.manifest.metrics["test"]["reward_margin"].value > 0.3
    assert result.artifact.manifest.metrics["test"]["reward_margin"].interval is not None
    assert len(result.artifact.manifest.task.state["reference"]) == 64
    # Elsewhere the starting model is not known, and there is nothing to compare with.
    again = evaluate(TorchEngine(tmp_path / "out"), rows).metrics.values
    assert set(again) == {"accuracy"}
    assert again["accuracy"] == result.artifact.manifest.metrics["test"]["accuracy"].value
