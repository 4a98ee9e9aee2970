"""The machine: what it is, and how much memory this process has taken from it."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch


def describe() -> dict[str, str | int]:
    """What results depend on: bit-identity is promised only where all of this is equal."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def peak_memory() -> int:
    """The most memory this process has held, in bytes: on a GPU what torch reserved there, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
