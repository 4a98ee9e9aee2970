"""T5 (Raffel et al. 2020): an encoder-decoder with RMS norms, whose positions are biases by distance alone.

Version 1.1 has gated feed-forward layers and an output matrix of its own (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lexmill.errors import UserError
from lexmill.models.encoder_decoder import EncoderDecoder
from lexmill.models.families.table import Family, Json, Setting, Stored, fixed_ratio, key
from lexmill.models.heads import ClassifierShape, LanguageShape

_FEED_FORWARD = "feed_forward_proj"
_KINDS: dict[str, tuple[str, bool]] = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu_new": ("gelu_tanh", True),
    "gated-relu": ("relu", True),
    "gated-silu": ("silu", True),
}
"""What `feed_forward_proj` may be: the activation, and whether there is a gate."""


def feed_forward(default: str) -> tuple[Setting, Setting]:
    """Activation and gate, which one key holds."""

    def kind(hf: Mapping[str, Any]) -> tuple[str, bool]:
        name = hf.get(_FEED_FORWARD, default)
        if name not in _KINDS:
            hint = f"can be: {', '.join(_KINDS)}"
            raise UserError(f"'{name}' cannot be represented", where=_FEED_FORWARD, hint=hint)
        return _KINDS[name]

    def write(hf: Json, wanted: tuple[str, bool]) -> None:
        named = [name for name, meaning in _KINDS.items() if meaning == wanted]
        if not named:
            raise UserError(f"a config of this family cannot say {wanted}", where=_FEED_FORWARD)
        hf[_FEED_FORWARD] = named[0]

    return (
        Setting("gated", lambda hf: kind(hf)[1], lambda hf, value: write(hf, (kind(hf)[0], value)), (_FEED_FORWARD,)),
        Setting(
            "activation", lambda hf: kind(hf)[0], lambda hf, value: write(hf, (value, kind(hf)[1])), (_FEED_FORWARD,)
        ),
    )


def _tied(hf: Mapping[str, Any]) -> bool:
    return hf.get("tie_word_embeddings") is not False


def _output_scale(hf: Mapping[str, Any]) -> float:
    """Version 1.1 is known by its untied output; transformers 5 says it outright."""
    return (hf.get("d_model") or 512) ** -0.5 if hf.get("scale_decoder_outputs", _tied(hf)) else 1.0


def _start_token(hf: Mapping[str, Any]) -> int:
    start = hf.get("decoder_start_token_id")
    return (hf.get("pad_token_id") or 0) if start is None else start


def _setting(ours: str, read: Callable[[Mapping[str, Any]], Any], theirs: str) -> Setting:
    return Setting(ours, read, lambda hf, value: hf.update({theirs: value}), (theirs,))


FAMILY = Family(
    name="t5",
    architectures={"base": "T5Model", "lm": "T5ForConditionalGeneration"},
    prefix="",
    trunk=EncoderDecoder,
    fixed={
        "max_positions": 1 << 16,  # no table ends anywhere
        "type_vocab_size": 0,
        "norm": "rms",
        "norm_place": "pre",
        "embedding_norm": False,
        "final_norm": True,
        "positions": "relative",
        "causal": False,
        "window": None,
        "attention_bias": False,
        "attention_scaled": False,
        "mlp_bias": False,
        "initializer_fan_in": True,
    },
    settings=(
        key("vocab_size", "vocab_size", int, 32128),
        key("hidden_size", "d_model", int, 512),
        key("num_layers", "num_layers", int, 6),
        key("decoder_layers", "num_decoder_layers", int, lambda hf: hf.get("num_layers") or 6),
        key("num_heads", "num_heads", int, 8),
        fixed_ratio("num_kv_heads", "num_heads", lambda hf: hf.get("num_heads") or 8),
        key("head_dim", "d_kv", int, 64),
        key("intermediate_size", "d_ff", int, 2048),
        key("norm_eps", "layer_norm_epsilon", float, 1e-6),
        key("relative_buckets", "relative_attention_num_buckets", int, 32),
        key("relative_max_distance", "relative_attention_max_distance", int, 128),
        *feed_forward("relu"),
        _setting("tied_output", _tied, "tie_word_embeddings"),
        Setting(
            "output_scale",
            _output_scale,
            lambda hf, value: hf.update(scale_decoder_outputs=value != 1),
            ("scale_decoder_outputs", "tie_word_embeddings"),
        ),
        _setting("start_token", _start_token, "decoder_start_token_id"),
        key("dropout", "dropout_rate", float, 0.1),
        key("attention_dropout", "dropout_rate", float, 0.1),
        key("initializer_range", "initializer_factor", float, 1.0),
    ),
    requires={"is_encoder_decoder": (True, None), "is_decoder": (False, None)},
    weights=(
        ("embeddings.token.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
        ("decoder.norm.weight", "decoder.final_layer_norm.weight"),
        ("relative.table.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("decoder.relative.table.weight", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *(
            Stored(f"{block}.layer.{theirs}.weight", (f"{layer}.{ours}.weight",), only=only)
            for layer, block, last in (
                ("layers.{i}", "encoder.block.{i}", 1),
                ("decoder.layers.{j}", "decoder.block.{j}", 2),
            )
            for ours, theirs, only in (
                ("attention_norm", "0.layer_norm", {}),
                *(
                    (f"attention.{name}", f"0.SelfAttention.{name[0]}", {})
                    for name in ("query", "key", "value", "output")
                ),
                ("mlp_norm", f"{last}.layer_norm", {}),
                ("mlp.gate", f"{last}.DenseReluDense.wi_0", {"gated": True}),
                ("mlp.up", f"{last}.DenseReluDense.wi_1", {"gated": True}),
                ("mlp.up", f"{last}.DenseReluDense.wi", {"gated": False}),
                ("mlp.down", f"{last}.DenseReluDense.wo", {}),
            )
        ),
        ("decoder.layers.{j}.cross_norm.weight", "decoder.block.{j}.layer.1.layer_norm.weight"),
        *(
            (
                f"decoder.layers.{{j}}.cross.{name}.weight",
                f"decoder.block.{{j}}.layer.1.EncDecAttention.{name[0]}.weight",
            )
            for name in ("query", "key", "value", "output")
        ),
    ),
    namespaces=("shared.", "encoder.", "decoder."),
    spare=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    classifier=ClassifierShape(num_labels=2, transform=None, pooling="mean"),
    language=lambda config: LanguageShape(scale=config.output_scale),
    heads={"lm": {"output.weight": "lm_head.weight"}},
)
