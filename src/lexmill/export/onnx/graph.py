"""Writing an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexmill.errors import MissingExtra

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise MissingExtra("onnx", "export to ONNX") from error

OPSET = 20
"""The first with `Gelu`; its operators are all in ONNX Runtime 1.17 and later."""
_IR = 9


class Graph:
    """A graph that grows: every method adds nodes and gives the names of what they compute.

    The rows of all sequences lie one below the other in `[rows, dim]`, padding included, as the layers want them.
    """

    def __init__(self, doc: str) -> None:
        self._doc = doc
        self._nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._shared: dict[Any, str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def input(self, name: str) -> str:
        """A table of integers `[batch, length]`."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]))
        return name

    def output(self, name: str, value: str, shape: Sequence[str | int]) -> None:
        """Give a value this name outside."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; gives the name of its output, or the names where there are several."""
        names = [self._name(kind) for _ in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=self._name(kind), **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, tensor: Tensor, key: Any = None) -> str:
        """A constant; one with the key of an earlier one is the earlier one."""
        if key is not None and key in self._shared:
            return self._shared[key]
        name = self.array(tensor.detach().cpu().contiguous().numpy())
        if key is not None:
            self._shared[key] = name
        return name

    def array(self, values: np.ndarray) -> str:
        """A constant."""
        name = self._name("constant")
        self._tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return name

    def integers(self, *values: int) -> str:
        """A constant row of integers; equal ones are stored once."""
        if values not in self._shared:
            self._shared[values] = self.array(np.array(values, np.int64))
        return self._shared[values]

    def number(self, value: float) -> str:
        """A constant of one float32; equal ones are stored once."""
        if ("number", value) not in self._shared:
            self._shared["number", value] = self.array(np.array(value, np.float32))
        return self._shared["number", value]

    def shaped(self, x: str, *shape: int) -> str:
        """The same numbers in this shape; -1 is what is left, 0 is kept."""
        return self.op("Reshape", x, self.integers(*shape))

    def transposed(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=list(order))

    def model(self) -> Any:
        """All of it, checked. Dimensions but the batch and the length are inferred."""
        graph = helper.make_graph(self._nodes, "lexmill", self._inputs, self._outputs, list(self._tensors.values()))
        opset = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=_IR, doc_string=self._doc)
        onnx.checker.check_model(made, full_check=True)
        return made

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"


def floats(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)
