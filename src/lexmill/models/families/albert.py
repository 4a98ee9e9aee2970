"""ALBERT (Lan et al. 2020): BERT whose layers share their weights, with narrow embeddings that are projected.

Its feed-forward output is dropped out as BERT's is, where `transformers` leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.models.families import bert
from lexmill.models.families.table import Json, Setting, choice, fixed_ratio, head_size, key
from lexmill.models.heads import LanguageShape


def _inner(hf: Mapping[str, Any]) -> int:
    return hf.get("inner_group_num") or 1


def _read_layers(hf: Mapping[str, Any]) -> int:
    return (hf.get("num_hidden_layers") or 12) * _inner(hf)


def _write_layers(hf: Json, value: Any) -> None:
    hf["num_hidden_layers"] = value // _inner(hf)


_LAYER = "encoder.albert_layer_groups.{group}.albert_layers.{inner}"


def _language(config: Any) -> LanguageShape:
    return LanguageShape(bias=True, transform=config.activation, width=config.embedding_size, norm_eps=config.norm_eps)


FAMILY = bert.FAMILY.variant(
    name="albert",
    architectures={
        "base": "AlbertModel",
        "classifier": "AlbertForSequenceClassification",
        "token_classifier": "AlbertForTokenClassification",
        "lm": "AlbertForMaskedLM",
    },
    prefix="albert.",
    settings=(
        key("vocab_size", "vocab_size", int, 30000),
        key("embedding_size", "embedding_size", int, 128),
        key("hidden_size", "hidden_size", int, 4096),
        key("group_size", "inner_group_num", int, 1),
        key("num_groups", "num_hidden_groups", int, 1),
        Setting("num_layers", _read_layers, _write_layers, ("num_hidden_layers", "inner_group_num")),
        key("num_heads", "num_attention_heads", int, 64),
        fixed_ratio("num_kv_heads", "num_attention_heads", lambda hf: hf.get("num_attention_heads") or 64),
        fixed_ratio("head_dim", "num_attention_heads", head_size(4096, 64)),
        key("intermediate_size", "intermediate_size", int, 16384),
        choice(
            "activation",
            "hidden_act",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"},
            "gelu_new",
        ),
        key("dropout", "hidden_dropout_prob", float, 0.0),
        key("attention_dropout", "attention_probs_dropout_prob", float, 0.0),
    ),
    weights=tuple(
        (f"{ours}.{part}", f"{theirs}.{part}")
        for ours, theirs in (
            ("embeddings.projection", "encoder.embedding_hidden_mapping_in"),
            ("layers.{i}.attention.query", f"{_LAYER}.attention.query"),
            ("layers.{i}.attention.key", f"{_LAYER}.attention.key"),
            ("layers.{i}.attention.value", f"{_LAYER}.attention.value"),
            ("layers.{i}.attention.output", f"{_LAYER}.attention.dense"),
            ("layers.{i}.attention_norm", f"{_LAYER}.attention.LayerNorm"),
            ("layers.{i}.mlp.up", f"{_LAYER}.ffn"),
            ("layers.{i}.mlp.down", f"{_LAYER}.ffn_output"),
            ("layers.{i}.mlp_norm", f"{_LAYER}.full_layer_layer_norm"),
        )
        for part in ("weight", "bias")
    ),
    spare=(r"embeddings\.(position_ids|token_type_ids)", r"pooler\.(weight|bias)"),
    heads={
        "classifier": {
            "transform.weight": "{prefix}pooler.weight",
            "transform.bias": "{prefix}pooler.bias",
            "output.weight": "classifier.weight",
            "output.bias": "classifier.bias",
        },
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {
            "transform.weight": "predictions.dense.weight",
            "transform.bias": "predictions.dense.bias",
            "norm.weight": "predictions.LayerNorm.weight",
            "norm.bias": "predictions.LayerNorm.bias",
            "output.weight": "predictions.decoder.weight",
            "output.bias": "predictions.bias",
        },
    },
    language=_language,
)
