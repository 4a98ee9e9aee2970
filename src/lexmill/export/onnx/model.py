"""What a task asks of its model, as one graph from tokens to outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lexmill.engine.graph_model import IDS, MASK, POOLED, TYPES
from lexmill.errors import UserError
from lexmill.export.onnx import layers, recurrent, transformer
from lexmill.export.onnx.graph import Graph
from lexmill.export.onnx.transformer import Inputs
from lexmill.models import Model, Recurrent, Transformer
from lexmill.models.heads import ClassifierHead, SpanHead
from lexmill.nn.linear import Linear
from lexmill.nn.pooling import Pooling


def written(model: Model, heads: Sequence[str], pooling: Pooling | None, doc: str) -> Any:
    """The ONNX model, with `input_ids`, `attention_mask` and, where the trunk has such, `token_type_ids` as its inputs.

    Args:
        heads: those whose outputs it has, by their names: `[batch, out]`, or `[batch, length, out]` of those that are
            asked about every token.
        pooling: it has the hidden state pooled so too, as `pooled`, `[batch, dim]`.
        doc: what it says of itself.

    Raises:
        UserError: something in the model cannot be written.
    """
    if model.dtype != torch.float32:
        kind = str(model.dtype).removeprefix("torch.")
        raise UserError(f"the weights are {kind}, and ONNX is written in float32", hint="store them in float32 first")
    graph = Graph(doc)
    typed = isinstance(model.trunk, Transformer) and model.trunk.embeddings.segment is not None
    inputs = Inputs(graph.input(IDS), graph.input(MASK), graph.input(TYPES) if typed else None)
    rows = _hidden(graph, model, inputs)
    shape = graph.op("Concat", graph.op("Shape", MASK), graph.integers(-1), axis=0)
    pools: dict[Pooling, str] = {}

    def pooled(how: Pooling) -> str:
        if how not in pools:
            pools[how] = _pooled(graph, graph.op("Reshape", rows, shape), how)
        return pools[how]

    for name in heads:
        head = model.heads[name]
        if not isinstance(head, (ClassifierHead, SpanHead)):
            raise layers.refused(head)
        size = head.output.out_features
        if head.pooling is None:
            said = graph.op("Reshape", _said(graph, head, rows), shape)
            graph.output(name, said, ["batch", "length", size])
        else:
            graph.output(name, _said(graph, head, pooled(head.pooling)), ["batch", size])
    if pooling is not None:
        graph.output(POOLED, pooled(pooling), ["batch", model.config.hidden_size])
    return graph.model()


def _hidden(graph: Graph, model: Model, inputs: Inputs) -> str:
    if type(model.trunk) is Transformer:
        return transformer.hidden(graph, model.trunk, inputs)
    if type(model.trunk) is Recurrent:
        return recurrent.hidden(graph, model.trunk, inputs)
    raise layers.refused(model.trunk)


def _pooled(graph: Graph, x: str, how: Pooling) -> str:
    """One row of `[batch, length, dim]` a sequence."""
    if how == "first":
        return graph.op("Gather", x, graph.op("Constant", value_int=0), axis=1)
    lengths = graph.op("ReduceSum", MASK, graph.integers(1), keepdims=1)
    if how == "last":
        last = graph.op("Unsqueeze", graph.op("Sub", lengths, graph.integers(1)), graph.integers(2))
        wide = graph.op("Concat", graph.integers(1, 1), layers.count(graph, x, 2), axis=0)
        rows = graph.op("GatherElements", x, graph.op("Expand", last, wide), axis=1)
        return graph.op("Squeeze", rows, graph.integers(1))
    there = graph.op("Cast", graph.op("Unsqueeze", MASK, graph.integers(2)), to=1)
    total = graph.op("ReduceSum", graph.op("Mul", x, there), graph.integers(1), keepdims=0)
    return graph.op("Div", total, graph.op("Cast", lengths, to=1))


def _said(graph: Graph, head: ClassifierHead | SpanHead, x: str) -> str:
    """What a head makes of rows."""
    if isinstance(head, ClassifierHead):
        if isinstance(head.transform, Linear) and head.shape.transform is not None:
            x = layers.activation(graph, head.shape.transform, layers.linear(graph, head.transform, x))
        if isinstance(head.norm, nn.Module):
            x = layers.norm(graph, head.norm, x)
    return layers.linear(graph, head.output, x)
