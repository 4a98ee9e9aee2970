"""One text alone: the short way gives what the long way gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import pytest
import torch
from tests.compress.material import material_of
from tests.small_classifier import small_classifier
from torch import Tensor

from lexmill import models
from lexmill.compress import Step
from lexmill.engine import Loaded
from lexmill.models import ModelConfig, Transformer
from lexmill.models.trunk import Only
from lexmill.nn.layout import Packed

STEPS = {
    "dense": None,
    "static": Step("int8", {"rows": 16, "max_error": 1.0}),
    "by row": Step("int8", {"rows": 16, "max_error": 1.0, "scheme": "token"}),
    "smooth": Step("int8", {"rows": 16, "max_error": 1.0, "smooth": 0.5}),
    "low rank": Step("factorise", {"recover": False}),
}


def subject(how: str) -> Loaded:
    found, step = small_classifier(), STEPS[how]
    if step is None:
        return found
    method, options = step.read("steps[0]")
    return method.apply(found, material_of(small_classifier(), train=24), options)[0]


def asked(trunk: Transformer, only: Only, *, length: int = 11) -> Tensor:
    ids = torch.arange(5, 5 + length)
    with torch.inference_mode():
        layout = Packed(torch.tensor([0, length]), torch.device("cpu"))
        return trunk(ids, torch.arange(length), layout, only=only)


@pytest.mark.parametrize("only", ["all", "first", "last"])
@pytest.mark.parametrize("how", list(STEPS))
def test_the_short_way_gives_what_the_long_way_gives(how: str, only: Only) -> None:
    trunk = cast("Transformer", subject(how).model.eval().trunk)
    long = asked(trunk, only)
    before = trunk.layer_rows
    trunk.straighten()
    assert trunk._straight is not None
    short = asked(trunk, only)
    assert short.shape == long.shape
    assert float((short - long).abs().max()) <= 1e-5 * float(long.abs().max())
    assert trunk.layer_rows - before == 11 * 2


def test_a_weight_that_changes_is_seen_and_a_copy_goes_its_own_way() -> None:
    trunk = cast("Transformer", small_classifier().model.eval().trunk)
    trunk.straighten()
    first = asked(trunk, "first")
    twin = copy.deepcopy(trunk)
    with torch.no_grad():
        trunk.layers[0].get_parameter("attention.query.weight").mul_(3)
    changed = asked(trunk, "first")
    assert not torch.allclose(changed, first)
    assert torch.allclose(asked(twin, "first"), first, atol=1e-6)


def test_a_module_that_takes_the_place_of_another_is_seen() -> None:
    trunk = cast("Transformer", small_classifier().model.eval().trunk)
    trunk.straighten()
    first = asked(trunk, "first")
    other = cast("Transformer", small_classifier(seed=1).model.eval().trunk)
    trunk.layers[0].get_submodule("mlp").up = other.layers[0].get_submodule("mlp.up")
    swapped = asked(trunk, "first")
    assert not torch.allclose(swapped, first)
    del trunk.layers[1]
    fewer = asked(trunk, "first")
    trunk.straighten()
    assert torch.allclose(asked(trunk, "first"), fewer, atol=1e-5)
    assert not torch.allclose(fewer, swapped)


@pytest.mark.parametrize(
    "change", [{"norm_place": "pre", "final_norm": True}, {"positions": "rotary"}, {"causal": True}]
)
def test_what_the_short_way_does_not_know_goes_the_long_way(change: dict[str, object]) -> None:
    config = replace(cast("ModelConfig", small_classifier().model.config), **change)
    trunk = cast("Transformer", models.init(config, "bert", 0).eval().trunk)
    long = asked(trunk, "all")
    trunk.straighten()
    assert trunk._straight is None
    assert torch.equal(asked(trunk, "all"), long)
