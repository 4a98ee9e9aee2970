"""Linear layers, and the registry of their kinds."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.nn import matmul
from lexmill.nn.blockwise import Bits, Blockwise
from lexmill.nn.matmul import linear

Role = Literal["column", "row", "vocab", "replicated"]
"""How a plan may shard a layer: by outputs, by inputs, by vocabulary, or not at all."""


L = TypeVar("L", bound="Linear")


class Linear(nn.Linear):
    """`y = x Wᵀ + b`. The kind `dense`: every weight stored, in the precision of computing.

    Of whatever kind, its matrix may be `quantised`: it then has no `weight`, and each product makes the matrix whole.

    Args:
        role: how tensor parallelism may cut it; a label only, this layer never looks at it.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, role: Role = "replicated") -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.role: Role = role
        self.quantised: Blockwise | None = None

    def reset_parameters(self) -> None:
        # On the meta device there is nothing to draw, and drawing there makes torch import its compiler (1.5 s).
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.quantised is not None:
            return self.quantised.product(input, self.bias)
        return linear(input, self.weight, self.bias)

    @property
    def like(self) -> Tensor:
        """A tensor on the device of the matrix and in the precision that it is computed in."""
        if self.quantised is None:
            return self.weight
        return torch.empty(0, dtype=self.quantised.dtype, device=self.quantised.codes.device)

    @property
    def matrix(self) -> Tensor:
        """The weight, or a stand-in of its shape, without numbers, where it is quantised."""
        return self.weight if self.quantised is None else torch.empty(self.quantised.shape, device="meta")

    @classmethod
    def sharing(cls: type[L], other: Linear) -> L:
        """A layer of this kind with the role, the matrix and the bias of another."""
        with torch.device("meta"):
            layer = cls(other.in_features, other.out_features, bias=has_bias(other))
        layer.role, layer.training, layer.quantised = other.role, other.training, other.quantised
        layer.weight, layer.bias = other.weight, other.bias
        return layer

    def quantise(self, bits: Bits, *, double: bool = True) -> None:
        """Store the matrix in so many bits a weight in place of as it is; see `Blockwise`."""
        if self.quantised is None:
            self.quantised = Blockwise(self.weight, bits, double=double)
            self.register_parameter("weight", None)

    def whole(self) -> None:
        """Store the matrix as products see it, where it is quantised."""
        if self.quantised is not None:
            self.weight = nn.Parameter(self.quantised.whole(), requires_grad=False)
            self.quantised = None

    def with_delta(self, delta: Float[Tensor, "out in"] | None) -> Linear:
        """A dense layer with this added to the matrix, which is new. This one stays as it is, bit for bit."""
        dense = Linear.sharing(self)
        weight = self.weight.detach().clone() if self.quantised is None else self.quantised.whole()
        dense.quantised = None
        if delta is not None:
            weight += delta.detach()
        dense.weight = nn.Parameter(weight, requires_grad=self.matrix.requires_grad)
        return dense


def pack(
    model: nn.Module,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    most: int | None = None,
) -> int:
    """Lay the matrices of linear layers out for products of about so many rows, where that gains; see `matmul.pack`.

    Args:
        dtype: the precision of the products.
        training: only those that are not trained, for both directions.
        most: bytes that the copies may take: none is made where all would take more.

    Returns:
        How many were.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and layer.quantised is None]
    chosen = [layer.weight for layer in layers if not (training and layer.weight.requires_grad)]
    copies = sum(weight.numel() for weight in chosen) * dtype.itemsize * (2 if training else 1)
    if most is not None and copies > most:
        return 0
    return sum(matmul.pack(weight, rows, dtype=dtype, training=training) for weight in chosen)


def has_bias(layer: nn.Linear) -> bool:
    """Whether a linear layer adds one."""
    return "bias" in dict(layer.named_parameters(recurse=False))


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
