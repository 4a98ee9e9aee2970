"""Runtimes that answer requests: what they share is `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lexmill.artifact import Artifact
from lexmill.engine.base import Cancelled, Engine, Expired, Overloaded, Request, Work
from lexmill.engine.batcher import Batcher
from lexmill.engine.ensemble import Ensemble
from lexmill.engine.loaded import Loaded, load
from lexmill.engine.onnx_engine import OnnxEngine
from lexmill.engine.runtime import Runtime
from lexmill.engine.torch_engine import TorchEngine
from lexmill.errors import UserError

__all__ = [
    "Batcher",
    "Cancelled",
    "Engine",
    "Ensemble",
    "Expired",
    "Loaded",
    "OnnxEngine",
    "Overloaded",
    "Request",
    "Runtime",
    "TorchEngine",
    "Work",
    "load",
    "open_engine",
]

RUNTIMES: Mapping[str, Callable[..., Runtime]] = {"torch": TorchEngine, "onnx": OnnxEngine}


def open_engine(path: Artifact | Path | str, runtime: str = "torch", **options: Any) -> Runtime:
    """The engine of this runtime for an artefact; `options` are the runtime's own. Raises `UserError` where the
    runtime is unknown or the artefact cannot be read."""
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}'", hint=f"known runtimes: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](path, **options)
