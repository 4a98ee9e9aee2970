"""Whole runs of the methods that add to a model: what the record says, and what is left in the artefact."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.fit.conftest import Recipe
from tests.train.parts import rows, stored, tiny_llama, write_rows

from lexmill import models
from lexmill.adapt import AdaptConfig
from lexmill.artifact import Artifact
from lexmill.config import load as load_config
from lexmill.engine import Request, TorchEngine, probes
from lexmill.engine.loaded import load
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, Watch, fit
from lexmill.monitor import read_events
from lexmill.nn import Packed
from lexmill.train import TrainConfig

TARGETS = ("query", "value", "output", "up", "down")


def effect_of(artifact: Artifact) -> dict[str, float]:
    return dict(artifact.manifest.history[-1].effect)


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "prompt"])
def test_what_cannot_be_merged_answers_from_the_artefact_as_it_was_trained(
    method: str, recipe: Recipe, tmp_path: Path
) -> None:
    size = {"width": 8} if method == "bottleneck" else {"tokens": 6}
    adapting = AdaptConfig(method, **size)  # pyright: ignore[reportArgumentType]
    config = replace(recipe(), adapt=adapting, options={"max_length": 96})
    said: list[str] = []
    artifact = fit(config, tmp_path / "out", watch=Watch(note=said.append)).artifact
    additions = artifact.manifest.structure["additions"]
    assert {one["kind"] for one in additions.values()} == {method}  # pyright: ignore
    assert json.loads((artifact.path / "config.json").read_text())["lexmill"]["additions"] == additions
    assert effect_of(artifact)["trunk_moved"] > 0
    assert (artifact.path / "adapters/default/adapter_model.safetensors").is_file() == (method != "bottleneck")
    assert any("no format for the method 'bottleneck'" in line for line in said) == (method == "bottleneck")
    assert "with `transformers` it answers as if it were without them" in (artifact.path / "card.md").read_text("utf-8")
    loaded = load(artifact)
    recorded = json.loads((artifact.path / probes.FILE).read_text())["probes"]
    found = probes.record(loaded.task, loaded.model, loaded.tokenizer)["probes"]
    assert [one["record"] for one in found] == [one["record"] for one in recorded]
    for ours, theirs in zip(found, recorded, strict=True):
        # Frozen weights are packed for training and not when read, which rounds otherwise.
        assert ours["evidence"] == pytest.approx(theirs["evidence"], rel=1e-5, abs=1e-5)


def test_what_was_added_is_there_without_the_room_that_added_it(recipe: Recipe, tmp_path: Path) -> None:
    config = replace(recipe(), adapt=AdaptConfig("prefix", tokens=6), options={"max_length": 96})
    path = fit(config, tmp_path / "out").artifact.path
    code = (
        "import json, sys, torch\n"
        "from lexmill import models\n"
        "from lexmill.nn import Packed\n"
        "torch.set_num_threads(1)\n"
        "model = models.load(sys.argv[1])\n"
        "assert 'lexmill.adapt' not in sys.modules\n"
        "ids = torch.arange(100, 109)\n"
        "with torch.no_grad():\n"
        "    print(json.dumps(model(ids, torch.arange(9), Packed.of([9]))['label'].tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    with torch.no_grad():
        model = models.load(path)
        found = model(torch.arange(100, 109), torch.arange(9), Packed.of([9]))["label"]
        for layer in model.trunk.layers:
            layer.attention.prefix = None
        without = model(torch.arange(100, 109), torch.arange(9), Packed.of([9]))["label"]
    assert json.loads(done.stdout) == found.tolist()
    assert not torch.allclose(found, without, atol=1e-3)


def test_texts_that_have_no_room_beside_a_prefix_are_refused_before_training(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="texts of 128 tokens and 20 in front") as error:
        fit(replace(recipe(), adapt=AdaptConfig("prefix")), tmp_path / "out")
    assert (error.value.where, error.value.hint) == ("options.max_length", "give at most 108, or fewer adapt.tokens")
    assert not list(tmp_path.iterdir())


def test_ranks_move_between_layers_and_the_record_shows_it(recipe: Recipe, tmp_path: Path) -> None:
    adapting = AdaptConfig("adalora", rank=2, targets=TARGETS, initial_rank=4)
    config = replace(recipe(train_={"epochs": 5, "learning_rate": 5e-3}), adapt=adapting)
    artifact = fit(config, tmp_path / "out").artifact
    effect = effect_of(artifact)
    ranks = {name: rank for name, rank in effect.items() if name.startswith("rank/")}
    assert len(ranks) == 2 * len(TARGETS)
    assert effect["rank_total_before"] == 4 * len(ranks)
    assert effect["rank_total"] == sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1
    events = [e for e in read_events(artifact.path / "run" / "events.jsonl") if e["phase"] == "train"]
    budgets = [event["rank_budget"] for event in events]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (effect["rank_total_before"], effect["rank_total"])
    over_time = [{n: v for n, v in e.items() if n.startswith("rank/")} for e in events if "rank/" in str(e)]
    assert len(over_time) > 5
    assert over_time[-1] == ranks
    assert sum(over_time[0].values()) > sum(over_time[-1].values())
    assert events[-1]["orthogonality"] < events[0]["orthogonality"]
    pattern = json.loads((artifact.path / "adapters/default/adapter_config.json").read_text())["rank_pattern"]
    assert sorted(sum(kept) for kept in pattern.values()) == sorted(ranks.values())


def test_the_best_epoch_is_one_whose_ranks_are_within_their_budget(recipe: Recipe, tmp_path: Path) -> None:
    adapting = AdaptConfig("adalora", rank=2, targets=TARGETS, initial_rank=4, tinit=0.3)
    # A rate so high that later epochs are worse.
    train = {"epochs": 5, "learning_rate": 0.5, "patience": 1}
    config = replace(recipe(train_=train, data_={"validation_fraction": 0.3}), adapt=adapting)
    effect = effect_of(fit(config, tmp_path / "out").artifact)
    assert effect["rank_total"] == effect["rank_total_before"] / 2
    assert effect["best_epoch"] >= 4


class Stop(Exception):
    """Ends a run from outside."""


class StopAt:
    """A sink that ends the run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def emit(self, event: object) -> None:
        assert isinstance(event, dict)
        if event.get("phase") == "train" and event["step"] == self.step:
            raise Stop

    def close(self) -> None:
        pass


