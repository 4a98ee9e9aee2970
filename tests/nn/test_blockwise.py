"""Matrices in 4 and 8 bits: how far they are off, what they take, and products that are those of the rounded matrix."""

from __future__ import annotations

import pytest
import torch

from lexmill.nn import Linear
from lexmill.nn.blockwise import Bits, Blockwise, nf4_levels

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


def test_the_levels_are_the_published_ones() -> None:
    assert torch.allclose(nf4_levels(), torch.tensor(PUBLISHED), atol=1e-5)


@pytest.mark.parametrize("shape", [(96, 64), (7, 5), (300, 130)])
@pytest.mark.parametrize(("bits", "off"), [(4, 0.11), (8, 0.01)])
@pytest.mark.parametrize("double", [False, True])
def test_a_matrix_comes_back_nearly(shape: tuple[int, int], bits: Bits, off: float, double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    stored = Blockwise(weight, bits, double=double)
    assert stored.whole().shape == shape
    assert float((stored.whole() - weight).norm() / weight.norm()) < off
    again = Blockwise(stored.whole(), bits)
    assert float((again.whole() - stored.whole()).norm() / weight.norm()) < off / 4


def test_zeros_stay_zeros_and_a_block_of_them_is_no_trouble() -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0
    assert not Blockwise(weight, 4, double=False).whole()[1].any()
    assert bool(Blockwise(weight, 4).whole().isfinite().all())


def test_double_quantisation_stores_less() -> None:
    weight = torch.randn(256, 256)
    plain, double = (Blockwise(weight, 4, double=double).num_bytes() for double in (False, True))
    assert plain == 256 * 256 // 2 + 4 * 1024
    assert double == 256 * 256 // 2 + 1024 + 4 * 4 + 4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_computes_and_passes_gradients_as_its_whole_matrix_does(bits: Bits) -> None:
    torch.manual_seed(0)
    layer, x = Linear(32, 48), torch.randn(20, 32, requires_grad=True)
    layer.quantise(bits)
    assert "weight" not in dict(layer.named_parameters())
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    found, bias_found = x.grad.clone(), layer.bias.grad.clone()
    x.grad = layer.bias.grad = None
    layer.whole()
    dense = layer(x)
    dense.square().sum().backward()
    assert torch.equal(y, dense)
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(bias_found, layer.bias.grad)


def test_no_whole_matrix_is_kept_for_the_backward() -> None:
    layer, x = Linear(512, 512), torch.randn(16, 512, requires_grad=True)
    layer.quantise(4)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(x)
    assert sum(kept) < 512 * 512
