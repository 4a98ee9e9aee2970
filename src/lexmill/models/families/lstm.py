"""LSTM (Hochreiter and Schmidhuber 1997): a recurrent trunk, trained from scratch.

Hugging Face has no such model, so `config.json` has our own names, and the layers those of `torch.nn.LSTM`: below
`rnn.`, the file holds what its `state_dict` would.
"""

from __future__ import annotations

from lexmill.models.families.table import Family, key
from lexmill.models.heads import ClassifierShape
from lexmill.models.recurrent import Recurrent

FAMILY = Family(
    name="lstm",
    architectures={
        "base": "LexmillRecurrent",
        "classifier": "LexmillRecurrentForSequenceClassification",
        "token_classifier": "LexmillRecurrentForTokenClassification",
        "lm": "LexmillRecurrentForCausalLM",
    },
    prefix="",
    fixed={"cell": "lstm"},
    settings=(
        key("vocab_size", "vocab_size", int, 8000),
        key("embedding_size", "embedding_size", int, 128),
        key("state_size", "hidden_size", int, 256),
        key("num_layers", "num_hidden_layers", int, 1),
        key("bidirectional", "bidirectional", bool, True),
        key("max_positions", "max_position_embeddings", int, 1 << 20),
        key("tied_output", "tie_word_embeddings", bool, False),
        key("dropout", "dropout", float, 0.3),
        key("initializer_range", "initializer_range", float, 0.1),
    ),
    weights=(
        ("embeddings.token.weight", "embeddings.weight"),
        *(
            (f"layers.{{i}}.{part}_{side}_l0{way}", f"rnn.{part}_{side}_l{{i}}{way}")
            for part in ("weight", "bias")
            for side in ("ih", "hh")
            for way in ("", "_reverse")
        ),
    ),
    namespaces=("embeddings.", "rnn."),
    classifier=ClassifierShape(num_labels=2, transform=None, pooling="mean", bias=True),
    heads={
        "classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {"output.weight": "lm_head.weight"},
    },
    trunk=Recurrent,
)
