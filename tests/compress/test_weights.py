"""Weights in few bits: how they are rounded, and what becomes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.decoders import GPT2, LLAMA, small_decoder
from tests.compress.material import assert_reloads, material_of
from tests.small_classifier import small_classifier
from torch import Tensor

from lexmill import models
from lexmill.compress import Step
from lexmill.compress.weights_rounding import awq, decoded, gptq, lost
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import greedy
from lexmill.models.recurrent import RecurrentConfig
from lexmill.nn.embedding import Int8Embedding
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.weight_only import Form, WeightOnlyLinear, nearest

FORMS = [Form("int8"), Form("int4", 32), Form("int4", 32, symmetric=False), Form("fp8")]


def inputs_and_matrix(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that go together, some columns much larger; their second moments; a matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    x = (x + 0.3 * torch.randn(600, 64, generator=generator)) * torch.logspace(-1, 1, 64)
    return x, x.double().t() @ x.double() / len(x), torch.randn(48, 64, generator=generator)


def weights(subject: Loaded | None = None, **options: Any) -> tuple[Loaded, dict[str, float]]:
    method, read = Step("weights", {"rows": 48, **options}).read("steps[0]")
    return method.apply(subject or small_classifier(), material_of(small_classifier()), read)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_less_of_the_outputs_than_the_nearest_codes(form: Form, act_order: bool) -> None:
    x, moments, weight = inputs_and_matrix()
    plain, chosen = nearest(weight, form), gptq(weight, moments, form, act_order=act_order)

    def off(coded: Any) -> float:
        return float((x @ (decoded(coded, form) - weight).t()).square().sum(-1).mean())

    assert off(chosen) < 0.75 * off(plain)
    assert lost(weight, decoded(chosen, form), moments) == pytest.approx(off(chosen), rel=1e-2)


def test_gptq_is_the_loop_of_the_paper() -> None:
    _, moments, weight = inputs_and_matrix()
    form = Form("int4", 32, symmetric=False)
    # One column after the other in float64, the whole inverse brought up to date by Gaussian elimination.
    left = weight.double().clone()
    inverse = (moments + 0.01 * moments.diagonal().mean() * torch.eye(64, dtype=torch.float64)).inverse()
    scales = zeros = torch.empty(0)
    codes = torch.zeros(48, 64)
    for i in range(64):
        if i % 32 == 0:
            found = form.scales(left[:, None, i : i + 32].float())
            scales, zeros = found[0][:, 0].double(), found[1][:, 0].double()  # pyright: ignore[reportOptionalSubscript]
        codes[:, i] = ((left[:, i] - zeros) / scales).round().clamp(-8, 7)
        error = (left[:, i] - (codes[:, i] * scales + zeros)) / inverse[i, i]
        left[:, i + 1 :] -= torch.outer(error, inverse[i, i + 1 :])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (gptq(weight, moments, form).codes == codes).float().mean() > 0.99


@pytest.mark.parametrize("form", FORMS[1:3])
def test_awq_loses_less_than_the_nearest_codes_and_shares_its_divisor(form: Form) -> None:
    _, moments, weight = inputs_and_matrix()
    other = inputs_and_matrix(1)[2]
    coded, power = awq([weight, other], moments, form)
    assert power > 0
    assert coded[0].divisor is not None
    assert torch.equal(coded[0].divisor, coded[1].divisor)  # pyright: ignore[reportArgumentType]
    plain = lost(weight, decoded(nearest(weight, form), form), moments)
    assert lost(weight, decoded(coded[0], form), moments) < 0.9 * plain
    assert awq([weight], torch.eye(64), form)[1] == 0


@pytest.mark.parametrize(
    ("options", "kernel", "bits"),
    [
        ({}, "kernels_int8", 8.6),
        ({"dtype": "int4"}, "kernels_int4", 5),
        ({"dtype": "int4", "symmetric": True, "rounding": "awq"}, "kernels_int4", 5.5),
        ({"dtype": "int4", "rounding": "nearest"}, "kernels_int4", 5),
        ({"group": 32}, "layers_dequantised", 8.6),
    ],
)
def test_an_encoder_is_smaller_and_read_again_as_it_was(
    tmp_path: Path, options: dict[str, Any], kernel: str, bits: float
) -> None:
    loaded, effect = weights(**options)
    assert effect["layers_weight_only"] == effect[kernel] == 12
    assert effect["layers_dense"] == 0
    assert effect["tables_int8"] == 1
    assert effect["bits_per_weight"] <= bits
    assert 0 < effect["layer_error"] <= effect["layer_error_largest"] < 0.2
    assert_reloads(loaded, tmp_path)


@pytest.mark.parametrize(("family", "changes"), [("llama", LLAMA), ("gpt2", GPT2)])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_decoder_says_the_same_when_read_again(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: str
) -> None:
    one = small_classifier()
    subject = Loaded(one.task, small_decoder(family, **changes), one.tokenizer)
    loaded, effect = weights(subject, dtype=dtype, rounding="nearest")
    assert effect[f"kernels_{dtype}"] == effect["layers_weight_only"] > 0
    model = loaded.model
    head, table = model.heads["lm"], model.trunk.embeddings.token
    assert isinstance(head.output, Int8Linear)
    assert isinstance(table, Int8Embedding)
    assert head.output.codes.data_ptr() == table.codes.data_ptr()
    prompts = [[3, 5, 7], [11, 2, 90, 4, 1]]
    said = greedy(model, prompts, 12)
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert models.weights_digest(again) == models.weights_digest(model)
    assert [one.ids for one in greedy(again, prompts, 12)] == [one.ids for one in said]
    stored = sum(tensor.nbytes for tensor in models.io.named_tensors(model).values())
    assert (tmp_path / "model.safetensors").stat().st_size < stored + 16_000


def test_a_loss_over_a_table_of_bytes_is_that_of_its_logits() -> None:
    one = small_classifier()
    loaded, _ = weights(Loaded(one.task, small_decoder("llama", **LLAMA), one.tokenizer), rounding="nearest")
    head, hidden, target = loaded.model.heads["lm"], torch.randn(600, 64), torch.arange(600) % 96
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(head(hidden), target, reduction="none")
        torch.testing.assert_close(head.losses(hidden, target), wanted)  # pyright: ignore[reportCallIssue]


def test_layers_to_be_skipped_stay_as_they_are() -> None:
    loaded, effect = weights(skip=("layers.0.mlp", "layers.1.attention.query"), embeddings=False)
    assert effect["layers_dense"] == 3
    assert effect["tables_int8"] == 0
    kinds = {name: type(module) for name, module in loaded.model.trunk.named_modules()}
    assert kinds["layers.1.attention.key"] is WeightOnlyLinear
    assert kinds["layers.1.attention.query"] is not WeightOnlyLinear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4", "group": 64}, "no groups of 64"),
        ({"dtype": "fp8"}, "does not multiply fp8"),
        ({"rounding": "nearest", "act_order": True}, "no order of columns"),
        ({"skip": ["layers.9"]}, "no linear layer at 'layers.9'"),
        ({"skip": ["layers"]}, "every layer is skipped"),
    ],
)
def test_what_cannot_act_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights(**options)


def test_a_recurrent_model_has_no_layers_for_it() -> None:
    one = small_classifier()
    config = RecurrentConfig(vocab_size=1500, cell="gru", state_size=16, embedding_size=16)
    with pytest.raises(UserError, match="no linear layers"):
        weights(Loaded(one.task, models.init(config, "gru", 0), one.tokenizer))
