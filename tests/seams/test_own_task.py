"""A task and a kind of head that exist in this file alone: fitted, saved, evaluated and served like the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from tests.fit.conftest import Recipe
from tests.serve.conftest import Start
from tests.train.parts import rows, write_rows
from tokenizers import Tokenizer
from torch import Tensor

from lexmill import models
from lexmill.artifact import Artifact, render_card
from lexmill.data.batch import Batch, Example, Tokens
from lexmill.engine import TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import evaluate
from lexmill.fit import Watch, fit
from lexmill.models import Head, Model, register_head
from lexmill.monitor import read_events
from lexmill.nn import LayerNorm, Linear
from lexmill.tasks import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed


@register_head
class NumberHead(Head):
    """One number a text, from the mean of its tokens."""

    kind = "number"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.output = LayerNorm(size), Linear(size, 1)

    @property
    def pooling(self) -> str:
        return "mean"

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, trunk: Any, described: Mapping[str, Any], where: str) -> NumberHead:
        return cls(trunk.config.hidden_size)

    def forward(self, pooled: Float[Tensor, "seq dim"]) -> Float[Tensor, "seq"]:
        return self.output(self.norm(pooled)).squeeze(-1)


@dataclass(frozen=True)
class ScoreOptions:
    max_length: int = 64
    scale: float = 10.0


class ScoreRequest(BaseModel):
    texts: list[str] = Field(min_length=1)
    raw: bool = False


class ScoreAnswer(BaseModel):
    value: float
    numbers: dict[str, float] | None = None


@register
class Score(Task):
    """Predicts a number for each text."""

    name = "score"
    Request = ScoreRequest
    Answer = ScoreAnswer
    Options = ScoreOptions
    evidence_field: ClassVar[str] = "numbers"
    metric: ClassVar[str] = "mean_absolute_error"
    metric_sign: ClassVar[int] = -1

    def __init__(self, columns: Mapping[str, str], options: ScoreOptions) -> None:
        self.columns, self.options = dict(columns), options

    @classmethod
    def wants(cls, options: ScoreOptions) -> Wants:
        return Wants(labels="value", max_tokens=options.max_length)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: ScoreOptions) -> Score:
        if "label" not in columns:
            raise UserError("no column holds the scores", hint="name it with --label")
        return cls(columns, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Score:
        return cls(state["columns"], ScoreOptions(**state["options"]))

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns, "options": asdict(self.options)}

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {"score": ()}

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        tokenizer.enable_truncation(self.options.max_length)
        found: list[Example] = []
        encodings = tokenizer.encode_batch([str(r[self.columns["text"]]) for r in records])
        for record, encoding in zip(records, encodings, strict=True):
            number = record.get(self.columns["label"]) if labelled else None
            labels = {} if number is None else {"score": np.float32(float(number) / self.options.scale)}
            found.append(Example({"source": (Tokens(np.array(encoding.ids, np.int64)),)}, labels))
        return found

    def attach(self, model: Model) -> None:
        if "score" not in model.heads:
            model.add_head("score", NumberHead(model.config.hidden_size))

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        return model(ids, positions, layout, types=types, heads=["score"])

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        return {"score": batch.masks["score"] * batch.weight}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {"score": (outputs["score"] - torch.from_numpy(batch.labels["score"])).square()}

    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, ScoreRequest)
        return [{self.columns["text"]: text} for text in request.texts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return ScoreRequest(texts=list(texts), raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[float]:
        return (self.forward(model, batch)["score"].double() * self.options.scale).tolist()

    def render(self, answer: float, request: BaseModel | None = None) -> dict[str, Any]:
        raw = isinstance(request, ScoreRequest) and request.raw
        return {"value": round(answer, 3), **({"numbers": self.evidence(answer)} if raw else {})}

    def evidence(self, answer: float) -> dict[str, float]:
        return {"score": answer}

    def evaluate(self, answers: Sequence[float], records: Sequence[Record]) -> Metrics:
        gold = np.array([float(record[self.columns["label"]]) for record in records])
        error = np.abs(np.array(answers) - gold)
        worst = [{"text": records[i]["text"], "error": float(error[i])} for i in error.argsort()[::-1][:3]]
        return Metrics({"mean_absolute_error": float(error.mean())}, {}, {"worst": worst})


@pytest.fixture(scope="module")
def fitted(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Taught to count the words of a text."""
    folder = tmp_path_factory.mktemp("score")
    # No number of the test rows need have been seen in training: numbers are not classes.
    data = [{"text": row["text"], "words": len(row["text"].split()) + i / 1000} for i, row in enumerate(rows(80))]
    config = recipe(
        data_={
            "train": write_rows(folder / "train.jsonl", data[:64]),
            "test": write_rows(folder / "test.jsonl", data[64:]),
            "label": "words",
            "validation_fraction": 0.25,
        },
        train_={"epochs": 6, "learning_rate": 3e-3, "dropout": 0.0, "checkpoint_every": 5},
        task="score",
    )
    return fit(config, folder / "out").artifact


