"""Embeddings: losses against sentence-transformers' own, micro-batches against one batch, files it can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.fit.conftest import Recipe
from tests.train.parts import InMemory, batch_of, distance, gradients, rows, tiny_bert, tokenizer, write_rows

from lexmill import load
from lexmill.artifact import Artifact
from lexmill.data import open_source
from lexmill.data.batch import Example, collate, join
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import evaluate
from lexmill.fit import Watch, fit
from lexmill.models import Model
from lexmill.tasks import Embed, sentence_files
from lexmill.tasks.embed import EmbedOptions, EmbedRequest, contrastive_loss, ordered_loss
from lexmill.tasks.inputs import dense
from lexmill.train import TrainConfig, Trainer, accumulate
from lexmill.train.step import Manner, _mix  # pyright: ignore[reportPrivateUsage]

PAIRS = {"text": "question", "text_pair": "answer"}
SCORED = {"text": "a", "text_pair": "b", "score": "score"}


def questions(count: int, negatives: int = 0) -> list[dict[str, Any]]:
    """Questions of an intent, each with another of the same; the last two share their answer."""
    data = rows(3 * count, classes=count)
    pairs = [{"question": data[i]["text"], "answer": data[count + i]["text"]} for i in range(count)]
    pairs[-1]["answer"] = pairs[-2]["answer"]
    others = [data[2 * count + i]["text"] for i in range(count)]
    return [{**pair, "negatives": [others[i - 1], others[i - 2]][:negatives]} for i, pair in enumerate(pairs)]


def scored(count: int) -> list[dict[str, Any]]:
    data = rows(count + 1)
    return [
        {"a": data[i]["text"], "b": data[i + 1]["text"], "score": None if i == 2 else i % 4 / 2} for i in range(count)
    ]


def case(kind: str, model: Model, **options: Any) -> tuple[Embed, list[Example]]:
    if kind == "scored":
        columns, data = SCORED, scored(9)
    else:
        columns, data = {**PAIRS, "negatives": "negatives"}, questions(9, negatives=2 if kind == "negatives" else 0)
    task = Embed.from_records(data, columns, EmbedOptions(**options))
    task.attach(model)
    return task, task.encode(data, tokenizer(), labelled=True)


def step(model: Model, task: Embed, parts: Sequence[Sequence[Example]], **how: Any) -> tuple[float, dict[str, Any]]:
    blank = {"embedding": np.zeros((), np.float32)} if "score" in task.columns else {}
    losses, _ = accumulate(model, task, [collate(part, blank) for part in parts], seed=3, manner=Manner(**how))
    return losses["embedding"], gradients(model)


@pytest.mark.parametrize("kind", ["pairs", "negatives", "scored"])
@pytest.mark.parametrize("dimensions", [(), (4, 16)])
def test_three_uneven_micro_batches_equal_one(kind: str, dimensions: tuple[int, ...]) -> None:
    model = tiny_bert().double()
    task, items = case(kind, model, dimensions=dimensions)
    whole, cut = step(model, task, [items]), step(model, task, [items[:1], items[1:4], items[4:]])
    assert cut[0] == pytest.approx(whole[0], rel=1e-12)
    assert distance(cut[1], whole[1]) <= 1e-10
    # Each micro-batch on its own would have fewer negatives: the cut is not forgiving.
    alone = [step(model, task, [part])[0] for part in (items[1:4], items[4:])]
    assert abs(sum(alone) / 2 - whole[0]) > 1e-3


def test_both_passes_of_a_cut_batch_drop_the_same() -> None:
    model = tiny_bert(dropout=0.2, attention_dropout=0.2).double().train()
    task, items = case("negatives", model)
    parts = [collate(part) for part in (items[:2], items[2:5], items[5:])]
    cut = step(model, task, [items[:2], items[2:5], items[5:]])
    vectors: list[torch.Tensor] = []
    for i, part in enumerate(parts):
        torch.manual_seed(_mix(3, i))
        vectors.append(task.forward(model, part)["embedding"])
    loss = task.item_losses({"embedding": torch.cat(vectors)}, join(parts))["embedding"].mean()
    loss.backward()
    assert cut[0] == pytest.approx(float(loss.detach()), rel=1e-12)
    assert distance(cut[1], gradients(model)) <= 1e-10


def test_ways_of_training_that_go_through_a_batch_several_times_are_refused() -> None:
    task, items = case("pairs", model := tiny_bert())
    with pytest.raises(UserError, match=r"train\.r_drop: 'embed' compares the examples"):
        Trainer(model, task, InMemory(task, items), TrainConfig(r_drop=0.5))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_packed_equals_padded(pooling: str) -> None:
    model = tiny_bert().double()
    task, items = case("negatives", model, pooling=pooling)
    fast, slow = step(model, task, [items]), step(model, task, [items], arrange=dense)
    assert fast[0] == pytest.approx(slow[0], rel=1e-12)
    assert distance(fast[1], slow[1]) <= 1e-10


def test_a_joined_batch_is_that_of_all_its_examples() -> None:
    task, items = case("scored", tiny_bert())
    blank = {"embedding": np.zeros((), np.float32)}
    joined, whole = join([collate(part, blank) for part in (items[:3], items[3:4], items[4:])]), collate(items, blank)
    for name in ("ids", "types", "positions", "offsets", "example"):
        assert np.array_equal(getattr(joined.streams["source"], name), getattr(whole.streams["source"], name))
    assert np.array_equal(joined.labels["embedding"], whole.labels["embedding"])
    assert joined.masks["embedding"].tolist() == [i != 2 for i in range(9)]
    assert "score" in task.columns


# --- against sentence-transformers ------------------------------------------------------------------------------
class _Fixed(torch.nn.Module):
    """Stands where its losses expect a model; they are given the vectors."""

    def get_embedding_dimension(self) -> int:
        return 6


def test_the_losses_are_those_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    generator = torch.Generator().manual_seed(0)
    text, pair, bad, worse = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    ranking = losses.MultipleNegativesRankingLoss(_Fixed(), scale=20.0)
    flat = torch.nn.functional.normalize(torch.stack([text, pair, bad, worse], 1).flatten(0, 1), dim=-1)
    ours = contrastive_loss(flat, torch.arange(0, 20, 4), np.arange(20), 0.05).mean()
    theirs = ranking.compute_loss_from_embeddings([text, pair, bad, worse], None)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-10)
    score = torch.tensor([0.1, 0.9, 0.9, 0.4, 0.0], dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(text, pair)
    ours = ordered_loss(cosine, score, torch.ones(5, dtype=torch.bool), 0.05)
    theirs = losses.CoSENTLoss(_Fixed(), scale=20.0).compute_loss_from_embeddings([text, pair], score)
    assert ours.tolist() == pytest.approx([float(theirs)] * 5, rel=1e-10)


def test_a_copy_of_the_own_pair_is_no_negative() -> None:
    flat = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    flat[3] = flat[1]
    first = torch.tensor([0, 2, 4])
    known, unknown = (contrastive_loss(flat, first, np.array(ids), 0.05) for ids in ([0, 1, 2, 1, 4, 5], range(6)))
    logits = flat[0] @ flat[[1, 5]].T / 0.05
    assert float(known[0]) == pytest.approx(float(torch.logsumexp(logits, 0) - logits[0]), rel=1e-5)
    assert unknown[0] > known[0]


@pytest.fixture(scope="module")
def fitted(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("embed")
    train = write_rows(folder / "train.jsonl", questions(24, negatives=1))
    config = recipe(
        data_={"train": train, "test": train, "validation": train},
        train_={"epochs": 4, "learning_rate": 3e-3, "dropout": 0.0, "token_budget": 200, "batch_size": 24},
        options={"dimensions": [8], "query_prefix": "query: ", "passage_prefix": "passage: ", "max_length": 12},
        task="embed",
    )
    return fit(config, folder / "out").artifact


def test_it_learns_and_says_what_it_found(fitted: Artifact) -> None:
    found = fitted.manifest.metrics["test"]
    assert set(found) == {"mrr", "recall@1", "recall@5", "recall@10"}
    assert found["mrr"].value > 0.5
    assert found["mrr"].interval is not None
    effect = fitted.manifest.history[-1].effect
    assert effect["positions_per_token"] > 1.9  # the batch was cut, and every part computed twice
    assert "missed" in (fitted.path / "run" / "report.html").read_text("utf-8")


def test_sentence_transformers_gives_the_same_vectors(fitted: Artifact) -> None:
    package = pytest.importorskip("sentence_transformers")
    theirs = package.SentenceTransformer(str(fitted.path), device="cpu", local_files_only=True)
    texts = [row["text"] for row in rows(12)] + ["card", "a long question " * 9]
    for kind in ("query", "passage"):
        expected = theirs.encode(texts, prompt_name=kind)
        ours = np.array([one["embedding"] for one in load(fitted.path).predict(texts, kind=kind)])
        assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert sentence_files.read(fitted.path) == {
        "pooling": "mean",
        "normalise": True,
        "max_length": 12,
        "query_prefix": "query: ",
        "passage_prefix": "passage: ",
    }


def test_the_settings_of_a_model_are_read_from_its_directory(minilm: Path, tmp_path: Path) -> None:
    assert sentence_files.read(minilm) == {"pooling": "mean", "normalise": True, "max_length": 256}
    assert sentence_files.read(tmp_path) == {}
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.models.Dense", "path": "1"}]))
    with pytest.raises(UserError, match="unknown module 'Dense'"):
        sentence_files.read(tmp_path)


def test_a_second_run_keeps_the_prefixes_and_may_change_them(fitted: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", questions(6))
    config = recipe(data_={"train": train}, task="embed", model=str(fitted.path), options={"query_prefix": "ask: "})
    again = fit(config, tmp_path / "again", watch=Watch()).artifact
    options = TorchEngine(again).task.state()["options"]
    assert (options["query_prefix"], options["passage_prefix"], options["max_length"]) == ("ask: ", "passage: ", 12)


def test_a_part_of_a_vector_is_given_where_it_was_trained(fitted: Artifact) -> None:
    opened = load(fitted.path)
    [[whole]], [[part]] = ([list(a.values()) for a in opened.predict(["where"], dimension=d)] for d in (None, 8))
    assert (len(whole), len(part)) == (32, 8)
    assert np.linalg.norm(part) == pytest.approx(1, rel=1e-5)
    assert np.array(part) == pytest.approx(np.array(whole[:8]) / np.linalg.norm(whole[:8]), rel=1e-5)
    with pytest.raises(UserError, match="not trained for vectors of 16"):
        opened.predict(["where"], dimension=16)
    with pytest.raises(UserError, match="64 is no part of a vector of 32"):
        Embed(PAIRS, EmbedOptions(dimensions=(64,))).attach(tiny_bert())


def test_ranks_are_those_of_the_obvious_loop() -> None:
    data = questions(9, negatives=1)
    data[4]["question"] = data[3]["question"]  # one question with two right answers
    model = tiny_bert()
    task = Embed.from_records(data, {**PAIRS, "negatives": "negatives"}, EmbedOptions())
    engine = TorchEngine(Loaded(task, model, tokenizer()))
    answers = [answer for _, answer in engine.run_stream(data, labelled=True)]
    texts: dict[str, np.ndarray] = {}
    for answer, row in zip(answers, data, strict=True):
        texts |= dict(zip([row["answer"], *row["negatives"]], answer[1:], strict=True))
    reciprocal: list[float] = []
    for answer, row in zip(answers, data, strict=True):
        right = {other["answer"] for other in data if other["question"] == row["question"]}
        own = answer[0] @ texts[row["answer"]]
        reciprocal.append(1 / (1 + sum(answer[0] @ v >= own for t, v in texts.items() if t not in right)))
    found = task.evaluate(answers, data)
    assert found.values["mrr"] == pytest.approx(np.mean(reciprocal))
    assert found.values["recall@1"] == pytest.approx(np.mean(np.array(reciprocal) == 1))
    assert found.intervals["mrr"][0] <= found.values["mrr"] <= found.intervals["mrr"][1]


def test_minilm_orders_real_pairs_as_people_do(minilm: Path, shared_data: Path) -> None:
    source = open_source(shared_data / "stsb_en_zh" / "en_test.jsonl.xz")
    data = [row.values for row in source.peek(60)]
    columns = {"text": "text_a", "text_pair": "text_b", "score": "score"}
    task = Embed.from_records(data, columns, EmbedOptions(**sentence_files.read(minilm)))
    from lexmill import models

    engine = TorchEngine(Loaded(task, models.load(minilm), tokenizer()))
    found = evaluate(engine, data).metrics
    assert found.values["spearman"] > 0.7
    answers = [answer for _, answer in engine.run_stream(data, labelled=True)]
    cosine = [a[0] @ a[1] for a in answers]
    assert found.values["spearman"] == pytest.approx(spearmanr(cosine, [row["score"] for row in data]).statistic)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"a": "x", "b": "y", "score": "high"}, SCORED, "'high' of column 'score' is not a number"),
        ({"a": "x", "b": None, "score": 1}, SCORED, "'b' of a record is null"),
        ({"a": "x", "b": "y", "score": 1, "n": "z"}, {**SCORED, "negatives": "n"}, "no use for negatives"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Embed.from_records([row], columns, EmbedOptions()).encode([row], tokenizer(), labelled=True)


def test_the_state_survives_and_requests_become_records() -> None:
    task = Embed(PAIRS, EmbedOptions(dimensions=(4, 8), passage_prefix="p: "))
    assert Embed.from_state(json.loads(json.dumps(task.state()))).state() == task.state()
    assert task.items(EmbedRequest(texts=["x"], kind="passage")) == [{"question": "x", "embed_as": "passage"}]
    assert (
        batch_of(task, task.encode(task.items(task.probe(["x", "y"])), tokenizer(), labelled=False)).num_examples == 2
    )


def test_scores_that_are_all_alike_are_an_error_in_the_data() -> None:
    records = [
        {"a": "x", "b": "y", "score": 1.0},
        {"a": "y", "b": "z", "score": "1"},
        {"a": "y", "b": "z", "score": None},
    ]
    columns = {"text": "a", "text_pair": "b", "score": "score"}
    with pytest.raises(UserError, match="'score' holds only 1"):
        Embed.from_records(records, columns, EmbedOptions())
