"""ONNX: the forward pass as a graph written node by node, which any ONNX runtime can run."""

from lexmill.export.onnx.format import Onnx, OnnxOptions

__all__ = ["Onnx", "OnnxOptions"]
