"""What stands on a trunk. A new kind of head is a subclass of `Head` in any file, decorated with `register_head`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.errors import UserError
from lexmill.models.config import strict
from lexmill.models.trunk import Trunk
from lexmill.nn.activation import ACTIVATIONS, Activation
from lexmill.nn.dropout import Dropout
from lexmill.nn.embedding import Embedding, Int8Embedding
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.linear import Linear
from lexmill.nn.norm import LayerNorm
from lexmill.nn.pooling import Pooling
from lexmill.nn.token_loss import layer_losses, token_losses

Transform = Literal["tanh", "relu", "gelu"]

TRANSFORMS: dict[Transform, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class ClassifierShape:
    """A classification head's structure.

    Args:
        transform: the activation of a square layer before the output; None for no such layer.
        transform_bias: whether that layer has one.
        norm_eps, norm_bias: of a layer norm after the activation; `norm_eps` is None where there is none.
        dropout: before the output, in training.
        pooling: the vector of a sequence that the head is given; None for the hidden state of every row.
        bias: whether the output has one.
    """

    num_labels: int
    transform: Transform | None = "tanh"
    dropout: float = 0.1
    pooling: Pooling | None = "first"
    bias: bool = True
    transform_bias: bool = True
    norm_eps: float | None = None
    norm_bias: bool = True


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
    """Logits from one pooled vector a sequence, or from the hidden state of every row."""

    kind = "classifier"

    def __init__(self, hidden_size: int, shape: ClassifierShape) -> None:
        super().__init__()
        self.shape = shape
        self.transform = Linear(hidden_size, hidden_size, bias=shape.transform_bias) if shape.transform else None
        self.norm = None if shape.norm_eps is None else LayerNorm(hidden_size, shape.norm_eps, bias=shape.norm_bias)
        self.dropout = Dropout(shape.dropout)
        self.output = Linear(hidden_size, shape.num_labels, bias=shape.bias)

    def forward(self, given: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows label"]:
        if self.transform is not None and self.shape.transform is not None:
            given = TRANSFORMS[self.shape.transform](self.transform(given))
        if self.norm is not None:
            given = self.norm(given)
        return self.output(self.dropout(given))

    @property
    def pooling(self) -> Pooling | None:
        return self.shape.pooling

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    @classmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> ClassifierHead:
        return cls(trunk.config.hidden_size, strict(ClassifierShape, described, where))


@dataclass(frozen=True)
class LanguageShape:
    """A language head's structure.

    Args:
        bias: whether the output has one.
        transform: the activation of a layer, with a layer norm after it, before the output (BERT); None for neither.
        width: of what that layer gives; that of the hidden state where None.
        transform_bias: whether that layer has one; `norm_bias` likewise.
        norm_eps: of that norm.
        scale: what hidden states are multiplied by before the output (T5).
    """

    bias: bool = False
    transform: Activation | None = None
    width: int | None = None
    transform_bias: bool = True
    norm_eps: float = 1e-12
    norm_bias: bool = True
    scale: float = 1.0


@register_head
class LMHead(Head):
    """Logits over the vocabulary, of every row it is given.

    Args:
        tied: the token embedding that the head shares; it has a weight of its own where None.
    """

    kind = "lm"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        shape: LanguageShape | None = None,
        *,
        tied: Embedding | Int8Embedding | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape or LanguageShape()
        width, form = self.shape.width or hidden_size, self.shape
        self.transform = Linear(hidden_size, width, bias=form.transform_bias) if form.transform else None
        self.norm = LayerNorm(width, form.norm_eps, bias=form.norm_bias) if form.transform else None
        self.output: Linear | Int8Linear = Linear(width, vocab_size, bias=form.bias, role="vocab")
        self.tied = tied is not None
        if tied is not None:
            if self.shape.bias:
                nn.init.zeros_(self.output.bias)
            self.tie(tied)

    def tie(self, table: Embedding | Int8Embedding) -> None:
        """Share this table: its rows are the output's matrix."""
        if isinstance(table, Int8Embedding):
            self.output = Int8Linear.sharing(table.codes, table.scales, self.output.bias)
        elif isinstance(self.output, Linear):
            self.output.weight = table.weight

    def forward(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        return self.output(self._transformed(hidden))

    def losses(self, hidden: Float[Tensor, "item dim"], target: Int[Tensor, "item"]) -> Float[Tensor, "item"]:
        """The negative log-likelihood, in nats, of each target; see `token_losses`."""
        rows, output = self._transformed(hidden), self.output
        if isinstance(output, Linear):
            return token_losses(rows, output.weight, output.bias, target)
        return layer_losses(rows, output, target)

    def _transformed(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows width"]:
        if self.shape.scale != 1.0:
            hidden = hidden * self.shape.scale
        if self.transform is None or self.norm is None or self.shape.transform is None:
            return hidden
        return self.norm(ACTIVATIONS[self.shape.transform](self.transform(hidden)))

    @property
    def pooling(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    @classmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> LMHead:
        tied = trunk.embeddings.token if trunk.config.tied_output else None
        shape = strict(LanguageShape, described, where)
        return cls(trunk.config.hidden_size, trunk.config.vocab_size, shape, tied=tied)


@dataclass(frozen=True)
class SpanShape:
    """A span head's structure.

    Args:
        dropout: before the output, in training.
    """

    dropout: float = 0.1


@register_head
class SpanHead(Head):
    """Two logits a row: that a span starts there, and that it ends there."""

    kind = "span"

    def __init__(self, hidden_size: int, shape: SpanShape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = Dropout(shape.dropout)
        self.output = Linear(hidden_size, 2)

    def forward(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 2"]:
        return self.output(self.dropout(hidden))

    @property
    def pooling(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    @classmethod
    def build(cls, trunk: Trunk, described: Mapping[str, Any], where: str) -> SpanHead:
        return cls(trunk.config.hidden_size, strict(SpanShape, described, where))
