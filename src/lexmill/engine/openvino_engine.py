"""The runtime `openvino`: OpenVINO, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lexmill.engine.graph_engine import GraphEngine
from lexmill.engine.graph_model import GraphModel
from lexmill.errors import MissingExtra, UserError

_PRODUCTS = ("FullyConnected", "MatMul")
"""What OpenVINO calls a product of rows with a matrix, in what it executes."""


class OpenVinoModel(GraphModel):
    """A graph that OpenVINO computes, in float32 where it is not in bytes.

    Args:
        threads: as OpenVINO has them where None.

    Raises:
        MissingExtra: OpenVINO is not installed.
        UserError: the file is missing, or none that it can run.
    """

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise MissingExtra("openvino", "running models in OpenVINO") from error
        super().__init__(file)
        # Left alone it would compute in bfloat16 on processors that have that.
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            self._compiled: Any = core.compile_model(core.read_model(file), "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot run it: {error}", where=str(file), hint="export it again") from error
        self._request: Any = self._compiled.create_infer_request()
        self._outputs = {name: one for one in self._compiled.outputs for name in one.get_names()}
        self.inputs = [name for one in self._compiled.inputs for name in one.get_names()]
        self.ranks = {name: len(one.partial_shape) for name, one in self._outputs.items()}
        self._version = openvino.__version__

    @property
    def record(self) -> Mapping[str, Any]:
        """`products`: how many of them are computed in each precision, in the graph that is executed."""
        executed = [op.get_rt_info() for op in self._compiled.get_runtime_model().get_ordered_ops()]
        chosen = [info for info in executed if info["layerType"].astype(str) in _PRODUCTS]
        products = Counter(info["runtimePrecision"].astype(str) for info in chosen)
        return {"version": self._version, "products": dict(products)}

    def compute(self, names: Sequence[str], given: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        found = self._request.infer(given, share_inputs=True)
        return [found[self._outputs[name]] for name in names]


class OpenVinoEngine(GraphEngine):
    """See `GraphEngine`. Its `record` says in which precision the products of an int8 model are really computed."""

    runtime: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)

    @classmethod
    def _opened(cls, file: Path, threads: int | None) -> GraphModel:
        return OpenVinoModel(file, threads=threads)
