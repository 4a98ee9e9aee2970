"""How long `lexmill --help` takes, against a bare `python -c pass`, in turn."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from measure import save

RUNS = 15


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    bare = [sys.executable, "-c", "pass"]
    lexmill = [str(Path(sys.executable).with_name("lexmill")), "--help"]
    seconds(bare), seconds(lexmill)
    pairs = [(seconds(lexmill), seconds(bare)) for _ in range(RUNS)]
    times = median(a / b for a, b in pairs)
    ours, theirs = (median(column) * 1000 for column in zip(*pairs, strict=True))
    print(f"lexmill --help {ours:.0f} ms, python -c pass {theirs:.0f} ms: {times:.1f}x (at most 8)")
    save("startup", {"help_ms": ours, "python_ms": theirs, "times": times})


if __name__ == "__main__":
    main()
