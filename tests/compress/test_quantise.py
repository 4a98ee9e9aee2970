"""Int8: what it makes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.compress.material import assert_reloads, material_of, rows_of, texts
from tests.small_classifier import small_classifier
from torch import nn

from lexmill import models
from lexmill.compress import Step
from lexmill.compress.calibrate import apart, groups_of, outputs
from lexmill.data import banking77, open_source
from lexmill.data.tokenizer import load_tokenizer
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import answered
from lexmill.models import ModelConfig, Transformer
from lexmill.models.backbone import Block
from lexmill.nn.embedding import Int8Embedding
from lexmill.nn.fake_int8 import FakeInt8Linear, rounded
from lexmill.nn.int8 import Grid, Int8Linear, kernel_for
from lexmill.nn.linear import Linear


def quantised(subject: Loaded | None = None, **options: Any) -> tuple[Loaded, dict[str, float]]:
    subject = subject or small_classifier()
    method, read = Step("int8", {"rows": 48, **options}).read("steps[0]")
    return method.apply(subject, material_of(small_classifier(), train=48), read)


def with_outliers(factor: float, inside: str = "states") -> Loaded:
    """An encoder a few of whose columns reach very far, which the matrices behind them take back: the same function as
    with a factor of 1. These are columns of the hidden states, or those between a feed-forward's two layers."""
    plain = small_classifier()
    config = replace(cast("ModelConfig", plain.model.config), norm_place="pre", final_norm=True, activation="relu")
    model = models.init(config, "bert", 0)
    torch.manual_seed(0)
    plain.task.attach(model)
    columns = [3, 17]
    for block in cast("list[Block]", list(cast("Transformer", model.trunk).layers)):
        attention, mlp = block.attention, block.mlp
        if inside == "states":
            _move(block.attention_norm, [attention.query, attention.key, attention.value], columns, factor)
            _move(block.mlp_norm, [mlp.up], columns, factor)
        else:
            _move(mlp.up, [mlp.down], columns, factor)
    return replace(plain, model=model.eval())


@torch.no_grad()
def _move(giver: nn.Module, readers: Sequence[nn.Module], columns: Sequence[int], factor: float) -> None:
    for name in ("weight", "bias"):
        giver.get_parameter(name)[columns] *= factor
    for reader in readers:
        reader.get_parameter("weight")[:, columns] /= factor


def minilm_with_outliers(minilm: Path, factor: float) -> Loaded:
    """The real encoder, in which values of two channels a layer reach very far, and the output matrix takes it back."""
    task = small_classifier().task
    model = models.load(minilm)
    torch.manual_seed(0)
    task.attach(model)
    for block in cast("list[Block]", list(cast("Transformer", model.trunk).layers)):
        _move(block.attention.value, [block.attention.output], [5, 200], factor)
    return Loaded(task, model.eval(), load_tokenizer(minilm))


@pytest.mark.parametrize("scheme", ["static", "token"])
def test_every_layer_and_table_becomes_bytes_and_is_read_again_as_it_was(scheme: str, tmp_path: Path) -> None:
    loaded, effect = quantised(scheme=scheme)
    assert effect["layers_int8"] == 12
    assert effect["layers_skipped"] == 0
    assert effect["kernels_int8"] == (12 if kernel_for(torch.device("cpu")) == "onednn" else 0)
    assert effect["tables_int8"] == 2
    assert effect["bytes_after"] < 0.4 * effect["bytes_before"]
    assert effect["output_error"] < 0.1
    assert isinstance(loaded.model.trunk.embeddings.get_submodule("token"), Int8Embedding)
    assert_reloads(loaded, tmp_path)


@pytest.mark.parametrize("scheme", ["static", "token"])
def test_a_text_is_answered_the_same_alone_and_among_31_others(scheme: str) -> None:
    engine = TorchEngine(quantised(scheme=scheme)[0])
    asked = [{"question": text} for text in texts(32, seed=5)]
    _, together = answered(engine, asked)
    for row, among in zip(asked[:6], together, strict=False):
        _, [alone] = answered(engine, [row])
        np.testing.assert_allclose(alone["label"], among["label"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"clip": "percentile"}, {"clip": "mse"}, {"smooth": 0.5}])
def test_other_grids_are_near_too(options: dict[str, Any]) -> None:
    _, effect = quantised(**options)
    assert effect["output_error"] < 0.1
    assert effect["layers_int8"] == 12


@pytest.mark.parametrize("inside", ["states", "feed_forward"])
def test_columns_that_reach_far_are_the_same_function(inside: str) -> None:
    rows = [{"question": text, "intent": "fee"} for text in texts(8)]
    assert apart(outputs(with_outliers(1000.0, inside), rows), outputs(with_outliers(1.0), rows)) < 1e-3


def test_an_encoder_that_int8_wrecks_is_refused() -> None:
    with pytest.raises(UserError, match="changes the answers"):
        quantised(with_outliers(1000.0), rescue=False)


def test_an_encoder_that_int8_wrecks_is_rescued_by_smoothing() -> None:
    _, effect = quantised(with_outliers(1000.0))
    assert effect["layers_int8"] == 12
    assert effect["layers_smoothed"] == 10
    assert effect["validation_error"] < 0.1


def test_an_encoder_that_int8_wrecks_is_rescued_by_sparing_its_layers() -> None:
    loaded, effect = quantised(with_outliers(1000.0, "feed_forward"))
    assert 0 < effect["layers_skipped"] < 12
    assert effect["validation_error"] <= 0.1
    places = {place for group in groups_of(loaded.model.trunk) for place in group.places}
    assert effect["layers_skipped"] == len(places)


