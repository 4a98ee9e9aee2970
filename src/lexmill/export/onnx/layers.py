"""Layers of a trunk as nodes of a graph: each kind that is known, and a `UserError` for any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.export.onnx.graph import Graph, floats
from lexmill.nn.activation import Activation
from lexmill.nn.embedding import Embedding, Int8Embedding
from lexmill.nn.int8 import Grid, Int8Linear
from lexmill.nn.linear import Linear
from lexmill.nn.low_rank import LowRankLinear
from lexmill.nn.norm import LayerNorm, RMSNorm

_MIDDLE = 128
_MOST = 127
_TINY = float(torch.finfo(torch.float32).tiny * 255)


def refused(what: object) -> UserError:
    """That a module cannot be written as ONNX."""
    kind = type(what).__name__
    hint = "export the model before this was put into it, or run it in torch"
    return UserError(f"a module of the kind {kind} cannot be written as ONNX", where="export --format onnx", hint=hint)


def linear(graph: Graph, layer: nn.Module, x: str) -> str:
    """`[rows, in]` to `[rows, out]`."""
    return project(graph, [layer], x)[0]


def project(graph: Graph, layers: Sequence[nn.Module], x: str) -> list[str]:
    """What several layers make of the same rows, in one product where they are of one kind."""
    first = layers[0]
    if all(type(layer) is Linear and layer.quantised is None for layer in layers):
        return _split(graph, _dense(graph, [_as(Linear, layer) for layer in layers], x), layers)
    if all(type(layer) is Int8Linear for layer in layers):
        chosen = [_as(Int8Linear, layer) for layer in layers]
        if all(chosen[0].joins(other) for other in chosen[1:]):
            return _split(graph, _int8(graph, chosen, x), layers)
    if len(layers) > 1:
        return [linear(graph, layer, x) for layer in layers]
    if type(first) is LowRankLinear:
        return [linear(graph, first.up, linear(graph, first.down, x))]
    raise refused(first)


def _as(kind: type[Any], layer: nn.Module) -> Any:
    assert isinstance(layer, kind)
    return layer


def _split(graph: Graph, x: str, layers: Sequence[Any]) -> list[str]:
    if len(layers) == 1:
        return [x]
    return graph.op("Split", x, graph.integers(*(one.out_features for one in layers)), axis=1, outputs=len(layers))


def _dense(graph: Graph, layers: Sequence[Linear], x: str) -> str:
    key = tuple(id(layer.weight) for layer in layers)
    weight = graph.weight(torch.cat([floats(layer.weight) for layer in layers]), key)
    bias = _biases(graph, layers)
    return graph.op("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)


def _biases(graph: Graph, layers: Sequence[Any]) -> str | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [layer.out_features for layer in layers]
    rows = [
        torch.zeros(n) if layer.bias is None else floats(layer.bias) for n, layer in zip(parts, layers, strict=True)
    ]
    return graph.weight(torch.cat(rows), ("bias", *(id(layer) for layer in layers)))


def _int8(graph: Graph, layers: Sequence[Int8Linear], x: str) -> str:
    """Rows on their grid, multiplied as bytes with sums in 32 bits (`MatMulInteger`), and scaled back."""
    first, ids = layers[0], tuple(id(layer) for layer in layers)
    scales = torch.cat([floats(layer.scales) for layer in layers])
    matrix = graph.weight(torch.cat([layer.codes for layer in layers]).t(), ("codes", *ids))
    if first.grid is None:
        codes, row_scale = _on_own_grids(graph, first, x)
        wide = _product(graph, codes, matrix, _MIDDLE)
        wide = graph.op("Mul", graph.op("Mul", wide, graph.weight(scales, ("scales", *ids))), row_scale)
    else:
        wide = _product(graph, _on_one_grid(graph, first, first.grid, x), matrix, first.grid.zero)
        wide = graph.op("Mul", wide, graph.weight(scales * first.grid.scale, ("scales", *ids)))
    bias = _biases(graph, layers)
    return wide if bias is None else graph.op("Add", wide, bias)


def _on_own_grids(graph: Graph, layer: Int8Linear, x: str) -> tuple[str, str]:
    """The codes of rows, each on a grid that reaches as far as it does, and their scales, `[rows, 1]`."""
    if layer.divisor is not None:
        x = graph.op("Mul", x, graph.weight(floats(layer.divisor).reciprocal(), ("factor", id(layer))))
    reach = graph.op("ReduceMax", graph.op("Abs", x), graph.integers(1), keepdims=1)
    scale = graph.op("Max", graph.op("Div", reach, graph.number(_MOST)), graph.number(_TINY))
    # As the layer rounds: half a code more, and cut off.
    shifted = graph.op("Add", graph.op("Div", x, scale), graph.number(_MIDDLE + 0.5))
    return graph.op("Cast", shifted, to=2), scale


def _on_one_grid(graph: Graph, layer: Int8Linear, grid: Grid, x: str) -> str:
    """The codes of rows on a grid that was chosen beforehand; a column's step is wider by its divisor."""
    if layer.divisor is None:
        return graph.op("QuantizeLinear", x, graph.number(grid.scale), _byte(graph, grid.zero))
    steps = graph.weight(floats(layer.divisor) * grid.scale, ("steps", id(layer)))
    zeros = graph.weight(torch.full([layer.in_features], grid.zero, dtype=torch.uint8), ("zeros", id(layer)))
    return graph.op("QuantizeLinear", x, steps, zeros, axis=1)


