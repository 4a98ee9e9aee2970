"""Linear layers whose matrix is kept in 8 or 4 bits a weight, while what goes into them stays a float.

A weight is `scale · code + zero`; scale and zero, both bfloat16, are shared by a group of columns of a row, or by the
row. Products on a CPU are torch's of bfloat16 rows by bytes or half bytes, which read the matrix as it is stored: that
is what time goes into where there are few rows, as in decoding. Many rows are multiplied by the matrix written out in
bfloat16. A form that has no such product is made whole in float32 each time, which saves memory but no time;
`WeightOnlyLinear.ran` says which it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.errors import UserError
from lexmill.nn import matmul
from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.joint import Joint, is_hooked
from lexmill.nn.linear import Linear, has_bias, register

Dtype = Literal["int8", "int4", "fp8"]
Kernel = Literal["int8", "int4", "fp8", "dequantised"]
"""What multiplied: a product that reads the codes, or a float one of the matrix made whole in float32."""

_BITS: Mapping[Dtype, int] = {"int8": 8, "int4": 4, "fp8": 8}
_FEW_ROWS: Mapping[Dtype, int] = {"int8": 24, "int4": 64, "fp8": 0}
"""Up to so many rows the products of codes are faster than writing the matrix out; measured on AVX-512."""
_INT4_GROUPS = (32, 64, 128)
_INT4_OUTPUTS, _INT8_INPUTS, _FP8_SIDE = 16, 16, 16
"""What the sides of a matrix must be multiples of, for the kernels."""
_FP8 = torch.float8_e4m3fn
_FP8_MOST = 448.0


@dataclass(frozen=True)
class Form:
    """How a matrix is kept.

    Args:
        dtype: of the codes: signed integers of 8 or 4 bits, or floats of 8 bits with 3 for the fraction (e4m3), whose
            inputs are put into them too, each row with a scale of its own.
        group: columns of a row that share a scale; the whole row where None.
        symmetric: whether zeros are 0.
    """

    dtype: Dtype
    group: int | None = None
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """The least code; the largest is one nearer to 0."""
        return -(1 << (_BITS[self.dtype] - 1))

    def scales(
        self, grouped: Float[Tensor, "out group column"]
    ) -> tuple[Float[Tensor, "out group"], Float[Tensor, "out group"] | None]:
        """Scales, and zeros unless `symmetric`, that reach over the weights of each group; rounded to bfloat16."""
        if self.dtype == "fp8":
            return _rounded(grouped.abs().amax(-1) / _FP8_MOST), None
        if self.symmetric:
            farthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
            return _rounded(farthest / self.lowest), None
        low, high = grouped.aminmax(dim=-1)
        scale = _rounded((high - low) / (-2 * self.lowest - 1))
        return scale, (low - self.lowest * scale).bfloat16()

    def grouped(self, weight: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "out group column"]:
        """A view of a matrix with the columns of a group together."""
        return weight.unflatten(-1, (-1, self.group or weight.shape[-1]))

    def encode(
        self,
        grouped: Float[Tensor, "out group column"],
        scales: Float[Tensor, "out group"],
        zeros: Float[Tensor, "out group"] | None,
    ) -> Shaped[Tensor, "out group column"]:
        """The nearest codes, one a byte."""
        if zeros is not None:
            grouped = grouped - zeros.float().unsqueeze(-1)
        levels = grouped / scales.float().unsqueeze(-1)
        if self.dtype == "fp8":
            return levels.clamp(-_FP8_MOST, _FP8_MOST).to(_FP8).view(torch.uint8)
        return levels.round().clamp(self.lowest, -self.lowest - 1).to(torch.int8)

    def decode(
        self,
        codes: Shaped[Tensor, "out group column"],
        scales: Float[Tensor, "out group"],
        zeros: Float[Tensor, "out group"] | None,
    ) -> Float[Tensor, "out group column"]:
        """What codes stand for, float32."""
        wide = (codes.view(_FP8) if self.dtype == "fp8" else codes).float() * scales.float().unsqueeze(-1)
        return wide if zeros is None else wide + zeros.float().unsqueeze(-1)


class Coded(NamedTuple):
    """A matrix in codes, one a byte; `divisor` is what it was multiplied by before, column by column."""

    codes: Shaped[Tensor, "out in"]
    scales: Float[Tensor, "out group"]
    zeros: Float[Tensor, "out group"] | None
    divisor: Float[Tensor, "in"] | None = None


def nearest(weight: Float[Tensor, "out in"], form: Form, divisor: Float[Tensor, "in"] | None = None) -> Coded:
    """Each weight, multiplied by its column's divisor, as the code nearest to it."""
    grouped = form.grouped(weight if divisor is None else weight * divisor)
    scales, zeros = form.scales(grouped)
    return Coded(form.encode(grouped, scales, zeros).flatten(1), scales, zeros, divisor)


