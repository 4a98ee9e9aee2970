"""Linear layers, and the registry of their kinds."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.nn.matmul import linear

Role = Literal["column", "row", "vocab", "replicated"]
"""How a plan may shard a layer: by outputs, by inputs, by vocabulary, or not at all."""


class Linear(nn.Linear):
    """`y = x Wᵀ + b`. The kind `dense`: every weight stored, in the precision of computing.

    Args:
        role: how tensor parallelism may cut it; a label only, this layer never looks at it.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, role: Role = "replicated") -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.role: Role = role

    def reset_parameters(self) -> None:
        # On the meta device there is nothing to draw, and drawing there makes torch import its compiler (1.5 s).
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return linear(input, self.weight, self.bias)


KINDS: dict[str, type[nn.Module]] = {Linear.kind: Linear}
"""Kinds of linear layer by the name that a structure map gives them."""

K = TypeVar("K", bound=nn.Module)


def register(name: str, kind: type[K]) -> type[K]:
    """Make a kind of linear layer known by its name. Raises `ValueError` where the name is taken."""
    if KINDS.setdefault(name, kind) is not kind:
        raise ValueError(f"the kind '{name}' is already {KINDS[name].__qualname__}")
    return kind


def find(name: str) -> type[nn.Module]:
    """The kind of this name, or a `UserError` that lists the known ones."""
    if name not in KINDS:
        raise UserError(f"unknown kind of linear layer '{name}'", hint=f"known kinds: {', '.join(sorted(KINDS))}")
    return KINDS[name]
