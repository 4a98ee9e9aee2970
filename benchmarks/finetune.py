"""Fine-tuning MiniLM-L6 on BANKING77, batch 32, against the Hugging Face Trainer, in one run.

All take the same model, data, batch size, optimiser and dropout, each in a process of its own. A turn is one window of
50 batches, so that every turn holds every length of text. With `--method lora` all train low-rank matrices (r = 8,
query and value), the peer by `peft`; with `lora-upper` in the upper half of the layers alone. Lexmill then keeps what
the lower half makes of the texts, without dropout there, and its turn is four whole epochs, that first pass included;
the peers of `lora`, with matrices in every layer, run too.
`--data waimai_10k --model e5` takes Chinese reviews and multilingual-e5-small. `--precision bf16` lets all make their
products in bfloat16. With a GPU all run there, in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from measure import Worker, interleave, ratio, save, table, work
from peers import with_lora

BATCH, STEPS, EPOCHS, MAX_LENGTH = 32, 50, 4, 128
Method = Literal["full", "lora", "lora-upper"]
CUDA = torch.cuda.is_available()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LEAST = {("full", 0.0): (3.2, 1.5), ("full", 0.1): (2.8, 1.3), ("lora", 0.1): (3.5, 1.9), ("lora-upper", 0.1): (6, 3)}
"""By method and dropout: how many times the Trainer's speed with dynamic padding, and with `group_by_length`, of MiniLM
on BANKING77; for `lora-upper` of the Trainer that adapts every layer, as for `lora`."""


@dataclass(frozen=True)
class Case:
    """What all contestants do. `rows` limits the data."""

    method: Method
    dropout: float
    data: str = "banking77"
    model: str = "minilm"
    precision: Literal["fp32", "bf16"] = "fp32"
    rows: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def directory(self) -> Path:
        from lexmill.fit import model_directory

        if self.model == "e5":
            from e5 import e5_small

            return e5_small()
        return model_directory(self.model)

    def file(self) -> Path:
        from lexmill.data import banking77

        return banking77()[0] if self.data == "banking77" else SHARED / self.data / "train.jsonl.xz"


def prepared(case: Case, window: int) -> Any:
    """Lexmill's model, task and examples, and how it trains; `window` 1 is its default order, 50 one by length."""
    from lexmill import models
    from lexmill.adapt import AdaptConfig, adapt
    from lexmill.fit import DataConfig, FitConfig
    from lexmill.fit.prepare import Subset, prepare, tokenized
    from lexmill.hardware import keep_heap
    from lexmill.train import TrainConfig

    keep_heap()
    epochs = EPOCHS if case.method == "lora-upper" else 1000
    config = TrainConfig(
        epochs=epochs, batch_size=BATCH, dropout=case.dropout, length_window=window, precision=case.precision
    )
    options = {"max_length": MAX_LENGTH}
    ready = prepare(FitConfig(DataConfig(case.file()), model=str(case.directory()), options=options, train=config))
    cache = tokenized(ready)
    model = models.load(case.directory())
    model.set_dropout(case.dropout)
    torch.manual_seed(0)
    ready.task.attach(model)
    upper = len(model.trunk.layers) // 2 if case.method == "lora-upper" else None
    adapt(model, AdaptConfig("full" if case.method == "full" else "lora", layers=upper))
    if CUDA:
        model.cuda()
    return model, ready.task, Subset(cache, np.arange(len(cache))[: case.rows]), config


def lexmill(case: Case, window: int) -> Callable[[], Mapping[str, Any]]:
    """A window of steps of Lexmill's own trainer, as `lexmill fit` runs them."""
    from lexmill.hardware import matmul_rate, peak_memory
    from lexmill.train import Trainer

    model, task, data, config = prepared(case, window)
    trainer = Trainer(model, task, data, config)
    tokens = float(trainer.data.lengths.mean())

    def turn() -> Mapping[str, Any]:
        ceiling = matmul_rate(model.matmul_shapes(), round(BATCH * tokens), dtype=case.dtype, device=model.device)
        model.train()
        start, examples, seen, positions = time.perf_counter(), 0, 0, 0.0
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
            "positions_per_token": positions / seen, "peak_memory": peak_memory(),
        }  # fmt: skip

    return turn


def kept(case: Case, window: int) -> Callable[[], Mapping[str, Any]]:
    """Four epochs on kept activations, from keeping them to the last step."""
    from lexmill.hardware import matmul_rate, peak_memory
    from lexmill.train import Trainer, keep_activations

    def turn() -> Mapping[str, Any]:
        model, task, data, config = prepared(case, window)
        rows = round(BATCH * float(data.lengths.mean()))
        ceiling = matmul_rate(model.matmul_shapes(), rows, dtype=case.dtype, device=model.device)
        layers, start = model.untrained_layers(), time.perf_counter()
        folder = Path(tempfile.gettempdir())
        with keep_activations(model, data, layers, folder, precision=config.precision) as found:
            trainer = Trainer(model, task, found, config, start=found.start)
            result = trainer.run(lambda event: None)
        seconds = time.perf_counter() - start
        return {
            "rate": len(data) * EPOCHS / seconds, "ceiling_gflops": ceiling / 1e9,
            "ceiling_share": result.ceiling_share, "positions_per_token": result.positions_per_token,
            "kept_bytes": found.start.bytes, "kept_seconds": found.start.seconds, "peak_memory": peak_memory(),
        }  # fmt: skip

    return turn


