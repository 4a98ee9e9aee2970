"""Linear layers whose matrix and whose inputs are bytes, multiplied as integers.

A weight is `scale · code` with a signed code and a scale an output (Jacob et al. 2018, section 2). Inputs are put on a
grid of 256 levels: one that was chosen beforehand (`static`), or one a row that reaches as far as that row does
(`token`). Either way a text is computed the same alone and among others.

On a CPU with VNNI the products are oneDNN's, of unsigned by signed bytes with sums in 32 bits; elsewhere the bytes are
widened and multiplied in floating point, which is right but gains no time. `Int8Linear.ran` says which it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.errors import UserError
from lexmill.nn.activation import ACTIVATIONS, Activation
from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.joint import Joint, is_hooked
from lexmill.nn.linear import Linear, has_bias, register
from lexmill.nn.matmul import FUSED

Kernel = Literal["onednn", "widened"]
"""What multiplied: oneDNN's integer kernels, or floating point after widening the bytes."""
Scheme = Literal["static", "token"]

LEVELS = 255
"""The largest code of an input."""
_MIDDLE = 128
_MOST = 127
_PACKED_FOR = 2048
"""Rows that packed matrices are best for; others are right too."""


class Grid(NamedTuple):
    """Where inputs are put: `x ≈ scale · (code − zero)`, codes from 0 to 255."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The grid that reaches from `low` to `high` and has a level at 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / LEVELS, torch.finfo(torch.float32).tiny * LEVELS)
        return cls(scale, round(-low / scale))


class Codes(NamedTuple):
    """Rows on a grid: on one for all, or with a scale a row."""

    codes: UInt8[Tensor, "rows in"]
    scale: float | Float[Tensor, "rows 1"]
    zero: int


@cache
def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # pyright: ignore[reportPrivateUsage]


def kernel_for(device: torch.device) -> Kernel:
    """What would multiply there."""
    integer = device.type == "cpu" and _has_vnni() and not torch.compiler.is_compiling()
    return "onednn" if integer else "widened"


@dataclass
class _Product:
    """One product of rows with the matrices of several layers, one above the other.

    Args:
        matrices: of the layers, by which it is known whether it still holds.
        grid: None where every row has its own.
        divisor: what each input is divided by before it is put on its grid; None for nothing.
        packed: the matrix as oneDNN reads it, where that multiplies.
    """

    matrices: tuple[tuple[Tensor, int], ...]
    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, "out"]
    bias: Float[Tensor, "out"] | None
    grid: Grid | None
    divisor: Float[Tensor, "in"] | None
    packed: Tensor | None

    def __post_init__(self) -> None:
        device = self.codes.device
        self.number = next(_NUMBERS)
        _IN_GRAPHS[self.number] = self
        zero = _MIDDLE if self.grid is None else self.grid.zero
        self._offset = torch.tensor(zero + 0.5, device=device)
        self._no_zeros = torch.zeros(len(self.codes), dtype=torch.int32, device=device)
        self._factor = None if self.divisor is None else self.divisor.reciprocal()
        if self._factor is not None and self.grid is not None:
            self._factor /= self.grid.scale

    @property
    def kernel(self) -> Kernel:
        return "widened" if self.packed is None else "onednn"

    def read(self, x: Float[Tensor, "rows in"]) -> Codes:
        """Rows on the grid of this product, or each on its own."""
        if self.grid is None:
            x = x if self._factor is None else x * self._factor
            scale = (x.abs().amax(-1, keepdim=True) / _MOST).clamp_min_(torch.finfo(torch.float32).tiny * LEVELS)
            return Codes(torch.addcmul(self._offset, x, scale.reciprocal()).to(torch.uint8), scale, _MIDDLE)
        if self._factor is None:
            shifted = torch.add(self._offset, x, alpha=1 / self.grid.scale)
        else:
            shifted = torch.addcmul(self._offset, x, self._factor)
        return Codes(shifted.clamp_(0, LEVELS).to(torch.uint8), *self.grid)

    def multiply(self, rows: Codes, activation: Activation | None = None, onto: Grid | None = None) -> Tensor:
        """The outputs, activated; as codes where a grid is given that they are to be put `onto`."""
        if self.packed is None or len(rows.codes) == 0:
            wide = F.linear(rows.codes.float() - rows.zero, self.codes.float()) * self.scales * rows.scale
            return self._ended(wide if self.bias is None else wide + self.bias, activation, onto)
        if isinstance(rows.scale, Tensor):
            wide = self._integer(rows.codes, 1.0, rows.zero, None)
            wide = wide * rows.scale if self.bias is None else torch.addcmul(self.bias, wide, rows.scale)
            return self._ended(wide, activation, onto)
        if activation is not None and activation not in FUSED:
            return self._ended(self._integer(rows.codes, rows.scale, rows.zero, self.bias), activation, onto)
        fused = ("none", "") if activation is None else FUSED[activation]
        return self._integer(rows.codes, rows.scale, rows.zero, self.bias, onto, *fused)

    def _integer(
        self,
        codes: Tensor,
        scale: float,
        zero: int,
        bias: Tensor | None,
        onto: Grid | None = None,
        post: str = "none",
        form: str = "",
    ) -> Tensor:
        out = (1.0, 0, torch.float32) if onto is None else (onto.scale, onto.zero, torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise
        return product(codes, scale, zero, self.packed, self.scales, self._no_zeros, bias, *out, post, [], form)

    def _ended(self, wide: Tensor, activation: Activation | None, onto: Grid | None) -> Tensor:
        wide = wide if activation is None else ACTIVATIONS[activation](wide)
        if onto is None:
            return wide
        return (wide / onto.scale).round_().add_(onto.zero).clamp_(0, LEVELS).to(torch.uint8)


_NUMBERS = count()
_IN_GRAPHS: WeakValueDictionary[int, _Product] = WeakValueDictionary()
"""Products by the numbers that compiled graphs know them by: what oneDNN packed is nothing that a graph can hold."""
_OPERATORS = torch.library.Library("lexmill", "DEF")
_OPERATORS.define("int8_product(Tensor x, int number, int outputs) -> Tensor")
_OPERATORS.define("int8_feed_forward(Tensor x, int up, int down, str activation, int outputs) -> Tensor")


def _product_in_graph(x: Tensor, number: int, outputs: int) -> Tensor:
    product = _IN_GRAPHS[number]
    return product.multiply(product.read(x))


def _feed_forward_in_graph(x: Tensor, up: int, down: int, activation: Activation, outputs: int) -> Tensor:
    first, second = _IN_GRAPHS[up], _IN_GRAPHS[down]
    assert second.grid is not None
    return second.multiply(Codes(first.multiply(first.read(x), activation, second.grid), *second.grid))


def _product_shape(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _feed_forward_shape(x: Tensor, up: int, down: int, activation: str, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


_OPERATORS.impl("int8_product", _product_in_graph, "CompositeExplicitAutograd")
_OPERATORS.impl("int8_feed_forward", _feed_forward_in_graph, "CompositeExplicitAutograd")
torch.library.register_fake("lexmill::int8_product", _product_shape, lib=_OPERATORS)
torch.library.register_fake("lexmill::int8_feed_forward", _feed_forward_shape, lib=_OPERATORS)


class _Ready(dict[int, _Product]):
    """Products made ready, by the number of layers in them. Copies of a layer begin without."""

    def __deepcopy__(self, memo: Any) -> _Ready:
        return _Ready()

    def __reduce__(self) -> Any:
        return _Ready, ()


@register_addition
class Int8Linear(nn.Module, Addition, Joint):
    """`y = x Wᵀ + b` in 8 bits, for inference.

    Args:
        grid: where inputs are put; each row on a grid of its own where None.
        smooth: whether inputs are divided by `divisor`, one number a column that the matrix was multiplied by, so that
            columns that reach far do not spoil the grid of the others (Xiao et al. 2023, SmoothQuant).
    """

    kind: ClassVar[str] = "int8"
    addition: ClassVar[str] = "int8"
    codes: Tensor
    scales: Tensor
    divisor: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, grid: Grid | None, *, bias: bool = True, smooth: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features))
        self.register_buffer("divisor", torch.ones(in_features) if smooth else None)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.ran: Kernel | None = None
        self._ready = _Ready()

    @classmethod
    @torch.no_grad()
    def of(cls, dense: Linear, grid: Grid | None, divisor: Float[Tensor, "in"] | None = None) -> Int8Linear:
        """A dense layer in 8 bits."""
        layer = cls(dense.in_features, dense.out_features, grid, bias=has_bias(dense), smooth=divisor is not None)
        weight = dense.weight.float() if divisor is None else dense.weight.float() * divisor
        layer.scales = (weight.abs().amax(1) / _MOST).clamp_min(torch.finfo(torch.float32).tiny * LEVELS)
        layer.codes = (weight / layer.scales[:, None]).round().to(torch.int8)
        layer.divisor = None if divisor is None else divisor.clone()  # layers that share it are stored each alone
        if layer.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().float(), requires_grad=False)
        return layer.train(dense.training)

    @classmethod
    def sharing(
        cls, codes: Int8[Tensor, "out in"], scales: Float[Tensor, "out"], bias: nn.Parameter | None
    ) -> Int8Linear:
        """A layer over codes that another holds too, each row of inputs on its own grid."""
        with torch.device("meta"):
            layer = cls(codes.shape[1], codes.shape[0], None, bias=False)
        layer.codes, layer.scales, layer.bias = codes, scales, bias
        return layer

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.together([self], input)

    def in_graph(self, layers: int = 1) -> _Product | None:
        """The product of so many layers that a graph is to call, where one is traced and it was made ready before."""
        return self._ready.get(layers) if torch.compiler.is_compiling() else None

    def product(self, layers: Sequence[Int8Linear]) -> _Product:
        """The product of the same rows with the matrices of these, of which this is the first; made ready once."""
        found = self._ready.get(len(layers))
        now = tuple((layer.codes, layer.codes._version) for layer in layers)
        if found is None or any(a is not c or b != d for (a, b), (c, d) in zip(found.matrices, now, strict=True)):
            found = self._ready[len(layers)] = _made(layers, now)
        for layer in layers:
            layer.ran = found.kernel
        return found

    def together(self, layers: Sequence[Int8Linear], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        found = self.in_graph(len(layers))
        if found is not None:
            outputs = sum(layer.out_features for layer in layers)
            return _shaped(torch.ops.lexmill.int8_product(_rows(x), found.number, outputs), x)
        product = self.product(layers)
        return _shaped(product.multiply(product.read(_rows(x))), x)

    def joins(self, other: nn.Module) -> bool:
        if not isinstance(other, Int8Linear) or is_hooked(other) or other.grid != self.grid:
            return False
        if (self.bias is None) != (other.bias is None) or self.in_features != other.in_features:
            return False
        if self.divisor is None or other.divisor is None:
            return self.divisor is other.divisor
        return torch.equal(self.divisor, other.divisor)

    @property
    def matrix(self) -> Tensor:
        """A stand-in of the matrix's shape, without numbers."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    def describe(self) -> dict[str, Any]:
        grid = None if self.grid is None else {"scale": self.grid.scale, "zero": self.grid.zero}
        return {"grid": grid, "smooth": self.divisor is not None}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> Int8Linear:
        if not isinstance(place, Linear):
            raise TypeError("there is no linear layer at this place")
        grid = None if described["grid"] is None else Grid(**described["grid"])
        return cls(place.in_features, place.out_features, grid, bias=has_bias(place), smooth=described["smooth"])


