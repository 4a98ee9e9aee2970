"""mT5 (Xue et al. 2021): T5 version 1.1, of many languages."""

from __future__ import annotations

from lexmill.models.families import t5
from lexmill.models.families.t5 import feed_forward
from lexmill.models.families.table import fixed_ratio, key

FAMILY = t5.FAMILY.variant(
    name="mt5",
    architectures={"base": "MT5Model", "lm": "MT5ForConditionalGeneration"},
    fixed={"output_scale": 1.0},
    settings=(
        key("vocab_size", "vocab_size", int, 250112),
        key("num_layers", "num_layers", int, 8),
        key("decoder_layers", "num_decoder_layers", int, lambda hf: hf.get("num_layers") or 8),
        key("num_heads", "num_heads", int, 6),
        fixed_ratio("num_kv_heads", "num_heads", lambda hf: hf.get("num_heads") or 6),
        key("intermediate_size", "d_ff", int, 1024),
        *feed_forward("gated-gelu"),
    ),
)