def trainer(case: Case, strategy: str, *, every_layer: bool = False) -> Callable[[], Mapping[str, Any]]:
    """A window of the Hugging Face Trainer; LoRA in every layer, if asked, where the case has it in the upper half."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers import logging as hf_logging

    from lexmill.data import open_source
    from lexmill.hardware import peak_memory

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
    tokenizer = AutoTokenizer.from_pretrained(case.directory())
    read = [row.values for row in open_source(case.file())][: case.rows]
    names = sorted({str(row["label"]) for row in read})
    encoded = tokenizer([row["text"] for row in read], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": names.index(str(row["label"]))}
        for ids, row in zip(encoded, read, strict=True)
    ]
    seed = 0

    def turn() -> Mapping[str, Any]:
        nonlocal seed
        seed += 1
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            case.directory(), num_labels=len(names),
            hidden_dropout_prob=case.dropout, attention_probs_dropout_prob=case.dropout,
        )  # fmt: skip
        if case.method != "full":
            upper = case.method == "lora-upper" and not every_layer
            model = with_lora(model, model.config.num_hidden_layers // 2 if upper else None)
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=3e-4,
                weight_decay=0.0, report_to=[], save_strategy="no", logging_steps=10_000, disable_tqdm=True,
                train_sampling_strategy=strategy, seed=seed, bf16=case.precision == "bf16", use_cpu=not CUDA,
            )  # fmt: skip
            collate = DataCollatorWithPadding(tokenizer)
            Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()  # pyright: ignore
        steps = len(clock.times) - 1
        return {"rate": BATCH * steps / (clock.times[-1] - clock.times[0]), "peak_memory": peak_memory()}

    return turn


CONTESTANTS: dict[str, Callable[[Case], Callable[[], Mapping[str, Any]]]] = {
    "lexmill": lambda case: (kept if case.method == "lora-upper" else lexmill)(case, 1),
    "lexmill, length windows": lambda case: (kept if case.method == "lora-upper" else lexmill)(case, 50),
    "hf trainer, dynamic padding": lambda case: trainer(case, "random"),
    "hf trainer, group_by_length": lambda case: trainer(case, "group_by_length"),
    "hf trainer, dynamic padding, every layer": lambda case: trainer(case, "random", every_layer=True),
    "hf trainer, group_by_length, every layer": lambda case: trainer(case, "group_by_length", every_layer=True),
}


def compare(case: Case, rounds: int) -> dict[str, Any]:
    upper = case.method == "lora-upper"
    names = [name for name in CONTESTANTS if upper or not name.endswith("every layer")]
    workers = {name: Worker(__file__, json.dumps({"name": name, "case": asdict(case)})) for name in names}
    rates = interleave(workers, rounds)
    facts = workers["lexmill"].facts
    memory = {name: worker.facts["peak_memory"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    table(rates, "examples/s")
    peers = ("hf trainer, dynamic padding", "hf trainer, group_by_length")
    alike = [ratio(rates, "lexmill", name) for name in peers]
    dynamic, grouped = [ratio(rates, "lexmill", f"{name}, every layer") for name in peers] if upper else alike
    known = LEAST.get((case.method, case.dropout)) if (case.data, case.model) == ("banking77", "minilm") else None
    least = [f" (at least {times})" if known else "" for times in known or ("", "")]
    print(
        f"{case.method}, {case.precision}, dropout {case.dropout}: {dynamic:.2f}x dynamic padding{least[0]}, "
        f"{grouped:.2f}x group_by_length{least[1]}"
        + (f" of every layer, {alike[0]:.2f}x and {alike[1]:.2f}x of the upper half" if upper else "")
        + f"; ceiling {facts['ceiling_gflops']:.0f} GFLOP/s, "
        f"share {facts['ceiling_share']:.0%}, {facts['positions_per_token']:.2f} positions a token; peak memory in MB: "
        + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items()),
        flush=True,
    )
    return {
        "examples_per_second": rates, "times_dynamic_padding": dynamic, "times_group_by_length": grouped,
        "rows": case.rows, "times_peers_alike": alike, "peak_memory_by_contestant": memory, **facts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=["full", "lora", "lora-upper"], default="full")
    parser.add_argument("--data", choices=["banking77", "waimai_10k"], default="banking77")
    parser.add_argument("--model", choices=["minilm", "e5"], default="minilm")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if CUDA else "fp32")
    parser.add_argument("--rows", type=int, help="only so many; fewer than the peer takes in a turn are not saved")
    parser.add_argument("--dropout", type=float, nargs="*", help="0 and 0.1, where not given; 0.1 alone for lora")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        asked = json.loads(given.worker)
        work(CONTESTANTS[asked["name"]](Case(**asked["case"])))
        return
    dropouts = given.dropout or [dropout for of, dropout in LEAST if of == given.method]
    cases = [Case(given.method, dropout, given.data, given.model, given.precision, given.rows) for dropout in dropouts]
    figures = {f"dropout {case.dropout}": compare(case, given.rounds) for case in cases}
    if given.rows is not None and given.rows < BATCH * STEPS:
        return
    parts = ["finetune", given.method, given.data, given.model, given.precision, "gpu" if CUDA else ""]
    save("-".join(part for part in parts if part not in ("", "full", "banking77", "minilm", "fp32")), figures)


if __name__ == "__main__":
    main()
