"""Models written for other programs, each file checked against its source."""

from lexmill.export.base import Format, find, known, register
from lexmill.export.parity import Parity
from lexmill.export.run import ExportResult, compared, export
from lexmill.export.source import Source, open_source

__all__ = [
    "ExportResult",
    "Format",
    "Parity",
    "Source",
    "compared",
    "export",
    "find",
    "known",
    "open_source",
    "register",
]
