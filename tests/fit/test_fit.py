"""From rows and a model to an artefact, and on from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.fit.conftest import Recipe
from tests.train.parts import rows, stored, tiny_llama, write_rows

from lexmill.adapt import AdaptConfig
from lexmill.artifact import Artifact
from lexmill.engine import Request, TorchEngine
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, Watch, fit
from lexmill.fit.model import model_directory, start
from lexmill.fit.prepare import prepare
from lexmill.monitor import read_events
from lexmill.nn.dropout import Dropout
from lexmill.train import TrainConfig


@pytest.fixture(scope="module")
def first(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One run, from which others start; tests leave it as it is."""
    return fit(recipe(), tmp_path_factory.mktemp("runs") / "first").artifact


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def same(a: Artifact, b: Artifact) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_seed_gives_the_same_bits_again_and_another_others(first: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    again = fit(recipe(), tmp_path / "again").artifact
    other = fit(recipe(train_={"seed": 1}), tmp_path / "other").artifact
    assert same(first, again)
    assert first.manifest.weights == again.manifest.weights
    assert not same(first, other)


@pytest.mark.parametrize("adapting", [AdaptConfig("lora", layers=1), AdaptConfig("bitfit"), AdaptConfig("frozen")])
def test_adapting_leaves_the_rest_of_the_model_as_it_was(adapting: AdaptConfig, recipe: Recipe, tmp_path: Path) -> None:
    asked = replace(recipe(), adapt=adapting)
    said: list[str] = []
    artifact = fit(asked, tmp_path / "out", watch=Watch(note=said.append)).artifact
    base, after = load_file(model_directory(asked.model) / "model.safetensors"), weights(artifact)
    moved = {name for name, tensor in after.items() if name.startswith("bert.") and "pooler" not in name}
    moved -= {n for n in moved if torch.equal(after[n], base.get(n, base.get(n.removeprefix("bert."), torch.empty(0))))}
    expected = {
        "lora": {f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "value")},
        "bitfit": {n for n in after if n.startswith("bert.encoder") and n.endswith("bias") and "key" not in n},
        "frozen": set[str](),
    }[adapting.method]
    assert {name for name in moved if not name.endswith("key.bias")} == expected
    effect = artifact.manifest.history[-1].effect
    assert effect["trained_weights"] < effect["weights"] / 2
    assert any(line.startswith(f"training {effect['trained_weights']:,.0f} of ") for line in said)
    assert artifact.manifest.history[-1].parameters["adapt"]["method"] == adapting.method  # pyright: ignore
    stored_adapter = artifact.path / "adapters" / "default" / "adapter_model.safetensors"
    assert stored_adapter.is_file() == (adapting.method == "lora")


def test_an_artefact_holds_what_the_contract_says(recipe: Recipe, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(64)[48:])
    result = fit(recipe(data_={"test": test, "validation_fraction": 0.25}, train_={"epochs": 2}), tmp_path / "out")
    artifact = result.artifact
    manifest = artifact.manifest
    assert {"config.json", "model.safetensors", "tokenizer.json", "card.md", "run/events.jsonl"} <= set(manifest.files)
    assert manifest.task.name == "classify"
    assert set(manifest.data) == {"train", "test"}
    assert manifest.metrics["test"]["accuracy"].interval is not None
    [made] = manifest.history
    assert made.name == "fit"
    assert made.effect["steps"] == 10
    assert made.effect["best_epoch"] in (1, 2)
    events = read_events(artifact.path / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["phase"] == "train"] == list(range(10))
    assert [e["step"] for e in events if e["phase"] == "validate"] == [5, 10]
    assert result.test is not None
    assert result.test["rows"] == 16
    assert not (tmp_path / "out.partial").exists()


def test_the_card_names_labels_data_and_metrics(recipe: Recipe, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(64)[48:])
    artifact = fit(recipe(data_={"test": test}), tmp_path / "bank").artifact
    card = (artifact.path / "card.md").read_text("utf-8")
    assert card.startswith("# bank\n")
    for label in {row["label"] for row in rows(48)}:
        assert f"`{label}`" in card
    assert "| accuracy |" in card
    assert "48" in card
    assert "{'" not in card


def test_dropout_zero_reaches_the_heads_too(recipe: Recipe) -> None:
    prepared = prepare(recipe())
    directory, task = prepared.model_directory, prepared.task
    dropped = start(directory, task, TrainConfig(), str).model
    assert dropped.heads["label"].dropout.p == 0.1
    still = start(directory, task, TrainConfig(dropout=0.0), str).model
    assert {module.p for module in still.modules() if isinstance(module, Dropout)} == {0.0}
    assert {layer.attention.dropout for layer in still.trunk.layers} == {0.0}


