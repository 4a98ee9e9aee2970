"""Training a 10 M-parameter GPT-2 from nothing on 3 M tokens of novels and PEPs, against the Hugging Face Trainer.

Both have a process of their own, the same new weights, blocks, batches, AdamW, schedule and dropout; a turn is a number
of optimiser steps. `--precision bf16` lets both make their products in bfloat16. `--quality` trains each over all
blocks instead, for bits per byte on held-out text and BLiMP. The tokenizer is trained here, on the training text.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from measure import Worker, interleave, ratio, save, table, work

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORK = Path(os.environ.get("LEXMILL_BENCH", tempfile.gettempdir())) / "lexmill-bench-pretrain"
STRUCTURE = {"model_type": "gpt2", "n_embd": 320, "n_layer": 6, "n_head": 5, "n_positions": 256}
"""7.4 M weights in the trunk and 2.6 M in the table of 8,192 tokens."""
VOCABULARY, BLOCK, BATCH = 8192, 256, 16
TOKENS = 3_000_000
RATE, WARMUP, LEAST = 1e-3, 0.02, 1.3
CUDA = torch.cuda.is_available()
Precision = Literal["fp32", "bf16"]


def text_files() -> tuple[Path, Path]:
    """Training and held-out text: all but every tenth document, and those."""
    train, held = WORK / "train.jsonl", WORK / "held.jsonl"
    if not (train.exists() and held.exists()):
        WORK.mkdir(parents=True, exist_ok=True)
        texts: list[str] = []
        for name in ("gutenberg_en/books", "peps_en/peps"):
            with lzma.open(DATA / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
                texts += [json.loads(line)["text"] for line in file]
        # Books whole would be half of the text in a few rows: chapters' worth of lines in a row make an even mixture.
        parts = [text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000)]
        order = np.random.default_rng(0).permutation(len(parts))
        chosen = [parts[i] for i in order]
        for path, some in ((held, chosen[: len(chosen) // 50]), (train, chosen[len(chosen) // 50 :])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some), encoding="utf-8")
    return train, held


def setting(dropout: float, precision: Precision) -> Any:
    """Model, blocks and trainer of Lexmill, as `lexmill fit` makes them; the peer takes weights and blocks from it."""
    from lexmill.data.tokenizer_training import TokenizerConfig, write_tokenizer
    from lexmill.fit import DataConfig, FitConfig
    from lexmill.fit.model import start
    from lexmill.fit.prepare import examples, prepare
    from lexmill.hardware import keep_heap
    from lexmill.train import TrainConfig, Trainer

    train, _ = text_files()
    keep_heap()
    directory = WORK / "model"
    if not directory.exists():
        write_tokenizer(train, directory, TokenizerConfig("bpe", VOCABULARY))
        (directory / "config.json").write_text(json.dumps(STRUCTURE))
    config = TrainConfig(
        epochs=1, batch_size=BATCH, learning_rate=RATE, warmup=WARMUP, weight_decay=0.1, dropout=dropout,
        precision=precision,
    )  # fmt: skip
    options = {"max_length": BLOCK}
    asked = FitConfig(
        DataConfig(train), model=str(directory), init="random", task="pretrain", options=options, train=config
    )
    prepared = prepare(asked)
    begun = start(directory, prepared.task, config, lambda line: None, anew=VOCABULARY)
    data = examples(prepared)[0]
    data.indices = data.indices[: min(TOKENS // BLOCK, len(data) - 1)]
    data.lengths = data.lengths[data.indices]
    if CUDA:
        begun.model.cuda()
    return prepared, Trainer(begun.model, prepared.task, data, config)


def lexmill(dropout: float, precision: Precision, steps: int) -> Callable[[], Mapping[str, Any]]:
    from lexmill.hardware import matmul_rate

    _, trainer = setting(dropout, precision)
    model = trainer.model

    def turn() -> Mapping[str, Any]:
        model.train()
        start, seen = time.perf_counter(), 0
        for _ in range(steps):
            seen += trainer.step().tokens
            trainer.progress.step += 1
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        shapes = [*model.matmul_shapes(), (model.config.hidden_size, VOCABULARY)]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        ceiling = matmul_rate(shapes, BATCH * BLOCK, dtype=dtype, device=model.device, repeats=5)
        work_done = model.training_work() + 6 * model.config.hidden_size * VOCABULARY
        return {
            "rate": seen / seconds,
            "ceiling_gflops": ceiling / 1e9,
            "ceiling_share": work_done * seen / seconds / ceiling,
        }

    return turn


def peer(dropout: float) -> tuple[Any, list[dict[str, Any]]]:
    """GPT-2 of `transformers` with Lexmill's new weights, and the blocks in the order that Lexmill takes them."""
    from transformers import GPT2LMHeadModel

    from lexmill import models

    _, trainer = setting(dropout, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        models.save(trainer.model.cpu(), folder)
        changes = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = GPT2LMHeadModel.from_pretrained(folder, **changes)
    order = np.concatenate([trainer.order.batch(step) for step in range(trainer.total_steps)])
    rows: list[dict[str, Any]] = []
    for index in order.tolist():
        ids = trainer.data.batch(np.array([index])).streams["source"].ids.tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return model, rows


def hf_trainer(dropout: float, precision: Precision, steps: int) -> Callable[[], Mapping[str, Any]]:
    model, rows = peer(dropout)
    state = {"at": 0}

    def turn() -> Mapping[str, Any]:
        seconds = train_peer(model, rows[state["at"] : state["at"] + steps * BATCH], precision)
        state["at"] += steps * BATCH
        return {"rate": steps * BATCH * BLOCK / seconds}

    return turn


def train_peer(model: Any, rows: list[dict[str, Any]], precision: Precision) -> float:
    """Train on these rows in this order; gives the seconds that the steps took."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not times:
                times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if CUDA:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # pyright: ignore

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE,
            warmup_steps=WARMUP, weight_decay=0.1, report_to=[], save_strategy="no", logging_steps=10_000,
            disable_tqdm=True, bf16=precision == "bf16", use_cpu=not CUDA,
        )  # fmt: skip
        collate = lambda some: {  # noqa: E731
            name: torch.tensor([row[name] for row in some]) for name in ("input_ids", "labels")
        }
        InOrder(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()  # pyright: ignore
    return times[-1] - times[0]


def quality(dropout: float, precision: Precision, most: int, pairs: int) -> dict[str, Any]:
    """Each trained over the same blocks once (at most `most` steps): bits per byte on held-out text, and BLiMP."""
    from lexmill import models
    from lexmill.data import open_source
    from lexmill.engine import TorchEngine
    from lexmill.engine.loaded import Loaded
    from lexmill.evaluate import evaluate
    from lexmill.evaluate.minimal_pairs import minimal_pairs

    prepared, trainer = setting(dropout, precision)
    trainer.total_steps = min(trainer.total_steps, most)
    trainer.run(lambda event: None)
    theirs, rows = peer(dropout)
    train_peer(theirs, rows[: trainer.total_steps * BATCH], precision)
    with tempfile.TemporaryDirectory() as folder:
        theirs.cpu().save_pretrained(folder)
        other = models.load(folder)
        prepared.task.attach(other)
    with lzma.open(DATA / "blimp" / "all.jsonl.xz", "rt", encoding="utf-8") as file:
        blimp = [json.loads(line) for line in file]
    blimp = [blimp[i] for i in np.random.default_rng(0).permutation(len(blimp))[:pairs]]
    found: dict[str, Any] = {"steps": trainer.total_steps}
    for name, model in (("lexmill", trainer.model), ("hf trainer", other)):
        engine = TorchEngine(Loaded(prepared.task, model.cpu(), prepared.tokenizer))
        held = evaluate(engine, (row.values for row in open_source(text_files()[1]))).metrics
        grammar = minimal_pairs(engine, blimp)
        found[name] = {
            "bits_per_byte": held.values["bits_per_byte"],
            "bits_per_byte_interval": held.intervals["bits_per_byte"],
            "perplexity": held.values["perplexity"],
            "blimp_accuracy": grammar.values["accuracy"],
            "blimp_interval": grammar.intervals["accuracy"],
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps a turn")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if CUDA else "fp32")
    parser.add_argument("--quality", action="store_true", help="train each over all blocks in place of turns (an hour)")
    parser.add_argument("--quality-steps", type=int, default=1 << 30, help="at most so many")
    parser.add_argument("--pairs", type=int, default=6700, help="of BLiMP's 67,000")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        contestant, dropout, precision, steps = arguments.worker.split(":")
        work({"lexmill": lexmill, "hf trainer": hf_trainer}[contestant](float(dropout), precision, int(steps)))
        return
    dropout, precision = arguments.dropout, arguments.precision
    name = "pretrain-gpu" if CUDA else "pretrain" if precision == "fp32" else f"pretrain-{precision}"
    if arguments.quality:
        found = quality(dropout, precision, arguments.quality_steps, arguments.pairs)
        save(f"{name}-quality", {"dropout": dropout, **found})
        return
    setting(dropout, precision)  # so that tokenizer and blocks are made once, before the workers
    names = ("lexmill", "hf trainer")
    workers = {name: Worker(__file__, f"{name}:{dropout}:{precision}:{arguments.steps}") for name in names}
    rates = interleave(workers, arguments.rounds)
    facts = workers["lexmill"].facts
    for worker in workers.values():
        worker.close()
    table(rates, "tokens/s")
    times = ratio(rates, *names)
    share = facts["ceiling_share"]
    print(f"{times:.2f}x the Hugging Face Trainer (at least {LEAST}); {share:.0%} of the ceiling", flush=True)
    figures: dict[str, Any] = {
        "dropout": dropout,
        "precision": precision,
        "tokens_per_second": rates,
        "times_trainer": times,
        **facts,
    }
    assert math.isfinite(times)
    save(name, figures)


if __name__ == "__main__":
    main()
