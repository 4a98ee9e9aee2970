"""Make a small LLaMA with new weights, and a tokenizer for it, as a Hugging Face directory to start a run from.

python examples/tiny_llama.py runs/tiny-llama
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lexmill.data.bundled import banking77
from lexmill.models import ModelConfig, init, save

VOCABULARY = 2048
END = "<|endoftext|>"


def texts(rows: Path) -> list[str]:
    with lzma.open(rows, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def tokenizer() -> Tokenizer:
    """Byte-level BPE, learnt from the bundled questions."""
    new = Tokenizer(models.BPE())
    new.pre_tokenizer = pre_tokenizers.ByteLevel()
    new.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    new.train_from_iterator(texts(banking77()[0]), trainer)
    return new


def config() -> ModelConfig:
    """Four query heads share two of keys and values; the output head is the token embedding."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_positions=512,
        norm="rms",
        norm_place="pre",
        norm_eps=1e-6,
        embedding_norm=False,
        final_norm=True,
        positions="rotary",
        activation="silu",
        gated=True,
        causal=True,
        attention_bias=False,
        mlp_bias=False,
        tied_output=True,
    )


def main(out: Path) -> None:
    out.mkdir(parents=True)
    save(init(config(), "llama", seed=0), out)
    tokenizer().save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
