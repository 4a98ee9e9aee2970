"""The runtime `onnx`: ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lexmill.engine.graph_engine import GraphEngine
from lexmill.engine.graph_model import GraphModel
from lexmill.errors import MissingExtra, UserError


class OnnxModel(GraphModel):
    """A graph that ONNX Runtime computes.

    Args:
        threads: of the session; as ONNX Runtime has them where None.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        UserError: the file is missing, or none that it can run.
    """

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MissingExtra("onnx", "running ONNX files") from error
        super().__init__(file)
        options: Any = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base class of their own
            raise UserError(f"ONNX Runtime cannot run it: {error}", where=str(file), hint="export it again") from error
        self.inputs = [one.name for one in self._session.get_inputs()]
        self.ranks = {one.name: len(one.shape) for one in self._session.get_outputs()}
        self._version = onnxruntime.__version__

    @property
    def record(self) -> Mapping[str, Any]:
        return {"version": self._version, "providers": self._session.get_providers()}

    def compute(self, names: Sequence[str], given: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        return self._session.run(list(names), given)


class OnnxEngine(GraphEngine):
    """See `GraphEngine`."""

    runtime: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX Runtime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    @classmethod
    def _opened(cls, file: Path, threads: int | None) -> GraphModel:
        return OnnxModel(file, threads=threads)