def _rounded(scales: Float[Tensor, "out group"]) -> Float[Tensor, "out group"]:
    tiny = torch.finfo(torch.bfloat16).tiny
    return torch.where(scales.abs() < tiny, tiny, scales).bfloat16()


def pack_nibbles(codes: Int8[Tensor, "out in"]) -> UInt8[Tensor, "out half"]:
    """Codes from -8 to 7, two a byte: that of the even column in the lower half."""
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_nibbles(packed: UInt8[Tensor, "out half"]) -> Int8[Tensor, "out in"]:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8


@dataclass
class _Product:
    """One product of rows with the matrices of several layers, one above the other.

    Args:
        codes: of the layers, each with its version, by which it is known whether the product still holds.
        factor: all codes as the kernel reads them, and `scales` likewise.
    """

    layers: Sequence[WeightOnlyLinear]
    codes: Sequence[tuple[Tensor, int]]
    kernel: Kernel
    factor: Tensor
    scales: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        self._form, self._divisor = self.layers[0].form, self.layers[0].divisor
        self._few = _FEW_ROWS[self._form.dtype] if matmul.has_bf16() else 1 << 62

    def holds(self, layers: Sequence[WeightOnlyLinear]) -> bool:
        """Whether it is that of these layers as they are now."""
        for layer, mine, (codes, version) in zip(layers, self.layers, self.codes, strict=True):
            if layer is not mine or layer.codes is not codes or codes._version != version:
                return False
        return True

    def multiply(self, x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """What the layers make of rows, side by side, in the precision of the rows."""
        given, rows = x.dtype, x.shape[0]
        x = x if self._divisor is None else x / self._divisor
        if self.kernel == "dequantised" or not rows:
            wide = F.linear(x.float(), torch.cat([layer.whole() for layer in self.layers]))
        elif self.kernel == "fp8":
            wide = self._fp8(x)
        elif rows > self._few:
            wide = self._many(x.bfloat16())
        elif self.kernel == "int4":
            wide = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.factor, self._form.group, self.scales)
        else:
            wide = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.factor, self.scales)
        wide = wide.to(given)
        return wide if self.bias is None else wide + self.bias

    def _many(self, x: Tensor) -> Tensor:
        """Rows by the matrix in bfloat16, which holds codes of 8 bits exactly."""
        if self.kernel == "int8":
            return F.linear(x, self.factor.bfloat16()) * self.scales
        return F.linear(x, torch.cat([layer.whole() for layer in self.layers]).bfloat16())

    def _fp8(self, x: Tensor) -> Tensor:
        """Rows in 8 bits, each with a scale, by the matrix."""
        scale = (x.float().abs().amax(-1, keepdim=True) / _FP8_MOST).clamp_min(torch.finfo(torch.float32).tiny)
        rows = (x.float() / scale).to(_FP8)
        multiply = torch._scaled_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return multiply(rows, self.factor.t(), scale_a=scale, scale_b=self.scales, out_dtype=torch.bfloat16)


class _Ready(dict[int, _Product]):
    """Products made ready, by the number of layers in them. Copies of a layer begin without."""

    def __deepcopy__(self, memo: Any) -> _Ready:
        return _Ready()

    def __reduce__(self) -> Any:
        return _Ready, ()


