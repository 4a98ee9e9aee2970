"""Answers texts with an exported model by onnxruntime and tokenizers alone: python onnx_consumer.py DIR/onnx TEXT ...

A pair of texts is written with ` ||| ` between them. One JSON object a text comes out. Lexmill is not imported.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer


def answers(folder, texts):
    told = json.loads((folder / "answers.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(told["max_length"])
    tokenizer.enable_padding()
    prefix = told.get("prefixes", {}).get("query", "")
    asked = [tuple(text.split(" ||| ")) if told["pairs"] else prefix + text for text in texts]
    found = tokenizer.encode_batch(asked)
    tokens = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    given = {name: np.array([getattr(one, tokens[name]) for one in found], np.int64) for name in told["inputs"]}
    session = InferenceSession(folder / "model.onnx")
    for name in [one.name for one in session.get_outputs()]:
        [rows] = session.run([name], given)
        if told.get("activation") == "softmax":
            rows = np.exp(rows - rows.max(-1, keepdims=True))
            rows = rows / rows.sum(-1, keepdims=True)
        elif told.get("activation") == "sigmoid":
            rows = 1 / (1 + np.exp(-rows))
        elif told.get("normalise"):
            rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        names = told.get("labels", {}).get(name)
        yield from (dict(zip(names, row.tolist(), strict=True)) if names else row.tolist() for row in rows)


for text, answer in zip(sys.argv[2:], answers(Path(sys.argv[1]), sys.argv[2:]), strict=True):
    print(json.dumps({"text": text, "answer": answer}, ensure_ascii=False))
