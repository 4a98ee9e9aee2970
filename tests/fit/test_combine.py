"""Several adapters over one trunk: each answers as the artefact it came from, alone and side by side in a batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from tests.fit.conftest import Recipe
from tests.train.parts import rows, tiny_bert, write_rows
from tests.train.parts import stored as stored_model
from typer.testing import CliRunner

import lexmill as lm
from lexmill.adapt import AdaptConfig
from lexmill.artifact import Artifact, tree
from lexmill.cli import app
from lexmill.engine import Request, TorchEngine
from lexmill.errors import UserError
from lexmill.fit import fit
from lexmill.serve.http.app import create_app
from lexmill.verify import verify

TEXTS = [row["text"] for row in rows(30, classes=10)]
LORA = AdaptConfig("lora", rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_model(tiny_bert(num_layers=3), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def sources(recipe: Recipe, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two classifiers from one model: other labels, columns, layers, ranks and lengths."""
    folder = tmp_path_factory.mktemp("sources")
    polite = [{"said": row["text"], "label": str(i % 3)} for i, row in enumerate(rows(24))]
    config = recipe(model=str(model), adapt=LORA, train_={"epochs": 2, "learning_rate": 2e-2})
    fit(config, folder / "bank")
    other = replace(config.data, train=write_rows(folder / "polite.jsonl", polite))
    adapt = AdaptConfig("lora", layers=2, rank=2, targets=("value", "up"))
    fit(replace(config, data=other, adapt=adapt, options={"max_length": 9}), folder / "polite")
    return {"bank": folder / "bank", "polite": folder / "polite"}


