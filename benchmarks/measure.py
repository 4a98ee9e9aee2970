"""What all benchmarks share: peers take turns in one run, and a ratio is the median over those turns."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

OUT = Path(__file__).parent / "results"


class Worker:
    """A contestant in a process of its own, which keeps its threads and its memory settings from the others.

    The script is run with `--worker NAME`, and calls `work` with what one turn does, or speaks as `work` does where it
    is run by another Python.
    """

    def __init__(self, script: str, name: str, *, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, script, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._ask()

    def _ask(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("worker: "):
                return json.loads(line.removeprefix("worker: "))
        raise SystemExit(f"a contestant ended with code {self.process.wait()}")

    def __call__(self) -> float:
        """One turn; gives its rate."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.facts = self._ask()
        return float(self.facts["rate"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(turn: Callable[[], Mapping[str, Any]]) -> None:
    """The worker's side: a first turn to warm up, then one for each line that comes in."""
    print("worker: " + json.dumps(dict(turn())), flush=True)
    for _ in sys.stdin:
        print("worker: " + json.dumps(dict(turn())), flush=True)


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The rate each contestant reports, once a round, in turn; the order turns about from round to round."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(contestants)
        for name in names if turn % 2 == 0 else reversed(names):
            rates[name].append(contestants[name]())
            print(f"  round {turn + 1}/{rounds}: {name:44s} {rates[name][-1]:8.1f}/s", flush=True)
    return rates


def ratio(rates: Mapping[str, list[float]], ours: str, peer: str) -> float:
    """How many times faster `ours` is: the median of the ratios of each round."""
    return median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))


def table(rates: Mapping[str, list[float]], unit: str) -> None:
    for name, values in rates.items():
        print(f"{name:46s} {median(values):8.1f} {unit} (from {min(values):.1f} to {max(values):.1f})")


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str, content: Mapping[str, Any]) -> None:
    """Keep the figures of this run beside the benchmarks, where the documents take them from."""
    OUT.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **content}, indent=2, ensure_ascii=False)
    (OUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")
