"""`x Wᵀ + b` by the faster of the two libraries that torch carries for a CPU.

`F.linear` in float32 goes to MKL. On a CPU with AVX-512, oneDNN's matrix multiply takes the weight as it lies in
memory, adds the bias on the way, and is 10 to 20 % faster at an encoder's shapes; `docs/log.md` has the figures. The
product for the weight's gradient is MKL's in both.

Under `autocast` to bfloat16, on a CPU that multiplies it, all products are oneDNN's too. torch's own linear layer would
copy each weight's gradient out of a transposed matrix, which takes longer than its product.

A model that only answers can have its weights `pack`ed: laid out beforehand as oneDNN's kernels read them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_FEWEST_ROWS = 8
_ROW_STEPS = 64
"""Numbers of rows used between a power of two and the next."""
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By weight: its version when it was packed, and the packed copy."""


@cache
def _onednn_is_faster() -> bool:
    """Whether this is a CPU on which oneDNN was measured to win, in a torch that has it."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _has_bf16() -> bool:
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


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product could be taken."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 and len(x) > 0
    if not plain or torch.is_autocast_enabled("cpu") or not _onednn_is_faster():
        return False
    return not torch.compiler.is_compiling()


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether it is the faster one, of a weight as it lies in memory."""
    return _is_plain(x, weight) and len(x) >= _FEWEST_ROWS


def _is_reduced(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of full-precision weights shall be made in bfloat16, and oneDNN's is the one to take."""
    wanted = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not wanted or x.device.type != "cpu" or weight.dtype != torch.float32 or x.dim() != 2 or len(x) == 0:
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and _has_bf16() and not torch.compiler.is_compiling()


def pack(weight: Float[Tensor, "out in"], rows: int) -> bool:
    """Keep a second copy of a weight as oneDNN's kernels read it; products without a gradient take it from now on.

    It is no longer taken once the weight is written to, and goes when the weight goes.

    Args:
        rows: of the products that it shall be best for; others are right too.

    Returns:
        Whether it was packed: only where oneDNN's products would be the faster ones.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not _onednn_is_faster():
        return False
    with torch.no_grad():
        _PACKED[weight] = weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return True


def _packed(x: Tensor, weight: Tensor) -> Tensor | None:
    """The packed copy of a weight, where there is one that still holds and no gradient is wanted."""
    if torch.is_grad_enabled() or not _is_plain(x, weight) or weight not in _PACKED:
        return None
    version, packed = _PACKED[weight]
    return packed if version == weight._version else None


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*rows out"]:
    """What `F.linear` computes, to within rounding."""
    packed = _packed(x, weight)
    if packed is not None:
        return _product(x, packed, bias)
    if _is_reduced(x, weight):
        return _Bf16Linear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}
"""Activations that oneDNN applies to a product on the way, and what it calls them."""


def activated(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, activation: str
) -> Float[Tensor, "*rows out"] | None:
    """An activation of what `linear` gives, in one sweep; None where that takes two, or a gradient is wanted."""
    if activation not in FUSED or torch.is_grad_enabled():
        return None
    packed = _packed(x, weight)
    if packed is None and not _fits(x, weight):
        return None
    name, kind = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight if packed is None else packed, bias, name, [], kind)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if to_x else None,
            grad.t() @ x if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


class _Bf16Linear(torch.autograd.Function):
    """Both factors rounded to bfloat16, sums in float32, the result rounded; gradients likewise, but in float32 in the
    end where the weight is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        reduced, rounded = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(reduced, rounded)
        ctx.x_dtype = x.dtype
        return _product(reduced, rounded, None if bias is None else bias.bfloat16())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        reduced, rounded = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(grad, rounded.t(), None).to(ctx.x_dtype) if to_x else None,
            (grad.t() @ reduced).float() if to_weight else None,
            grad.sum(0, dtype=torch.float32) if to_bias else None,
        )
