"""Runtimes that answer requests: what they share is `Engine`."""

from __future__ import annotations

from lexmill.engine.base import Cancelled, Engine, Expired, Overloaded, Request, Work
from lexmill.engine.batcher import Batcher
from lexmill.engine.compiled_engine import CompiledEngine
from lexmill.engine.dependence import batch_dependence
from lexmill.engine.ensemble import Ensemble
from lexmill.engine.loaded import Loaded, load
from lexmill.engine.onnx_engine import OnnxEngine
from lexmill.engine.openvino_engine import OpenVinoEngine
from lexmill.engine.pretrained import load_pretrained
from lexmill.engine.runtime import Runtime
from lexmill.engine.runtimes import RUNTIMES, available_runtimes, find_runtime, open_engine, runtime_of
from lexmill.engine.torch_engine import TorchEngine

__all__ = [
    "RUNTIMES",
    "Batcher",
    "Cancelled",
    "CompiledEngine",
    "Engine",
    "Ensemble",
    "Expired",
    "Loaded",
    "OnnxEngine",
    "OpenVinoEngine",
    "Overloaded",
    "Request",
    "Runtime",
    "TorchEngine",
    "Work",
    "available_runtimes",
    "batch_dependence",
    "find_runtime",
    "load",
    "load_pretrained",
    "open_engine",
    "runtime_of",
]
