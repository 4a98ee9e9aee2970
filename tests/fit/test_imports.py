"""A model of `transformers`, or an adapter of `peft`, becomes an artefact that answers as it did."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import lexmill
from tests.train.parts import rows, tokenizer

import lexmill as lm
from lexmill.engine import load
from lexmill.errors import UserError
from lexmill.fit import model_directory
from lexmill.models.generate import greedy
from lexmill.verify import verify

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LABELS = ["card", "cash", "pin"]
TEXTS = [row["text"] for row in rows(12)]
SMALL: dict[str, Any] = {
    "vocab_size": 30_522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def logits(model: Any, texts: list[str]) -> np.ndarray:
    """Of the last token's successor, or of each class, one text at a time."""
    model.eval()
    found: list[np.ndarray] = []
    for text in texts:
        ids = torch.tensor([tokenizer().encode(text).ids])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(model(ids).logits[0].numpy())
    return np.stack(found)


def assert_answers(path: Path, wanted: np.ndarray, labels: list[str]) -> None:
    answers = lm.load(path).predict(TEXTS, raw=True)
    got = np.array([[one["logits"][f"label/{label}"] for label in labels] for one in answers])
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    assert [one["label"] for one in answers] == [labels[int(index)] for index in wanted.argmax(1)]


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_directory("minilm") / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier as `transformers` saves one."""
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = transformers.BertConfig(id2label=names, initializer_range=0.2, **SMALL)
    folder = tmp_path_factory.mktemp("theirs") / "classifier"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return with_tokenizer(folder)


def adapter_on(base: Any, config: Any, folder: Path) -> Any:
    """An adapter that does something, on a model; saved in `folder`."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "classifier" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture(scope="module")
def on_minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """LoRA on the real MiniLM with a head of three classes, and what it answers."""
    folder = tmp_path_factory.mktemp("theirs") / "lora"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_directory("minilm"), num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return folder, logits(adapter_on(base, config, folder), TEXTS)


def test_a_classifier_of_transformers(plain: Path, tmp_path: Path) -> None:
    wanted = logits(transformers.AutoModelForSequenceClassification.from_pretrained(plain), TEXTS)
    said = lexmill("import", plain, "--out", tmp_path / "out")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == ["task: classify", "3 labels: card, cash, pin", f"wrote {tmp_path / 'out'}"]
    assert_answers(tmp_path / "out", wanted, LABELS)
    assert verify(tmp_path / "out").ok
    step = lexmill("show", tmp_path / "out", "--json").json["history"][0]
    assert (step["name"], step["parameters"]["source"]) == ("import", str(plain))


