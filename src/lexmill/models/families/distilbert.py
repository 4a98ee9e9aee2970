"""DistilBERT (Sanh et al. 2019): BERT of fewer layers, without segments and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.models.families import bert
from lexmill.models.families.table import Family, choice, fixed_ratio, key
from lexmill.models.heads import ClassifierShape


def _heads(hf: Mapping[str, Any]) -> int:
    return hf.get("n_heads") or 12


FAMILY = Family(
    name="distilbert",
    architectures={
        "base": "DistilBertModel",
        "classifier": "DistilBertForSequenceClassification",
        "token_classifier": "DistilBertForTokenClassification",
        "lm": "DistilBertForMaskedLM",
    },
    prefix="distilbert.",
    fixed={**bert.FAMILY.fixed, "type_vocab_size": 0, "norm_eps": 1e-12},
    settings=(
        key("vocab_size", "vocab_size", int, 30522),
        key("hidden_size", "dim", int, 768),
        key("num_layers", "n_layers", int, 6),
        key("num_heads", "n_heads", int, 12),
        fixed_ratio("num_kv_heads", "n_heads", _heads),
        fixed_ratio("head_dim", "n_heads", lambda hf: (hf.get("dim") or 768) // _heads(hf)),
        key("intermediate_size", "hidden_dim", int, 3072),
        key("max_positions", "max_position_embeddings", int, 512),
        choice("activation", "activation", {"gelu": "gelu", "relu": "relu"}, "gelu"),
        key("tied_output", "tie_word_embeddings", bool, True),
        key("dropout", "dropout", float, 0.1),
        key("attention_dropout", "attention_dropout", float, 0.1),
        key("initializer_range", "initializer_range", float, 0.02),
    ),
    weights=(
        ("embeddings.token.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.position.weight", "embeddings.position_embeddings.weight"),
        *((f"embeddings.norm.{part}", f"embeddings.LayerNorm.{part}") for part in ("weight", "bias")),
        *(
            (f"layers.{{i}}.{ours}.{part}", f"transformer.layer.{{i}}.{theirs}.{part}")
            for ours, theirs in (
                ("attention.query", "attention.q_lin"),
                ("attention.key", "attention.k_lin"),
                ("attention.value", "attention.v_lin"),
                ("attention.output", "attention.out_lin"),
                ("attention_norm", "sa_layer_norm"),
                ("mlp.up", "ffn.lin1"),
                ("mlp.down", "ffn.lin2"),
                ("mlp_norm", "output_layer_norm"),
            )
            for part in ("weight", "bias")
        ),
    ),
    namespaces=("embeddings.", "transformer."),
    spare=(r"embeddings\.position_ids",),
    aliases=bert.FAMILY.aliases,
    classifier=ClassifierShape(num_labels=2, transform="relu", pooling="first", bias=True),
    heads={
        "classifier": {
            "transform.weight": "pre_classifier.weight",
            "transform.bias": "pre_classifier.bias",
            "output.weight": "classifier.weight",
            "output.bias": "classifier.bias",
        },
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {
            "transform.weight": "vocab_transform.weight",
            "transform.bias": "vocab_transform.bias",
            "norm.weight": "vocab_layer_norm.weight",
            "norm.bias": "vocab_layer_norm.bias",
            "output.weight": "vocab_projector.weight",
            "output.bias": "vocab_projector.bias",
        },
    },
    language=bert.FAMILY.language,
)