@pytest.mark.parametrize("scheme", ["static", pytest.param("token", marks=pytest.mark.slow)])
def test_a_minilm_that_int8_wrecks_is_refused_or_rescued(minilm: Path, scheme: str) -> None:
    rows = banking_rows(32)
    material = replace(material_of(train=1), train=rows[:16], validation=rows[16:])
    whole = outputs(minilm_with_outliers(minilm, 1.0), rows)
    assert apart(outputs(minilm_with_outliers(minilm, 1e4), rows), whole) < 1e-3

    def compressed(**options: Any) -> tuple[Loaded, dict[str, float]]:
        method, read = Step("int8", {"scheme": scheme, **options}).read("steps[0]")
        return method.apply(minilm_with_outliers(minilm, 1e4), material, read)

    with pytest.raises(UserError, match="changes the answers"):
        compressed(rescue=False)
    rescued, effect = compressed()
    assert effect["layers_int8"] == 36
    assert effect["layers_smoothed"] == 30
    assert apart(outputs(rescued, rows), whole) < 0.1
    _, together = answered(TorchEngine(rescued), rows)
    for row, among in zip(rows[:3], together, strict=False):
        _, [alone] = answered(TorchEngine(rescued), [row])
        np.testing.assert_allclose(alone["label"], among["label"], rtol=1e-5, atol=1e-5)


def banking_rows(count: int) -> list[dict[str, str]]:
    read = [row.values for row in islice(open_source(banking77()[1]), count)]
    return [{"question": str(row["text"]), "intent": "fee"} for row in read]


def test_layers_that_are_named_stay_dense() -> None:
    loaded, effect = quantised(skip=["layers.0.mlp"], embeddings=False)
    assert effect["layers_skipped"] == 2
    assert effect["tables_int8"] == 0
    assert not isinstance(loaded.model.trunk.get_submodule("layers.0.mlp.up"), Int8Linear)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"skip": ["layers.7"]}, "no linear layer"),
        ({"skip": ["layers"]}, "every layer is skipped"),
        ({"scheme": "token", "clip": "mse"}, "as far as the row"),
    ],
)
def test_what_cannot_act_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        quantised(**options)


def test_bytes_are_not_made_bytes_again() -> None:
    loaded, _ = quantised()
    with pytest.raises(UserError, match="no linear layers"):
        quantised(loaded)


@pytest.mark.parametrize("scheme", ["static", "token"])
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_a_layer_that_rounds_in_floating_point_computes_what_bytes_do(scheme: str, smooth: float | None) -> None:
    torch.manual_seed(0)
    dense, x = Linear(48, 24), torch.randn(200, 48) * torch.linspace(0.1, 3, 48)
    divisor = None if smooth is None else torch.linspace(0.2, 2, 48)
    at = x if divisor is None else x / divisor
    grid = Grid.over(float(at.min()), float(at.max())) if scheme == "static" else None
    fake, real = FakeInt8Linear.over(dense, grid, divisor), Int8Linear.of(dense, grid, divisor)
    with torch.no_grad():
        apart = (fake(x) - real(x)).abs()
    # One code of one input, times the largest weight, where rounding decides otherwise.
    code = (
        (grid.scale if grid is not None else float(at.abs().max()) / 127) * float(dense.weight.detach().abs().max()) * 2
    )
    assert float(apart.max()) <= 2 * code
    assert float(apart.median()) < 1e-5


def test_rounding_lets_gradients_through_within_the_grid_alone() -> None:
    torch.manual_seed(0)
    dense, x = Linear(8, 4), torch.tensor([[0.5, -0.5, 9.0, -9.0, 0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    FakeInt8Linear.over(dense, Grid.over(-1.0, 1.0)).forward(x).sum().backward()
    assert x.grad is not None
    inside = torch.tensor([True, True, False, False, True, True, True, True])
    torch.testing.assert_close(x.grad[0, inside], rounded(dense.weight.detach()).sum(0)[inside])
    assert not x.grad[0, ~inside].any()
    assert dense.weight.grad is not None
    assert dense.weight.grad.abs().sum() > 0


def test_training_with_rounding_makes_up_for_what_rounding_takes() -> None:
    subject, rows = with_outliers(200.0), rows_of(small_classifier(), 60, seed=3)
    teacher = with_outliers(200.0)
    material = replace(material_of(teacher, train=256), validation=())
    bare = {"rows": 48, "rescue": False, "max_error": 10.0}
    recovery = {"epochs": 6, "learning_rate": 3e-4, "batch_size": 16, "task_weight": 0.0}
    method, plain = Step("int8", bare).read("step")
    _, trained = Step("int8", {**bare, "train": True, "recovery": recovery}).read("step")
    wanted = outputs(teacher, rows)
    rough, _ = method.apply(with_outliers(200.0), material, plain)
    fine, effect = method.apply(subject, material, trained)
    assert effect["layers_trained_rounding"] == effect["layers_int8"] == 12
    assert effect["weights_moved"] > 0
    assert effect["divergence_after"] < effect["divergence_before"]
    assert effect["output_error"] < 0.1  # bytes against the model that was trained to be rounded
    assert apart(outputs(fine, rows), wanted) < 0.7 * apart(outputs(rough, rows), wanted)
    assert not any(isinstance(one, FakeInt8Linear) for one in fine.model.modules())