@pytest.fixture(scope="module")
def combined(sources: dict[str, Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.combine(model, sources, out=tmp_path_factory.mktemp("combined") / "both").path


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {name: lm.load(path).predict(TEXTS, raw=True) for name, path in sources.items()}


def assert_close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [one["label"] for one in found] == [one["label"] for one in wanted]
    a, b = (np.array([list(one["logits"].values()) for one in answers]) for answers in (found, wanted))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_each_adapter_answers_as_the_artefact_that_it_came_from(combined: Path, expected: dict[str, Any]) -> None:
    assert set(expected["bank"][0]["logits"]).isdisjoint(expected["polite"][0]["logits"])
    opened = lm.load(combined)
    for name, wanted in expected.items():
        assert_close(opened.predict(TEXTS, adapter=name, raw=True), wanted)


@pytest.mark.parametrize("budget", [60, 2048])
def test_texts_of_several_adapters_go_through_the_trunk_together(
    combined: Path, expected: dict[str, Any], budget: int
) -> None:
    engine = TorchEngine(combined, token_budget=budget)
    names = [("bank", "polite", "polite")[i % 3] for i in range(len(TEXTS))]
    columns = {"bank": "text", "polite": "said"}
    trunk = engine._loaded.model.trunk
    before, known = trunk.layer_rows, trunk.known_rows
    answers = engine.run(
        [Request({columns[name]: text}, adapter=name) for name, text in zip(names, TEXTS, strict=True)]
    )
    computed, known = trunk.layer_rows - before, trunk.known_rows - known
    if budget > 1000:
        # Two layers of three in one pass, whose result the passes of the last layer know: nothing is computed twice.
        assert known / 2 == pytest.approx(computed / 3, rel=0.05)
        assert engine.work.tokens == pytest.approx(computed / 3, rel=0.05)
    for name in columns:
        own = [i for i, chosen in enumerate(names) if chosen == name]
        task = engine.task_for(name)
        request = task.Request.model_validate({"texts": TEXTS, "raw": True})
        assert_close([task.render(answers[i], request) for i in own], [expected[name][i] for i in own])


def test_over_http_an_item_names_its_adapter(combined: Path, expected: dict[str, Any]) -> None:
    with TestClient(create_app({"both": TorchEngine(combined)})) as client:
        body = {"texts": TEXTS[:4], "raw": True}
        mixed = ["polite", "bank", "bank", "polite"]
        reply = client.post("/v1/classify", params={"adapter": mixed}, json=body).json()["answers"]
        for i, name in enumerate(mixed):
            assert_close([reply[i]], [expected[name][i]])
        one = client.post("/v1/classify?adapter=bank", json=body).json()["answers"]
        assert_close(one, expected["bank"][:4])
        for query, says in (
            ("?adapter=bnk", "known adapters: bank, polite"),
            ("", "known adapters: bank, polite"),
            ("?adapter=bank&adapter=polite", "2 adapters for 4 items"),
        ):
            refused = client.post(f"/v1/classify{query}", json=body)
            assert refused.status_code == 422
            assert says in json.dumps(refused.json())


def test_the_command_line_combines_and_asks(sources: dict[str, Path], model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    named = [f"{name}={path}" for name, path in sources.items()]
    made = runner.invoke(app, ["combine", str(model), *named, "--out", str(tmp_path / "both")], catch_exceptions=False)
    assert made.exit_code == 0
    asked = write_rows(tmp_path / "asked.jsonl", [{"said": TEXTS[0]}])
    done = runner.invoke(app, ["predict", str(tmp_path / "both"), str(asked), "--adapter", "polite"])
    assert json.loads(done.stdout)["label"] in {"0", "1", "2"}
    labelled = write_rows(tmp_path / "rows.jsonl", rows(8))
    scored = runner.invoke(app, ["evaluate", str(tmp_path / "both"), str(labelled), "--adapter", "bank", "--json"])
    assert json.loads(scored.stdout)["rows"] == 8


def test_every_adapter_is_verified(combined: Path) -> None:
    found = verify(combined)
    assert found.ok, found.lines()
    names = [check.name for check in found.checks]
    for adapter in ("bank", "polite"):
        assert f"trained = reloaded, {adapter}" in names
        assert f"trained = served, {adapter}" in names


@pytest.mark.slow
def test_a_changed_adapter_is_caught_although_the_hashes_match(combined: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(combined, changed)
    file = changed / "adapters" / "polite" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("lora_B.weight"))[0] += 0.5
    save_file(tensors, file)
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["files"] = {name: tree.measure(changed / name).model_dump() for name in tree.names(changed)}
    (changed / "manifest.json").write_text(json.dumps(manifest))
    found = verify(changed)
    assert not found.ok
    failed = [check.name for check in found.checks if not check.ok]
    assert failed == ["trained weights = loaded weights", "trained = reloaded, polite"]


def test_an_adapter_of_another_base_is_refused(sources: dict[str, Path], model: Path, tmp_path: Path) -> None:
    other = stored_model(tiny_bert(seed=1, num_layers=3), tmp_path / "other")
    with pytest.raises(UserError, match="fitted from another model"):
        lm.combine(other, sources, out=tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_what_has_no_adapter_is_refused(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    fit(recipe(model=str(model)), tmp_path / "full")
    with pytest.raises(UserError, match="no adapter"):
        lm.combine(model, {"full": tmp_path / "full"}, out=tmp_path / "both")


def test_a_base_with_heads_of_its_own_answers_without_an_adapter(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    fit(recipe(model=str(model)), tmp_path / "base")
    config = recipe(model=str(tmp_path / "base"), adapt=LORA, train_={"learning_rate": 2e-2})
    fit(config, tmp_path / "more")
    both = lm.combine(tmp_path / "base", {"more": tmp_path / "more"}, out=tmp_path / "both")
    opened = lm.load(both.path)
    assert_close(opened.predict(TEXTS, raw=True), lm.load(tmp_path / "base").predict(TEXTS, raw=True))
    assert_close(opened.predict(TEXTS, adapter="more", raw=True), lm.load(tmp_path / "more").predict(TEXTS, raw=True))
    assert Artifact.open(both.path).manifest.history[-1].name == "combine"
    engine = TorchEngine(both)
    plain, adapted = engine.run([Request({"text": TEXTS[0]}), Request({"text": TEXTS[0]}, adapter="more")])
    alone = engine.run([Request({"text": TEXTS[0]})])[0]
    np.testing.assert_allclose(plain["label"], alone["label"], rtol=1e-4, atol=1e-5)
    assert np.abs(plain["label"] - adapted["label"]).max() > 1e-3


def test_an_adapter_over_rounded_matrices_is_refused_and_says_why(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    rounded = recipe(model=str(model), adapt=replace(LORA, base_bits=4), train_={"learning_rate": 2e-2})
    fit(rounded, tmp_path / "rounded")
    with pytest.raises(UserError, match="over rounded matrices"):
        lm.combine(model, {"one": tmp_path / "rounded"}, out=tmp_path / "out")
    with pytest.raises(UserError, match="over rounded matrices"):
        lm.export(tmp_path / "rounded", format="peft", out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
