"""Fine-tuning MiniLM-L6 on BANKING77, batch 32, against the Hugging Face Trainer, in one run.

All take the same model, data, batch size, optimiser and dropout, each in a process of its own. A turn is one window of
50 batches, so that every turn holds every length of text. With `--method lora` all train low-rank matrices (r = 8,
query and value), the peer by `peft`. With a GPU all run there, in bf16.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from measure import Worker, interleave, ratio, save, table, work

BATCH, STEPS = 32, 50
Method = Literal["full", "lora"]
CUDA = torch.cuda.is_available()
LEAST = {("full", 0.0): (3.2, 1.5), ("full", 0.1): (2.8, 1.3), ("lora", 0.1): (3.5, 1.9)}
"""By method and dropout: how many times the Trainer's speed with dynamic padding, and with `group_by_length`."""


def lexmill(method: Method, dropout: float, window: int) -> Callable[[], Mapping[str, Any]]:
    """Steps of Lexmill's own trainer, as `lexmill fit` runs them; `window` 1 is its default order, 50 one by length."""
    from lexmill import models
    from lexmill.adapt import AdaptConfig, adapt
    from lexmill.data import banking77
    from lexmill.fit import DataConfig, FitConfig, model_directory
    from lexmill.fit.prepare import prepare, split, tokenized
    from lexmill.hardware import keep_heap, matmul_rate
    from lexmill.train import TrainConfig, Trainer

    keep_heap()
    precision = "bf16" if CUDA else "fp32"
    config = TrainConfig(epochs=1000, batch_size=BATCH, dropout=dropout, length_window=window, precision=precision)
    prepared = prepare(FitConfig(DataConfig(banking77()[0]), train=config))
    model = models.load(model_directory("minilm"))
    model.set_dropout(dropout)
    torch.manual_seed(0)
    prepared.task.attach(model)
    adapt(model, AdaptConfig(method))
    if CUDA:
        model.cuda()
    trainer = Trainer(model, prepared.task, split(tokenized(prepared), 0.0, 0)[0], config)
    tokens = float(trainer.data.lengths.mean())
    dtype = torch.bfloat16 if CUDA else torch.float32

    def turn() -> Mapping[str, Any]:
        ceiling = matmul_rate(model.matmul_shapes(), round(BATCH * tokens), dtype=dtype, device=model.device)
        model.train()
        start, examples, seen, positions = time.perf_counter(), 0, 0, 0
        for _ in range(STEPS):
            result = trainer.step()
            trainer.progress.step += 1
            examples, seen, positions = examples + result.examples, seen + result.tokens, positions + result.positions
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        share = model.training_work() * seen / seconds / ceiling
        return {
            "rate": examples / seconds, "ceiling_gflops": ceiling / 1e9, "ceiling_share": share,
            "positions_per_token": positions / seen,
        }  # fmt: skip

    return turn


def trainer(method: Method, dropout: float, strategy: str) -> Callable[[], Mapping[str, Any]]:
    """A window of the Hugging Face Trainer."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers import logging as hf_logging

    from lexmill.data import banking77, open_source
    from lexmill.fit import model_directory

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not self.times:
                self.times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if CUDA:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    hf_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model_directory("minilm"))
    read = [row.values for row in open_source(banking77()[0])]
    names = sorted({row["label"] for row in read})
    encoded = tokenizer([row["text"] for row in read], truncation=True, max_length=128)["input_ids"]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": names.index(row["label"])}
        for ids, row in zip(encoded, read, strict=True)
    ]
    seed = 0

    def turn() -> Mapping[str, Any]:
        nonlocal seed
        seed += 1
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_directory("minilm"), num_labels=len(names),
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        if method == "lora":
            from peft import LoraConfig, get_peft_model

            targets = ["query", "value"]
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS"))
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=3e-4,
                weight_decay=0.0, report_to=[], save_strategy="no", logging_steps=10_000, disable_tqdm=True,
                train_sampling_strategy=strategy, seed=seed, bf16=CUDA, use_cpu=not CUDA,
            )  # fmt: skip
            collate = DataCollatorWithPadding(tokenizer)
            Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()  # pyright: ignore
        return {"rate": BATCH * STEPS / (clock.times[-1] - clock.times[0])}

    return turn


CONTESTANTS: dict[str, Callable[[Method, float], Callable[[], Mapping[str, Any]]]] = {
    "lexmill": lambda method, dropout: lexmill(method, dropout, 1),
    "lexmill, length windows": lambda method, dropout: lexmill(method, dropout, 50),
    "hf trainer, dynamic padding": lambda method, dropout: trainer(method, dropout, "random"),
    "hf trainer, group_by_length": lambda method, dropout: trainer(method, dropout, "group_by_length"),
}


def compare(method: Method, dropout: float, rounds: int) -> dict[str, Any]:
    workers = {name: Worker(__file__, f"{name}:{method}:{dropout}") for name in CONTESTANTS}
    rates = interleave(workers, rounds)
    facts = workers["lexmill"].facts
    for worker in workers.values():
        worker.close()
    table(rates, "examples/s")
    dynamic = ratio(rates, "lexmill", "hf trainer, dynamic padding")
    grouped = ratio(rates, "lexmill", "hf trainer, group_by_length")
    least = LEAST[method, dropout]
    print(
        f"{method}, dropout {dropout}: {dynamic:.2f}x dynamic padding (at least {least[0]}), {grouped:.2f}x "
        f"group_by_length (at least {least[1]}); ceiling {facts['ceiling_gflops']:.0f} GFLOP/s, "
        f"share {facts['ceiling_share']:.0%}, "
        f"{facts['positions_per_token']:.2f} positions a token",
        flush=True,
    )
    return {"examples_per_second": rates, "times_dynamic_padding": dynamic, "times_group_by_length": grouped, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--dropout", type=float, nargs="*", help="0 and 0.1, where not given; 0.1 alone for lora")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, method, dropout = arguments.worker.split(":")
        work(CONTESTANTS[name](method, float(dropout)))
        return
    method: Method = arguments.method
    dropouts = arguments.dropout or [dropout for of, dropout in LEAST if of == method]
    figures = {f"dropout {dropout}": compare(method, dropout, arguments.rounds) for dropout in dropouts}
    name = "finetune" if method == "full" else f"finetune-{method}"
    save(f"{name}-gpu" if CUDA else name, figures)


if __name__ == "__main__":
    main()
