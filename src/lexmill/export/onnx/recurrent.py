"""LSTM and GRU trunks as nodes of a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lexmill.export.onnx import layers
from lexmill.export.onnx.graph import Graph, floats
from lexmill.export.onnx.transformer import Inputs
from lexmill.models.recurrent import Recurrent

_GATES = {nn.LSTM: ("LSTM", (0, 3, 1, 2)), nn.GRU: ("GRU", (1, 0, 2))}
"""The operator, and its gates in the order of torch's: torch has input, forget, cell, output and reset, update, new;
ONNX has input, output, forget, cell and update, reset, hidden."""


def hidden(graph: Graph, trunk: Recurrent, inputs: Inputs) -> str:
    """The last hidden state, `[rows, dim]`, 0 at the padding."""
    x = layers.rows_of(graph, trunk.embeddings.token, inputs.ids)
    lengths = graph.op("Cast", graph.op("ReduceSum", inputs.mask, graph.integers(1), keepdims=0), to=6)
    x = graph.transposed(x, 1, 0, 2)
    for layer in trunk.layers:
        x = _layer(graph, layer, x, lengths)
    return graph.shaped(graph.transposed(x, 1, 0, 2), -1, trunk.config.hidden_size)


def _layer(graph: Graph, layer: nn.Module, x: str, lengths: str) -> str:
    """`[length, batch, in]` to `[length, batch, out]`."""
    if type(layer) not in _GATES:
        raise layers.refused(layer)
    assert isinstance(layer, (nn.LSTM, nn.GRU))
    kind, order = _GATES[type(layer)]
    ways = ["", "_reverse"] if layer.bidirectional else [""]

    def stacked(name: str) -> Tensor:
        return torch.stack([_ordered(floats(getattr(layer, f"{name}_l0{way}")), order) for way in ways])

    bias = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    out = graph.op(
        kind, x, graph.weight(stacked("weight_ih")), graph.weight(stacked("weight_hh")), graph.weight(bias), lengths,
        hidden_size=layer.hidden_size, direction="bidirectional" if layer.bidirectional else "forward", **attributes,
    )  # fmt: skip
    return graph.shaped(graph.transposed(out, 0, 2, 1, 3), 0, 0, -1)


def _ordered(gates: Tensor, order: tuple[int, ...]) -> Tensor:
    """The gates of a matrix or bias in another order."""
    parts = gates.chunk(len(order))
    return torch.cat([parts[index] for index in order])
