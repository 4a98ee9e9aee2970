"""Products of bytes against what they stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lexmill.errors import UserError
from lexmill.nn.activation import ACTIVATIONS, Activation
from lexmill.nn.embedding import Embedding, Int8Embedding
from lexmill.nn.int8 import Grid, Int8Linear, feed_forward, kernel_for
from lexmill.nn.joint import project
from lexmill.nn.linear import Linear
from lexmill.nn.mlp import MLP

CPU = torch.device("cpu")
GRIDS = [Grid.over(-3.0, 4.0), None]


def obvious(layer: Int8Linear, x: Tensor) -> Tensor:
    """Every number spelled out, in float64."""
    x = x.double() if layer.divisor is None else x.double() / layer.divisor
    if layer.grid is None:
        scale, zero = x.abs().amax(-1, keepdim=True) / 127, 128
    else:
        scale, zero = layer.grid
    codes = (x / scale + zero + 0.5).floor().clamp(0, 255)
    weight = layer.codes.double() * layer.scales.double()[:, None]
    bias = 0 if layer.bias is None else layer.bias.double()
    return ((codes - zero) * scale) @ weight.t() + bias


def layer_of(
    grid: Grid | None, *, smooth: bool = False, bias: bool = True, size: tuple[int, int] = (48, 40)
) -> Int8Linear:
    divisor = torch.rand(size[0]) + 0.5 if smooth else None
    return Int8Linear.of(Linear(*size, bias=bias), grid, divisor)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["fast", "slow"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply, where this CPU has both."""
    if request.param == "slow":
        monkeypatch.setattr("lexmill.nn.int8._has_vnni", lambda: False)
    return kernel_for(CPU)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_its_codes(grid: Grid | None, smooth: bool, bias: bool, kernel: str) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(grid, smooth=smooth, bias=bias), torch.randn(37, 48)
    found = layer(x)
    assert layer.ran == kernel
    # One input may stand so near the middle of two levels that float32 takes the other.
    apart = (found.double() - obvious(layer, x)).abs()
    assert float(apart.median()) < 1e-5
    assert float(apart.max()) < 0.02


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_near_the_dense_layer(grid: Grid | None) -> None:
    torch.manual_seed(0)
    dense, x = Linear(64, 32), torch.randn(50, 64).clamp(-3, 4)
    found, wanted = Int8Linear.of(dense, grid)(x), dense(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("grid", GRIDS)
def test_a_row_is_computed_the_same_alone(grid: Grid | None, kernel: str) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(grid), torch.randn(32, 48)
    x[5] *= 100
    torch.testing.assert_close(layer(x)[3:4], layer(x[3:4]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_layers_that_read_alike_share_a_product(grid: Grid | None, kernel: str) -> None:
    torch.manual_seed(0)
    layers, x = [layer_of(grid) for _ in range(3)], torch.randn(2, 7, 48)
    for found, layer in zip(project(layers, x), layers, strict=True):
        torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)
    other = layer_of(Grid.over(-1.0, 1.0))
    assert not layers[0].joins(other)
    torch.testing.assert_close(project([layers[0], other], x)[1], other(x))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("grid", GRIDS)
def test_a_feed_forward_is_its_two_layers(activation: Activation, grid: Grid | None, kernel: str) -> None:
    torch.manual_seed(0)
    between = None if grid is None else Grid.over(-0.3, 3.0)
    up, down, x = layer_of(grid, size=(48, 96)), layer_of(between, size=(96, 48)), torch.randn(21, 48)
    found, wanted = feed_forward(up, activation, down, x), down(ACTIVATIONS[activation](up(x)))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    mlp = MLP(48, 96, activation)
    mlp.up, mlp.down = up, down  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(mlp(x), found)


def test_a_changed_matrix_and_a_copy_are_multiplied_anew() -> None:
    layer, x = layer_of(None), torch.randn(4, 48)
    layer(x)
    twin = copy.deepcopy(layer)
    twin.codes.zero_()
    torch.testing.assert_close(twin(x), layer.bias.expand(4, -1))  # pyright: ignore[reportOptionalMemberAccess]
    assert not torch.allclose(layer(x), twin(x))


def test_no_rows_give_no_rows() -> None:
    assert layer_of(None)(torch.empty(0, 48)).shape == (0, 40)


def test_a_gradient_is_refused() -> None:
    with torch.enable_grad(), pytest.raises(UserError, match="no gradient"):
        layer_of(None)(torch.randn(3, 48, requires_grad=True))


def test_a_table_of_bytes_is_near_its_rows() -> None:
    torch.manual_seed(0)
    table, ids = Embedding(30, 16), torch.tensor([[3, 0], [29, 3]])
    found = Int8Embedding.of(table)(ids)
    assert float((found - table(ids)).abs().max()) <= float(table.weight[ids].abs().max()) / 127 / 2 * 1.001
    assert found.shape == (2, 2, 16)