def test_early_stopping_is_recorded_in_the_artefact(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(train_={"epochs": 6, "patience": 1, "learning_rate": 1e-7}, data_={"validation_fraction": 0.2})
    artifact = fit(config, tmp_path / "out").artifact
    effect = artifact.manifest.history[-1].effect
    assert (effect["stopped_early"], effect["best_epoch"], effect["epochs"]) == (1, 1, 2)


def test_several_labels_joined_by_bars_may_combine_anew_in_the_test_rows(recipe: Recipe, tmp_path: Path) -> None:
    data = [{**row, "label": [row["label"], f"{row['label']}|any"][i % 2]} for i, row in enumerate(rows(48))]
    train = write_rows(tmp_path / "train.jsonl", data)
    unseen = f"{data[0]['label']}|{data[2]['label']}"
    test = write_rows(tmp_path / "test.jsonl", [{"text": "where is my card", "label": unseen}])
    config = recipe(data_={"train": train, "test": test}, options={"multi_label": True})
    result = fit(config, tmp_path / "out")
    assert result.artifact.manifest.task.state["heads"][0]["labels"][-1] != unseen  # pyright: ignore


# --- going on from an artefact ----------------------------------------------------------------------------------
def test_a_run_from_an_artefact_goes_on_with_its_head(first: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    notes: list[str] = []
    config = recipe(model=str(first.path), train_={"learning_rate": 1e-12, "dropout": 0.0})
    second = fit(config, tmp_path / "second", watch=Watch(notes.append)).artifact
    assert any("going on with the head 'label' of first" in note for note in notes)
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert [step.name for step in second.manifest.history] == ["fit", "fit"]
    start = read_events(second.path / "run" / "events.jsonl")[0]["loss"]
    assert start < read_events(first.path / "run" / "events.jsonl")[0]["loss"]


def test_a_run_with_other_labels_starts_a_new_head_and_says_so(first: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows(48, classes=6))
    notes: list[str] = []
    config = recipe(model=str(first.path), data_={"train": train})
    second = fit(config, tmp_path / "second", watch=Watch(notes.append)).artifact
    assert "leaving out the head 'label' of first: its labels differ" in notes
    assert weights(second)["classifier.weight"].shape[0] == 6
    assert TorchEngine(second).run([Request({"text": "x"})])[0]["label"].shape == (6,)


def test_a_head_that_is_not_asked_for_is_left_out(recipe: Recipe, tmp_path: Path) -> None:
    data = [{**row, "polite": str(i % 2)} for i, row in enumerate(rows(48))]
    train = write_rows(tmp_path / "train.jsonl", data)
    first = fit(recipe(data_={"train": train}, options={"heads": ["label", "polite"]}), tmp_path / "first").artifact
    notes: list[str] = []
    config = recipe(data_={"train": train}, model=str(first.path), options={"heads": ["polite"]})
    second = fit(config, tmp_path / "second", watch=Watch(notes.append)).artifact
    assert "leaving out the head 'label' of first: it is not asked for" in notes
    assert "going on with the head 'polite' of first" in notes
    assert not any("heads.label" in name for name in weights(second))


def test_an_artefact_with_a_flipped_bit_is_no_start(first: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(first.path, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        fit(recipe(model=str(tmp_path / "damaged")), tmp_path / "second")


# --- other tasks and readers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_decoder_is_fitted_checkpointed_resumed_and_answers(recipe: Recipe, tmp_path: Path, tied: bool) -> None:
    model = stored(tiny_llama(tied_output=tied, num_layers=1), tmp_path / "llama")
    # A column that looks like a label, of one class, must not stand in the way of a task without labels.
    data = [{"text": row["text"], "reply": row["label"], "category": "bank"} for row in rows(24)]
    train = write_rows(tmp_path / "train.jsonl", data)
    config = FitConfig(
        DataConfig(train, text="text", text_pair="reply", test=train),
        model=str(model),
        task="generate",
        train=TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3, checkpoint_every=1),
    )
    artifact = fit(config, tmp_path / "out").artifact
    assert artifact.manifest.metrics["test"]["loss"].value > 0
    again = fit(config, tmp_path / "again", resume=True).artifact
    assert same(artifact, again)
    engine = TorchEngine(artifact)
    [answer] = engine.run([Request({"text": "where is my card", "max_new_tokens": 3})])
    assert 1 <= engine.task.render(answer)["tokens"] <= 3


def test_transformers_loads_a_fitted_minilm_with_its_labels_and_the_same_logits(
    recipe: Recipe, minilm: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    train = write_rows(tmp_path / "train.jsonl", rows(16))
    artifact = fit(recipe(model=str(minilm), data_={"train": train}), tmp_path / "out").artifact
    labels = sorted({row["label"] for row in rows(16)})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(artifact.path).eval()
    words = transformers.AutoTokenizer.from_pretrained(artifact.path)
    assert [theirs.config.id2label[i] for i in range(4)] == labels
    assert theirs.config.label2id == {label: i for i, label in enumerate(labels)}
    texts = [row["text"] for row in rows(24)[16:]]
    ours = TorchEngine(artifact).run([Request({"text": text}) for text in texts])
    with torch.no_grad():
        logits = theirs(**words(texts, padding=True, return_tensors="pt")).logits
    gap = (torch.stack([torch.from_numpy(one["label"]) for one in ours]) - logits).abs().max()
    assert float(gap) <= 1e-5 * float(logits.abs().max())
    assert json.loads((artifact.path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
