"""An ExecuTorch program answers as its source, of any length, in a process without Lexmill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from tests.export.test_huggingface import TEXTS, ours, parity
from tests.export.test_onnx import BASE, FAMILIES, TASKS, bert, classifier, in_int8, with_task
from tests.export.test_torch_export import some
from tests.small_classifier import LABELS, small_classifier, write_artifact

from lexmill import models
from lexmill.errors import UserError
from lexmill.export import export, find
from lexmill.tasks.generate import Generate, GenerateOptions


@pytest.fixture(autouse=True)
def _unchecked_shapes() -> Iterator[None]:
    """While a graph is made shapes are symbols, which the checks of annotations would turn into numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("family", some(FAMILIES, set()))
def test_every_family_answers_as_its_source(family: str, tmp_path: Path) -> None:
    model = models.init(replace(BASE, **FAMILIES[family]), family, 0)
    assert parity(classifier(model), tmp_path, "executorch").holds


@pytest.mark.parametrize("task", some(TASKS, {"tag"}))
def test_every_task_answers_as_its_source(task: str, tmp_path: Path) -> None:
    assert parity(TASKS[task](), tmp_path, "executorch").holds


PROGRAM = """
import json, sys
sys.modules["lexmill"] = None
import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
answers = json.load(open(folder + "/answers.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(answers["longest"])
method = Runtime.get().load_program(folder + "/model.pte").load_method("forward")
given = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
for text in texts:
    row = tokenizer.encode(text)
    [logits] = method.execute([torch.tensor([getattr(row, given[name])]) for name in answers["inputs"]])
    print("answer:", json.dumps({"logits": logits[0].tolist(), "labels": answers["labels"][answers["outputs"][0]]}))
"""


def test_a_process_with_executorch_alone_gets_the_same_logits(tmp_path: Path) -> None:
    subject = small_classifier()
    write_artifact(subject, tmp_path / "small")
    found = export(tmp_path / "small", tmp_path / "out", "executorch")
    [(name, close)] = found.parity.items()
    assert name == "executorch/model.pte"
    assert (close.label_agreement, close.holds) == (1.0, True)
    told = json.loads((tmp_path / "out/executorch/answers.json").read_text("utf-8"))
    assert told["longest"] == told["max_length"]
    assert told["operators"]["xnnpack"] > 0
    texts = [*TEXTS, "."]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out/executorch"), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("answer: ") for line in done.stdout.splitlines() if line.startswith("answer: ")]
    for text, line in zip(texts, lines, strict=True):
        got, want = json.loads(line), ours(subject, [text])[0]
        assert got["labels"] == list(LABELS)
        np.testing.assert_allclose(got["logits"], want, atol=1e-5 * np.abs(want).max())


def test_what_it_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    form = find("executorch")
    small = classifier(bert())
    in_int8(small, None, smooth=False)
    causal = models.init(replace(BASE, **FAMILIES["llama"]), "llama", 0)
    speaker = with_task(Generate({"text": "text"}, GenerateOptions()), causal)
    for subject, told in ((small, "an ExecuTorch program cannot hold the int8"), (speaker, "cannot be one graph")):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())
    assert not list(tmp_path.iterdir())
