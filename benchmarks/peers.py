"""Peers on the very recipe that Lexmill runs: its data, seed, epochs, batch size, rate, warm-up, dropout and loss."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from lexmill.data import open_source
from lexmill.fit import FitConfig, model_directory
from lexmill.metrics.answers import answer_scores, mostly_chinese
from lexmill.tasks.answer import AnswerOptions, best_span


def with_lora(model: Any, upper: int | tuple[int, ...] | None, *, rank: int = 8, alpha: float = 16.0) -> Any:
    """The classifier with `peft`'s matrices at queries and values, in so many upper layers or in all."""
    from peft import LoraConfig, get_peft_model

    layers = range(model.config.num_hidden_layers)
    chosen = list(layers[-upper:]) if isinstance(upper, int) else upper and list(upper)
    return get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=int(alpha), target_modules=["query", "value"], task_type="SEQ_CLS",
            layers_to_transform=chosen,
        ),
    )  # fmt: skip


def _predicted(
    config: FitConfig, model: Any, learnt: list[Any], asked: list[Any], collator: Any, *, at_once: int = 64, **more: Any
) -> Any:
    """What a model says of rows after the Hugging Face Trainer has trained it as the recipe has it."""
    from transformers import Trainer, TrainingArguments
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    train = config.train
    steps = -(-len(learnt) // train.batch_size) * train.epochs
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=train.batch_size, num_train_epochs=train.epochs,
            learning_rate=train.learning_rate, weight_decay=train.weight_decay, seed=train.seed, use_cpu=True,
            warmup_steps=round(train.warmup * steps), per_device_eval_batch_size=at_once,
            report_to=[], save_strategy="no", logging_steps=10_000, disable_tqdm=True, bf16=train.precision == "bf16",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=learnt, data_collator=collator, **more)
        trainer.train()
        return trainer.predict(asked).predictions  # pyright: ignore


def classify(config: FitConfig) -> dict[str, float]:
    """Test accuracy of the Hugging Face Trainer with dynamic padding, after the last epoch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    train, directory = config.train, model_directory(config.model)
    assert config.data.test is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    names: list[str] = []

    def rows(file: Path) -> list[dict[str, Any]]:
        read = [row.values for row in open_source(file)]
        names[:] = names or sorted({str(row["label"]) for row in read})
        longest = int(config.options.get("max_length", 128))
        ids = tokenizer([row["text"] for row in read], truncation=True, max_length=longest)["input_ids"]
        return [{"input_ids": i, "labels": names.index(str(row["label"]))} for i, row in zip(ids, read, strict=True)]

    learnt, asked = rows(config.data.train), rows(config.data.test)
    weights = None
    if config.options.get("class_weights") == "balanced":
        counts = np.bincount([row["labels"] for row in learnt], minlength=len(names))
        weights = torch.tensor(len(learnt) / (len(names) * counts), dtype=torch.float32)
    smoothing = float(config.options.get("label_smoothing", 0.0))

    def loss(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weights, label_smoothing=smoothing)

    torch.manual_seed(train.seed)
    given = {} if train.dropout is None else dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), train.dropout
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(names), **given)
    if config.adapt.method == "lora":
        model = with_lora(model, config.adapt.layers, rank=config.adapt.rank, alpha=config.adapt.alpha)
    said = _predicted(config, model, learnt, asked, DataCollatorWithPadding(tokenizer), compute_loss_func=loss)
    guesses = np.argmax(said, axis=-1)
    return {"accuracy": float(np.mean(guesses == [row["labels"] for row in asked]))}


def embed(config: FitConfig) -> dict[str, float]:
    """Spearman correlation on the test pairs of sentence-transformers, trained by cosine similarity."""
    from sentence_transformers import InputExample, SentenceTransformer, losses, models
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from torch.utils.data import DataLoader

    train, directory = config.train, str(model_directory(config.model))
    assert config.data.test is not None
    torch.manual_seed(train.seed)
    word = models.Transformer(directory, max_seq_length=int(config.options.get("max_length", 128)))
    model = SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu")

    def pairs(file: Path) -> list[tuple[str, str, float]]:
        return [tuple(row.values.values()) for row in open_source(file)]  # pyright: ignore

    learnt = [InputExample(texts=[a, b], label=float(score) / 5) for a, b, score in pairs(config.data.train)]
    loader: Any = DataLoader(learnt, shuffle=True, batch_size=train.batch_size)  # pyright: ignore
    model.fit(
        [(loader, losses.CoSENTLoss(model))], epochs=train.epochs, show_progress_bar=False,
        warmup_steps=round(train.warmup * len(loader) * train.epochs), optimizer_params={"lr": train.learning_rate},
    )  # fmt: skip
    first, second, scores = zip(*pairs(config.data.test), strict=True)
    return {"spearman": float(EmbeddingSimilarityEvaluator(first, second, scores)(model)["spearman_cosine"])}


def tag(config: FitConfig) -> dict[str, float]:
    """seqeval's entity F1 on the test rows of the Hugging Face Trainer, labels on the first token of a word."""
    from seqeval.metrics import f1_score
    from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    train, directory = config.train, model_directory(config.model)
    assert config.data.test is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    read = {file: [row.values for row in open_source(file)] for file in (config.data.train, config.data.test)}
    names = sorted({name for rows in read.values() for row in rows for name in row["tags"]})

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        longest = int(config.options.get("max_length", 128))
        found = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=longest)
        words = found.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [names.index(row["tags"][w]) if starts else -100 for w, starts in zip(words, first, strict=True)]
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}

    learnt, asked = ([encoded(row) for row in rows] for rows in read.values())
    torch.manual_seed(train.seed)
    model = AutoModelForTokenClassification.from_pretrained(directory, num_labels=len(names))
    found = np.argmax(_predicted(config, model, learnt, asked, DataCollatorForTokenClassification(tokenizer)), axis=-1)
    said: list[list[str]] = []
    gold: list[list[str]] = []
    for guesses, row, example in zip(found, read[config.data.test], asked, strict=True):
        kept = [names[g] for g, label in zip(guesses, example["labels"], strict=False) if label != -100]
        said.append(kept + ["O"] * (len(row["tags"]) - len(kept)))  # what was cut off is found by nobody
        gold.append(row["tags"])
    return {"f1": float(f1_score(gold, said))}


