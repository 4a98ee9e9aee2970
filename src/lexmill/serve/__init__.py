"""Artefacts behind HTTP. Needs the extra `serve`."""

from lexmill.serve.server import serve

__all__ = ["serve"]
