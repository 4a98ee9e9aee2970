"""Training on kept activations is training without them, but for what is not computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.parts import (
    VOCABULARY,
    InMemory,
    batch_of,
    classifier,
    distance,
    rows,
    tiny_bert,
    tiny_llama,
    tokenizer,
)

from lexmill import models
from lexmill.adapt import AdaptConfig, adapt
from lexmill.data import Tokens
from lexmill.data.batch import Example
from lexmill.models import Model, RecurrentConfig
from lexmill.tasks import Classify
from lexmill.tasks.inputs import dense, packed
from lexmill.train import Store, TrainConfig, Trainer, TrainResult, keep_activations, kept_bytes
from lexmill.train.kept import Dataset

CONFIG = TrainConfig(epochs=3, batch_size=8, learning_rate=1e-2, token_budget=150)
METHODS = {
    "upper lora": (AdaptConfig("lora", layers=1), 2),
    "upper two": (AdaptConfig("full", layers=2), 1),
    "biases": (AdaptConfig("bitfit", layers=1), 2),
    "heads alone": (AdaptConfig("frozen"), 3),
}
Case = tuple[Model, Classify, InMemory]


TRUNKS: dict[str, Callable[[], Model]] = {
    "bert": lambda: tiny_bert(num_layers=3),
    "llama": lambda: tiny_llama(num_layers=3),
    "lstm": lambda: models.init(RecurrentConfig(VOCABULARY, "lstm", 24, 16, num_layers=3, dropout=0.0), "lstm", 0),
}


def case(method: AdaptConfig, trunk: str = "bert") -> Case:
    """Pairs of texts of many lengths for three layers, so that positions and types matter."""
    model = TRUNKS[trunk]()
    data = [{**row, "other": row["label"] * (i % 4 + 1)} for i, row in enumerate(rows(21))]
    task = classifier(data, model, columns={"text": "text", "text_pair": "other", "label": "label"})
    torch.manual_seed(2)
    adapt(model, method)
    return model, task, InMemory(task, task.encode(data, tokenizer(), labelled=True))


def train(model: Model, task: Classify, data: Dataset, **more: Any) -> tuple[list[float], TrainResult]:
    losses: list[float] = []
    result = Trainer(model, task, data, CONFIG, **more).run(lambda event: losses.append(event["loss"]))
    return losses, result


@pytest.mark.parametrize(
    ("kind", "trunk"),
    [*((kind, "bert") for kind in METHODS), ("upper two", "llama"), ("heads alone", "llama"), ("upper two", "lstm")],
)
def test_a_run_on_kept_activations_is_the_run_without(kind: str, trunk: str, tmp_path: Path) -> None:
    method, layers = METHODS[kind]
    slow, task, data = case(method, trunk)
    assert len(set(data.lengths.tolist())) > 5
    expected, whole = train(slow, task, data)
    fast, task, data = case(method, trunk)
    assert fast.untrained_layers() == layers
    with keep_activations(fast, data, layers, tmp_path) as kept:
        assert kept.start.bytes == kept_bytes(fast, data, "fp32") == data.lengths.sum() * 32 * 4
        found, saving = train(fast, task, kept, start=kept.start)
    assert found == pytest.approx(expected, rel=1e-5)
    assert distance(fast.state_dict(), slow.state_dict()) <= 1e-5
    # Three epochs of the upper layers, and one of the lower.
    share = (3 * (3 - layers) + layers) / 9
    assert saving.positions_per_token == pytest.approx(share * whole.positions_per_token, rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_states_kept_in_half_the_bytes_are_the_same_but_rounded(tmp_path: Path) -> None:
    model, _, data = case(METHODS["upper lora"][0])
    with (
        keep_activations(model, data, 2, tmp_path) as exact,
        keep_activations(model, data, 2, tmp_path, stored="bf16") as half,
    ):
        assert half.start.bytes * 2 == exact.start.bytes
        a, b = (packed(k.batch(np.arange(5)).streams["source"], model.device).layout.known for k in (exact, half))
    assert a is not None
    assert b is not None
    assert torch.equal(a.rows.bfloat16().float(), b.rows)


def test_what_is_kept_does_not_depend_on_when_it_is_made(tmp_path: Path) -> None:
    model, task, data = case(METHODS["upper lora"][0])
    model.set_dropout(0.3)
    with keep_activations(model, data, 2, tmp_path) as kept:
        first = kept.rows.copy()
        train(model, task, kept)
    model.train()
    with keep_activations(model, data, 2, tmp_path) as again:
        assert np.array_equal(again.rows, first)
    assert model.training


def test_a_resumed_run_ends_in_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    class Pulled(Exception):
        pass

    def stop(event: Any) -> None:
        if event["step"] == 5:
            raise Pulled

    method, layers = METHODS["upper lora"]
    whole, task, data = case(method)
    with keep_activations(whole, data, layers, tmp_path) as kept:
        _, expected = train(whole, task, kept, start=kept.start)
    store = Store(tmp_path / "checkpoints")
    killed, task, data = case(method)
    with keep_activations(killed, data, layers, tmp_path) as kept, pytest.raises(Pulled):
        Trainer(killed, task, kept, CONFIG, store=store, start=kept.start).run(stop)
    resumed, task, data = case(method)
    with keep_activations(resumed, data, layers, tmp_path) as kept:
        trainer = Trainer(resumed, task, kept, CONFIG, store=store, start=kept.start)
        assert trainer.resume()
        assert trainer.progress.step == 3
        found = trainer.run(lambda event: None)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert found.positions_per_token == expected.positions_per_token


def test_states_are_not_used_for_other_tokens_and_padding_knows_none(tmp_path: Path) -> None:
    model, task, data = case(METHODS["upper two"][0])
    model.eval()
    with keep_activations(model, data, 1, tmp_path) as kept:
        batch = kept.batch(np.arange(6))
        stream = batch.streams["source"]
        before = model.trunk.layer_rows
        padded = task.forward(model, batch, dense)["label"]
        assert model.trunk.layer_rows - before == 3 * 6 * int(stream.lengths.max())
        torch.testing.assert_close(task.forward(model, batch)["label"], padded)
        masked = replace(batch, streams={"source": replace(stream, ids=np.full_like(stream.ids, 103))})
        plain = replace(batch, streams={"source": replace(masked.streams["source"], kept=None)})
        assert torch.equal(task.forward(model, masked)["label"], task.forward(model, plain)["label"])


def test_every_stream_of_an_example_has_its_own_rows(tmp_path: Path) -> None:
    model = tiny_bert(num_layers=3)
    texts = [np.arange(start, start + length) for start, length in ((5, 3), (50, 7), (9, 1), (70, 4), (30, 2))]
    examples = [
        Example({"b": (Tokens(texts[0]), Tokens(texts[1])), "a": (Tokens(texts[2]),)}),
        Example({"a": (Tokens(texts[3]),)}),
        Example({"a": (Tokens(texts[4]),), "b": (Tokens(texts[0]),)}),
    ]

    class Pairs:
        lengths = np.array([11, 4, 5])

        def __len__(self) -> int:
            return 3

        def batch(self, indices: np.ndarray) -> Any:
            return batch_of(task, [examples[i] for i in indices])

    task = classifier(rows(4), model)
    model.eval()
    with keep_activations(model, Pairs(), 2, tmp_path) as kept, torch.no_grad():
        for indices in ([0, 1, 2], [2, 0], [1]):
            for stream in kept.batch(np.array(indices)).streams.values():
                ids, positions, types, layout = packed(replace(stream, kept=None), model.device)
                expected = model.trunk(ids, positions, layout, types=types, until=2)
                known = packed(stream, model.device).layout.known
                assert known is not None
                torch.testing.assert_close(known.rows, expected, rtol=1e-5, atol=1e-6)
