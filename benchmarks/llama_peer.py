"""llama.cpp as a peer, in the Python that has `llama-cpp-python`: `weight_only.py` starts it.

It reads one line of JSON, quantises a GGUF file where that was not done before, says its perplexity or decodes once,
and then once more for each further line.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantised(source: str, out: str, number: int) -> None:
    if Path(out).exists():
        return
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize, wanted.nthread = number, True, 2
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(wanted)):
        raise SystemExit(f"could not write {out}")


def opened(file: str, *, every: bool) -> Any:
    sizes = {"n_ctx": 640, "n_batch": 640, "n_threads": 2, "n_threads_batch": 2}
    return llama_cpp.Llama(file, **sizes, logits_all=every, verbose=False)


def perplexity(file: str, windows: list[list[int]]) -> float:
    model, total, count = opened(file, every=True), 0.0, 0
    for ids in windows:
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids) - 1], np.float64)
        top = logits.max(1)
        chosen = logits[np.arange(len(logits)), ids[1:]]
        total += float((np.log(np.exp(logits - top[:, None]).sum(1)) + top - chosen).sum())
        count += len(logits)
    return math.exp(total / count)


def rate(model: Any, ids: list[int], tokens: int) -> float:
    """New tokens a second, the prompt included."""
    start = time.perf_counter()
    model.reset()
    model.eval(ids)
    for _ in range(tokens - 1):
        model.eval([model.sample(temp=0.0)])
    model.sample(temp=0.0)
    return tokens / (time.perf_counter() - start)


def say(facts: dict[str, Any]) -> None:
    print("worker: " + json.dumps(facts), flush=True)


def main() -> None:
    asked = json.loads(sys.argv[-1])
    quantised(asked["source"], asked["out"], asked["number"])
    if "windows" in asked:
        size = Path(asked["out"]).stat().st_size
        say({"perplexity": perplexity(asked["out"], asked["windows"]), "bytes": size})
        return
    model = opened(asked["out"], every=False)
    say({"rate": rate(model, asked["ids"], asked["tokens"])})
    for _ in sys.stdin:
        say({"rate": rate(model, asked["ids"], asked["tokens"])})


if __name__ == "__main__":
    main()
