"""GGUF files that are written here: read back to the same tensors and tokens, by this importer and by `gguf`'s own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.artifact.test_gguf import TEXT, byte_level, reference

from lexmill.artifact.gguf import Kind, export_gguf, import_gguf
from lexmill.data.tokenizer import load_tokenizer
from lexmill.errors import UserError
from lexmill.models import greedy, load

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LARGEST_GAP: dict[Kind, float] = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}
"""Of a number, against the largest of its row: half a step of each kind."""


def saved(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A Hugging Face directory with random weights, as transformers writes it."""
    folder.mkdir()
    reference(kind, **changes).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    told = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    return folder


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_file_is_read_back_to_the_same_tensors_and_words(tmp_path: Path, kind: str, tied: bool) -> None:
    source = saved(tmp_path / "source", kind, tie_word_embeddings=tied, head_dim=16)
    export_gguf(source, tmp_path / "a.gguf")
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")
    want, got = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    text = TEXT + "Ünïcode 漢字 <|im_end|>\n\n  7.25"
    assert load_tokenizer(tmp_path / "back").encode(text).ids == load_tokenizer(source).encode(text).ids
    told = json.loads((tmp_path / "back/tokenizer_config.json").read_text("utf-8"))
    assert (told["eos_token"], told["chat_template"]) == ("<|im_end|>", "{{ messages[0].content }}")
    both = [load(source), load(tmp_path / "back")]
    for model in both:
        model.add_language_head("lm")
    ids = load_tokenizer(source).encode("the mill turns").ids
    first, second = ([one.ids for one in greedy(model, [ids], 12, end_ids=set())] for model in both)
    assert first == second


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_rounded_numbers_are_within_a_step_and_are_what_the_package_reads(tmp_path: Path, kind: Kind) -> None:
    source = saved(tmp_path / "source")
    export_gguf(source, tmp_path / "a.gguf", kind)
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")
    want, got = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, tensor in want.items():
        gap = (tensor - got[name]).abs() / tensor.abs().amax(-1, keepdim=True)
        assert gap.max() <= LARGEST_GAP[kind if tensor.dim() > 1 else "F32"], name
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["output_norm.weight"], kinds["blk.0.ffn_down.weight"]) == ("F32", kind)
    [table] = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    read = gguf.quants.dequantize(table.data, table.tensor_type)
    np.testing.assert_array_equal(read, got["model.embed_tokens.weight"].numpy())


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"hidden_act": "gelu"}, "'gelu' cannot be written"), ({"attention_bias": True}, "bias' has no name in GGUF")],
)
def test_what_the_format_cannot_say_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        export_gguf(saved(tmp_path / "source", **changes), tmp_path / "a.gguf")


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    told = json.loads((source / "tokenizer.json").read_text("utf-8"))
    told["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    with pytest.raises(UserError, match="cuts text in a way that has no name"):
        export_gguf(source, tmp_path / "a.gguf")
