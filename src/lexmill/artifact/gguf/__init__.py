"""GGUF, the one-file format of llama.cpp, from and to a Hugging Face directory."""

from lexmill.artifact.gguf.convert import Imported, import_gguf
from lexmill.artifact.gguf.write import Kind, export_gguf

__all__ = ["Imported", "Kind", "export_gguf", "import_gguf"]
