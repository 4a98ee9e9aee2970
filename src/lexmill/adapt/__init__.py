"""Which weights of a pretrained model a run trains, and what it adds to them."""

from lexmill.adapt.config import AdaptConfig
from lexmill.adapt.methods import ADAPTER, Adapted, adapt
from lexmill.adapt.peft import load_adapter, save_adapter
from lexmill.adapt.peft_save import save_adapted

__all__ = ["ADAPTER", "AdaptConfig", "Adapted", "adapt", "load_adapter", "save_adapted", "save_adapter"]
