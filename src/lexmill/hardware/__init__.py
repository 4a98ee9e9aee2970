"""What the machine at hand can do."""

from lexmill.hardware.energy import EnergyMeter
from lexmill.hardware.heap import keep_heap
from lexmill.hardware.machine import describe, device, multiplies_fast, peak_memory
from lexmill.hardware.matmul import matmul_rate

__all__ = ["EnergyMeter", "describe", "device", "keep_heap", "matmul_rate", "multiplies_fast", "peak_memory"]