def _product(graph: Graph, codes: str, matrix: str, zero: int) -> str:
    return graph.op("Cast", graph.op("MatMulInteger", codes, matrix, _byte(graph, zero)), to=1)


def _byte(graph: Graph, value: int) -> str:
    return graph.weight(torch.tensor(value, dtype=torch.uint8), ("byte", value))


def rows_of(graph: Graph, table: nn.Module, ids: str) -> str:
    """The rows of a table at these ids."""
    if type(table) is Embedding:
        return graph.op("Gather", graph.weight(floats(table.weight), id(table.weight)), ids)
    if type(table) is Int8Embedding:
        codes = graph.op("Cast", graph.op("Gather", graph.weight(table.codes, id(table.codes)), ids), to=1)
        return graph.op("Mul", codes, graph.op("Gather", graph.weight(floats(table.scales)[:, None]), ids))
    raise refused(table)


def norm(graph: Graph, module: nn.Module, x: str) -> str:
    """A normalisation over the last dimension."""
    if type(module) is nn.Identity:
        return x
    if type(module) is LayerNorm:
        bias = [] if module.bias is None else [_weight(graph, module.bias)]
        return graph.op("LayerNormalization", x, _weight(graph, module.weight), *bias, axis=-1, epsilon=module.eps)
    if type(module) is RMSNorm:
        mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.integers(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.number(module.eps)))
        return graph.op("Mul", graph.op("Div", x, root), _weight(graph, module.weight))
    raise refused(module)


def _weight(graph: Graph, tensor: Tensor) -> str:
    return graph.weight(floats(tensor), id(tensor))


def activation(graph: Graph, kind: Activation | str, x: str) -> str:
    """An activation by its name."""
    if kind in ("gelu", "gelu_tanh"):
        return graph.op("Gelu", x, approximate="none" if kind == "gelu" else "tanh")
    if kind == "silu":
        return graph.op("Mul", x, graph.op("Sigmoid", x))
    return graph.op({"relu": "Relu", "tanh": "Tanh"}[kind], x)


def count(graph: Graph, x: str, axis: int) -> str:
    """How long a value is along an axis, as a row of one integer."""
    return graph.op("Shape", x, start=axis, end=axis + 1)


def upto(graph: Graph, length: str) -> str:
    """The integers from 0 to below the one of a row."""
    zero, one = graph.array(np.array(0, np.int64)), graph.array(np.array(1, np.int64))
    return graph.op("Range", zero, graph.op("Squeeze", length), one)
