"""A small BERT classifier with a tokenizer trained on the spot: real parts, made in a moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer

from lexmill import models
from lexmill.artifact import Artifact, Manifest, TaskRecord, create
from lexmill.engine import Loaded, probes
from lexmill.models import ModelConfig
from lexmill.tasks.classify import Classify, ClassifyOptions

LABELS = ("balance", "card", "fee", "pin", "refund")


@cache
def _vocabulary() -> dict[str, int]:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(probes.probe_texts(), trainer)
    return tokenizer.get_vocab()


def small_tokenizer() -> Tokenizer:
    vocabulary = _vocabulary()
    tokenizer = Tokenizer(WordPiece(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def small_classifier(
    *,
    pair: bool = False,
    name: str = "small",
    labels: Sequence[str] = LABELS,
    max_length: int = 96,
    layers: int = 2,
    seed: int = 0,
) -> Loaded:
    """A classifier of texts or pairs with random weights large enough that its logits differ between texts."""
    config = ModelConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=64,
        max_positions=512,
        type_vocab_size=2,
        initializer_range=0.3,
    )
    columns = {"text": "question", "label": "intent"} | ({"text_pair": "other"} if pair else {})
    records = [{"question": "x", "other": "y", "intent": label} for label in labels]
    task = Classify.from_records(records, columns, ClassifyOptions(max_length=max_length))
    model = models.init(config, "bert", seed)
    torch.manual_seed(seed)
    task.attach(model)
    return Loaded(task, model.eval(), small_tokenizer(), name)


def write_artifact(loaded: Loaded, out: Path, *, probed: bool = True) -> Artifact:
    """What `fit` leaves of a trained model, without the training; its probes, which take a second, where asked."""
    with create(out) as writer:
        models.save(loaded.model, writer.path("config.json").parent)
        loaded.tokenizer.no_truncation()
        loaded.tokenizer.save(str(writer.path("tokenizer.json")))
        if probed:
            recorded = probes.record(loaded.task, loaded.model, loaded.tokenizer)
            writer.path(probes.FILE).write_text(json.dumps(recorded, ensure_ascii=False), encoding="utf-8")
        writer.manifest = Manifest(
            task=TaskRecord(name=loaded.task.name, state=json.loads(json.dumps(loaded.task.state()))),
            weights=models.weights_digest(loaded.model),
        )
    return Artifact.open(out)
