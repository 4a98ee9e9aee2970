"""The loss over a vocabulary equals torch's plain one, with its gradients, in every shape that cuts differently."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lexmill.nn.token_loss import token_losses


def both(rows: int, bias: bool, dtype: torch.dtype):
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 12, dtype=dtype), torch.randn(61, 12, dtype=dtype) * 3
    shift = torch.randn(61, dtype=dtype) if bias else None
    target, asked = torch.randint(0, 61, (rows,)), torch.rand(rows, dtype=dtype)
    found = []
    for way in (token_losses, lambda h, w, b, t: F.cross_entropy(F.linear(h, w, b), t, reduction="none")):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, shift)]
        losses = way(*leaves, target)
        (losses @ asked).backward()
        found.append([losses.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("rows", [1, 7, 512, 513, 1100])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_equal_the_plain_way(rows, bias):
    for ours, plain in both(rows, bias, torch.float64):
        assert float((ours - plain).abs().max() / plain.abs().max()) <= 1e-12
    for ours, plain in both(rows, bias, torch.float32):
        assert float((ours - plain).abs().max() / plain.abs().max()) <= 1e-5


def test_logits_too_large_for_exp_are_no_trouble():
    hidden, weight = torch.full((3, 2), 50.0), torch.tensor([[9.0, 9.0], [-9.0, -9.0], [8.0, 8.0]])
    losses = token_losses(hidden, weight, None, torch.tensor([0, 1, 2]))
    assert losses.tolist() == [0.0, 1800.0, 100.0]


def test_a_frozen_weight_gets_no_gradient_and_nothing_is_kept_where_none_is_wanted():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    token_losses(hidden, weight, None, torch.arange(5)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert token_losses(hidden, weight, None, torch.arange(5)).grad_fn is None


def test_in_half_precision_it_is_the_plain_way():
    hidden, weight, target = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_losses(hidden, weight, None, target)
    plain = F.cross_entropy(F.linear(hidden.bfloat16(), weight.bfloat16()).float(), target, reduction="none")
    assert torch.equal(ours, plain)
