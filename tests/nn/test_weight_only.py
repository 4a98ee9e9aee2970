"""Products of codes against the matrix that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lexmill.errors import UserError
from lexmill.nn import weight_only
from lexmill.nn.joint import project
from lexmill.nn.linear import Linear
from lexmill.nn.mlp import MLP
from lexmill.nn.weight_only import (
    Form,
    Kernel,
    WeightOnlyLinear,
    has_fp8,
    kernel_for,
    pack_nibbles,
    unpack_nibbles,
)

CPU = torch.device("cpu")
FORMS: list[tuple[Form, Kernel]] = [
    (Form("int8"), "int8"),
    (Form("int8", symmetric=False), "dequantised"),
    (Form("int8", 32), "dequantised"),
    (Form("int4", 32), "int4"),
    (Form("int4", 64, symmetric=False), "int4"),
    (Form("int4"), "dequantised"),
    (Form("fp8"), "dequantised"),
]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def near(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def obvious(layer: WeightOnlyLinear, x: Tensor) -> Tensor:
    """Every weight spelled out, in float64."""
    if layer.form.dtype == "int4":
        pairs = [[(int(byte) & 15) - 8, (int(byte) >> 4) - 8] for byte in layer.codes.flatten()]
        codes = torch.tensor(pairs, dtype=torch.float64).view(layer.out_features, layer.in_features)
    else:
        codes = (layer.codes.view(torch.float8_e4m3fn) if layer.form.dtype == "fp8" else layer.codes).double()
    group = torch.arange(layer.in_features) // (layer.form.group or layer.in_features)
    weight = codes * layer.scales.double()[:, group]
    weight = weight if layer.zeros is None else weight + layer.zeros.double()[:, group]
    x = x.double() if layer.divisor is None else x.double() / layer.divisor.double()
    return (x @ weight.t() + (0 if layer.bias is None else layer.bias.double())).float()


@pytest.mark.parametrize(("form", "kernel"), FORMS)
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_its_matrix(form: Form, kernel: Kernel, rows: int, bias: bool) -> None:
    layer, x = WeightOnlyLinear.of(Linear(128, 48, bias=bias), form), torch.randn(rows, 128)
    # bfloat16 keeps 8 bits of what goes in and comes out.
    assert near(layer(x), obvious(layer, x)) < (1e-5 if kernel == "dequantised" else 6e-3)
    assert layer.ran == kernel


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_it_is_near_the_dense_layer(form: Form, kernel: Kernel) -> None:
    dense, x = Linear(128, 48), torch.randn(50, 128)
    apart = near(WeightOnlyLinear.of(dense, form)(x), dense(x))
    assert apart < {"int8": 0.02, "int4": 0.2, "fp8": 0.05}[form.dtype]


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_a_row_is_computed_alone_as_among_others(form: Form, kernel: Kernel) -> None:
    layer, x = WeightOnlyLinear.of(Linear(128, 48), form), torch.randn(100, 128)
    assert near(layer(x)[3:4], layer(x[3:4])) < 6e-3


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_layers_that_read_alike_share_a_product(form: Form, kernel: Kernel) -> None:
    layers = [WeightOnlyLinear.of(Linear(64, width), form) for width in (32, 16, 16)]
    x = torch.randn(2, 5, 64)
    wanted = [obvious(layer, x.flatten(0, 1)).view(2, 5, -1) for layer in layers]
    for _ in range(2):
        assert all(near(a, b) < 6e-3 for a, b in zip(project(layers, x), wanted, strict=True))
    assert near(layers[1](x), wanted[1]) < 6e-3
    twins = copy.deepcopy(layers)
    twins[2].codes.fill_(0)
    assert not torch.equal(project(twins, x)[2], project(layers, x)[2])


def test_layers_that_read_otherwise_are_multiplied_alone() -> None:
    mine, other = (
        WeightOnlyLinear.of(Linear(64, 32), Form("int8")),
        WeightOnlyLinear.of(Linear(64, 32), Form("int4", 32)),
    )
    assert not mine.joins(other)
    x = torch.randn(3, 64)
    torch.testing.assert_close(project([mine, other], x)[1], other(x))


def test_a_gated_feed_forward_is_that_of_its_layers() -> None:
    mlp, x = MLP(64, 96, "silu", gated=True, bias=False), torch.randn(4, 64)
    wanted = mlp(x)
    for name in ("gate", "up", "down"):
        setattr(mlp, name, WeightOnlyLinear.of(getattr(mlp, name), Form("int8")))
    assert near(mlp(x), wanted) < 0.03


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9))
def test_nibbles_come_out_as_they_went_in(seed: int, rows: int, pairs: int) -> None:
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_the_farthest_weight_of_a_group_is_kept() -> None:
    weight = torch.randn(8, 64)
    for form in (Form("int4", 32), Form("int4", 32, symmetric=False), Form("int8")):
        grouped = form.grouped(weight)
        scales, zeros = form.scales(grouped)
        back = form.decode(form.encode(grouped, scales, zeros), scales, zeros)
        assert float((back - grouped).abs().max()) <= 0.51 * float(scales.float().abs().max()) + 0.01


def test_sizes_that_kernels_do_not_take_are_made_whole() -> None:
    assert kernel_for(Form("int4", 32), 24, 64, CPU) == "dequantised"
    assert kernel_for(Form("int8"), 24, 40, CPU) == "dequantised"
    assert kernel_for(Form("int8"), 24, 48, CPU) == "int8"
    layer, x = WeightOnlyLinear.of(Linear(40, 24), Form("int8")), torch.randn(2, 40)
    assert near(layer(x), obvious(layer, x)) < 1e-5


def test_the_product_of_fp8_is_that_of_the_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has the product for a CPU too, in slow steps: its arithmetic is what a GPU's is held to.
    assert not has_fp8(CPU)
    layer, x = WeightOnlyLinear.of(Linear(64, 32), Form("fp8")), torch.randn(5, 64)
    x[2] *= 1000
    plain = layer(x)
    monkeypatch.setattr(weight_only, "has_fp8", lambda device: True)
    found = copy.deepcopy(layer)(x)
    scale = x.abs().amax(-1, keepdim=True) / 448
    casts = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert near(found, obvious(layer, casts)) < 6e-3
    assert near(found, plain) < 0.05


def test_no_rows_give_no_rows() -> None:
    for form, _ in FORMS:
        assert WeightOnlyLinear.of(Linear(128, 48), form)(torch.empty(0, 128)).shape == (0, 48)


def test_a_gradient_is_refused() -> None:
    with torch.enable_grad(), pytest.raises(UserError, match="no gradient"):
        WeightOnlyLinear.of(Linear(32, 16), Form("int8"))(torch.randn(2, 32, requires_grad=True))
