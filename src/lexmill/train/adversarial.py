"""Training on word vectors moved to where the loss is larger: FGM (Miyato et al. 2017) and FreeLB (Zhu et al. 2020).

Lengths are those of a whole sequence of vectors, as in both papers; how far it moves is a share of its own length.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.data.batch import Batch
from lexmill.models import Model
from lexmill.train.passes import Backward

_TINY = 1e-12


class _Moved:
    """While `open`, the word vectors of a model are moved by `delta`, whose gradient is kept."""

    def __init__(self, model: Model) -> None:
        self.embeddings = model.trunk.embeddings
        self.delta: Tensor | None = None
        self.vectors: Tensor = torch.empty(0)
        self._sequence: Int[Tensor, "*rows"] = torch.empty(0, dtype=torch.int64)

    @contextmanager
    def open(self) -> Generator[None]:
        hooks = (
            self.embeddings.register_forward_pre_hook(self._positions),
            self.embeddings.token.register_forward_hook(self._move),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _positions(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Behind a prefix every sequence begins at the same later position.
        positions = args[1].reshape(-1)
        self._sequence = (positions == positions.min()).cumsum(0) - 1

    def _move(self, module: nn.Module, args: tuple[Any, ...], found: Tensor) -> Tensor:
        self.vectors = found.detach().float()
        moved = torch.zeros_like(found) if self.delta is None else self.delta.to(found.dtype)
        self.delta = moved.detach().requires_grad_(True)
        return found + self.delta

    def gradient(self) -> Float[Tensor, "*rows dim"]:
        """Of the loss with respect to `delta`, after a backward pass."""
        assert self.delta is not None
        assert self.delta.grad is not None
        return self.delta.grad.float()

    def direction(self) -> Float[Tensor, "*rows dim"]:
        """The gradient by sequence, each of length 1; nowhere where it overflowed, which ends such a step anyway."""
        grad = self.gradient()
        return (grad / self.lengths(grad)).nan_to_num(0.0, 0.0, 0.0)

    def lengths(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 1"]:
        """By row, the norm of its whole sequence."""
        squares = x.square().sum(-1).reshape(-1)
        total = squares.new_zeros(int(self._sequence[-1]) + 1).index_add(0, self._sequence, squares)
        return total.sqrt()[self._sequence].view(*x.shape[:-1], 1).clamp_min(_TINY)


@dataclass(frozen=True)
class FGM:
    """A pass as it is, and one with each sequence moved along its loss's gradient; both losses count in full.

    Args:
        size: how far a sequence moves, as a share of its length.
    """

    size: float

    def __call__(self, model: Model, batch: Batch, backward: Backward) -> tuple[Mapping[str, float], dict[str, float]]:
        moved = _Moved(model)
        with moved.open():
            clean = backward(1.0)
            moved.delta = moved.direction() * (self.size * moved.lengths(moved.vectors))
            worse = backward(1.0)
        return clean, {"adversarial_gain": sum(worse.values()) - sum(clean.values())}


@dataclass(frozen=True)
class FreeLB:
    """`steps` passes, the first as it is, each next one where the one before climbed to; each counts 1 / `steps`.

    Args:
        size: the farthest a sequence may be moved, as a share of its length; a step climbs `2 × size / steps`.
    """

    size: float
    steps: int

    def __call__(self, model: Model, batch: Batch, backward: Backward) -> tuple[Mapping[str, float], dict[str, float]]:
        moved = _Moved(model)
        seen: list[Mapping[str, float]] = []
        with moved.open():
            for _ in range(self.steps):
                seen.append(backward(1 / self.steps))
                assert moved.delta is not None
                reach = self.size * moved.lengths(moved.vectors)
                climbed = moved.delta.detach().float() + moved.direction() * (2 * reach / self.steps)
                moved.delta = climbed * (reach / moved.lengths(climbed)).clamp(max=1.0)
        mean = {head: sum(one[head] for one in seen) / len(seen) for head in seen[0]}
        return mean, {"adversarial_gain": sum(seen[-1].values()) - sum(seen[0].values())}
