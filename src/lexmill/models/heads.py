"""What stands on a trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.dropout import Dropout
from lexmill.nn.linear import Linear
from lexmill.nn.pooling import Pooling

Transform = Literal["tanh", "relu"]

TRANSFORMS: dict[Transform, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class ClassifierShape:
    """A classification head's structure.

    Args:
        transform: the activation of a square layer before the output; None for no such layer.
        dropout: before the output, in training.
        pooling: the vector of a sequence that the head is given.
        bias: whether the output has one.
    """

    num_labels: int
    transform: Transform | None = "tanh"
    dropout: float = 0.1
    pooling: Pooling = "first"
    bias: bool = True


class ClassifierHead(nn.Module):
    """Logits from one pooled vector a sequence."""

    kind = "classifier"

    def __init__(self, hidden_size: int, shape: ClassifierShape) -> None:
        super().__init__()
        self.shape = shape
        self.transform = Linear(hidden_size, hidden_size) if shape.transform else None
        self.dropout = Dropout(shape.dropout)
        self.output = Linear(hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, pooled: Float[Tensor, "seq dim"]) -> Float[Tensor, "seq label"]:
        if self.transform is not None and self.shape.transform is not None:
            pooled = TRANSFORMS[self.shape.transform](self.transform(pooled))
        return self.output(self.dropout(pooled))

    def describe(self) -> dict[str, Any]:
        """The structure, as JSON."""
        return {"kind": self.kind, **asdict(self.shape)}


class LMHead(nn.Module):
    """Logits over the vocabulary, of every row it is given.

    Args:
        tied: the token embedding that the head shares; it has a weight of its own where None.
    """

    kind = "lm"

    def __init__(
        self, hidden_size: int, vocab_size: int, *, tied: nn.Embedding | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.output = Linear(hidden_size, vocab_size, bias=bias, role="vocab")
        self.tied = tied is not None
        self.has_bias = bias
        if tied is not None:
            self.output.weight = tied.weight

    def forward(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        return self.output(hidden)

    def describe(self) -> dict[str, Any]:
        """The structure, as JSON."""
        return {"kind": self.kind, "bias": self.has_bias}


Head = ClassifierHead | LMHead
