"""RoBERTa (Liu et al. 2019): BERT whose first position is the one after the padding token's id."""

from __future__ import annotations

from lexmill.models.families import bert
from lexmill.models.families.table import key, shifted

FAMILY = bert.FAMILY.variant(
    name="roberta",
    architectures={"base": "RobertaModel", "classifier": "RobertaForSequenceClassification"},
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
        }
    },
)
