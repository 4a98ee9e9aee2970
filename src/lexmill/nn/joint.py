"""Layers that read the same rows, in one product where they can be multiplied together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.matmul import rounded


class Joint(ABC):
    """A linear layer whose product may be that of several layers, one above the other."""

    out_features: int

    @abstractmethod
    def joins(self, other: nn.Module) -> bool:
        """Whether both read rows alike, so that one product serves both."""

    @abstractmethod
    def together(self, layers: Sequence[Any], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """What these layers, of which this is the first, and which it joins, make of the same rows, side by side."""


def joined(layers: Sequence[nn.Module]) -> Joint | None:
    """The first of these layers where one product serves them all."""
    first = layers[0]
    if not isinstance(first, Joint) or is_hooked(first) or not all(first.joins(other) for other in layers[1:]):
        return None
    return first


def project(layers: Sequence[nn.Module], x: Float[Tensor, "*rows in"]) -> Sequence[Float[Tensor, "*rows out"]]:
    """What several layers make of the same rows; in one product where they can."""
    first = joined(layers)
    if first is None:
        rows = rounded(x)
        return [layer(rows) for layer in layers]
    return first.together(layers, x).split([layer.out_features for layer in layers if isinstance(layer, Joint)], -1)


def is_hooked(layer: nn.Module) -> bool:
    """Whether someone listens to what goes into a layer or comes out, so that it must be called as a whole."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
