"""The transformer as nodes of a graph: all of its structure that an encoder has, masks included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from torch import nn

from lexmill.errors import UserError
from lexmill.export.onnx import layers
from lexmill.export.onnx.graph import Graph
from lexmill.models.backbone import Block, Embeddings, Transformer
from lexmill.nn.attention import Attention
from lexmill.nn.mlp import MLP
from lexmill.nn.rotary import Rotary, frequencies

_NEVER = -1e9
"""What is added to the score of a key that is not seen: its weight is 0 exactly."""


@dataclass(frozen=True)
class Inputs:
    """What a graph is asked: tokens `[batch, length]`, 1 where there is one in `mask`, and segment types."""

    ids: str
    mask: str
    types: str | None


def hidden(graph: Graph, trunk: Transformer, inputs: Inputs) -> str:
    """The last hidden state, `[rows, dim]`."""
    if trunk.exits is not None:
        hint = "export the artefact it was made from; exits need a runtime that takes texts out of a batch"
        raise UserError("a model with early exits cannot be written as ONNX", where="export --format onnx", hint=hint)
    if trunk.relative is not None:
        hint = "run it in torch"
        raise UserError("positions by a bias (T5) cannot be written as ONNX", where="export --format onnx", hint=hint)
    length = layers.count(graph, inputs.ids, 1)
    positions = layers.upto(graph, length)
    x = _embedded(graph, trunk.embeddings, inputs, positions)
    shared = _Shared(graph, inputs.mask, positions)
    for block in trunk.layers:
        x = _block(graph, cast("Block", block), x, trunk, shared)
    return layers.norm(graph, trunk.norm, x)


def _embedded(graph: Graph, module: Embeddings, inputs: Inputs, positions: str) -> str:
    if module.prompt is not None:
        raise layers.refused(module.prompt)
    x = layers.rows_of(graph, module.token, inputs.ids)
    if module.segment is not None:
        types = inputs.types or graph.integers(0)
        x = graph.op("Add", x, layers.rows_of(graph, module.segment, types))
    if module.position is not None:
        shifted = graph.op("Add", positions, graph.integers(module.position_offset))
        x = graph.op("Add", x, layers.rows_of(graph, module.position, shifted))
    if module.task_type is not None:
        x = graph.op("Add", x, layers.rows_of(graph, module.task_type, graph.integers(0)))
    x = layers.norm(graph, module.norm, x)
    x = graph.op("Reshape", x, graph.integers(-1, module.token.embedding_dim))
    return x if type(module.projection) is nn.Identity else layers.linear(graph, module.projection, x)


class _Shared:
    """What all layers of one pass share: which keys are seen, and rotations; each made once."""

    def __init__(self, graph: Graph, mask: str, positions: str) -> None:
        self.graph, self.positions, self.mask = graph, positions, mask
        self._biases: dict[tuple[bool, int | None], str] = {}
        self._ropes: dict[object, tuple[str, str]] = {}
        self._length = layers.count(graph, mask, 1)
        # [batch, length, -1]: what rows are laid out to again.
        self.shape = graph.op("Concat", graph.op("Shape", mask), graph.integers(-1), axis=0)

    def bias(self, causal: bool, window: int | None) -> str:
        """What is added to scores, `[batch, 1, 1 or length, length]`."""
        if (causal, window) not in self._biases:
            graph = self.graph
            hidden = graph.op("Sub", graph.number(1.0), graph.op("Cast", self.mask, to=1))
            hidden = graph.op("Unsqueeze", hidden, graph.integers(1, 2))
            if causal or window is not None:
                hidden = graph.op("Max", hidden, self._unseen(causal, window))
            self._biases[causal, window] = graph.op("Mul", hidden, graph.number(_NEVER))
        return self._biases[causal, window]

    def _unseen(self, causal: bool, window: int | None) -> str:
        """1 where a key is out of reach of a query, `[length, length]`."""
        graph, keys = self.graph, self.positions
        queries = graph.op("Unsqueeze", keys, graph.integers(1))
        ahead = graph.op("Sub", keys, queries)
        found: list[str] = []
        if causal:
            found.append(graph.op("Greater", ahead, graph.integers(0)))
        if window is not None:
            found.append(graph.op("GreaterOrEqual", graph.op("Abs", ahead), graph.integers(window)))
        unseen = found[0] if len(found) == 1 else graph.op("Or", *found)
        return graph.op("Cast", unseen, to=1)

    def rope(self, rotary: Rotary) -> tuple[str, str]:
        """Cosines and sines, `[length, 1, dim / 2]`."""
        if rotary not in self._ropes:
            graph = self.graph
            each = graph.weight(frequencies(rotary.dim, rotary.theta, rotary.scaling)[None, None])
            angles = graph.op(
                "Mul", graph.op("Cast", graph.op("Unsqueeze", self.positions, graph.integers(1, 2)), to=1), each
            )
            self._ropes[rotary] = graph.op("Cos", angles), graph.op("Sin", angles)
        return self._ropes[rotary]


def _block(graph: Graph, block: Block, x: str, trunk: Transformer, shared: _Shared) -> str:
    rotary = trunk.rotary.get(block.rope_kind)
    if block.post_norm:
        mixed = _attention(graph, block.attention, x, rotary, shared)
        x = layers.norm(graph, block.attention_norm, graph.op("Add", x, mixed))
        return layers.norm(graph, block.mlp_norm, graph.op("Add", x, _mlp(graph, block.mlp, x)))
    normed = layers.norm(graph, block.attention_norm, x)
    mixed = _attention(graph, block.attention, normed, rotary, shared)
    x = graph.op("Add", x, layers.norm(graph, block.attention_out_norm, mixed))
    wide = _mlp(graph, block.mlp, layers.norm(graph, block.mlp_norm, x))
    return graph.op("Add", x, layers.norm(graph, block.mlp_out_norm, wide))


def _attention(graph: Graph, module: Attention, x: str, rotary: Rotary | None, shared: _Shared) -> str:
    if module.prefix is not None:
        raise layers.refused(module.prefix)
    q, k, v = layers.project(graph, [module.query, module.key, module.value], x)
    q, k, v = (_heads(graph, part, module.head_dim, shared) for part in (q, k, v))
    if module.query_norm is not None and module.key_norm is not None:
        q, k = layers.norm(graph, module.query_norm, q), layers.norm(graph, module.key_norm, k)
    if rotary is not None:
        q, k = (_rotated(graph, part, rotary, module.head_dim, shared) for part in (q, k))
    q, v = graph.transposed(q, 0, 2, 1, 3), graph.transposed(v, 0, 2, 1, 3)
    k = graph.transposed(k, 0, 2, 3, 1)
    heads, kv_heads = module.query.out_features // module.head_dim, module.key.out_features // module.head_dim
    if heads != kv_heads:
        k, v = (_repeated(graph, part, kv_heads, heads // kv_heads) for part in (k, v))
    scores = graph.op("MatMul", q, k)
    if module.scaled:
        scores = graph.op("Mul", scores, graph.number(1 / math.sqrt(module.head_dim)))
    weights = graph.op("Softmax", graph.op("Add", scores, shared.bias(module.causal, module.window)), axis=-1)
    mixed = graph.transposed(graph.op("MatMul", weights, v), 0, 2, 1, 3)
    return layers.linear(graph, module.output, graph.shaped(mixed, -1, heads * module.head_dim))


def _heads(graph: Graph, x: str, head_dim: int, shared: _Shared) -> str:
    """`[rows, wide]` as `[batch, length, head, head_dim]`."""
    shape = graph.op("Concat", shared.shape, graph.integers(head_dim), axis=0)
    return graph.op("Reshape", x, shape)


def _rotated(graph: Graph, x: str, rotary: Rotary, head_dim: int, shared: _Shared) -> str:
    cos, sin = shared.rope(rotary)
    turned, still = x, None
    if rotary.dim < head_dim:
        turned, still = graph.op("Split", x, graph.integers(rotary.dim, head_dim - rotary.dim), axis=-1, outputs=2)
    if rotary.interleaved:
        pairs = graph.op("Reshape", turned, graph.integers(0, 0, 0, -1, 2))
        low, high = graph.op("Split", pairs, graph.integers(1, 1), axis=-1, outputs=2)
        low, high = graph.op("Squeeze", low, graph.integers(-1)), graph.op("Squeeze", high, graph.integers(-1))
    else:
        low, high = graph.op("Split", turned, graph.integers(rotary.dim // 2, rotary.dim // 2), axis=-1, outputs=2)
    first = graph.op("Sub", graph.op("Mul", low, cos), graph.op("Mul", high, sin))
    second = graph.op("Add", graph.op("Mul", high, cos), graph.op("Mul", low, sin))
    if rotary.interleaved:
        both = [graph.op("Unsqueeze", part, graph.integers(-1)) for part in (first, second)]
        whole = graph.op("Reshape", graph.op("Concat", *both, axis=-1), graph.integers(0, 0, 0, rotary.dim))
    else:
        whole = graph.op("Concat", first, second, axis=-1)
    return whole if still is None else graph.op("Concat", whole, still, axis=-1)


def _repeated(graph: Graph, x: str, heads: int, times: int) -> str:
    """`[batch, head, a, b]` with every head so many times in a row."""
    return graph.op("Gather", x, graph.integers(*(head for head in range(heads) for _ in range(times))), axis=1)


def _mlp(graph: Graph, module: MLP, x: str) -> str:
    if module.gate is None:
        return layers.linear(
            graph, module.down, layers.activation(graph, module.activation, layers.linear(graph, module.up, x))
        )
    gate, up = layers.project(graph, [module.gate, module.up], x)
    return layers.linear(graph, module.down, graph.op("Mul", layers.activation(graph, module.activation, gate), up))