@pytest.mark.parametrize("at", [11, 25])
def test_adalora_goes_on_from_a_checkpoint_as_if_it_had_not_been_stopped(
    at: int, recipe: Recipe, tmp_path: Path
) -> None:
    adapting = AdaptConfig("adalora", rank=2, targets=TARGETS, delta_t=0.05)
    config = replace(recipe(train_={"epochs": 5, "checkpoint_every": 7}), adapt=adapting)
    whole = fit(config, tmp_path / "whole").artifact
    with pytest.raises(Stop):
        fit(config, tmp_path / "stopped", watch=Watch(sinks=(StopAt(at),)))
    stopped = fit(config, tmp_path / "stopped", resume=True).artifact
    assert whole.manifest.weights == stopped.manifest.weights
    one, two = effect_of(whole), effect_of(stopped)
    assert {n: v for n, v in one.items() if "rank" in n} == {n: v for n, v in two.items() if "rank" in n}


def test_a_trunk_in_four_bits_is_saved_as_it_was_trained_and_the_record_has_the_bytes(
    recipe: Recipe, tmp_path: Path
) -> None:
    adapting = AdaptConfig("lora", base_bits=4)
    said: list[str] = []
    artifact = fit(replace(recipe(), adapt=adapting), tmp_path / "out", watch=Watch(note=said.append)).artifact
    effect = effect_of(artifact)
    assert effect["trunk_bytes"] < effect["trunk_bytes_before"] * 0.15
    assert any(f"take {effect['trunk_bytes']:,.0f} bytes" in line for line in said)
    tensors = load_file(artifact.path / "model.safetensors")
    untouched = tensors["bert.encoder.layer.0.intermediate.dense.weight"].view(-1, 64)
    assert max(len(block.unique()) for block in untouched) <= 16
    recorded = json.loads((artifact.path / probes.FILE).read_text())
    loaded = load(artifact)
    found = probes.record(loaded.task, loaded.model, loaded.tokenizer)
    assert json.loads(json.dumps(found)) == recorded


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_decoder_with_something_in_front_is_trained_and_continues_texts(method: str, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(16))
    adapting = AdaptConfig(method, tokens=4)  # pyright: ignore[reportArgumentType]
    config = FitConfig(
        DataConfig(train, text="text"), model=str(stored(tiny_llama(), tmp_path / "llama")), task="generate",
        options={"max_length": 16}, adapt=adapting, train=TrainConfig(epochs=2, batch_size=8, learning_rate=1e-2),
    )  # fmt: skip
    artifact = fit(config, tmp_path / "out").artifact
    events = [e for e in read_events(artifact.path / "run" / "events.jsonl") if e["phase"] == "train"]
    assert events[-1]["loss"] < events[0]["loss"]
    [answer] = TorchEngine(artifact).run([Request({"text": "my card", "max_new_tokens": 3})])
    assert len(answer.ids) == 3


# --- learning rates by layer, and layers by number ---------------------------------------------------------------
def test_layers_learn_at_rates_that_fall_from_the_head_down(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(train_={"layer_decay": 0.5, "learning_rate": 1e-3, "weight_decay": 0.1, "dropout": 0.0})
    artifact = fit(config, tmp_path / "out").artifact
    effect = effect_of(artifact)
    assert effect["highest_rate"] == 1e-3
    assert effect["lowest_rate"] == pytest.approx(1e-3 * 0.5**3)
    event = read_events(artifact.path / "run" / "events.jsonl")[0]
    assert event["learning_rate/lowest"] == pytest.approx(event["learning_rate"] * 0.5**3)


def test_a_decay_that_has_nothing_to_act_on_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    config = replace(recipe(train_={"layer_decay": 0.5}), adapt=AdaptConfig("frozen"))
    with pytest.raises(UserError, match="at one height"):
        fit(config, tmp_path / "out")


def test_layers_are_a_number_or_a_list_on_the_command_line() -> None:
    found = [load_config(AdaptConfig, sets=[f"layers={text}"]).value.layers for text in ("2", "[0, 3]", "none")]
    assert found == [2, (0, 3), None]
    with pytest.raises(UserError, match="layers"):
        load_config(AdaptConfig, sets=["layers=[-1]"])


def test_only_the_layers_named_are_trained(recipe: Recipe, tmp_path: Path) -> None:
    config = replace(recipe(), adapt=AdaptConfig("bitfit", layers=(0,)))
    artifact = fit(config, tmp_path / "out").artifact
    before = load_file(Path(config.model) / "model.safetensors")
    after = load_file(artifact.path / "model.safetensors")
    moved = {n for n, t in after.items() if not torch.equal(t, before.get(n.removeprefix("bert."), t))}
    assert moved
    assert all(name.startswith("bert.encoder.layer.0.") and name.endswith("bias") for name in moved)
