"""A classifier compressed by `lexmill compress`, against the int8 models that other toolkits make of the same source.

    python benchmarks/compress.py banking77 [--source runs/bank] [--toolkit inc=ENV/bin/python …]

The source is fitted by the set's recipe unless it is given, and compressed by the chain below, with the proof on the
test rows. Then all contestants, each in a process of its own, take turns: a stream of texts, tokenizing included, and
texts one by one. `int8_peers.py` says what other toolkits need; those that are not given are left out, ONNX Runtime's
own dynamic quantisation excepted. All peers are compared on accuracy too, on all test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from lexmill.compress import CompressConfig, compress, read_step
from lexmill.data import open_source
from lexmill.fit import FitConfig, fit
from lexmill.metrics import paired_mean
from measure import Worker, interleave, ratio, save, work
from quality import SETS

CHAINS: Mapping[str, Sequence[str]] = {
    "banking77": ("vocabulary", "distil,layers=2,recovery.epochs=18", "int8"),
    "twitter_fin_sentiment": ("vocabulary", "distil,layers=3", "int8"),
    "waimai_10k": ("vocabulary,min_count=2", "distil,layers=4,recovery.epochs=18", "int8"),
}
STREAM, ALONE, BATCHES = 1024, 100, (16, 32)
HERE, RUNS = Path(__file__).parent, Path(__file__).resolve().parents[1] / "runs"


# --- contestants ----------------------------------------------------------------------------------------------------
def lexmill(folder: Path, _: int) -> tuple[Callable[[list[str]], Sequence[int]], int]:
    from lexmill.artifact import Artifact
    from lexmill.engine import Request, TorchEngine, load

    engine = TorchEngine(load(Artifact.open(folder)))
    text = engine.task.columns["text"]

    def run(texts: list[str]) -> Sequence[int]:
        answers = engine.run([Request({text: one}) for one in texts])
        return [int(np.argmax(one["label"])) for one in answers]

    return run, _bytes(folder, "model.safetensors", "tokenizer.json")


def onnx(folder: Path, batch: int) -> tuple[Callable[[list[str]], Sequence[int]], int]:
    from tokenizers import Tokenizer

    import onnx_peer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ask = onnx_peer.answers(onnx_peer.session(folder / "model.onnx"), tokenizer, batch)
    return lambda texts: ask(texts).argmax(-1).tolist(), _bytes(
        folder, "model.onnx", "model.onnx_data", "tokenizer.json"
    )


def pipeline(folder: Path, batch: int) -> tuple[Callable[[list[str]], Sequence[int]], int]:
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def run(texts: list[str]) -> Sequence[int]:
        return [model.config.label2id[one["label"]] for one in asked(texts, batch_size=batch, truncation=True)]

    return run, _bytes(folder, "model.safetensors", "tokenizer.json")


KINDS = {one.__name__: one for one in (lexmill, onnx, pipeline)}


def _bytes(folder: Path, *files: str) -> int:
    return sum((folder / name).stat().st_size for name in files if (folder / name).exists())


def contest(name: str) -> None:
    """The worker's side. `name` is `KIND BATCH FOLDER TEXTS`: a file of texts, beside which the answers are put."""
    kind, batch, folder, file = json.loads(name)
    texts: list[str] = json.loads(Path(file).read_text())
    run, size = KINDS[kind](Path(folder), batch)
    answers = Path(file).with_name(f"answers-{Path(folder).name}-{batch}.json")
    answers.write_text(json.dumps(list(run(texts))))
    some = texts[:STREAM]

    def turn() -> dict[str, Any]:
        began = time.perf_counter()
        run(some)
        rate = len(some) / (time.perf_counter() - began)
        times: list[float] = []
        for one in some[:ALONE]:
            began = time.perf_counter()
            run([one])
            times.append(1000 * (time.perf_counter() - began))
        p50, p99 = np.quantile(times, (0.5, 0.99))
        return {"rate": rate, "p50_ms": p50, "p99_ms": p99, "bytes": size, "answers": str(answers)}

    work(turn)


# --- models -----------------------------------------------------------------------------------------------------------
def fitted(name: str) -> Path:
    out = RUNS / f"benchmark-{name}"
    if not out.exists():
        config: FitConfig = SETS[name][0](0, None)
        fit(replace(config, train=replace(config.train, precision="bf16")), out)
    return out


def compressed(source: Path, chain: Sequence[str]) -> Path:
    out = RUNS / f"{source.name}-{'-'.join(one.replace(',', '-') for one in chain)}"
    if not out.exists():
        compress(source, out, CompressConfig(steps=tuple(read_step(one) for one in chain)))
    return out


