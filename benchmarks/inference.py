"""Classifying 1,024 BANKING77 test questions, tokenizing included, at fp32: Lexmill, ONNX Runtime, Hugging Face.

All run the same weights (MiniLM-L6 with a new head of 77 classes) and must give the same logits. A round is one pass
over all texts by each contestant in turn; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers import logging as hf_logging

import onnx_peer
from lexmill import models
from lexmill.data import banking77, open_source
from lexmill.data.tokenizer import load_tokenizer
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.fit import model_directory
from lexmill.hardware import keep_heap
from lexmill.tasks import Classify
from lexmill.tasks.classify import ClassifyOptions
from measure import interleave, ratio, save, table

COUNT = 1024


def timed(answer: Callable[[list[str]], Any], texts: list[str]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        answer(texts)
        return len(texts) / (time.perf_counter() - start)

    return run


def ours(folder: Path) -> TorchEngine:
    """An engine on MiniLM with a new head; its weights are saved for the peers."""
    rows = [row.values for row in open_source(banking77()[0])]
    task = Classify.from_records(rows, {"text": "text", "label": "label"}, ClassifyOptions())
    directory = model_directory("minilm")
    model, tokenizer = models.load(directory), load_tokenizer(directory)
    torch.manual_seed(0)
    task.attach(model)
    models.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return TorchEngine(Loaded(task, model, tokenizer))


def onnx(folder: Path, model: Any, batch: int) -> Callable[[list[str]], np.ndarray]:
    """ONNX Runtime on batches of texts sorted by length."""
    file = folder / "model.onnx"
    if not file.exists():
        onnx_peer.write(model, file)
    return onnx_peer.answers(onnx_peer.session(file), Tokenizer.from_file(str(folder / "tokenizer.json")), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    hf_logging.set_verbosity_error()
    keep_heap()
    texts = [row.values["text"] for row in open_source(banking77()[1])]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:COUNT]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = ours(folder)
        hf = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        asked = pipeline(
            "text-classification",
            model=hf,
            tokenizer=AutoTokenizer.from_pretrained(model_directory("minilm")),
            device="cpu",
        )

        def lexmill(some: list[str]) -> list[Any]:
            return engine.run([Request({"text": text}) for text in some])

        small, large = onnx(folder, hf, 16), onnx(folder, hf, 32)
        logits = np.stack([answer["label"] for answer in lexmill(texts)])
        worst = float(np.abs(small(texts) - logits).max() / np.abs(logits).max())
        print(f"largest relative difference to ONNX Runtime: {worst:.1e}")
        assert worst < 1e-5
        contestants = {
            "lexmill": timed(lexmill, texts),
            "onnx runtime fp32, sorted, 16 a batch": timed(small, texts),
            "onnx runtime fp32, sorted, 32 a batch": timed(large, texts),
            "hf pipeline, 32 a batch": timed(lambda some: asked(some, batch_size=32), texts),
        }
        for run in contestants.values():
            run()
        rates = interleave(contestants, rounds)
        table(rates, "texts/s")
        runtime = min(ratio(rates, "lexmill", name) for name in rates if name.startswith("onnx"))
        hugging = ratio(rates, "lexmill", "hf pipeline, 32 a batch")
        print(
            f"{hugging:.2f}x the HF pipeline (at least 3.4), {runtime:.2f}x ONNX Runtime's better batch (at least 1.0)"
        )
        single = {
            "lexmill": timed(lambda some: [lexmill([one]) for one in some], texts[:200]),
            "onnx runtime fp32": timed(lambda some: [small([one]) for one in some], texts[:200]),
        }
        for run in single.values():
            run()
        alone = interleave(single, 3)
        print({name: f"{1000 / float(np.median(rate)):.2f} ms a text" for name, rate in alone.items()})
    save(
        "inference",
        {
            "texts_per_second": rates,
            "times_hf_pipeline": hugging,
            "times_onnx_runtime": runtime,
            "one_text_per_second": alone,
            "largest_difference": worst,
        },
    )


if __name__ == "__main__":
    main()
