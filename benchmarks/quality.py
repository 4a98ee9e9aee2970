"""Test accuracy of full fine-tuning on real data: the mean over seeds, through `lexmill fit` itself."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from lexmill.config import load
from lexmill.data import banking77
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.train import TrainConfig
from measure import save

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
    return FitConfig(data, train=TrainConfig(seed=seed, dropout=dropout, epochs=3))


SETS: dict[str, tuple[Callable[[int, float | None], FitConfig], float | None]] = {
    "banking77": (bank, 0.925),
    "clinc150": (clinc, 0.95),
    "waimai_10k": (waimai, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"out of {', '.join(SETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=None, help="the model's own where not given")
    arguments = parser.parse_args()
    for name in arguments.sets:
        make, least = SETS[name]
        runs: list[dict[str, Any]] = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                result = fit(make(seed, arguments.dropout), Path(folder) / "out")
                test = result.test or {}
            runs.append(
                {"seed": seed, **{k: test[k] for k in ("accuracy", "macro_f1", "intervals")}, **result.training}
            )
            print(json.dumps(runs[-1]), flush=True)
        accuracy = mean(run["accuracy"] for run in runs)
        wanted = f" (at least {least:.1%})" if least else ""
        print(f"{name}: accuracy {accuracy:.2%}{wanted}, mean of {len(runs)} seeds", flush=True)
        save(f"quality-{name}", {"accuracy": accuracy, "runs": runs})


if __name__ == "__main__":
    main()
