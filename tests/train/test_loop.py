"""The loop: early stopping, precision, what its events say, and how it stops when numbers run away."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.parts import InMemory, classifier, rows, tiny_bert, tokenizer

from lexmill.errors import Failure, UserError
from lexmill.models import Model
from lexmill.nn import matmul
from lexmill.nn.linear import Linear
from lexmill.train import Store, TrainConfig, Trainer

CONFIG = TrainConfig(epochs=2, batch_size=8, learning_rate=1e-3)


def trainer(config: TrainConfig = CONFIG, model: Model | None = None, **more: Any) -> Trainer:
    model, data = model or tiny_bert(), rows(24)
    task = classifier(data, model)
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return Trainer(model, task, InMemory(task, task.encode(data, tokenizer(), labelled=True)), config, **more)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def scores(values: list[float], seen: list[dict[str, torch.Tensor]], model: Model) -> Callable[[], Mapping[str, float]]:
    """Validation results given beforehand; `seen` is given the weights at each validation."""

    def validate() -> Mapping[str, float]:
        assert not model.training
        seen.append(weights(model))
        return {"accuracy": values[len(seen) - 1]}

    return validate


def test_early_stopping_keeps_the_best_weights_and_records_their_epoch() -> None:
    model = tiny_bert()
    seen: list[dict[str, torch.Tensor]] = []
    config = TrainConfig(epochs=9, batch_size=8, learning_rate=1e-3, weight_decay=0.1, patience=2)
    run = trainer(config, model, validate=scores([0.5, 0.9, 0.3, 0.9], seen, model))
    events: list[Mapping[str, Any]] = []
    result = run.run(events.append)
    assert (result.best_epoch, result.stopped_early, result.epochs, result.steps) == (2, True, 4, 12)
    assert equal(weights(model), seen[1])
    assert not equal(seen[1], seen[3])
    found = [(e["step"], e["epoch"], e["accuracy"]) for e in events if e["phase"] == "validate"]
    assert found == [(3, 1, 0.5), (6, 2, 0.9), (9, 3, 0.3), (12, 4, 0.9)]


def test_without_patience_the_best_epoch_wins_at_the_end() -> None:
    model = tiny_bert()
    seen: list[dict[str, torch.Tensor]] = []
    result = trainer(CONFIG, model, validate=scores([0.7, 0.6], seen, model)).run(lambda _: None)
    assert (result.best_epoch, result.stopped_early) == (1, False)
    assert equal(weights(model), seen[0])


def test_patience_without_validation_is_refused() -> None:
    with pytest.raises(UserError, match="needs validation data"):
        trainer(TrainConfig(patience=1))


def test_every_step_says_what_it_did() -> None:
    events: list[Mapping[str, Any]] = []
    result = trainer().run(events.append)
    assert [event["step"] for event in events] == list(range(6))
    for event in events:
        assert event["phase"] == "train"
        assert event["steps"] == 6
        assert event["loss"] > 0
        assert event["grad_norm"] > 0
        assert event["learning_rate"] == pytest.approx(1e-3 * (1 - event["step"] / 6))
        assert 1.0 <= event["positions_per_token"] < 1.2
        assert 0 < event["ceiling_share"] < 1.5
        assert event["tokens_per_second"] > event["examples_per_second"] > 0
        assert event["peak_memory"] > 2**20
    losses = [event["loss"] for event in events]
    assert result.final_loss == losses[-1]
    assert sum(losses[3:]) < sum(losses[:3]), "the second epoch, over the same examples, is not easier than the first"
    assert result.seconds == pytest.approx(sum(event["seconds"] for event in events))
    assert 1.0 <= result.positions_per_token < 1.2


def test_a_finished_run_resumed_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = trainer(store=store)
    before = first.run(lambda _: None)
    again = trainer(store=store)
    assert again.resume()
    events: list[Mapping[str, Any]] = []
    after = again.run(events.append)
    assert events == []
    assert equal(weights(again.model), weights(first.model))
    assert (after.steps, after.final_loss, after.seconds) == (before.steps, before.final_loss, before.seconds)
    assert math.isfinite(after.examples_per_second)


def test_bf16_runs_and_stays_close_to_fp32() -> None:
    runs: list[list[float]] = []
    for precision in ("fp32", "bf16"):
        events: list[Mapping[str, Any]] = []
        run = trainer(TrainConfig(epochs=2, batch_size=8, learning_rate=1e-3, precision=precision))
        run.run(events.append)
        assert run.model.dtype == torch.float32
        assert all(state.dtype != torch.bfloat16 for state in run.optimizer.state().values())
        runs.append([event["loss"] for event in events])
    assert runs[0] != runs[1]
    assert runs[1] == pytest.approx(runs[0], rel=0.02)


@pytest.mark.skipif(not matmul._onednn_is_faster(), reason="this CPU's products are MKL's")
def test_weights_that_stay_as_they_are_are_packed_and_again_after_resuming(tmp_path: Path) -> None:
    def run() -> Trainer:
        model = tiny_bert()
        for layer in model.trunk.layers[:1]:
            layer.requires_grad_(requires_grad=False)
        return trainer(store=Store(tmp_path), model=model)

    first = run()
    first.run(lambda _: None)
    again = run()
    assert again.resume()
    for found in (first, again):
        layers = [layer for layer in found.model.modules() if isinstance(layer, Linear)]
        held = [matmul._copies(layer.weight) for layer in layers]
        assert [bool(copies) for copies in held] == [not layer.weight.requires_grad for layer in layers]
        for layer, copies in zip(layers, held, strict=True):
            assert all(copy.version == layer.weight._version for copy in copies.values())


def test_a_loss_that_is_not_finite_is_a_failure_that_says_where() -> None:
    run = trainer(TrainConfig(epochs=2, batch_size=8, learning_rate=1e30, max_grad_norm=0))
    with pytest.raises(Failure, match=r"step [1-3]: loss") as raised:
        run.run(lambda _: None)
    assert "learning_rate" in (raised.value.hint or "")


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    moved: list[float] = []
    for limit in (0.0, 0.01):
        # With so large an epsilon AdamW's first step is proportional to the gradient.
        run = trainer(TrainConfig(epochs=1, batch_size=24, learning_rate=1e3, epsilon=1e3, max_grad_norm=limit))
        before = weights(run.model)
        norm = run.step().grad_norm
        after = weights(run.model)
        moved.append(float(torch.stack([(after[n] - before[n]).norm() for n in before]).norm()))
    assert moved[1] == pytest.approx(moved[0] * 0.01 / norm, rel=0.01)


def test_the_token_budget_changes_nothing_but_the_cut() -> None:
    losses: list[list[float]] = []
    for budget in (30, 4096):
        events: list[Mapping[str, Any]] = []
        trainer(TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3, token_budget=budget)).run(events.append)
        losses.append([event["loss"] for event in events])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_run_at_the_next_step(tmp_path: Path) -> None:
    """What arrives in a finaliser is printed and forgotten by Python."""

    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    steps: list[int] = []

    def emit(event: Mapping[str, Any]) -> None:
        if event["phase"] == "train":
            steps.append(event["step"])
            if event["step"] == 3:
                Interrupted()

    run = trainer(replace(CONFIG, checkpoint_every=2), store=Store(tmp_path, keep=1))
    with pytest.raises(KeyboardInterrupt):
        run.run(emit)
    assert steps == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = trainer(replace(CONFIG, checkpoint_every=2), store=Store(tmp_path, keep=1))
    assert again.resume()
    again.run(emit)
    assert steps == [0, 1, 2, 3, 4, 5]


def test_an_interrupt_is_left_to_a_program_that_handles_it() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        result = trainer().run(lambda event: signal.raise_signal(signal.SIGINT) if event["step"] == 1 else None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.steps, came) == (6, [signal.SIGINT])
