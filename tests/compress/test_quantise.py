"""Int8: what it makes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.compress.material import assert_reloads, material_of, texts
from tests.small_classifier import small_classifier

from lexmill import models
from lexmill.compress import Step
from lexmill.compress.calibrate import apart, groups_of, outputs
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import answered
from lexmill.models import ModelConfig, Transformer
from lexmill.models.backbone import Block
from lexmill.nn.embedding import Int8Embedding
from lexmill.nn.int8 import Int8Linear, kernel_for


def quantised(subject: Loaded | None = None, **options: Any) -> tuple[Loaded, dict[str, float]]:
    subject = subject or small_classifier()
    method, read = Step("int8", {"rows": 48, **options}).read("steps[0]")
    return method.apply(subject, material_of(small_classifier(), train=48), read)


def with_outliers(factor: float) -> Loaded:
    """An encoder whose norms give a few columns that reach very far, which the matrices behind them take back: the
    same function as with a factor of 1."""
    plain = small_classifier()
    config = replace(cast("ModelConfig", plain.model.config), norm_place="pre", final_norm=True)
    model = models.init(config, "bert", 0)
    torch.manual_seed(0)
    plain.task.attach(model)
    columns = [3, 17]
    with torch.no_grad():
        for block in cast("list[Block]", list(cast("Transformer", model.trunk).layers)):
            for norm, readers in (
                (block.attention_norm, [block.attention.query, block.attention.key, block.attention.value]),
                (block.mlp_norm, [block.mlp.up]),
            ):
                norm.get_parameter("weight")[columns] *= factor
                norm.get_parameter("bias")[columns] *= factor
                for reader in readers:
                    reader.weight[:, columns] /= factor
    return replace(plain, model=model.eval())


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


def test_columns_that_reach_far_are_the_same_function() -> None:
    rows = [{"question": text, "intent": "fee"} for text in texts(8)]
    assert apart(outputs(with_outliers(1000.0), rows), outputs(with_outliers(1.0), rows)) < 1e-3


def test_an_encoder_that_int8_wrecks_is_refused() -> None:
    with pytest.raises(UserError, match="changes the answers"):
        quantised(with_outliers(1000.0), spare=False)


def test_an_encoder_that_int8_wrecks_is_rescued_by_smoothing() -> None:
    _, effect = quantised(with_outliers(1000.0), spare=False, smooth=0.5)
    assert effect["layers_int8"] == 12
    assert effect["validation_error"] < 0.1


def test_an_encoder_that_int8_wrecks_is_rescued_by_sparing_its_layers() -> None:
    loaded, effect = quantised(with_outliers(1000.0))
    assert 0 < effect["layers_skipped"] < 12
    assert effect["validation_error"] <= 0.1
    spared = {place for group in groups_of(loaded.model.trunk) if group.reads_states for place in group.places}
    assert effect["layers_skipped"] == len(spared)


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
