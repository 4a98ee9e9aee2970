"""What stands on a trunk. A new kind of head is a subclass of `Head` in any file, decorated with `register_head`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.models.config import strict
from lexmill.models.trunk import Trunk
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


class Head(nn.Module, ABC):
    """A module that reads a trunk's hidden state. Its parameters are saved with the model, its structure as JSON."""

    kind: ClassVar[str]
    """What `describe` calls it in a saved model."""

    @property
    @abstractmethod
    def pooling(self) -> Pooling | None:
        """The vector a sequence that it is given, or None for the hidden state of every row."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The structure, as JSON, without the kind."""

    @classmethod
    @abstractmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> Head:
        """The inverse of `describe`, weights aside. A wrong key is a `UserError` at `where`."""


_KINDS: dict[str, type[Head]] = {}
H = TypeVar("H", bound=Head)


def register_head(head: type[H]) -> type[H]:
    """Class decorator: make a kind of head known, so that saved models with it can be loaded."""
    _KINDS[head.kind] = head
    return head


def build_head(trunk: Trunk, described: Mapping[str, Any], where: str) -> Head:
    """A head of the `kind` that stands in `described`. An unknown one is a `UserError`."""
    shape = dict(described)
    kind = shape.pop("kind", None)
    if kind not in _KINDS:
        raise UserError(f"unknown kind of head {kind!r}", where=where, hint=f"known kinds: {', '.join(sorted(_KINDS))}")
    return _KINDS[kind].build(trunk, shape, where)


@register_head
class ClassifierHead(Head):
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

    @property
    def pooling(self) -> Pooling:
        return self.shape.pooling

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    @classmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> ClassifierHead:
        return cls(trunk.config.hidden_size, strict(ClassifierShape, described, where))


@register_head
class LMHead(Head):
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

    @property
    def pooling(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"bias": self.has_bias}

    @classmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> LMHead:
        tied = trunk.embeddings.token if trunk.config.tied_output else None
        return cls(trunk.config.hidden_size, trunk.config.vocab_size, tied=tied, bias=bool(described.get("bias")))
