"""Qwen2 (Yang et al. 2024): LLaMA with biases on queries, keys and values alone."""

from __future__ import annotations

from lexmill.models.families import llama
from lexmill.models.families.table import key

FAMILY = llama.FAMILY.variant(
    name="qwen2",
    architectures={
        "base": "Qwen2Model",
        "classifier": "Qwen2ForSequenceClassification",
        "token_classifier": "Qwen2ForTokenClassification",
        "lm": "Qwen2ForCausalLM",
    },
    fixed={"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    settings=(
        key("vocab_size", "vocab_size", int, 151936),
        key("num_kv_heads", "num_key_value_heads", int, 32),
        key("intermediate_size", "intermediate_size", int, 22016),
        key("max_positions", "max_position_embeddings", int, 32768),
    ),
    requires={**llama.FAMILY.requires, "use_sliding_window": (False, None)},
)
