"""Which precisions a machine multiplies."""

from pathlib import Path

import pytest
import torch

from lexmill.hardware import multiplies_fast

CPUINFO = Path("/proc/cpuinfo")


def test_full_precision_and_gpus_are_never_slow():
    assert multiplies_fast(torch.float32, torch.device("cpu"))
    assert multiplies_fast(torch.float16, torch.device("cuda"))


@pytest.mark.skipif(not CPUINFO.exists(), reason="this system does not list what its CPU can do")
def test_a_cpu_has_bfloat16_products_where_the_system_says_so():
    assert multiplies_fast(torch.bfloat16, torch.device("cpu")) == ("avx512_bf16" in CPUINFO.read_text("utf-8"))
