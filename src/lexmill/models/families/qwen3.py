"""Qwen3 (Yang et al. 2025): LLaMA with normalised queries and keys."""

from __future__ import annotations

from lexmill.models.families import llama
from lexmill.models.families.table import key

FAMILY = llama.FAMILY.variant(
    name="qwen3",
    architectures={
        "base": "Qwen3Model",
        "classifier": "Qwen3ForSequenceClassification",
        "token_classifier": "Qwen3ForTokenClassification",
        "lm": "Qwen3ForCausalLM",
    },
    fixed={"qk_norm": True, "mlp_bias": False},
    settings=(
        key("vocab_size", "vocab_size", int, 151936),
        key("num_kv_heads", "num_key_value_heads", int, 32),
        key("head_dim", "head_dim", int, 128),
        key("intermediate_size", "intermediate_size", int, 22016),
        key("max_positions", "max_position_embeddings", int, 32768),
    ),
    requires={**llama.FAMILY.requires, "use_sliding_window": (False, None)},
    weights=(
        ("layers.{i}.attention.query_norm.weight", "layers.{i}.self_attn.q_norm.weight"),
        ("layers.{i}.attention.key_norm.weight", "layers.{i}.self_attn.k_norm.weight"),
    ),
)
