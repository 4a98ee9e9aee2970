"""Products of packed weights against the plain ones."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lexmill.nn import matmul
from lexmill.nn.linear import Linear, pack

needs_onednn = pytest.mark.skipif(not matmul._onednn_is_faster(), reason="this CPU's products are MKL's")


def weights(out: int = 48, inner: int = 32) -> tuple[nn.Parameter, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(out, inner)), torch.randn(out)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_weight_gives_the_same_products(rows, biased):
    weight, bias = weights()
    x = torch.randn(rows, 32)
    assert matmul.pack(weight, 64)
    with torch.no_grad():
        assert matmul._packed(weight, torch.float32) is not None
        found = matmul.linear(x, weight, bias if biased else None)
        active = matmul.activated(x, weight, bias if biased else None, "gelu")
        assert active is not None
        wanted = F.linear(x, weight, bias if biased else None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(active, F.gelu(wanted), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_weight_that_was_written_to_is_taken_as_it_is_now():
    weight, bias = weights()
    x = torch.randn(16, 32)
    matmul.pack(weight, 64)
    with torch.no_grad():
        weight.mul_(2)
        assert matmul._packed(weight, torch.float32) is None
        torch.testing.assert_close(matmul.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_gradients_of_a_packed_weight_are_those_of_a_plain_one():
    weight, bias = weights()
    x = torch.randn(16, 32, requires_grad=True)
    matmul.pack(weight, 64)
    matmul.linear(x, weight, bias).square().sum().backward()
    found = weight.grad
    weight.grad = None
    F.linear(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_the_copy_goes_with_its_weight():
    gc.collect()
    before = len(matmul._PACKED)
    weight, _ = weights()
    matmul.pack(weight, 64)
    assert len(matmul._PACKED) == before + 1
    del weight
    gc.collect()
    assert len(matmul._PACKED) == before


def test_what_onednn_does_not_multiply_is_not_packed():
    assert not matmul.pack(torch.zeros(8, 8, dtype=torch.bfloat16), 64)
    assert not matmul.pack(torch.zeros(8, 8, device="meta"), 64)


@pytest.mark.skipif(not matmul.has_bf16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("rows", [1, 16, 77])
def test_products_in_bfloat16_round_as_autocast_does_and_so_do_their_gradients(rows):
    weight, bias = weights()
    bias = bias.requires_grad_()
    x = torch.randn(rows, 32, requires_grad=True)
    found, wanted = [], []
    for product, gradients in ((matmul.linear, found), (F.linear, wanted)):
        x.grad = weight.grad = bias.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = product(x, weight, bias)
        assert y.dtype == torch.bfloat16
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients += [y.detach().float(), x.grad, weight.grad, bias.grad]
    exact = F.linear(x, weight, bias).detach()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))
    assert 0 < float((found[0] - exact).abs().max()) < 0.02 * float(exact.abs().max())


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_that_is_not_trained_hands_gradients_on(dtype):
    weight, bias = weights()
    weight.requires_grad_(requires_grad=False)
    bias.requires_grad_()
    x = torch.randn(16, 32, requires_grad=True)
    found: list[list[torch.Tensor]] = []
    for packed in (False, True):
        if packed and not matmul.pack(weight, 64, dtype=dtype, training=True):
            pytest.skip("this CPU does not multiply bfloat16")
        x.grad = bias.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = matmul.linear(x, weight, bias)
            assert (matmul._packed(weight, dtype) is not None) == packed
        y.float().square().sum().backward()
        found.append([y.detach().float(), x.grad, bias.grad])
    for plain, of_packed in zip(*found, strict=True):
        torch.testing.assert_close(of_packed, plain, rtol=1e-2, atol=1e-4 * float(plain.abs().max()))


@needs_onednn
def test_only_what_would_be_copied_counts_against_the_bound():
    """A multilingual model's table of tokens is larger than all of its matrices, and is not packed."""
    model = nn.Sequential(nn.Embedding(10_000, 8), Linear(8, 16), Linear(16, 8))
    model.requires_grad_(False)
    model[2].weight.requires_grad_()
    copies = 8 * 16 * 4 * 2
    assert pack(model, 64, training=True, most=copies - 1) == 0
    assert not matmul._copies(model[1].weight)
    assert pack(model, 64, training=True, most=copies) == 1
    assert matmul._copies(model[1].weight)
