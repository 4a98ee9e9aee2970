"""GLM-4 of 2025 (`glm4`): GLM with norms before and after each sub-layer."""

from __future__ import annotations

from lexmill.models.families import glm

FAMILY = glm.FAMILY.variant(
    name="glm4",
    architectures={
        "base": "Glm4Model",
        "classifier": "Glm4ForSequenceClassification",
        "token_classifier": "Glm4ForTokenClassification",
        "lm": "Glm4ForCausalLM",
    },
    fixed={"norm_place": "around"},
    weights=(
        ("layers.{i}.attention_out_norm.weight", "layers.{i}.post_self_attn_layernorm.weight"),
        ("layers.{i}.mlp_out_norm.weight", "layers.{i}.post_mlp_layernorm.weight"),
    ),
)
