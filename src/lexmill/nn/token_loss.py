"""The loss of an output over a vocabulary, without more passes over its logits than it needs.

Logits are the largest thing that training a language model makes: one number a token and word. `F.cross_entropy` after
`F.linear` writes them four times and reads them more often. Here the logits of a few hundred tokens at a time, while
they lie in the cache, turn in place into what the backward pass multiplies by; it costs hardly more than the three
matrix products. `docs/log.md` has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.nn.matmul import linear

_ROWS = 512
"""Tokens at a time: enough for fast products, few enough for the cache."""


def token_losses(
    hidden: Float[Tensor, "item dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, "vocab"] | None,
    target: Int[Tensor, "item"],
) -> Float[Tensor, "item"]:
    """The negative log-likelihood, in nats, of each target: `F.cross_entropy(linear(hidden), target)`, unreduced.

    On a CPU in one precision it is the fast way above, differentiable once; elsewhere it is torch's.
    """
    plain = hidden.device.type == "cpu" and hidden.dtype == weight.dtype and hidden.dtype in _KINDS
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.cross_entropy(linear(hidden, weight, bias).float(), target, reduction="none")
    return _TokenLosses.apply(hidden, weight, bias, target)  # pyright: ignore[reportReturnType]


_KINDS = (torch.float32, torch.float64)


def layer_losses(
    hidden: Float[Tensor, "item dim"], output: nn.Module, target: Int[Tensor, "item"]
) -> Float[Tensor, "item"]:
    """The same of an output that has no matrix to read, without a gradient: a few rows at a time."""
    parts = zip(hidden.split(_ROWS), target.split(_ROWS), strict=True)
    return torch.cat([F.cross_entropy(output(rows).float(), wanted, reduction="none") for rows, wanted in parts])


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        losses = hidden.new_empty(len(hidden))
        kept: list[Tensor] = []
        parts = zip(
            hidden.split(_ROWS), target.unsqueeze(1).split(_ROWS), losses.unsqueeze(1).split(_ROWS), strict=True
        )
        for rows, targets, out in parts:
            logits = linear(rows, weight, bias)
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, targets)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            torch.add(total.log(), top - chosen, out=out)
            if wanted:
                # Divided by `total` it is the gradient: probabilities, less 1 at the target.
                kept += [logits.scatter_add_(1, targets, -total), total]
        ctx.has_bias = bias is not None
        ctx.save_for_backward(hidden, weight, *kept)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, *kept = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = weight.new_zeros(len(weight)) if ctx.has_bias and ctx.needs_input_grad[2] else None
        outs = [None] * len(kept[::2]) if to_hidden is None else to_hidden.split(_ROWS)
        parts = zip(kept[::2], kept[1::2], grad.unsqueeze(1).split(_ROWS), hidden.split(_ROWS), outs, strict=True)
        for change, total, of_loss, rows, out in parts:
            scale = of_loss / total
            if out is not None:
                torch.mm(change, weight, out=out).mul_(scale)
            if to_weight is not None:
                to_weight.addmm_(change.t(), rows * scale)
            if to_bias is not None:
                to_bias.addmv_(change.t(), scale.squeeze(1))
        return to_hidden, to_weight, to_bias, None
