"""From text to text: what is learnt, what the loss is, what is reported; and a whole run on real sentences."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer

from lexmill import models
from lexmill.adapt import AdaptConfig, adapt
from lexmill.data import collate
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.models import Model, ModelConfig, families, init
from lexmill.monitor import read_events
from lexmill.tasks import Seq2Seq
from lexmill.tasks.inputs import dense
from lexmill.tasks.seq2seq import Seq2SeqAnswer, Seq2SeqOptions, Seq2SeqRequest
from lexmill.train import TrainConfig, accumulate
from lexmill.train.step import Manner
from lexmill.verify import verify

COLUMNS = {"source": "source", "target": "target"}


def rows(folder: Path, count: int, split: str = "train") -> list[dict[str, Any]]:
    with lzma.open(folder / "multi30k" / f"{split}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(count)]


def tokenizer(texts: list[str], size: int = 300) -> Tokenizer:
    made = Tokenizer(Unigram())
    made.pre_tokenizer = Metaspace()
    made.decoder = MetaspaceDecoder()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        texts, UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def tiny(vocab_size: int, seed: int = 0, **changes: Any) -> Model:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    config = families.find("t5").read_config({"vocab_size": vocab_size, **sizes, **changes})
    assert isinstance(config, ModelConfig)
    return init(config, "t5", seed)


@pytest.fixture(scope="module")
def sentences(shared_data: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("source", "target")} for row in rows(shared_data, 300)]


@pytest.fixture(scope="module")
def words(sentences: list[dict[str, Any]]) -> Tokenizer:
    return tokenizer([row[name] for row in sentences for name in ("source", "target")])


@pytest.fixture
def task_and_model(words: Tokenizer) -> tuple[Seq2Seq, Model]:
    task, model = Seq2Seq(COLUMNS, Seq2SeqOptions(max_new_tokens=12)), tiny(words.get_vocab_size())
    task.attach(model)
    return task, model


def test_the_target_and_its_end_are_learnt_and_the_source_has_its_prefix(words: Tokenizer) -> None:
    task = Seq2Seq(COLUMNS, Seq2SeqOptions(prefix="say: ", max_source_length=9, max_target_length=4))
    row = {"source": "A man in an orange hat.", "target": "Ein Mann mit einem Hut."}
    [example] = task.encode([row], words, labelled=True)
    [source], [target] = example.streams["source"], example.streams["target"]
    assert source.ids.tolist() == [*words.encode("say: A man in an orange hat.", add_special_tokens=False).ids[:8], 1]
    assert target.ids.tolist() == [*words.encode("Ein Mann mit einem Hut.", add_special_tokens=False).ids[:3], 1]
    assert list(task.encode([row], words, labelled=False)[0].streams) == ["source"]


def test_the_loss_is_that_of_transformers(task_and_model, words, sentences, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    task, model = task_and_model
    examples = task.encode(sentences[:6], words, labelled=True)
    ours, _ = accumulate(model, task, [collate(examples)], seed=0)
    models.save(model, tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    total = count = 0.0
    with torch.no_grad():
        for example in examples:
            ids, said = (torch.from_numpy(example.streams[name][0].ids)[None] for name in ("source", "target"))
            total += float(theirs(input_ids=ids, labels=said).loss) * said.numel()
            count += said.numel()
    assert ours["lm"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_and_cut_equals_padded_with_several_targets_too(words, sentences, smoothing: float) -> None:
    task = Seq2Seq(COLUMNS, Seq2SeqOptions(label_smoothing=smoothing))
    model = tiny(words.get_vocab_size()).double()
    task.attach(model)
    data = [dict(row) for row in sentences[:7]]
    data[2]["target"] = [data[2]["target"], data[3]["target"], "ein Hund"]
    examples = task.encode(data, words, labelled=True)

    def gradients(batches, arrange=None):
        model.zero_grad()
        manner = Manner(arrange=arrange) if arrange else None
        losses, _ = accumulate(model, task, batches, seed=0, manner=manner)
        return losses["lm"], {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}

    whole, slow = gradients([collate(examples)], dense)
    for batches in ([collate(examples)], [collate(examples[:1]), collate(examples[1:3]), collate(examples[3:])]):
        loss, fast = gradients(batches)
        assert loss == pytest.approx(whole, rel=1e-10)
        assert fast.keys() == slow.keys()
        for name, grad in slow.items():
            torch.testing.assert_close(fast[name], grad, rtol=1e-9, atol=1e-9)


def test_answers_are_those_of_each_alone_whatever_they_are_asked_with(task_and_model, words, sentences) -> None:
    task, model = task_and_model
    engine = TorchEngine(Loaded(task, model, words))
    asked = [
        *task.items(Seq2SeqRequest(texts=[row["source"] for row in sentences[:3]], num_beams=1)),
        *task.items(Seq2SeqRequest(texts=[row["source"] for row in sentences[3:5]], num_beams=3, max_new_tokens=5)),
        *task.items(Seq2SeqRequest(texts=[sentences[5]["source"]], length_penalty=0.0)),
    ]
    together = engine.run([Request(record) for record in asked])
    for record, answer in zip(asked, together, strict=True):
        [alone] = engine.run([Request(record)])
        assert alone.said.ids == answer.said.ids
        assert task.evidence(alone) == pytest.approx(task.evidence(answer), rel=1e-4)
        request = Seq2SeqRequest(texts=["x"], raw=True)
        shown = Seq2SeqAnswer.model_validate(task.render(answer, request))
        assert shown.logprobs is not None
        assert len(shown.logprobs) == shown.tokens <= record.get("max_new_tokens", 12)
        assert shown.score == pytest.approx(
            sum(shown.logprobs.values()) / shown.tokens ** record.get("length_penalty", 1.0)
        )


def test_rows_of_one_source_are_one_item_with_several_references(task_and_model, words, sentences) -> None:
    task, model = task_and_model
    engine = TorchEngine(Loaded(task, model, words))
    [answer] = engine.run([Request({"source": sentences[0]["source"]})])
    split = [{"source": sentences[0]["source"], "target": text} for text in ("ein Hund", answer.text)]
    joined = [{"source": sentences[0]["source"], "target": ["ein Hund", answer.text]}]
    found = []
    for data in (split, joined):
        answers = [reply for _, reply in engine.run_stream(data, labelled=True)]
        found.append(task.evaluate(answers, data))
    assert found[0].values == pytest.approx(found[1].values)
    assert found[0].values["chrf"] == pytest.approx(100)
    assert found[0].values["perplexity"] == pytest.approx(math.exp(found[0].values["loss"]))


def test_the_state_survives() -> None:
    task = Seq2Seq(COLUMNS, Seq2SeqOptions(prefix="x", num_beams=2))
    again = Seq2Seq.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    assert again.items(Seq2SeqRequest(texts=["a"], num_beams=3)) == [{"source": "a", "num_beams": 3}]


def test_what_cannot_be_learnt_says_why(words: Tokenizer) -> None:
    task = Seq2Seq(COLUMNS, Seq2SeqOptions())
    with pytest.raises(UserError, match="'target' holds None"):
        task.encode([{"source": "a"}], words, labelled=True)
    with pytest.raises(UserError, match="no text"):
        task.encode([{"source": 3}], words, labelled=False)
    with pytest.raises(UserError, match="no decoder"):
        task.attach(init(ModelConfig(20, 8, 1, 2, 2, 4, 8, 16), "bert", 0))


def test_adapters_reach_both_sides_and_what_has_one_place_is_refused(task_and_model, words, sentences) -> None:
    task, model = task_and_model
    adapted = adapt(model, AdaptConfig("lora"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "adapters" in name}
    for place in ("layers.0.attention.query", "decoder.layers.0.attention.query", "decoder.layers.0.cross.value"):
        assert any(name.startswith(f"trunk.{place}") for name in trained), place
    accumulate(model, task, [collate(task.encode(sentences[:2], words, labelled=True))], seed=0)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    adapted.merge()
    assert not any("adapters" in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match="one transformer"):
        adapt(model, AdaptConfig("prefix"))


def _model_directory(folder: Path, model: Model, words: Tokenizer) -> Path:
    folder.mkdir()
    models.save(model, folder)
    words.no_truncation()
    words.save(str(folder / "tokenizer.json"))
    return folder


def _write(path: Path, data: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    return path


def test_a_run_learns_and_its_artefact_answers_as_trained(words, sentences, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path / "cache"))
    english = [{"en": row["source"], "de": row["target"]} for row in sentences]
    config = FitConfig(
        DataConfig(
            _write(tmp_path / "train.jsonl", english[:260]), test=_write(tmp_path / "test.jsonl", english[260:])
        ),
        model=str(_model_directory(tmp_path / "model", tiny(words.get_vocab_size()), words)),
        task="seq2seq",
        options={"num_beams": 2, "max_new_tokens": 12},
        train=TrainConfig(epochs=3, batch_size=16, learning_rate=5e-3),
    )
    result = fit(config, tmp_path / "out")
    losses = [event["loss"] for event in read_events(tmp_path / "out" / "run" / "events.jsonl") if "loss" in event]
    assert losses[-1] < losses[0] - 1
    assert result.test is not None
    assert result.test["loss"] < math.log(words.get_vocab_size())
    for name in ("bleu", "chrf", "rougeL"):
        low, high = result.test["intervals"][name]
        assert low <= result.test[name] <= high
    assert 1.0 <= result.training["positions_per_token"] < 1.2
    engine = TorchEngine(tmp_path / "out")
    [answer] = engine.run([Request(record) for record in engine.task.items(Seq2SeqRequest(texts=["A man in a hat."]))])
    assert answer.text
    checked = verify(tmp_path / "out")
    assert checked.ok, checked.lines()