def peers(source: Path, toolkits: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the ONNX models that toolkits make."""
    from transformers import AutoModelForSequenceClassification

    import onnx_peer

    plain = RUNS / f"{source.name}-onnx"
    if not plain.exists():
        plain.mkdir(parents=True)
        onnx_peer.write(AutoModelForSequenceClassification.from_pretrained(source).eval(), plain / "model.onnx")
        for file in ("tokenizer.json", "config.json"):
            (plain / file).write_bytes((source / file).read_bytes())
    made = {"onnx runtime fp32": plain}
    for toolkit, python in {"onnxruntime": sys.executable, **toolkits}.items():
        folder = RUNS / f"{source.name}-{toolkit}"
        if not (folder / "model.onnx").exists():
            folder.mkdir(exist_ok=True)
            given = source if toolkit == "optimum" else plain / "model.onnx"
            subprocess.run([python, str(HERE / "int8_peers.py"), toolkit, str(given), str(folder)], check=True)
            (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        made[f"{toolkit} int8"] = folder
    return made


# --- figures ----------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(CHAINS))
    parser.add_argument("--source", type=Path, help="an artefact that was fitted on this set")
    parser.add_argument("--step", action="append", help="in place of the set's chain")
    parser.add_argument("--compressed", type=Path, help="an artefact that was compressed already")
    parser.add_argument("--toolkit", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source = (arguments.source or fitted(arguments.set)).resolve()
    small = (arguments.compressed or compressed(source, arguments.step or CHAINS[arguments.set])).resolve()
    given = dict(one.split("=", 1) for one in arguments.toolkit)
    config: FitConfig = SETS[arguments.set][0](0, None)
    assert config.data.test is not None
    rows = [row.values for row in open_source(config.data.test)]
    task = json.loads((source / "manifest.json").read_text())["task"]["state"]
    text, label, labels = task["columns"]["text"], task["columns"]["label"], task["heads"][0]["labels"]
    order = np.random.default_rng(0).permutation(len(rows))
    file = RUNS / f"{source.name}-texts" / "texts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([rows[i][text] for i in order]))
    gold = np.array([labels.index(str(rows[i][label])) for i in order])
    contestants = {
        "lexmill compressed": ("lexmill", 0, small),
        "lexmill fp32": ("lexmill", 0, source),
        **{
            f"{name}, {batch} a batch": ("onnx", batch, folder)
            for name, folder in peers(source, given).items()
            for batch in BATCHES
        },
        "hf pipeline fp32": ("pipeline", 32, source),
    }
    started = {
        name: Worker(__file__, json.dumps([kind, batch, str(folder), str(file)]))
        for name, (kind, batch, folder) in contestants.items()
    }
    p50: dict[str, list[float]] = {name: [] for name in started}

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            rate = started[name]()
            p50[name].append(started[name].facts["p50_ms"])
            return rate

        return run

    rates = interleave({name: turn(name) for name in started}, arguments.rounds)
    right = {
        name: np.array(json.loads(Path(one.facts["answers"]).read_text())) == gold for name, one in started.items()
    }
    figures: dict[str, Any] = {}
    for name, one in started.items():
        lost = paired_mean(right[name].astype(np.float64), right["hf pipeline fp32"].astype(np.float64))
        figures[name] = {
            "accuracy": float(right[name].mean()),
            "lost": lost.value,
            "lost_interval": list(lost.interval),
            "megabytes": one.facts["bytes"] / 1e6,
            "p50_ms": float(np.median(p50[name])),
            "texts_per_second": float(np.median(rates[name])),
            "times_hf_pipeline": ratio(rates, name, "hf pipeline fp32"),
            "rates": rates[name],
        }
        one.close()
    print(f"{'':42s} accuracy  lost (95 %)             MB   p50 ms  texts/s  x HF")
    for name, one in figures.items():
        low, high = one["lost_interval"]
        print(
            f"{name:42s} {one['accuracy']:8.2%} {one['lost']:+.4f} ({low:+.4f} {high:+.4f}) {one['megabytes']:6.1f} "
            f"{one['p50_ms']:7.2f} {one['texts_per_second']:8.0f} {one['times_hf_pipeline']:5.2f}"
        )
    int8 = min(ratio(rates, "lexmill compressed", name) for name in rates if name.startswith("onnxruntime int8"))
    theirs = min(one["p50_ms"] for name, one in figures.items() if name.startswith("onnx runtime fp32"))
    alone = figures["lexmill compressed"]["p50_ms"] / theirs
    print(f"{int8:.2f}x ONNX Runtime's own int8; one text alone in {alone:.2f} of ONNX Runtime fp32's time")
    found = {"times_onnx_int8": int8, "alone_of_onnx_fp32": alone, "contestants": figures}
    save(f"compress-{arguments.set}", {"chain": small.name, **found})


if __name__ == "__main__":
    if "--worker" in sys.argv:
        contest(sys.argv[sys.argv.index("--worker") + 1])
    else:
        main()
