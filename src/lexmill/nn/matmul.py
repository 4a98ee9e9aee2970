"""`x Wᵀ + b` by the faster of the two libraries that torch carries for a CPU.

`F.linear` in float32 goes to MKL. On a CPU with AVX-512, oneDNN's matrix multiply takes the weight as it lies in
memory, adds the bias on the way, and is 10 to 20 % faster at an encoder's shapes; `docs/log.md` has the figures. The
product for the weight's gradient is MKL's in both.

Under `autocast` to bfloat16, on a CPU that multiplies it, all products are oneDNN's too. torch's own linear layer would
copy each weight's gradient out of a transposed matrix, which takes longer than its product.

Weights that are not being trained can be `pack`ed: laid out beforehand as oneDNN's kernels read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_FEWEST_ROWS = 8
_ROW_STEPS = 64
"""Numbers of rows used between a power of two and the next."""


@dataclass(frozen=True)
class _Packed:
    """A weight as oneDNN's kernels read it: as it was at a `version`, and, for gradients of the input, turned."""

    version: int
    forward: Tensor
    backward: Tensor | None


_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By weight, and by the precision of the product."""


@cache
def _onednn_is_faster() -> bool:
    """Whether this is a CPU on which oneDNN was measured to win, in a torch that has it."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_bf16() -> bool:
    """Whether this is a CPU with products of bfloat16 that sum in float32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def fitting_rows(rows: int, device: torch.device) -> int:
    """The least number of rows, no smaller than this, that products should have.

    oneDNN makes a kernel for each new number of rows, at 1 to 2 ms for each shape of matrix; packed batches would
    have a new one nearly every time. So numbers are rounded up, by 1/128 in the mean, to 64 an octave.
    """
    if device.type != "cpu" or not _onednn_is_faster() or rows == 0:
        return rows
    step = max(_FEWEST_ROWS, (1 << (rows - 1).bit_length()) // (2 * _ROW_STEPS))
    return -(-rows // step) * step


def pack(
    weight: Float[Tensor, "out in"], rows: int, *, dtype: torch.dtype = torch.float32, training: bool = False
) -> bool:
    """Keep a copy of a weight as oneDNN's kernels read it, for products that want no gradient of the weight.

    It is no longer taken once the weight is written to, and goes when the weight goes.

    Args:
        rows: of the products that it shall be best for; others are right too.
        dtype: the precision of the products.
        training: keep a second one, for gradients of the input.

    Returns:
        Whether it was packed: only where oneDNN's products would be the faster ones.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not _multiplies(dtype):
        return False
    with torch.no_grad():
        plain = weight.detach().to(dtype)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        backward = reorder(plain.t().contiguous(), rows) if training else None
        found = _Packed(weight._version, reorder(plain, rows), backward)
    _PACKED[weight] = {**_copies(weight), dtype: found}
    return True


def _copies(weight: Tensor) -> Mapping[torch.dtype, _Packed]:
    return cast("Mapping[torch.dtype, _Packed]", _PACKED.get(weight, {}))


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products in this precision are the faster ones."""
    return has_bf16() if dtype == torch.bfloat16 else dtype == torch.float32 and _onednn_is_faster()


def _precision(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """That of oneDNN's product of these, or None where torch's own shall be taken."""
    if torch.compiler.is_compiling():  # before a length is asked for, which a graph leaves open
        return None
    if x.device.type != "cpu" or x.dim() != 2 or len(x) == 0 or weight.dtype != torch.float32:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if x.dtype not in (torch.float32, dtype) or not _multiplies(dtype):
        return None
    return dtype


def _packed(weight: Tensor, dtype: torch.dtype) -> _Packed | None:
    """The copy of a weight, where there is one that still holds and no gradient of the weight is wanted."""
    learns = torch.is_grad_enabled()
    if learns and weight.requires_grad:
        return None
    found = _copies(weight).get(dtype)
    if found is None or found.version != weight._version or (learns and found.backward is None):
        return None
    return found


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*rows out"]:
    """What `F.linear` computes, to within rounding."""
    dtype = _precision(x, weight)
    if dtype is None:
        return F.linear(x, weight, bias)
    packed = _packed(weight, dtype)
    if packed is None and dtype == torch.float32 and len(x) < _FEWEST_ROWS:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled() and dtype == x.dtype == torch.float32:
        return _product(x, weight if packed is None else packed.forward, bias)
    return _OneDnnLinear.apply(x, weight, bias, dtype, packed)  # pyright: ignore[reportReturnType]


def rounded(x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
    """The rows as products under `autocast` round them, for several that read the same: rounded once, not once each."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
        return x
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype) if _multiplies(dtype) else x


FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}
"""Activations that oneDNN applies to a product on the way, and what it calls them."""


def activated(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, activation: str
) -> Float[Tensor, "*rows out"] | None:
    """An activation of what `linear` gives, in one sweep; None where that takes two, or a gradient is wanted."""
    dtype = None if activation not in FUSED or torch.is_grad_enabled() else _precision(x, weight)
    if dtype is None:
        return None
    packed = _packed(weight, dtype)
    if packed is None and len(x) < _FEWEST_ROWS:
        return None
    factor = weight.to(dtype) if packed is None else packed.forward
    return _product(x.to(dtype), factor, None if bias is None else bias.to(dtype), *FUSED[activation])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)


class _OneDnnLinear(torch.autograd.Function):
    """Both factors rounded to `dtype`, sums in float32, the result rounded. Gradients likewise, those of the weight and
    the bias in float32 in the end."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: _Packed | None
    ) -> Tensor:
        rows, factor = x.to(dtype), weight.to(dtype) if packed is None else packed.forward
        ctx.packed, ctx.x_dtype = packed, x.dtype
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, factor if packed is None else None)
        return _product(rows, factor, None if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, factor = ctx.saved_tensors
        to_x, to_weight, to_bias, _, _ = ctx.needs_input_grad
        turned = factor.t() if ctx.packed is None else ctx.packed.backward
        return (
            _product(grad, turned, None).to(ctx.x_dtype) if to_x else None,
            (grad.t() @ rows).float() if to_weight else None,
            grad.sum(0, dtype=torch.float32) if to_bias else None,
            None,
            None,
        )
