"""Which weights of a pretrained model a run trains, and what it adds to them."""

from lexmill.adapt.config import AdaptConfig
from lexmill.adapt.methods import ADAPTER, Adapted, adapt
from lexmill.adapt.peft import load_adapter, save_adapter

__all__ = ["ADAPTER", "AdaptConfig", "Adapted", "adapt", "load_adapter", "save_adapter"]
