"""ERNIE (Sun et al. 2021): BERT with an embedding of the kind of task, which is the first kind for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.models.families import bert
from lexmill.models.families.table import Json, Setting


def _read(hf: Mapping[str, Any]) -> int:
    return int(hf.get("task_type_vocab_size", 3)) if hf.get("use_task_id") else 0


def _write(hf: Json, value: Any) -> None:
    hf["use_task_id"] = bool(value)
    if value:
        hf["task_type_vocab_size"] = value


FAMILY = bert.FAMILY.variant(
    name="ernie",
    architectures={
        "base": "ErnieModel",
        "classifier": "ErnieForSequenceClassification",
        "token_classifier": "ErnieForTokenClassification",
        "lm": "ErnieForMaskedLM",
    },
    prefix="ernie.",
    settings=(Setting("task_type_vocab_size", _read, _write, ("use_task_id", "task_type_vocab_size")),),
    weights=(("embeddings.task_type.weight", "embeddings.task_type_embeddings.weight"),),
)
