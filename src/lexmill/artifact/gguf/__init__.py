"""GGUF, the one-file format of llama.cpp, as a Hugging Face directory."""

from lexmill.artifact.gguf.convert import Imported, import_gguf

__all__ = ["Imported", "import_gguf"]
