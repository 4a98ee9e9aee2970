"""Which weights of a matrix become 0, and what the others make up for, given what goes into its layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lexmill.compress.weights_rounding import inverse_root
from lexmill.errors import UserError

By = Literal["magnitude", "wanda", "sparsegpt"]
_BLOCK = 128
"""Columns among which zeros are chosen before what is lost is made up for by those to come."""


@dataclass(frozen=True)
class Pattern:
    """Where zeros lie: a share of weights anywhere, or all but `keep` of every `of` neighbours in a row."""

    share: float
    keep: int = 0
    of: int = 0

    @classmethod
    def read(cls, text: str) -> Pattern:
        """`2:4` is two weights of every four that stay. Raises a `UserError` where it is something else."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        keep, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < keep < of:
            raise UserError(f"'{text}' is no pattern", where="pattern", hint="write 2:4, for two of every four")
        return cls(1 - keep / of, keep, of)

    def zeros(self, scores: Float[Tensor, "out in"], *, by_row: bool) -> Bool[Tensor, "out in"]:
        """The weights of the least scores: of every group, or of every row, or of the whole matrix."""
        if self.of:
            groups = scores.unflatten(1, (-1, self.of))
            return _least(groups, self.of - self.keep).flatten(1)
        rows = scores if by_row else scores.reshape(1, -1)
        return _least(rows, round(self.share * rows.shape[1])).view_as(scores)


def _least(scores: Float[Tensor, "*rows col"], count: int) -> Bool[Tensor, "*rows col"]:
    """As many of every row, exactly, whatever ties there are."""
    least = scores.topk(count, dim=-1, largest=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, least, value=True)


def sparse(
    weight: Float[Tensor, "out in"], moments: Float[Tensor, "in in"], pattern: Pattern, by: By, *, damp: float = 0.01
) -> Float[Tensor, "out in"]:
    """The matrix with zeros in this pattern.

    Args:
        moments: the mean of `x xᵀ` over inputs.
        by: `magnitude`: the least of the matrix go. `wanda`: of every row the least `|w| · ‖x‖` go (Sun et al. 2023).
            `sparsegpt`: what the outputs miss least goes, and the columns to come make up for it (Frantar and Alistarh
            2023, algorithm 1).
        damp: `sparsegpt`: added to the diagonal of the moments, as a share of its mean.
    """
    if by == "sparsegpt":
        return _made_up_for(weight, inverse_root(moments.double(), damp).to(weight), pattern)
    scores = weight.abs()
    if by == "wanda":
        scores = scores * moments.diagonal().sqrt().to(scores)
    return weight.masked_fill(pattern.zeros(scores, by_row=by == "wanda"), 0.0)


def _made_up_for(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], pattern: Pattern
) -> Float[Tensor, "out in"]:
    left, size = weight.clone(), weight.shape[1]
    costs = inverse.diagonal().square()
    block = _BLOCK if not pattern.of else pattern.of * max(1, _BLOCK // pattern.of)
    for start in range(0, size, block):
        stop = min(start + block, size)
        zeros = pattern.zeros(left[:, start:stop].square() / costs[start:stop], by_row=False)
        lost = torch.zeros_like(left[:, start:stop])
        for i in range(start, stop):
            at = i - start
            if pattern.of and at % pattern.of == 0:  # as the weights are when their turn comes
                near = slice(i, i + pattern.of)
                zeros[:, at : at + pattern.of] = pattern.zeros(left[:, near].square() / costs[near], by_row=True)
            lost[:, at] = torch.where(zeros[:, at], left[:, i], 0.0) / inverse[i, i]
            left[:, i:stop] -= torch.outer(lost[:, at], inverse[i, i:stop])
        left[:, start:stop].masked_fill_(zeros, 0.0)
        left[:, stop:] -= lost @ inverse[start:stop, stop:]
    return left
