"""Which weights of a pretrained model a run trains, and what it adds to them."""

from lexmill.adapt.config import AdaptConfig
from lexmill.adapt.methods import ADAPTER, Adapted, adapt, merge
from lexmill.adapt.peft import load_adapter, refuse_unplaced, save_adapter, take_heads, task_of
from lexmill.adapt.peft_save import save_adapted
from lexmill.adapt.shared import activate, adapter_tensors, add_adapter, rows_of, save_heads, using

__all__ = [
    "ADAPTER",
    "AdaptConfig",
    "Adapted",
    "activate",
    "adapt",
    "adapter_tensors",
    "add_adapter",
    "load_adapter",
    "merge",
    "refuse_unplaced",
    "rows_of",
    "save_adapted",
    "save_adapter",
    "save_heads",
    "take_heads",
    "task_of",
    "using",
]
