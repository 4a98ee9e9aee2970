"""GGUF files of models that were fitted here: read back to the same answers; what has no name there is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.artifact.test_gguf import byte_level
from tests.export.test_huggingface import parity
from tests.export.test_onnx import BASE, FAMILIES, classifier

from lexmill import models
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.export import find
from lexmill.nn.low_rank import LowRankLinear
from lexmill.tasks.generate import Generate, GenerateOptions

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def speaker(family: str = "llama", **changes: Any) -> Loaded:
    """A model that goes on with texts."""
    torch.manual_seed(0)
    options = GenerateOptions(end_token="<|im_end|>", chat_template="{{ messages[0].content }}")
    task = Generate({"text": "text"}, options)
    model = models.init(replace(BASE, vocab_size=300, **FAMILIES.get(family, FAMILIES["llama"]) | changes), family, 0)
    task.attach(model)
    return Loaded(task, model.eval(), byte_level(), "small")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied_output": True}),
        ("qwen2", {"attention_bias": True, "attention_output_bias": False}),
        ("qwen3", {}),
        ("mistral", {"window": None}),
    ],
)
def test_each_family_answers_as_its_source(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert parity(speaker(family, **changes), tmp_path, "gguf", 3).holds
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == ("llama" if family == "mistral" else family)
    assert reader.fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"


def test_numbers_are_as_exact_as_the_model_has_them(tmp_path: Path) -> None:
    subject = speaker()
    subject.model.bfloat16()
    assert parity(subject, tmp_path, "gguf", 3).max_error == 0.0
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_up.weight"], kinds["output_norm.weight"]) == ("BF16", "F32")


def test_what_has_no_name_there_is_refused(tmp_path: Path) -> None:
    form = find("gguf")
    thin = speaker()
    thin.model.trunk.layers[0].mlp.up = LowRankLinear(32, 64, 8)
    words = classifier(models.init(replace(BASE, **FAMILIES["llama"]), "llama", 0))
    for subject, told in (
        (thin, "low_rank"),
        (words, "LlamaForSequenceClassification cannot be written as GGUF"),
        (speaker("mistral"), "sliding_window: 9 cannot be written"),
        (speaker("gpt2", **FAMILIES["gpt2"]), "GPT2LMHeadModel cannot be written as GGUF"),
    ):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())
    assert not list(tmp_path.iterdir())