register(Int8Linear.kind, Int8Linear)


def _made(layers: Sequence[Int8Linear], matrices: tuple[tuple[Tensor, int], ...]) -> _Product:
    first = layers[0]
    with torch.inference_mode(mode=False), torch.no_grad():
        codes, scales = torch.cat([one.codes for one in layers]), torch.cat([one.scales for one in layers]).float()
        biases: list[Tensor] = [one.bias for one in layers if one.bias is not None]
        packed = None
        if kernel_for(codes.device) == "onednn":
            packed = torch.ops.onednn.qlinear_prepack(codes, [_PACKED_FOR, first.in_features])
        bias = torch.cat(biases).float() if biases else None
        return _Product(matrices, codes, scales, bias, first.grid, first.divisor, packed)


def feed_forward(
    up: Int8Linear, activation: Activation, down: nn.Module, x: Float[Tensor, "*rows dim"]
) -> Float[Tensor, "*rows dim"]:
    """`down(act(up(x)))`; where `down` has one grid for all, what lies between is written on that grid at once."""
    if (
        isinstance(down, Int8Linear)
        and not is_hooked(down)
        and down.grid is not None
        and down.divisor is None
        and (above := up.in_graph()) is not None
        and (below := down.in_graph()) is not None
    ):
        numbers = above.number, below.number
        return _shaped(torch.ops.lexmill.int8_feed_forward(_rows(x), *numbers, activation, down.out_features), x)
    first = up.product([up])
    rows = first.read(_rows(x))
    if not isinstance(down, Int8Linear) or is_hooked(down) or down.grid is None or down.divisor is not None:
        return down(_shaped(first.multiply(rows, activation), x))
    codes = first.multiply(rows, activation, down.grid)
    return _shaped(down.product([down]).multiply(Codes(codes, *down.grid)), x)


def _rows(x: Float[Tensor, "*rows in"]) -> Float[Tensor, "row in"]:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError("int8 layers have no gradient", hint="train the model first, and quantise it last")
    return x.reshape(-1, x.shape[-1]).float()


def _shaped(rows: Float[Tensor, "row out"], like: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    return rows.view(*like.shape[:-1], rows.shape[-1]).to(like.dtype)
