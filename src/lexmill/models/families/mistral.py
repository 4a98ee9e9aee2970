"""Mistral (Jiang et al. 2023): LLaMA whose tokens may see only so many before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.errors import UserError
from lexmill.models.families import llama
from lexmill.models.families.table import Json, Setting, key


def _read_window(hf: Mapping[str, Any]) -> int | None:
    window = hf.get("sliding_window", 4096)
    if window is not None and type(window) is not int:
        raise UserError(f"must be int, is {window!r}", where="sliding_window")
    return window


def _write_window(hf: Json, value: Any) -> None:
    hf["sliding_window"] = value


FAMILY = llama.FAMILY.variant(
    name="mistral",
    architectures={
        "base": "MistralModel",
        "classifier": "MistralForSequenceClassification",
        "token_classifier": "MistralForTokenClassification",
        "lm": "MistralForCausalLM",
    },
    fixed={"attention_bias": False, "mlp_bias": False},
    settings=(
        key("num_kv_heads", "num_key_value_heads", int, 8),
        key("intermediate_size", "intermediate_size", int, 14336),
        key("max_positions", "max_position_embeddings", int, 131072),
        Setting("window", _read_window, _write_window, ("sliding_window",)),
    ),
)
