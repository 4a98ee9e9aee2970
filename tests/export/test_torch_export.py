"""A torch.export package answers as its source, of any batch and length, in a process without Lexmill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from tests.export.test_huggingface import TEXTS, ours, parity
from tests.export.test_onnx import BASE, FAMILIES, TASKS, bert, classifier, in_int8, with_task
from tests.small_classifier import LABELS, small_classifier, write_artifact

from lexmill import models
from lexmill.errors import UserError
from lexmill.export import export, find
from lexmill.models.recurrent import RecurrentConfig
from lexmill.nn.low_rank import LowRankLinear
from lexmill.tasks.generate import Generate, GenerateOptions


@pytest.fixture(autouse=True)
def _unchecked_shapes() -> Iterator[None]:
    """While a graph is made shapes are symbols, which the checks of annotations would turn into numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def some(names: Iterable[str], quick: set[str]) -> list[Any]:
    """All names; those that are not quick only where long evidence is asked for, since each is a graph of its own."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", some(FAMILIES, {"modernbert"}))
def test_every_family_answers_as_its_source(family: str, tmp_path: Path) -> None:
    model = models.init(replace(BASE, **FAMILIES[family]), family, 0)
    assert parity(classifier(model), tmp_path, "torch").holds


@pytest.mark.parametrize("task", some(TASKS, {"tag", "embed last"}))
def test_every_task_answers_as_its_source(task: str, tmp_path: Path) -> None:
    assert parity(TASKS[task](), tmp_path, "torch").holds


def test_low_rank_layers_stay_two_products(tmp_path: Path) -> None:
    subject = classifier(bert())
    thin = LowRankLinear(32, 64, 8)
    torch.nn.init.normal_(thin.down.weight)
    subject.model.trunk.layers[0].mlp.up = thin
    assert parity(subject, tmp_path, "torch").holds
    held = torch.export.load(tmp_path / "model.pt2").state_dict
    assert "model.trunk.layers.0.mlp.up.down.weight" in held


PROGRAM = """
import json, sys
sys.modules["lexmill"] = None
import torch
folder, batches = sys.argv[1], json.loads(sys.argv[2])
answers = json.load(open(folder + "/answers.json"))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(answers["max_length"])
tokenizer.enable_padding()
model = torch.export.load(folder + "/model.pt2").module()
given = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
with torch.inference_mode():
    for texts in batches:
        rows = tokenizer.encode_batch(texts)
        inputs = {name: torch.tensor([getattr(row, given[name]) for row in rows]) for name in answers["inputs"]}
        print(json.dumps({"logits": model(**inputs)["label"].tolist(), "labels": answers["labels"]["label"]}))
"""


def test_a_process_with_torch_alone_gets_the_same_logits(tmp_path: Path) -> None:
    subject = small_classifier()
    write_artifact(subject, tmp_path / "small")
    found = export(tmp_path / "small", tmp_path / "out", "torch")
    [(name, parity)] = found.parity.items()
    assert name == "torch/model.pt2"
    assert (parity.label_agreement, parity.holds) == (1.0, True)
    batches = [TEXTS, TEXTS[:1], ["."]]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out" / "torch"), json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for texts, line in zip(batches, done.stdout.splitlines(), strict=True):
        got = json.loads(line)
        assert got["labels"] == list(LABELS)
        want = ours(subject, texts)
        np.testing.assert_allclose(got["logits"], want, atol=1e-5 * np.abs(want).max())


def test_what_is_no_graph_is_refused_by_name(tmp_path: Path) -> None:
    form = find("torch")
    small = classifier(bert())
    in_int8(small, None, smooth=False)
    causal = models.init(replace(BASE, **FAMILIES["llama"]), "llama", 0)
    speaker = with_task(Generate({"text": "text"}, GenerateOptions()), causal)
    recurrent = models.init(RecurrentConfig(1500, "gru", 16, 12, num_layers=1, bidirectional=True), "gru", 0)
    for subject, told in (
        (small, "cannot hold the int8"),
        (speaker, "cannot be one graph"),
        (classifier(recurrent), "cannot trace this model"),
    ):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())
    assert not list(tmp_path.iterdir())


def test_a_format_that_is_not_there_says_why() -> None:
    with pytest.raises(UserError, match="cannot be written: its converter") as fault:
        find("litert")
    assert "export it as torch" in str(fault.value)