def test_a_classifier_of_pairs(plain: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(plain).eval()
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    out = lm.import_pretrained(plain, out=tmp_path / "out", pairs=True).path
    for pair, answer in zip(pairs, lm.load(out).predict([list(pair) for pair in pairs], raw=True), strict=True):
        read = tokenizer().encode(*pair)
        with torch.no_grad():
            wanted = theirs(torch.tensor([read.ids]), token_type_ids=torch.tensor([read.type_ids])).logits[0].numpy()
        np.testing.assert_allclose(list(answer["logits"].values()), wanted, atol=1e-5 * np.abs(wanted).max())


def test_an_adapter_of_peft(on_minilm: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, wanted = on_minilm
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    out, named = tmp_path / "out", ["--labels", tmp_path / "labels.txt"]
    said = lexmill("import", folder, "--base", "minilm", *named, "--out", out, "--json").json
    assert (said["task"], said["labels"], said["merged_matrices"]) == ("classify", LABELS, 12.0)
    assert_answers(out, wanted, LABELS)
    assert verify(out).ok
    assert (
        lm.export(out, format="peft", out=tmp_path / "peft").artifact.path / "peft" / "adapter_model.safetensors"
    ).exists()
    both = lm.combine("minilm", {"theirs": out}, out=tmp_path / "both")
    answers = lm.load(both.path).predict(TEXTS, adapter="theirs", raw=True)
    got = np.array([list(one["logits"].values()) for one in answers])
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_an_adapter_says_where_its_model_is(plain: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(plain)
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    wanted = logits(adapter_on(base, config, tmp_path / "prefix"), TEXTS)
    lm.import_pretrained(tmp_path / "prefix", out=tmp_path / "out")
    assert_answers(tmp_path / "out", wanted, LABELS)
    assert verify(tmp_path / "out").ok


def test_an_adapter_of_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(with_tokenizer(tmp_path / "base"))
    added = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    theirs = adapter_on(base, added, tmp_path / "lora")
    out = lm.import_pretrained(tmp_path / "lora", out=tmp_path / "out").path
    ids = tokenizer().encode(TEXTS[0], add_special_tokens=False).ids
    wanted = list[int]()
    for _ in range(8):
        with torch.no_grad():
            wanted.append(int(theirs(torch.tensor([ids + wanted])).logits[0, -1].argmax()))
    loaded = load(out)
    assert greedy(loaded.model, [ids], max_new_tokens=8)[0].ids == wanted
    assert loaded.task.name == "generate"
    assert lm.load(out).predict([TEXTS[0]], max_new_tokens=8)[0]["text"]


def test_a_head_of_one_output_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=1, initializer_range=0.2, **SMALL)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "one")
    out = lm.import_pretrained(with_tokenizer(tmp_path / "one"), out=tmp_path / "out").path
    read = tokenizer().encode(TEXTS[0], TEXTS[1])
    with torch.no_grad():
        wanted = theirs(torch.tensor([read.ids]), token_type_ids=torch.tensor([read.type_ids])).logits
    (answer,) = lm.load(out).predict([[TEXTS[0], TEXTS[1]]], raw=True)
    np.testing.assert_allclose(list(answer["logits"].values()), wanted[0].numpy(), rtol=1e-4, atol=1e-5)
    assert verify(out).ok


def test_a_model_in_bfloat16_verifies(plain: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(plain)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    out = lm.import_pretrained(with_tokenizer(tmp_path / "half"), out=tmp_path / "out").path
    assert_answers(out, logits(theirs.float(), TEXTS), LABELS)
    assert verify(out).ok


def test_texts_end_where_the_model_ends_them(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(eos_token_id=1010, num_key_value_heads=2, **SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    loaded = load(lm.import_pretrained(with_tokenizer(tmp_path / "base"), out=tmp_path / "out").path)
    assert loaded.task.options.end_token == tokenizer().id_to_token(1010)
    assert loaded.task.options.max_length == 512


def test_a_model_without_a_head_embeds(tmp_path: Path) -> None:
    artifact = lm.import_pretrained(model_directory("minilm"), out=tmp_path / "out")
    assert artifact.manifest.task.name == "embed"
    (vector,) = lm.load(artifact.path).predict(["Where is my card?"])
    assert len(vector["embedding"]) == 384


def test_classes_without_names(on_minilm: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    said = lexmill("import", on_minilm[0], "--out", tmp_path / "out")
    assert said.code == 0
    assert "3 labels: LABEL_0, LABEL_1, LABEL_2\nthe files do not say what the classes are called" in said.out


def broken(folder: Path, source: Path, name: str, change: Any) -> Path:
    """A copy of a directory whose tensors, or the config called `name`, are changed."""
    shutil.copytree(source, folder)
    if name.endswith(".json"):
        config = json.loads((folder / name).read_text("utf-8"))
        change(config)
        (folder / name).write_text(json.dumps(config), "utf-8")
    else:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)
    return folder


def test_what_cannot_be_taken_over_is_refused(plain: Path, on_minilm: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    adapter, weights = on_minilm[0], "adapter_model.safetensors"
    embeddings = {"base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    kept = broken(tmp_path / "kept", adapter, weights, lambda found: found.update(embeddings))
    named = {"modules_to_save": ["classifier", "score", "word_embeddings"]}
    config = json.loads((kept / "adapter_config.json").read_text("utf-8"))
    (kept / "adapter_config.json").write_text(json.dumps(config | named), "utf-8")
    nowhere = {"base_model_name_or_path": "someone/else"}
    lost = broken(tmp_path / "lost", adapter, "adapter_config.json", lambda found: found.update(nowhere))
    half = broken(tmp_path / "half", plain, "model.safetensors", lambda found: found.pop("bert.pooler.dense.weight"))
    tokens = {"architectures": ["BertForTokenClassification"]}
    tags = broken(tmp_path / "tags", plain, "config.json", lambda found: found.update(tokens))
    headless = broken(tmp_path / "headless", plain, "model.safetensors", lambda found: found.pop("classifier.weight"))
    later = {"alora_invocation_tokens": [102]}
    odd = {"r": 0}
    waits = broken(tmp_path / "waits", adapter, "adapter_config.json", lambda found: found.update(later))
    none = broken(tmp_path / "none", adapter, "adapter_config.json", lambda found: found.update(odd))
    asked = {"architectures": ["BertForQuestionAnswering"]}
    spans = broken(tmp_path / "spans", plain, "config.json", lambda found: found.update(asked))
    twice = broken(tmp_path / "twice", plain, "config.json", lambda found: found["id2label"].update({"0": "pin"}))
    many = broken(tmp_path / "many", plain, "config.json", lambda found: found.update({"problem_type": "regression"}))
    by_token = {"task_type": "TOKEN_CLS"}
    tagger = broken(tmp_path / "tagger", adapter, "adapter_config.json", lambda found: found.update(by_token))
    done = lm.import_pretrained(plain, out=tmp_path / "done").path
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (kept, {}, "'bert.embeddings.word_embeddings.weight' has no place"),
        (lost, {}, "the model of the adapter is not at 'someone/else'"),
        (adapter, {"base": plain}, "do not fit the model"),
        (half, {}, "'bert.pooler.dense.weight' of the head is missing"),
        (tags, {}, "how its tokens make words"),
        (headless, {}, "the classification head is missing"),
        (waits, {}, "cannot be represented"),
        (none, {}, "0 is no number above 0"),
        (spans, {}, "how its windows overlap"),
        (twice, {}, "two classes have one name"),
        (many, {}, "a head of 3 numbers"),
        (tagger, {}, "how its tokens make words"),
        (done, {}, "an artefact already"),
        (plain, {"labels": ["one", "two"]}, "2 labels for a head of 3 outputs"),
        (plain, {"labels": ["one", "two", "one"]}, "two classes have one name"),
        (plain, {"base": "minilm"}, "has no base"),
        (model_directory("minilm"), {"labels": LABELS}, "no classification head to name"),
        (model_directory("minilm"), {"pairs": True}, "no classification head for pairs"),
        (tmp_path / "nothing", {}, "no such file or directory"),
    ]
    for source, arguments, told in cases:
        with pytest.raises(UserError, match=told):
            lm.import_pretrained(source, out=tmp_path / "out", **arguments)
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "labels.txt").write_text("one\n\ntwo\n")
    said = lexmill("import", plain, "--labels", tmp_path / "labels.txt", "--out", tmp_path / "out")
    assert (said.code, f"{tmp_path / 'labels.txt'}:2: there is no label" in said.err) == (2, True)