def test_it_learns_and_picks_the_epoch_of_the_smallest_error(fitted: Artifact) -> None:
    events = read_events(fitted.path / "run" / "events.jsonl")
    errors = [event["mean_absolute_error"] for event in events if event["phase"] == "validate"]
    assert errors[-1] < errors[0]
    assert fitted.manifest.history[-1].effect["best_epoch"] == 1 + errors.index(min(errors))


def test_the_artefact_knows_the_task_and_its_head(fitted: Artifact) -> None:
    assert fitted.manifest.task.name == "score"
    assert fitted.manifest.structure["heads"] == {"score": {"kind": "number"}}
    assert fitted.manifest.metrics["test"]["mean_absolute_error"].value > 0
    assert "mean_absolute_error" in render_card(fitted.manifest, "words")
    assert "worst" in (fitted.path / "run" / "report.html").read_text("utf-8")


def test_a_reloaded_artefact_scores_as_the_trained_model_did(fitted: Artifact) -> None:
    data = [{"text": row["text"], "words": len(row["text"].split()) + i / 1000} for i, row in enumerate(rows(80))]
    found = evaluate(TorchEngine(fitted), data[64:])
    recorded = fitted.manifest.metrics["test"]["mean_absolute_error"].value
    assert found.metrics.values["mean_absolute_error"] == pytest.approx(recorded, rel=1e-6)


def test_it_is_served_from_its_schema(fitted: Artifact, start: Start) -> None:
    engine = TorchEngine(fitted)
    client = start({"words": engine})
    texts = [row["text"] for row in rows(70)[64:]]
    answer = client.post("/v1/score", json={"texts": texts, "raw": True})
    assert answer.status_code == 200
    assert answer.json()["model"] == "words"
    found = [ScoreAnswer.model_validate(one) for one in answer.json()["answers"]]
    direct = [number for _, number in engine.run_stream([{"text": text} for text in texts])]
    assert [one.value for one in found] == pytest.approx(direct, abs=1e-3)
    assert [one.numbers for one in found] == [{"score": pytest.approx(number, rel=1e-5)} for number in direct]
    assert client.post("/v1/score", json={"texts": []}).status_code == 422
    assert client.post("/v1/classify", json={"texts": ["x"]}).status_code == 404
    schema = client.get("/openapi.json").json()
    assert schema["paths"]["/v1/score"]["post"]["summary"] == "Predicts a number for each text."
    assert "ScoreRequest" in schema["components"]["schemas"]


def test_a_second_run_goes_on_with_its_head(fitted: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    data = [{"text": row["text"], "words": len(row["text"].split())} for row in rows(16)]
    notes: list[str] = []
    train = write_rows(tmp_path / "train.jsonl", data)
    config = recipe(data_={"train": train, "label": "words"}, task="score", model=str(fitted.path))
    again = fit(config, tmp_path / "again", watch=Watch(notes.append)).artifact
    assert "going on with the head 'score' of out" in notes
    assert isinstance(TorchEngine(again).task, Score)


def test_a_model_with_an_unknown_kind_of_head_says_which_are_known(fitted: Artifact, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        content = (fitted.path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b'"kind": "number"', b'"kind": "colour"'))
    with pytest.raises(UserError, match="unknown kind of head 'colour'") as raised:
        models.load(tmp_path)
    assert "classifier, lm, number" in (raised.value.hint or "")