@register_addition
class WeightOnlyLinear(nn.Module, Addition, Joint):
    """`y = x Wᵀ + b` with W in codes, for inference.

    Args:
        divided: whether inputs are divided by `divisor`, one number a column that the matrix was multiplied by before
            it was rounded (Lin et al. 2024, AWQ).
    """

    kind: ClassVar[str] = "weight_only"
    addition: ClassVar[str] = "weight_only"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    divisor: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, form: Form, *, bias: bool = True, divided: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        width = in_features // 2 if form.dtype == "int4" else in_features
        kind = torch.int8 if form.dtype == "int8" else torch.uint8
        groups = in_features // (form.group or in_features)
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=kind))
        self.register_buffer("scales", torch.ones(out_features, groups, dtype=torch.bfloat16))
        self.register_buffer("zeros", None if form.symmetric else torch.zeros_like(self.scales))
        self.register_buffer("divisor", torch.ones(in_features) if divided else None)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.ran: Kernel | None = None
        self._ready = _Ready()

    @classmethod
    @torch.no_grad()
    def of(cls, dense: Linear, form: Form, coded: Coded | None = None) -> WeightOnlyLinear:
        """A dense layer in these codes, or else in the nearest."""
        coded = coded or nearest(dense.weight.float(), form)
        divided = coded.divisor is not None
        layer = cls(dense.in_features, dense.out_features, form, bias=has_bias(dense), divided=divided)
        layer.codes = pack_nibbles(coded.codes) if form.dtype == "int4" else coded.codes
        layer.scales, layer.zeros = coded.scales, coded.zeros
        layer.divisor = None if coded.divisor is None else coded.divisor.clone()
        if layer.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().float(), requires_grad=False)
        return layer.train(dense.training)

    def whole(self) -> Float[Tensor, "out in"]:
        """The matrix that codes stand for, float32, still multiplied by the divisor."""
        codes = unpack_nibbles(self.codes) if self.form.dtype == "int4" else self.codes
        return self.form.decode(self.form.grouped(codes), self.scales, self.zeros).flatten(1)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.together([self], input)

    def together(self, layers: Sequence[WeightOnlyLinear], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError("layers in codes have no gradient", hint="train the model first, and quantise it last")
        wide = self.product(layers).multiply(x.reshape(-1, self.in_features))
        return wide.view(*x.shape[:-1], wide.shape[-1])

    def product(self, layers: Sequence[WeightOnlyLinear]) -> _Product:
        """The product of the same rows with the matrices of these, of which this is the first; made ready once."""
        found = self._ready.get(len(layers))
        if found is None or not found.holds(layers):
            found = self._ready[len(layers)] = _made(layers)
        for layer in layers:
            layer.ran = found.kernel
        return found

    def joins(self, other: nn.Module) -> bool:
        if not isinstance(other, WeightOnlyLinear) or is_hooked(other) or other.form != self.form:
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
        return {**asdict(self.form), "divided": self.divisor is not None}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> WeightOnlyLinear:
        if not isinstance(place, Linear):
            raise TypeError("there is no linear layer at this place")
        shape = dict(described)
        divided = shape.pop("divided")
        return cls(place.in_features, place.out_features, Form(**shape), bias=has_bias(place), divided=divided)


register(WeightOnlyLinear.kind, WeightOnlyLinear)


def kernel_for(form: Form, outputs: int, inputs: int, device: torch.device) -> Kernel:
    """What multiplies few rows by a matrix of this form and size there."""
    if torch.compiler.is_compiling():
        return "dequantised"
    if form.dtype == "fp8":
        sides = outputs % _FP8_SIDE == 0 and inputs % _FP8_SIDE == 0
        return "fp8" if has_fp8(device) and form.group is None and sides else "dequantised"
    if device.type != "cpu":
        return "dequantised"
    if form.dtype == "int4":
        return "int4" if form.group in _INT4_GROUPS and outputs % _INT4_OUTPUTS == 0 else "dequantised"
    plain = form.group is None and form.symmetric and inputs % _INT8_INPUTS == 0
    return "int8" if plain else "dequantised"


def has_fp8(device: torch.device) -> bool:
    """Whether this is a GPU that multiplies floats of 8 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _made(layers: Sequence[WeightOnlyLinear]) -> _Product:
    first = layers[0]
    outputs, device = sum(layer.out_features for layer in layers), first.codes.device
    kernel = kernel_for(first.form, outputs, first.in_features, device)
    with torch.inference_mode(mode=False), torch.no_grad():
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        factor, scales = _factor(layers, kernel)
        codes = [(layer.codes, layer.codes._version) for layer in layers]
        return _Product(list(layers), codes, kernel, factor, scales, torch.cat(biases) if biases else None)


def _factor(layers: Sequence[WeightOnlyLinear], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Codes and scales as a kernel reads them."""
    codes, scales = torch.cat([layer.codes for layer in layers]), torch.cat([layer.scales for layer in layers])
    if kernel == "int4":
        zeros = [torch.zeros_like(layer.scales) if layer.zeros is None else layer.zeros for layer in layers]
        both = torch.stack([scales, torch.cat(zeros)], -1).bfloat16()
        wide = unpack_nibbles(codes).int() + 8
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1), both.transpose(0, 1).contiguous()
    if kernel == "fp8":
        return codes.view(_FP8), scales.float().t().contiguous()
    if kernel == "int8" and len(layers) > 1:
        # From now on each layer's codes are a part of the joint ones, so that memory holds them once.
        for layer, part in zip(layers, codes.split([layer.out_features for layer in layers]), strict=True):
            layer.codes = part
    return codes if len(layers) > 1 else layers[0].codes, scales.flatten().bfloat16()
