"""Every recipe loads strictly, and runs: on a few of its own rows, with a small model in the place of its own."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.small_classifier import small_tokenizer

from lexmill import models
from lexmill.config import load
from lexmill.data import open_source
from lexmill.data.bundled import banking77
from lexmill.data.tokenizer_training import Special, TokenizerConfig, save_tokenizer, train_tokenizer
from lexmill.engine import TorchEngine
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.models import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SPLITS = ("train", "validation", "test")
ROWS_A_LABEL = 6
CHARACTERS = 2000
"""Of a text to learn a language from: the first ones."""
STRUCTURES = {path.stem.partition("-")[0]: path for path in (ROOT / "examples").glob("*-mini.json")}
"""By family, the structure that recipes tell to copy."""
SMALL: dict[Special, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paths in recipes are relative to the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path / "cache"))


def recipe(file: Path) -> FitConfig:
    """The recipe's config; skips where its data is not there."""
    config = load(FitConfig, file=file).value
    for split in SPLITS:
        path: Path | None = getattr(config.data, split)
        if path is not None and not path.exists():
            pytest.skip(f"needs {path}")
    return config


def few_rows(config: FitConfig, folder: Path) -> list[str]:
    """A few rows of each file, and the settings that name them: those of the two most frequent labels of training, or
    the first ones where the rows have no labels that are names; of tagged rows those of labels seen in training."""
    learnt = open_source(config.data.train, max_line_bytes=config.data.max_line_bytes)
    frequent = Counter(row.values.get("label") for row in learnt).most_common(2)
    wanted = [label for label, _ in frequent if isinstance(label, str)]
    sets: list[str] = []
    known: set[str] = set()
    for split in SPLITS:
        path: Path | None = getattr(config.data, split)
        if path is None:
            continue
        rows = [row.values for row in open_source(path, max_line_bytes=config.data.max_line_bytes)]
        chosen = [row for label in wanted for row in [r for r in rows if r["label"] == label][:ROWS_A_LABEL]]
        chosen = chosen or [row for row in rows if not known or tagged(row) <= known][: 2 * ROWS_A_LABEL]
        if config.task == "pretrain":
            chosen = [row | {"text": row["text"][:CHARACTERS]} for row in chosen]
        known = known or {label for row in chosen for label in tagged(row)}
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        sets.append(f'data.{split}="{file}"')
    return sets


def tagged(row: dict[str, Any]) -> set[str]:
    return {tag.partition("-")[2] for tag in row.get("tags", ())}


def small_model(config: FitConfig, folder: Path) -> Path:
    """A directory to start from: the decoder of the example that the recipe names; where it starts from nothing, the
    recipe's own structure made small, and a tokenizer; or a small BERT."""
    out = folder / "base"
    if config.init == "random":
        family = next(family for family in SMALL if Path(config.model).name.startswith(family))
        read = open_source(folder / "train.jsonl")
        texts = [str(row.values[name]) for row in read for name in ("text", "source", "target") if name in row.values]
        shape = TokenizerConfig("wordpiece", 4000) if family == "bert" else TokenizerConfig("bpe", 400, family)
        out.mkdir()
        save_tokenizer(train_tokenizer(texts, shape, fewer=True), shape, out)
        structure = json.loads(STRUCTURES[family].read_text("utf-8")) | SMALL[family]
        (out / "config.json").write_text(json.dumps(structure), "utf-8")
        return out
    if config.task == "generate":
        runpy.run_path(str(ROOT / "examples" / "tiny_llama.py"))["main"](out)
        return out
    out.mkdir()
    tokenizer = small_tokenizer()
    shape = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=64,
        max_positions=512,
        type_vocab_size=2,
    )
    models.save(models.init(shape, "bert", seed=0), out)
    tokenizer.save(str(out / "tokenizer.json"))
    return out


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_where_each_of_its_values_stands(file: Path) -> None:
    loaded = load(FitConfig, file=file)
    assert loaded.origins["model"].startswith(f"{file}:")
    assert loaded.origins["train.epochs"].startswith(f"{file}:")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs(file: Path, tmp_path: Path) -> None:
    config = recipe(file)
    sets = few_rows(config, tmp_path)
    sets += [f'model="{small_model(config, tmp_path)}"', "train.epochs=1", "train.batch_size=8"]
    if config.task == "pretrain":
        sets.append("options.max_length=32")
    if config.task == "seq2seq":
        sets += ["options.max_new_tokens=8", "options.num_beams=2"]
    if config.data.validation_fraction:
        sets.append("data.validation_fraction=0.3")  # some of so few rows
    loaded = load(FitConfig, file=file, sets=sets)
    result = fit(loaded.value, tmp_path / "out", origins=loaded.origins)
    if config.data.test is not None:
        assert result.training["steps"] == 2
        assert result.test is not None
        assert result.test["rows"] == 2 * ROWS_A_LABEL
    else:
        assert result.training["best_epoch"] == 1  # as the rows held out said
    engine = TorchEngine(result.artifact)
    asked = engine.task.items(engine.task.probe(["where is my card"]))
    ((_, answer),) = engine.run_stream(asked)
    assert engine.task.render(answer)


def test_the_banking77_recipe_has_the_bundled_data() -> None:
    recipe = load(FitConfig, file=ROOT / "recipes" / "banking77.toml").value
    train, test = banking77()
    same = DataConfig(recipe.data.train.resolve(), test=recipe.data.test and recipe.data.test.resolve())
    assert same == DataConfig(train.resolve(), test=test.resolve())
