"""One text alone, straight through an encoder.

A batch of many rows is bound by its products; one short text by what is done around them: looking up modules, ordering
sequences by length, filling rows up. Here all of that is settled once, so that what is left are the calls into torch.
The numbers are those of `Transformer.forward`, to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.models.trunk import Only
from lexmill.nn.attention import Attention
from lexmill.nn.int8 import Codes, Int8Linear
from lexmill.nn.joint import is_hooked
from lexmill.nn.linear import Linear
from lexmill.nn.low_rank import LowRankLinear
from lexmill.nn.mlp import MLP
from lexmill.nn.norm import LayerNorm
from lexmill.nn.weight_only import WeightOnlyLinear

if TYPE_CHECKING:
    from lexmill.models.backbone import Block

Step = Callable[[Float[Tensor, "tok in"]], Float[Tensor, "tok out"]]
Heads = tuple[Float[Tensor, "1 head tok dim"], Float[Tensor, "1 head tok dim"], Float[Tensor, "1 head tok dim"]]
Layer = Callable[[Float[Tensor, "tok dim"], Only], Float[Tensor, "some_tok dim"]]

_KINDS = (Linear, Int8Linear, LowRankLinear, WeightOnlyLinear)


@dataclass(frozen=True)
class Straight:
    """The layers of an encoder for one sequence.

    They are bound to its modules: weights may change in place, and where a module was put in another's place they do
    not hold any more.
    """

    layers: Sequence[Layer]
    source: nn.ModuleList
    bound: Sequence[tuple[Mapping[str, nn.Module | None], str, nn.Module | None]]
    """Each module, with what holds it and its name there."""

    @classmethod
    def of(cls, blocks: Sequence[Block], source: nn.ModuleList) -> Straight | None:
        """None where a layer does anything but full attention, feed-forward, and a norm after each."""
        layers = [_layer(block) for block in blocks]
        known = [layer for layer in layers if layer is not None]
        bound = [(_held(one), name, module) for one in source.modules() for name, module in _held(one).items()]
        return cls(known, source, bound) if len(known) == len(layers) else None

    def holds(self, source: nn.ModuleList) -> bool:
        """Whether these are the layers it was made of, with all modules where they were."""
        return source is self.source and all(held.get(name) is module for held, name, module in self.bound)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model is not bound to the modules of the original."""

    def __call__(self, x: Float[Tensor, "tok dim"], only: Only) -> Float[Tensor, "some_tok dim"]:
        for layer in self.layers[:-1]:
            x = layer(x, "all")
        return self.layers[-1](x, only)


def _held(module: nn.Module) -> Mapping[str, nn.Module | None]:
    return module._modules  # pyright: ignore[reportPrivateUsage]


def _layer(block: Block) -> Layer | None:
    attention, mlp = block.attention, block.mlp
    norms = block.attention_norm, block.mlp_norm
    linears = (attention.query, attention.key, attention.value, attention.output, mlp.up, mlp.down)
    special = attention.causal or attention.window or attention.prefix or attention.query_norm or attention.key_norm
    if (
        not block.post_norm
        or special
        or not attention.scaled
        or type(attention) is not Attention
        or type(mlp) is not MLP
        or mlp.gate is not None
        or any(type(one) is not LayerNorm for one in norms)
        or any(type(one) not in _KINDS for one in linears)
        or attention.key.out_features != attention.query.out_features
        or any(is_hooked(one) for one in block.modules())
    ):
        return None
    heads, width = _heads(attention), attention.query.out_features
    output, feed = _step(attention.output), _feed_forward(mlp)
    after_attention, after_mlp = (_norm(one) for one in norms if isinstance(one, LayerNorm))

    def run(x: Tensor, only: Only) -> Tensor:
        q, k, v = heads(x)
        if only != "all":
            chosen = slice(0, 1) if only == "first" else slice(-1, None)
            q, x = q[:, :, chosen], x[chosen]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
        x = after_attention(x + output(mixed))
        return after_mlp(x + feed(x))

    return run


def _heads(attention: Attention) -> Callable[[Tensor], Heads]:
    layers, dim = (attention.query, attention.key, attention.value), attention.head_dim
    first: Any = attention.query
    if isinstance(first, Int8Linear) and all(first.joins(other) for other in layers[1:]):
        joined = _int8([one for one in layers if isinstance(one, Int8Linear)])

        def at_once(x: Tensor) -> Heads:
            q, k, v = joined(x).view(1, len(x), 3, -1, dim).transpose(1, 3).unbind(2)
            return q, k, v

        return at_once
    query, key, value = (_step(one) for one in layers)

    def each(x: Tensor) -> Heads:
        shape = 1, len(x), -1, dim
        return (
            query(x).view(shape).transpose(1, 2),
            key(x).view(shape).transpose(1, 2),
            value(x).view(shape).transpose(1, 2),
        )

    return each


def _feed_forward(mlp: MLP) -> Step:
    up: nn.Module = mlp.up
    down: nn.Module = mlp.down
    if (
        not isinstance(up, Int8Linear)
        or not isinstance(down, Int8Linear)
        or down.grid is None
        or down.divisor is not None
    ):
        return mlp.forward
    first, second, grid, activation = up.product([up]), down.product([down]), down.grid, mlp.activation

    def run(x: Tensor) -> Tensor:
        codes = first.multiply(first.read(x), activation, grid)
        return second.multiply(Codes(codes, *grid))

    return run


def _step(layer: nn.Module) -> Step:
    return _int8([layer]) if isinstance(layer, Int8Linear) else layer.forward


def _int8(layers: list[Int8Linear]) -> Step:
    product = layers[0].product(layers)
    return lambda x: product.multiply(product.read(x))


def _norm(layer: LayerNorm) -> Step:
    weight, bias, eps = layer.weight, layer.bias, layer.eps
    shape = list(weight.shape)
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps, False)
