"""How weights are rounded to codes, given what goes into their layer: GPTQ, and AWQ's choice of scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lexmill.nn.weight_only import Coded, Form, nearest

_BLOCK = 128
"""Columns that are rounded before what is left is brought up to date, where groups do not say."""
_STEPS = 20
"""Exponents tried, from 0 up to 1."""


def gptq(
    weight: Float[Tensor, "out in"],
    moments: Float[Tensor, "in in"],
    form: Form,
    *,
    damp: float = 0.01,
    act_order: bool = False,
) -> Coded:
    """Column after column to the nearest code, what is lost by each made up for by those to come (Frantar et al. 2023,
    algorithm 1).

    Args:
        moments: the mean of `x xᵀ` over inputs.
        damp: added to their diagonal, as a share of its mean.
        act_order: begin with the columns of the largest inputs; groups then have the scales of the first weights,
            and otherwise those of the weights as they are when their turn comes.
    """
    size, group = weight.shape[1], form.group or weight.shape[1]
    order = moments.diagonal().argsort(descending=True) if act_order else torch.arange(size)
    inverse = inverse_root(moments[order][:, order].double(), damp)
    left = weight[:, order].clone()
    scales, zeros = form.scales(form.grouped(weight))
    codes = torch.empty(weight.shape, dtype=torch.uint8 if form.dtype == "fp8" else torch.int8)
    block = form.group or _BLOCK
    for start in range(0, size, block):
        stop = min(start + block, size)
        if form.group is not None and not act_order:
            own = form.scales(left[:, None, start:stop])
            at = start // group
            scales[:, at] = own[0][:, 0]
            if zeros is not None and own[1] is not None:
                zeros[:, at] = own[1][:, 0]
        lost = torch.zeros(len(weight), stop - start)
        for i in range(start, stop):
            at = int(order[i]) // group
            of = scales[:, at : at + 1], None if zeros is None else zeros[:, at : at + 1]
            column = left[:, i].clone()
            code = form.encode(column[:, None, None], *of)
            codes[:, int(order[i])] = code[:, 0, 0]
            lost[:, i - start] = (column - form.decode(code, *of)[:, 0, 0]) / inverse[i, i]
            left[:, i:stop] -= torch.outer(lost[:, i - start], inverse[i, i:stop])
        left[:, stop:] -= lost @ inverse[start:stop, stop:]
    return Coded(codes, scales, zeros)


def inverse_root(moments: Float[Tensor, "in in"], damp: float) -> Float[Tensor, "in in"]:
    """The upper triangle U with `Uᵀ U` the inverse of the damped moments; float32."""
    mean = moments.diagonal().mean().clamp_min(1e-12)
    damped = moments + damp * mean * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()


def awq(
    weights: Sequence[Float[Tensor, "out in"]], moments: Float[Tensor, "in in"], form: Form
) -> tuple[list[Coded], float]:
    """The nearest codes of matrices that read the same inputs, once their columns are multiplied by the root mean
    square of their inputs to some power: that of the least error of the outputs (Lin et al. 2024, section 3.2, where
    it is the mean absolute input). The second is that power."""
    reach = moments.diagonal().sqrt().clamp_min(1e-8)
    best: tuple[float, list[Coded], float] | None = None
    for step in range(_STEPS):
        power = step / _STEPS
        divisor = reach**power
        divisor = (divisor / (divisor.max() * divisor.min()).sqrt()).float()
        coded = [nearest(weight, form, divisor if step else None) for weight in weights]
        error = sum(lost(weight, decoded(one, form), moments) for weight, one in zip(weights, coded, strict=True))
        if best is None or error < best[0]:
            best = error, coded, power
    assert best is not None
    return best[1], best[2]


def decoded(coded: Coded, form: Form) -> Float[Tensor, "out in"]:
    """What codes stand for, the divisor taken off again."""
    whole = form.decode(form.grouped(coded.codes), coded.scales, coded.zeros).flatten(1)
    return whole if coded.divisor is None else whole / coded.divisor


def lost(weight: Float[Tensor, "out in"], other: Float[Tensor, "out in"], moments: Float[Tensor, "in in"]) -> float:
    """The mean square, summed over outputs, of what a layer gives too much or too little with the other matrix."""
    apart = weight - other
    return float(((apart @ moments.float()) * apart).sum())
