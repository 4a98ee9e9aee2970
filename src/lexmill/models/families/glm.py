"""GLM (GLM team 2024): LLaMA that rotates a part of each head, in neighbouring pairs, with biases on queries, keys and
values and with gate and up in one matrix."""

from __future__ import annotations

from lexmill.models.families import llama
from lexmill.models.families.table import Stored, key, rope_settings

FAMILY = llama.FAMILY.variant(
    name="glm",
    architectures={
        "base": "GlmModel",
        "classifier": "GlmForSequenceClassification",
        "token_classifier": "GlmForTokenClassification",
        "lm": "GlmForCausalLM",
    },
    fixed={"rope_interleaved": True, "attention_output_bias": False, "mlp_bias": False},
    settings=(
        key("vocab_size", "vocab_size", int, 151552),
        key("num_layers", "num_hidden_layers", int, 40),
        key("num_kv_heads", "num_key_value_heads", int, 2),
        key("head_dim", "head_dim", int, 128),
        key("intermediate_size", "intermediate_size", int, 13696),
        key("max_positions", "max_position_embeddings", int, 131072),
        key("norm_eps", "rms_norm_eps", float, 1.5625e-7),
        key("attention_bias", "attention_bias", bool, True),
        *rope_settings(lambda hf: hf.get("head_dim") or 128, 0.5),
    ),
    weights=(Stored("layers.{i}.mlp.gate_up_proj.weight", ("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight")),),
)
