"""Models written for other programs, each file checked against its source."""

from lexmill.export.base import Format, find, known, register
from lexmill.export.executorch import ExecuTorch
from lexmill.export.gguf import Gguf
from lexmill.export.huggingface import HuggingFace
from lexmill.export.onnx import Onnx
from lexmill.export.parity import Parity
from lexmill.export.peft import Peft
from lexmill.export.run import ExportResult, export, exported
from lexmill.export.source import Source, open_source
from lexmill.export.torch_export import TorchExport

__all__ = [
    "ExecuTorch",
    "ExportResult",
    "Format",
    "Gguf",
    "HuggingFace",
    "Onnx",
    "Parity",
    "Peft",
    "Source",
    "TorchExport",
    "export",
    "exported",
    "find",
    "known",
    "open_source",
    "register",
]
