"""The files beside a model by which sentence-transformers knows how vectors are made, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexmill.errors import UserError
from lexmill.nn.pooling import Pooling

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
TRANSFORMER = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"

_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_MODES: dict[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_PREFIXES = {"query": "query_prefix", "passage": "passage_prefix", "document": "passage_prefix"}


def read(directory: Path) -> dict[str, Any]:
    """What the files of a directory say, by the names that `embed` has for it; nothing where there are none.

    Raises:
        UserError: the vectors are made by a module, such as a dense layer, that is not known here.
    """
    if not (directory / MODULES).is_file():
        return {}
    found: dict[str, Any] = {"normalise": False}
    for module in json.loads((directory / MODULES).read_text("utf-8")):
        kind, where = str(module["type"]).rpartition(".")[2], directory / str(module["path"])
        if kind == "Pooling":
            found["pooling"] = _pooling(_json(where / "config.json"))
        elif kind == "Normalize":
            found["normalise"] = True
        elif kind != "Transformer":
            hint = "leave modules.json out to train another vector from the same weights"
            raise UserError(f"vectors go through an unknown module '{kind}'", where=str(directory), hint=hint)
    length = _json(directory / TRANSFORMER).get("max_seq_length")
    if isinstance(length, int):
        found["max_length"] = length
    prompts = _json(directory / PROMPTS).get("prompts") or {}
    return found | {ours: prompts[theirs] for theirs, ours in _PREFIXES.items() if prompts.get(theirs)}


def written(
    size: int, *, pooling: Pooling, normalise: bool, max_length: int, query_prefix: str, passage_prefix: str
) -> dict[str, str]:
    """The files of a model whose vectors have `size` numbers, by relative path."""
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    files: dict[str, Any] = {
        MODULES: [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(modules)
        ],
        POOLING: {
            "word_embedding_dimension": size,
            "include_prompt": True,
            **{key: ours == pooling for key, ours in _POOLINGS.items()},
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
        },
        TRANSFORMER: {"max_seq_length": max_length, "do_lower_case": False},
        PROMPTS: {
            "prompts": {"query": query_prefix, "passage": passage_prefix, "document": passage_prefix},
            "default_prompt_name": "query" if query_prefix else None,
            "similarity_fn_name": "cosine",
        },
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _pooling(config: Mapping[str, Any]) -> str:
    """Our name of how tokens are pooled; theirs where there is none, which no option will take."""
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        return _MODES.get(mode, mode)
    given = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    return _POOLINGS.get(given[0], given[0]) if len(given) == 1 else " and ".join(given)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
