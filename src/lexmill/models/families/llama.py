"""LLaMA (Touvron et al. 2023; Grattafiori et al. 2024): a decoder with RMS norms, rotary positions, grouped queries."""

from __future__ import annotations

from lexmill.models.families.table import Family, choice, head_size, key, rope_settings
from lexmill.models.heads import ClassifierShape

FAMILY = Family(
    name="llama",
    architectures={
        "base": "LlamaModel",
        "classifier": "LlamaForSequenceClassification",
        "token_classifier": "LlamaForTokenClassification",
        "lm": "LlamaForCausalLM",
    },
    prefix="model.",
    fixed={
        "type_vocab_size": 0,
        "norm": "rms",
        "norm_place": "pre",
        "embedding_norm": False,
        "final_norm": True,
        "positions": "rotary",
        "gated": True,
        "causal": True,
        "window": None,
        "dropout": 0.0,
    },
    settings=(
        key("vocab_size", "vocab_size", int, 32000),
        key("hidden_size", "hidden_size", int, 4096),
        key("num_layers", "num_hidden_layers", int, 32),
        key("num_heads", "num_attention_heads", int, 32),
        key("num_kv_heads", "num_key_value_heads", int, lambda hf: hf.get("num_attention_heads") or 32),
        key("head_dim", "head_dim", int, head_size(4096, 32)),
        key("intermediate_size", "intermediate_size", int, 11008),
        key("max_positions", "max_position_embeddings", int, 2048),
        key("norm_eps", "rms_norm_eps", float, 1e-6),
        *rope_settings(),
        choice(
            "activation",
            "hidden_act",
            {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
            "silu",
        ),
        key("attention_bias", "attention_bias", bool, False),
        key("mlp_bias", "mlp_bias", bool, False),
        key("tied_output", "tie_word_embeddings", bool, False),
        key("attention_dropout", "attention_dropout", float, 0.0),
        key("initializer_range", "initializer_range", float, 0.02),
    ),
    requires={"partial_rotary_factor": (1, None)},
    weights=(
        ("embeddings.token.weight", "embed_tokens.weight"),
        ("norm.weight", "norm.weight"),
        ("layers.{i}.attention_norm.weight", "layers.{i}.input_layernorm.weight"),
        ("layers.{i}.mlp_norm.weight", "layers.{i}.post_attention_layernorm.weight"),
        *(
            (f"layers.{{i}}.{ours}.{part}", f"layers.{{i}}.{theirs}.{part}")
            for ours, theirs in (
                ("attention.query", "self_attn.q_proj"),
                ("attention.key", "self_attn.k_proj"),
                ("attention.value", "self_attn.v_proj"),
                ("attention.output", "self_attn.o_proj"),
                ("mlp.gate", "mlp.gate_proj"),
                ("mlp.up", "mlp.up_proj"),
                ("mlp.down", "mlp.down_proj"),
            )
            for part in ("weight", "bias")
        ),
    ),
    namespaces=("embed_tokens.", "layers.", "norm."),
    spare=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    classifier=ClassifierShape(num_labels=2, transform=None, pooling="last", bias=False),
    heads={
        "classifier": {"output.weight": "score.weight"},
        "token_classifier": {"output.weight": "score.weight", "output.bias": "score.bias"},
        "lm": {"output.weight": "lm_head.weight"},
    },
)
