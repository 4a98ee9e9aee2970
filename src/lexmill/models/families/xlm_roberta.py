"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa for a hundred languages."""

from __future__ import annotations

from lexmill.models.families import roberta

FAMILY = roberta.FAMILY.variant(
    name="xlm-roberta",
    architectures={
        "base": "XLMRobertaModel",
        "classifier": "XLMRobertaForSequenceClassification",
        "token_classifier": "XLMRobertaForTokenClassification",
        "lm": "XLMRobertaForMaskedLM",
    },
)
