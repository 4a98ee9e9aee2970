"""RoBERTa (Liu et al. 2019): BERT whose first position is the one after the padding token's id."""

from __future__ import annotations

from typing import Any

from lexmill.models.families import bert
from lexmill.models.families.table import key, shifted
from lexmill.models.heads import LanguageShape


def _language(config: Any) -> LanguageShape:
    return LanguageShape(bias=True, transform="gelu", norm_eps=config.norm_eps)


FAMILY = bert.FAMILY.variant(
    name="roberta",
    architectures={
        "base": "RobertaModel",
        "classifier": "RobertaForSequenceClassification",
        "token_classifier": "RobertaForTokenClassification",
        "lm": "RobertaForMaskedLM",
    },
    prefix="roberta.",
    settings=(
        key("vocab_size", "vocab_size", int, 50265),
        shifted("position_offset", "pad_token_id", 2, lambda hf: -1),
        shifted("max_positions", "max_position_embeddings", 510, lambda hf: hf.get("pad_token_id", 1) + 1),
    ),
    heads={
        "classifier": {
            "transform.weight": "classifier.dense.weight",
            "transform.bias": "classifier.dense.bias",
            "output.weight": "classifier.out_proj.weight",
            "output.bias": "classifier.out_proj.bias",
        },
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {
            "transform.weight": "lm_head.dense.weight",
            "transform.bias": "lm_head.dense.bias",
            "norm.weight": "lm_head.layer_norm.weight",
            "norm.bias": "lm_head.layer_norm.bias",
            "output.weight": "lm_head.decoder.weight",
            "output.bias": "lm_head.bias",
        },
    },
    language=_language,
)
