"""Strict, typed, frozen configs from TOML, `--set a.b=c` and flags, and where each value came from."""

from lexmill.config.load import Loaded, load
from lexmill.config.toml import to_dict, to_toml

__all__ = ["Loaded", "load", "to_dict", "to_toml"]
