"""Every family with every task: a whole run and the same answers from disk, or a refusal in words, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.train.parts import rows, write_rows
from tokenizers import Tokenizer

from lexmill import models
from lexmill.data.tokenizer_training import TokenizerConfig, train_tokenizer
from lexmill.engine import Request, TorchEngine
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.models import Model, ModelConfig, RecurrentConfig, families
from lexmill.tasks import base
from lexmill.train import TrainConfig

REAL = rows(8)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "intermediate_size": 16}
SIZES |= {"max_positions": 1024, "layers": (), "initializer_range": 0.1}


@dataclass(frozen=True)
class Case:
    """A task with data for it, and which models can do it; the others must refuse."""

    task: str
    rows: list[dict[str, Any]]
    suits: Callable[[Model], bool] = lambda model: True
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def causal(model: Model) -> bool:
    return model.config.causal


def two_sided(model: Model) -> bool:
    return model.trunk.sides == 2


def both_ways(model: Model) -> bool:
    return not causal(model) and not two_sided(model)


SHORT = {"max_length": 16}
PAIRS = [(REAL[i]["text"], REAL[(i + 4) % 8]["text"]) for i in range(8)]
TAGGED = [row["text"].split() for row in REAL]
CASES = {
    "classify": Case("classify", REAL, options=SHORT),
    "embed": Case("embed", [{"question": a, "answer": b} for a, b in PAIRS], options=SHORT),
    "rank": Case("rank", [{"text_a": a, "text_b": b, "label": i % 2} for i, (a, b) in enumerate(PAIRS)], options=SHORT),
    "answer": Case(
        "answer",
        [
            {
                "question": " ".join(a.split()[:2]),
                "context": b,
                "answers": {"text": [b.split()[0]], "answer_start": [0]},
            }
            for a, b in PAIRS
        ],
        options={"max_length": 48, "stride": 16},
    ),
    "tag": Case(
        "tag", [{"tokens": t, "tags": ["B-X", *["O"] * (len(t) - 1)]} for t in TAGGED], options={**SHORT, "stride": 4}
    ),
    "generate": Case("generate", [{"prompt": a, "response": b} for a, b in PAIRS], causal, {"max_new_tokens": 3}),
    "seq2seq": Case("seq2seq", [{"source": a, "target": b} for a, b in PAIRS], two_sided, {"max_new_tokens": 3}),
    "pretrain-causal": Case("pretrain", REAL, causal, {"max_length": 32}),
    "pretrain-masked": Case("pretrain", REAL, both_ways, {"max_length": 32, "objective": "masked"}),
    "pretrain-span": Case("pretrain", REAL, two_sided, {"max_length": 32, "objective": "span"}),
}


@cache
def tokenizer() -> Tokenizer:
    made = train_tokenizer([row["text"] for row in rows(200)], TokenizerConfig("wordpiece", 300, "roberta"))
    made.add_special_tokens([f"<extra_id_{i}>" for i in range(8)])
    return made


def tiny(name: str) -> Model:
    size, config = tokenizer().get_vocab_size(), families.find(name).read_config({})
    if isinstance(config, RecurrentConfig):
        return models.init(replace(config, vocab_size=size, embedding_size=8, state_size=8), name, 0)
    assert isinstance(config, ModelConfig)
    own: dict[str, Any] = {**SIZES, "vocab_size": size, "num_kv_heads": min(config.num_kv_heads, 2)}
    if config.positions == "relative":
        del own["max_positions"]  # no table ends anywhere
    if config.embedding_size is not None:
        own["embedding_size"] = 8
    if config.rope_dim is not None:
        own["rope_dim"] = 4
    return models.init(replace(config, **own, decoder_layers=min(config.decoder_layers, 1)), name, 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Model]]:
    place = tmp_path_factory.mktemp("families")

    @cache
    def of(name: str) -> tuple[Path, Model]:
        model, folder = tiny(name), place / name
        folder.mkdir()
        models.save(model, folder)
        tokenizer().save(str(folder / "tokenizer.json"))
        return folder, model

    return of


def test_every_task_has_a_case() -> None:
    own = {name for name in base.known() if base.find(name).__module__.startswith("lexmill.")}
    assert {case.task for case in CASES.values()} >= own


QUICK = ("bert", "llama", "t5", "lstm")
"""One family of each shape; the others are run with the slow tests."""
CELLS = [
    pytest.param(family.name, name, marks=() if family.name in QUICK else pytest.mark.slow, id=f"{family.name}-{name}")
    for family, (name, case) in product(families.known(), CASES.items())
    if case.task in base.known()
]


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_a_run_ends_in_an_artefact_that_answers_as_it_did_or_is_refused(
    family, name, stored, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # without the extra `report`: its plots are tested elsewhere
    (directory, model), case = stored(family), CASES[name]
    data = write_rows(tmp_path / "rows.jsonl", case.rows)
    config = FitConfig(
        DataConfig(data, test=data),
        model=str(directory),
        task=case.task,
        options=case.options,
        train=TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3),
    )
    if not case.suits(model):
        with pytest.raises(UserError):
            fit(config, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
        return
    result = fit(config, tmp_path / "out")
    assert result.training["steps"] >= 1
    assert result.test is not None
    engine = TorchEngine(tmp_path / "out")
    probe = engine.task.probe([row["text"] for row in REAL[:2]])
    records = engine.task.items(probe)
    found = [engine.run([Request(record) for record in records]) for engine in (engine, TorchEngine(tmp_path / "out"))]
    evidence = [[engine.task.evidence(answer) for answer in answers] for answers in found]
    assert evidence[0] == evidence[1]
