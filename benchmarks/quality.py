"""Test accuracy of full fine-tuning on real data: the mean over seeds, through `lexmill fit` itself.

With `--peer` the Hugging Face Trainer or sentence-transformers runs the same recipe on the same seeds after it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from e5 import e5_small
from lexmill.adapt import AdaptConfig
from lexmill.config import load
from lexmill.data import banking77
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.train import TrainConfig
from measure import save
from peers import OF_TASK

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def bank(seed: int, dropout: float | None) -> FitConfig:
    recipe = load(FitConfig, file=RECIPES / "banking77.toml").value
    train, test = banking77()
    return replace(recipe, data=DataConfig(train, test=test), train=replace(recipe.train, seed=seed, dropout=dropout))


def clinc(seed: int, dropout: float | None) -> FitConfig:
    folder = SHARED / "clinc150"
    data = DataConfig(folder / "train.jsonl.xz", test=folder / "test.jsonl.xz")
    return FitConfig(data, train=TrainConfig(seed=seed, dropout=dropout, epochs=5))


def waimai(seed: int, dropout: float | None) -> FitConfig:
    folder = SHARED / "waimai_10k"
    data = DataConfig(folder / "train.jsonl.xz", test=folder / "test.jsonl.xz")
    train = TrainConfig(seed=seed, dropout=dropout, epochs=3, learning_rate=1e-4, warmup=0.1)
    return FitConfig(data, model=str(e5_small()), train=train)


def by_lora(
    make: Callable[[int, float | None], FitConfig], *, epochs: int, upper: int | None = None
) -> Callable[[int, float | None], FitConfig]:
    """The same with low-rank matrices at queries and values, r = 8, in every layer or in so many upper ones."""

    def made(seed: int, dropout: float | None) -> FitConfig:
        config = make(seed, dropout)
        train = replace(config.train, epochs=epochs, learning_rate=2e-3)
        return replace(config, adapt=AdaptConfig("lora", layers=upper), train=train)

    return made


def of_recipe(name: str, *, e5: bool = False) -> Callable[[int, float | None], FitConfig]:
    """The recipe of this name, its data found beside this repository, with multilingual-e5-small where `e5`."""

    def make(seed: int, dropout: float | None) -> FitConfig:
        recipe = load(FitConfig, file=RECIPES / f"{name}.toml").value
        root = RECIPES.parent
        data = {part: getattr(recipe.data, part) for part in ("train", "validation", "test")}
        found = replace(recipe.data, **{part: path and (root / path).resolve() for part, path in data.items()})
        model = str(e5_small()) if e5 else recipe.model
        return replace(recipe, data=found, model=model, train=replace(recipe.train, seed=seed, dropout=dropout))

    return make


def clinc_oos(seed: int, dropout: float | None) -> FitConfig:
    """In-scope and out-of-scope rows put one after the other, as the recipe says."""
    for part in ("val", "test"):
        joined = RECIPES.parent / "runs" / f"clinc150-{part}.jsonl.xz"
        joined.parent.mkdir(exist_ok=True)
        files = [SHARED / "clinc150" / f"{kind}{part}.jsonl.xz" for kind in ("", "oos_")]
        joined.write_bytes(b"".join(file.read_bytes() for file in files))
    return of_recipe("clinc150_oos")(seed, dropout)


SETS: dict[str, tuple[Callable[[int, float | None], FitConfig], float | None]] = {
    "banking77": (bank, 0.925),
    "clinc150": (clinc, 0.95),
    "waimai_10k": (waimai, None),
    "clinc150_oos": (clinc_oos, None),
    "sst2": (of_recipe("sst2"), None),
    "trec": (of_recipe("trec"), None),
    "twitter_fin_sentiment": (of_recipe("twitter_fin_sentiment"), None),
    "chnsenticorp": (of_recipe("chnsenticorp", e5=True), None),
    "finfe": (of_recipe("finfe", e5=True), None),
    "stsb": (of_recipe("stsb"), None),
    "policyqa": (of_recipe("policyqa"), None),
    "cmrc2018": (of_recipe("cmrc2018", e5=True), None),
    "wnut17": (of_recipe("wnut17"), None),
    "banking77_lora": (by_lora(bank, epochs=4), None),
    "banking77_lora_upper": (by_lora(bank, epochs=4, upper=3), None),
    "waimai_10k_lora": (by_lora(waimai, epochs=3), None),
    "waimai_10k_lora_upper": (by_lora(waimai, epochs=3, upper=6), None),
    "cluener2020": (of_recipe("cluener2020", e5=True), None),
}


def alone(config: FitConfig) -> dict[str, float]:
    """The peer's run in a process of its own: what this one's training took would leave it too little memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(OF_TASK[config.task], config).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"out of {', '.join(SETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=None, help="the model's own where not given")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--peer", action="store_true", help=f"run the peer too; of {', '.join(OF_TASK)}")
    arguments = parser.parse_args()
    for name in arguments.sets:
        make, least = SETS[name]
        runs: list[dict[str, Any]] = []
        theirs: list[dict[str, float]] = []
        for seed in range(arguments.seeds):
            config = make(seed, arguments.dropout)
            epochs = arguments.epochs or config.train.epochs
            config = replace(config, train=replace(config.train, epochs=epochs, precision=arguments.precision))
            with tempfile.TemporaryDirectory() as folder:
                result = fit(config, Path(folder) / "out")
                test = result.test or {}
            runs.append(
                {"seed": seed, **{k: v for k, v in test.items() if k not in ("tables", "rows")}, **result.training}
            )
            print(json.dumps(runs[-1]), flush=True)
            if arguments.peer:
                theirs.append(alone(config))
                print(f"peer: {json.dumps(theirs[-1])}", flush=True)
        metric = next(name for name in ("accuracy", "spearman", "f1") if name in runs[0])
        value = mean(run[metric] for run in runs)
        wanted = f" (at least {least:.1%})" if least else ""
        print(f"{name}: {metric} {value:.2%}{wanted}, mean of {len(runs)} seeds", flush=True)
        figures: dict[str, Any] = {metric: value, "runs": runs}
        if theirs:
            figures |= {"peer": mean(run[metric] for run in theirs), "peer_runs": theirs}
            print(f"{name}: the peer's {metric} {figures['peer']:.2%}", flush=True)
        save(f"quality-{name}" + ("" if arguments.precision == "fp32" else f"-{arguments.precision}"), figures)


if __name__ == "__main__":
    main()
