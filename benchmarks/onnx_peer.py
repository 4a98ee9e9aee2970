"""ONNX Runtime as a peer: a Hugging Face model written by torch's exporter, and asked on batches of sorted texts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer


def write(model: Any, file: Path) -> None:
    """Write a classifier with rows and columns of any number."""
    rows, columns = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("columns", min=2, max=512)
    shape = {0: rows, 1: columns}
    ids, mask = torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.int64)
    torch.onnx.export(
        model, (ids, mask), file, dynamo=True, opset_version=20, external_data=False, verbose=False,
        input_names=["input_ids", "attention_mask"],
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
    )  # fmt: skip


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def answers(
    asked: onnxruntime.InferenceSession, tokenizer: Tokenizer, batch: int, max_length: int = 128
) -> Callable[[list[str]], np.ndarray]:
    """What gives texts' logits `[text, class]`, from batches of texts of about equal length."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    names = {one.name for one in asked.get_inputs()}

    def run(texts: list[str]) -> np.ndarray:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            width = len(ids[part[-1]])
            padded, mask = np.zeros((2, len(part), width), np.int64)
            for row, i in enumerate(part):
                padded[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
            given = {"input_ids": padded, "attention_mask": mask, "token_type_ids": np.zeros_like(padded)}
            logits = asked.run(None, {name: one for name, one in given.items() if name in names})[0]
            found.update(zip(part, logits, strict=True))
        return np.stack([found[i] for i in range(len(ids))])

    return run
