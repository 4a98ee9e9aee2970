"""Dropout's masks on a CPU: how many elements they drop, and what they put in place of the rest."""

from __future__ import annotations

import math

import pytest
import torch

from lexmill.nn.dropout import Dropout, keep_mask

SIZE = 400_003


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_drops_the_share_p_and_holds_exactly_two_values(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = keep_mask((SIZE,), p, torch.empty(0, dtype=dtype))
    assert mask.dtype == dtype
    low, high = mask.unique().tolist()
    assert low == 0
    steps = {math.floor(p * 256), math.ceil(p * 256)}
    taken = [step for step in steps if high == torch.tensor(256 / (256 - step), dtype=dtype)]
    assert taken
    dropped = float((mask == 0).double().mean())
    share = min((step / 256 for step in taken), key=lambda share: abs(share - dropped))
    assert abs(dropped - share) <= 5 * math.sqrt(share * (1 - share) / SIZE)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.99])
def test_over_many_masks_an_element_is_dropped_with_probability_p(p: float) -> None:
    torch.manual_seed(0)
    dropped = torch.stack([keep_mask((400,), p, torch.empty(0)) == 0 for _ in range(4000)]).double().mean(1)
    assert abs(float(dropped.mean()) - p) <= 5 * float(dropped.std()) / math.sqrt(len(dropped))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mean_of_a_mask_is_one(p: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask((1001, 333), p, torch.empty(0))
    assert mask.shape == (1001, 333)
    assert abs(float(mask.double().mean()) - 1) <= 5 * math.sqrt(p / (1 - p) / mask.numel())


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (keep_mask((SIZE,), 0.3, torch.empty(0)) > 0).double() - 0.7
    for shift in (1, 2, 3, 4, 64):
        correlation = float((kept[:-shift] * kept[shift:]).mean()) / 0.21
        assert abs(correlation) <= 5 / math.sqrt(SIZE)


def test_a_mask_is_a_function_of_torchs_seed() -> None:
    masks: list[torch.Tensor] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(keep_mask((1000,), 0.5, torch.empty(0)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(5, 3)
    layer = Dropout(0.5)
    assert torch.equal(layer.eval()(x), x)
    assert (layer.train()(x) == 0).any()
