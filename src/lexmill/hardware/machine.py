"""The machine: what it is, and how much memory this process has taken from it."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch

from lexmill.errors import UserError


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


def multiplies_fast(dtype: torch.dtype, where: torch.device) -> bool:
    """Whether this device has products of that precision; a CPU without them emulates them many times slower."""
    if where.type != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()  # pyright: ignore[reportPrivateUsage]


def peak_memory() -> int:
    """The most memory this process has held, in bytes: on a GPU what torch reserved there, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device(name: str) -> torch.device:
    """The device of this name; `auto` is the first GPU where torch can use one, else the CPU. A `UserError` where there
    is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        hint = "give auto, cpu, cuda or cuda:1"
        raise UserError(f"'{name}' is no device", where="train.device", hint=hint) from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise UserError(f"torch finds {there} GPUs here", where="train.device", hint="give auto or cpu")
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"'{name}' is not supported", where="train.device", hint="give auto, cpu, cuda or cuda:1")
    return found
