"""From a Hugging Face directory to a GGUF file: the tables of `architectures` and `tokenizer` the other way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lexmill.artifact.gguf import architectures, tokenizer
from lexmill.artifact.safetensors_file import TensorEntry, read_header
from lexmill.errors import MissingExtra, UserError

Kind = Literal["F32", "F16", "BF16"]
"""How matrices are stored; vectors are always F32."""
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def export_gguf(directory: Path, file: Path, kind: Kind = "F32") -> None:
    """Write a Hugging Face directory as one GGUF file, which must not exist yet.

    Args:
        kind: of the numbers of matrices.

    Raises:
        UserError: the architecture, a setting, a tensor or the tokenizer has no name in GGUF.
        MissingExtra: the package `gguf` is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtra("gguf", "writing a GGUF file") from error
    config = json.loads((directory / "config.json").read_text("utf-8"))
    name, architecture = architectures.named(config, directory / "config.json")
    stored = directory / "model.safetensors"
    entries = read_header(stored)
    placed = architectures.unplaced(entries, architecture, config["num_hidden_layers"], stored)
    settings = architectures.settings(name, config, directory / "config.json")
    settings |= tokenizer.settings(directory, entries["model.embed_tokens.weight"].shape[0])
    writer = gguf.GGUFWriter(file, name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    for key, value in settings.items():
        _add(writer, key, value)
    for theirs, ours in placed.items():
        values = architecture.arranged(ours, _read(stored, entries[theirs]), config)
        chosen = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(ours, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(path: Path, entry: TensorEntry) -> Float[np.ndarray, "*shape"]:
    """One tensor of a safetensors file as float32."""
    dtype = _NUMPY.get(entry.dtype, "<u2" if entry.dtype == "BF16" else None)
    if dtype is None:
        raise UserError(f"holds numbers of the kind {entry.dtype}", where=str(path), hint="store it as F32 or BF16")
    raw = np.fromfile(path, dtype, math.prod(entry.shape), offset=entry.start)
    if entry.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False).reshape(entry.shape)


def _add(writer: Any, key: str, value: Any) -> None:
    """A setting, as the kind of value that readers expect: whole numbers are unsigned."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
