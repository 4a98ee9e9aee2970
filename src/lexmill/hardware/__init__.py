"""What the machine at hand can do."""

from lexmill.hardware.heap import keep_heap
from lexmill.hardware.machine import describe, peak_memory
from lexmill.hardware.matmul import matmul_rate

__all__ = ["describe", "keep_heap", "matmul_rate", "peak_memory"]