def answer(config: FitConfig) -> dict[str, float]:
    """Exact match and F1 on the test rows of the Hugging Face Trainer, with windows as Lexmill cuts them; the span of
    the largest sum of two logits over a row's windows answers it, of at most as many tokens. A step takes as many
    windows as the recipe's questions have in the mean, so that both take as many steps."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    train, directory, options = config.train, model_directory(config.model), AnswerOptions(**config.options)
    assert config.data.test is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    read = {file: [row.values for row in open_source(file)] for file in (config.data.train, config.data.test)}

    def windows(rows: list[dict[str, Any]]) -> tuple[Any, list[int]]:
        found = tokenizer(
            [row["question"] for row in rows], [row["context"] for row in rows], truncation="only_second",
            max_length=options.max_length, stride=options.stride, return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )  # fmt: skip
        return found, found["overflow_to_sample_mapping"]

    def spans_of(found: Any, index: int) -> list[tuple[int, int] | None]:
        """Of each token, its characters in the context; None for others."""
        return [
            span if owner == 1 else None
            for span, owner in zip(found["offset_mapping"][index], found.sequence_ids(index), strict=True)
        ]

    def learnt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found, owners = windows(rows)
        made: list[dict[str, Any]] = []
        for index, owner in enumerate(owners):
            first = rows[owner]["answers"][0]
            begin, end = first["start"], first["start"] + len(first["text"])
            spans = spans_of(found, index)
            touched = [i for i, span in enumerate(spans) if span and span[1] > begin and span[0] < end]
            there = [span for span in spans if span]
            whole = touched and there[0][0] <= begin and there[-1][1] >= end
            low, high = (touched[0], touched[-1]) if whole else (0, 0)
            made.append({"input_ids": found["input_ids"][index], "start_positions": low, "end_positions": high})
        return made

    questions = read[config.data.train]
    rows = learnt(questions)
    at_once = round(train.batch_size * len(rows) / len(questions))
    torch.manual_seed(train.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(directory)
    asked = read[config.data.test]
    found, owners = windows(asked)
    given = [{"input_ids": ids} for ids in found["input_ids"]]
    of_windows = replace(config, train=replace(train, batch_size=at_once))
    starts, ends = _predicted(of_windows, model, rows, given, DataCollatorWithPadding(tokenizer), at_once=16)
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(asked)
    for index, owner in enumerate(owners):
        inside = [(i, span) for i, span in enumerate(spans_of(found, index)) if span]
        logits = np.stack([one[index][[i for i, _ in inside]] for one in (starts, ends)], -1)
        value, low, high = best_span(logits, options.max_answer_length)
        (first, _), (_, last) = inside[low][1], inside[high][1]
        best[owner] = max(best[owner], (value, asked[owner]["context"][first:last].strip()))
    chinese = mostly_chinese([row["question"] for row in asked])
    scores = [
        answer_scores(text, [one["text"] for one in row["answers"]], chinese=chinese)
        for (_, text), row in zip(best, asked, strict=True)
    ]
    exact, f1 = np.mean(scores, axis=0)
    return {"f1": float(f1), "exact_match": float(exact)}


OF_TASK = {"classify": classify, "embed": embed, "tag": tag, "answer": answer}
