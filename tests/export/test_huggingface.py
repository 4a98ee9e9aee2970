"""The folder `huggingface` answers in transformers as in its source; what no class there can hold is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.test_onnx import BASE, FAMILIES, TASKS, bert, classifier, in_int8, with_task
from tests.small_classifier import LABELS, small_classifier, write_artifact

from lexmill import models
from lexmill.engine import Loaded, probes
from lexmill.errors import UserError
from lexmill.export import export, find
from lexmill.export.parity import Parity, measure
from lexmill.models.recurrent import RecurrentConfig
from lexmill.nn.low_rank import LowRankLinear
from lexmill.tasks.classify import Classify, ClassifyOptions
from lexmill.tasks.generate import Generate, GenerateOptions

transformers = pytest.importorskip("transformers")
TEXTS = ["What is my PIN?", "My card has not arrived, and the fee was charged twice", "refund " * 40]


def parity(subject: Loaded, folder: Path, form: str = "huggingface", count: int = 8) -> Parity:
    one = find(form)
    chosen = one.Options()
    [name] = one.write(subject, folder, chosen)
    records = probes.probe_records(subject.task)
    records = records[:: max(len(records) // count, 1)]
    got = one.evidence(subject, folder / name, records)
    return measure(probes.evidence(subject, records), got, one.tolerance(subject, chosen), labelled=True)


def ours(subject: Loaded, texts: list[str]) -> np.ndarray:
    """The logits of texts, one at a time."""
    found = probes.evidence(subject, [{"question": text} for text in texts])
    return np.array([list(one.values()) for one in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_classifies_alike_in_every_family(family: str, tmp_path: Path) -> None:
    own = {"attention_output_bias": False} if family == "glm4" else {}
    subject = classifier(models.init(replace(BASE, **FAMILIES[family], **own), family, 0))
    assert parity(subject, tmp_path).max_error == 0.0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "lexmill" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert [theirs.config.id2label[index] for index in range(len(LABELS))] == list(LABELS)
    with torch.inference_mode():
        got = theirs(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).logits.numpy()
    want = ours(subject, TEXTS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("task", [name for name in TASKS if name != "several labels"])
def test_every_task_answers_alike_from_what_is_written(task: str, tmp_path: Path) -> None:
    assert parity(TASKS[task](), tmp_path).max_error == 0.0


def test_several_labels_are_told_as_such(tmp_path: Path) -> None:
    assert parity(TASKS["several labels"](), tmp_path).max_error == 0.0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.problem_type == "multi_label_classification"


def test_transformers_cuts_texts_as_the_task_does(tmp_path: Path) -> None:
    subject = classifier(bert(), max_length=24)
    parity(subject, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 24
    [tokens] = subject.task.encode([{"question": TEXTS[2]}], subject.tokenizer, labelled=False)
    assert tokenizer(TEXTS[2], truncation=True)["input_ids"] == tokens.streams["source"][0].ids.tolist()
    assert tokenizer.pad_token == "[PAD]"


def test_transformers_tags_and_goes_on_with_texts_alike(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    tagger = TASKS["tag"]()
    parity(tagger, tmp_path / "tag")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "tag").eval()
    assert list(theirs.config.label2id) == ["O", "B-PER", "I-PER"]
    (tmp_path / "lm").mkdir()
    causal = models.init(replace(BASE, **FAMILIES["llama"]), "llama", 0)
    subject = with_task(Generate({"text": "text"}, GenerateOptions(max_new_tokens=6)), causal)
    assert parity(subject, tmp_path / "lm").max_error == 0.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    ids = subject.tokenizer.encode("the card").ids
    [said] = models.greedy(subject.model, [ids], 6, end_ids=set())
    with torch.inference_mode():
        last = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert said.ids[0] == int(last.argmax())
    assert said.logprobs[0] == pytest.approx(float(last.max()), rel=1e-5)


def test_sentence_transformers_embeds_alike(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    subject = TASKS["embed"]()
    parity(subject, tmp_path)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    got = theirs.encode(TEXTS, prompt_name="query")
    records = subject.task.items(subject.task.Request(texts=TEXTS, kind="query"))
    want = np.array([list(one.values()) for one in probes.evidence(subject, records)])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_no_class_there_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    form = find("huggingface")
    small = classifier(bert())
    in_int8(small, None, smooth=False)
    thin = classifier(bert())
    thin.model.trunk.layers[0].mlp.up = LowRankLinear(32, 64, 8)
    layers = (models.LayerOverride(intermediate_size=40), models.LayerOverride())
    narrow = classifier(models.init(replace(BASE, layers=layers), "bert", 0))
    two = [{"q": "x", "a": label, "b": label} for label in ("no", "yes")]
    both = Classify.from_records(two, {"text": "q", "label": "a"}, ClassifyOptions(heads=["a", "b"]))
    recurrent = models.init(RecurrentConfig(1500, "gru", 16, 12, num_layers=1, bidirectional=True), "gru", 0)
    for subject, told in (
        (small, "int8"),
        (thin, "low_rank at 'layers.0.mlp.up'"),
        (narrow, "layers that differ"),
        (with_task(both, bert()), "more than one head: 'a', 'b'"),
        (classifier(recurrent), "no class for the family 'gru'"),
    ):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())
    assert not list(tmp_path.iterdir())


def test_an_export_carries_its_proof(tmp_path: Path) -> None:
    write_artifact(small_classifier(), tmp_path / "small")
    found = export(tmp_path / "small", tmp_path / "out", "huggingface").artifact
    entry = found.manifest.structure["export"]["huggingface/model.safetensors"]
    assert (entry["max_error"], entry["label_agreement"]) == (0.0, 1.0)
    assert {f"huggingface/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")} <= set(
        found.manifest.files
    )
