"""Matrices as products of thin ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.material import assert_reloads, material_of, texts
from tests.small_classifier import small_classifier

from lexmill.compress import Step
from lexmill.compress.factorise import Factors, choose_ranks, places, second_moments
from lexmill.engine import probes
from lexmill.errors import UserError
from lexmill.nn.linear import Linear
from lexmill.nn.low_rank import LowRankLinear


def factorised(**options: Any) -> tuple[Any, dict[str, float]]:
    method, read = Step("factorise", {"rows": 48, "recover": False, **options}).read("steps[0]")
    return method.apply(small_classifier(), material_of(small_classifier()), read)


def test_a_product_of_full_rank_is_the_dense_layer() -> None:
    dense, x = Linear(24, 16), torch.randn(40, 24)
    layer = Factors(dense.weight, x.double().t() @ x.double()).layer(16, dense)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_what_a_product_loses_is_what_it_says_and_less_than_without_knowing_the_inputs() -> None:
    torch.manual_seed(0)
    dense = Linear(24, 16, bias=False)
    x = torch.randn(500, 24) * torch.logspace(0, -2, 24)
    known = Factors(dense.weight, x.double().t() @ x.double() / len(x))
    blind = Factors(dense.weight, torch.eye(24, dtype=torch.float64))

    def lost(factors: Factors) -> float:
        layer = factors.layer(6, dense)
        with torch.no_grad():
            return float((layer(x) - dense(x)).square().sum() / dense(x).square().sum())

    assert lost(known) == pytest.approx(1 - known.kept(6), rel=1e-2)
    assert lost(known) < 0.7 * lost(blind)


def test_ranks_keep_to_the_budget_and_go_where_they_are_needed() -> None:
    torch.manual_seed(0)
    eye = torch.eye(32, dtype=torch.float64)
    flat, steep = torch.randn(32, 32), torch.randn(32, 4) @ torch.randn(4, 32)
    factors = {"flat": Factors(flat, eye), "steep": Factors(steep, eye)}
    ranks = choose_ranks(factors, 700)
    assert ranks["steep"] == 4
    assert sum((rank or 0) * 64 for rank in ranks.values()) <= 700
    assert choose_ranks(factors, 1400)["flat"] is None


def test_second_moments_are_those_of_the_rows_that_went_in() -> None:
    one = small_classifier()
    place = "layers.0.attention.query"
    rows = [{"question": text, "intent": "fee"} for text in texts(5)]
    kept: list[torch.Tensor] = []
    layer = one.model.trunk.get_submodule(place)
    hook = layer.register_forward_pre_hook(lambda module, given: kept.append(given[0].double()))
    moments = second_moments(one, rows)
    hook.remove()
    x = torch.cat(kept)
    torch.testing.assert_close(moments[place], x.t() @ x / len(x))
    assert set(moments) == set(places(one.model))


def test_a_factorised_model_is_smaller_and_read_again_as_it_was(tmp_path: Path) -> None:
    loaded, effect = factorised(keep=0.5)
    assert effect["weights_after"] <= 0.5 * effect["weights_before"]
    layers = [module for module in loaded.model.modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == effect["layers_factorised"] > 0
    held = sum(m.down.weight.numel() + m.up.weight.numel() for m in layers)
    whole = [loaded.model.trunk.get_submodule(place) for place in places(loaded.model)]
    assert held + sum(layer.weight.numel() for layer in whole) == effect["weights_after"]
    assert_reloads(loaded, tmp_path)


def test_recovery_brings_the_answers_nearer() -> None:
    recovery = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "task_weight": 0.0}
    loaded, effect = factorised(keep=0.4, recover=True, recovery=recovery)
    assert effect["divergence_after"] < effect["divergence_before"]
    assert probes.evidence(loaded, [{"question": "x"}])


def test_a_budget_below_one_rank_each_is_an_error() -> None:
    with pytest.raises(UserError, match="rank 1"):
        factorised(keep=0.01)
