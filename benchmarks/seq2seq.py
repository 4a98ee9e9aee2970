"""English to German on Multi30k from scratch: Lexmill against the same T5 in transformers, in one run.

Both begin with the same weights (3 + 3 layers of 256) and see the same batches, optimiser steps, learning rates and
share of dropout; `transformers` is trained by a plain loop with dynamic padding. Both are then asked for the test
sentences by beam search. How fast they answer is measured in turns, with the weights that Lexmill learnt, of which
`transformers` is given a copy, on the same batches; nearly all answers must be equal. Lexmill drops hidden states and
attention weights; T5 of transformers drops the feed-forward layer's inner states and the last hidden state as well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer

from lexmill import models
from lexmill.data import collate, open_source
from lexmill.data.batch import Example
from lexmill.data.order import Order
from lexmill.data.packing import micro_batches
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.hardware import keep_heap
from lexmill.metrics.texts import text_metrics
from lexmill.models import Model, families, init
from lexmill.tasks import Seq2Seq
from lexmill.tasks.seq2seq import Seq2SeqOptions
from lexmill.train import TrainConfig
from lexmill.train.optimizer import Optimizer
from lexmill.train.schedule import learning_rate
from lexmill.train.step import train_step
from measure import interleave, ratio, save, table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "multi30k"
PEAK, WARMUP, DROPOUT, VOCABULARY = 2e-3, 0.1, 0.1, 8000
Rows = Sequence[Mapping[str, Any]]


def read(split: str, count: int | None) -> list[Mapping[str, Any]]:
    return [row.values for row in open_source(DATA / f"{split}.jsonl.xz")][:count]


def unigram(rows: Rows) -> Tokenizer:
    made = Tokenizer(Unigram())
    made.pre_tokenizer, made.decoder = Metaspace(), MetaspaceDecoder()
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator((row[name] for row in rows for name in ("source", "target")), trainer)
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def new_model(tokenizer: Tokenizer) -> Model:
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "dropout_rate": DROPOUT}
    return init(families.find("t5").read_config({"vocab_size": tokenizer.get_vocab_size(), **sizes}), "t5", 0)


def rate_at(step: int, steps: int) -> float:
    return learning_rate(step, steps, peak=PEAK, schedule="linear", warmup=WARMUP, decay=0.0)


def batches(examples: Sequence[Example], batch_size: int, steps: int) -> list[np.ndarray]:
    lengths = np.array([sum(len(s.ids) for one in e.streams.values() for s in one) for e in examples])
    order = Order(len(examples), batch_size, 0, lengths=lengths)
    return [order.batch(step) for step in range(steps)]


def lexmill(model: Model, task: Seq2Seq, examples: Sequence[Example], plan: Sequence[np.ndarray]) -> float:
    """Train; gives examples a second."""
    optimizer = Optimizer(model, TrainConfig(weight_decay=0.0, max_grad_norm=1.0))
    lengths = np.array([sum(len(s.ids) for one in e.streams.values() for s in one) for e in examples])
    model.train()
    start = time.perf_counter()
    for step, indices in enumerate(plan):
        cut = [collate([examples[i] for i in part]) for part in micro_batches(indices, lengths, 8192)]
        train_step(model, task, cut, optimizer, learning_rate=rate_at(step, len(plan)), seed=step)
    seconds = time.perf_counter() - start
    optimizer.close()
    model.eval()
    return sum(map(len, plan)) / seconds


def padded(examples: Sequence[Example], name: str, fill: int) -> torch.Tensor:
    rows = [torch.from_numpy(example.streams[name][0].ids) for example in examples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def peer(model: Any, examples: Sequence[Example], plan: Sequence[np.ndarray]) -> float:
    """Train; gives examples a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.0, fused=True)
    model.train()
    torch.manual_seed(0)
    start = time.perf_counter()
    for step, indices in enumerate(plan):
        batch = [examples[i] for i in indices]
        source, labels = padded(batch, "source", 0), padded(batch, "target", -100)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, len(plan))
        model(input_ids=source, attention_mask=(source != 0).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    return sum(map(len, plan)) / seconds


def by_length(examples: Sequence[Example]) -> list[list[int]]:
    """Batches of neighbours in length."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].streams["source"][0].ids))
    return [order[start : start + 64] for start in range(0, len(order), 64)]


def answers(engine: TorchEngine, examples: Sequence[Example], test: Rows) -> list[str]:
    found = [""] * len(examples)
    for rows in by_length(examples):
        said = engine.run([Request({"source": test[i]["source"]}) for i in rows])
        for i, answer in zip(rows, said, strict=True):
            found[i] = answer.text
    return found


@torch.inference_mode()
def peer_answers(model: Any, examples: Sequence[Example], tokenizer: Tokenizer, beams: int) -> list[str]:
    found = [""] * len(examples)
    for rows in by_length(examples):
        source = padded([examples[i] for i in rows], "source", 0)
        said = model.generate(
            source, attention_mask=(source != 0).long(), num_beams=beams, max_new_tokens=64, do_sample=False,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        for i, ids in zip(rows, said.tolist(), strict=True):
            found[i] = tokenizer.decode([token for token in ids if token > 1])
    return found


def answered(answer: Callable[[], list[str]]) -> Callable[[], float]:
    """A turn of answering; gives answers a second."""

    def turn() -> float:
        start = time.perf_counter()
        return len(answer()) / (time.perf_counter() - start)

    return turn


def contestant(name: str, texts: list[str], test: Rows, trained: float) -> dict[str, Any]:
    found = text_metrics(texts, [[row["target"]] for row in test])
    (bleu, (low, high)), (chrf, _) = found["bleu"], found["chrf"]
    quality = f"BLEU {bleu:5.2f} (95 % interval {low:.2f} to {high:.2f}), chrF {chrf:5.2f}"
    print(f"{name:13s} {quality}; trained {trained:6.1f} examples/s", flush=True)
    return {
        "bleu": bleu, "bleu_interval": [low, high], "chrf": chrf, "examples_per_second": trained,
        "sample": texts[:3],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps; 907 are one epoch at 32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=None, help="training rows; all where not given")
    parser.add_argument("--test-rows", type=int, default=None)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of answering")
    arguments = parser.parse_args()
    from transformers import T5ForConditionalGeneration

    keep_heap()
    train, test = read("train", arguments.rows), read("test_2016_flickr", arguments.test_rows)
    tokenizer = unigram(train)
    columns = {"source": "source", "target": "target"}
    task = Seq2Seq(columns, Seq2SeqOptions(num_beams=arguments.beams, max_new_tokens=64))
    examples = task.encode(train, tokenizer, labelled=True)
    plan = batches(examples, arguments.batch_size, arguments.steps)
    ours = new_model(tokenizer)
    task.attach(ours)
    with tempfile.TemporaryDirectory() as folder:
        models.save(ours, folder)
        theirs = T5ForConditionalGeneration.from_pretrained(folder)
    figures: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.batch_size, "beams": arguments.beams}

    asked = task.encode(test, tokenizer, labelled=False)
    trained = lexmill(ours, task, examples, plan)
    engine = TorchEngine(Loaded(task, ours, tokenizer))
    texts = answers(engine, asked, test)
    figures["lexmill"] = contestant("lexmill", texts, test, trained)

    trained = peer(theirs, examples, plan)
    said = peer_answers(theirs, asked, tokenizer, arguments.beams)
    figures["transformers"] = contestant("transformers", said, test, trained)

    with tempfile.TemporaryDirectory() as folder:
        models.save(ours, folder)
        copy = T5ForConditionalGeneration.from_pretrained(folder).eval()
    said = peer_answers(copy, asked, tokenizer, arguments.beams)
    equal = sum(a == b for a, b in zip(texts, said, strict=True)) / len(texts)
    print(f"equal answers, given the same weights: {equal:.1%}", flush=True)
    assert equal >= 0.98
    rates = interleave(
        {
            "lexmill": answered(lambda: answers(engine, asked, test)),
            "transformers": answered(lambda: peer_answers(copy, asked, tokenizer, arguments.beams)),
        },
        arguments.rounds,
    )
    table(rates, "answers/s")
    figures |= {"answers_per_second": rates, "equal_answers": equal}
    figures["times_answers_per_second"] = ratio(rates, "lexmill", "transformers")
    speeds = [figures[name]["examples_per_second"] for name in ("lexmill", "transformers")]
    figures["times_examples_per_second"] = speeds[0] / speeds[1]
    for what in ("examples_per_second", "answers_per_second"):
        print(f"{what}: {figures[f'times_{what}']:.2f}x", flush=True)
    save("seq2seq", figures)


if __name__ == "__main__":
    main()
