"""Strict, typed, frozen configs from TOML, `--set a.b=c` and flags, and where each value came from."""

from lexmill.config.load import Loaded, load, read_sets
from lexmill.config.toml import to_dict, to_toml

__all__ = ["Loaded", "load", "read_sets", "to_dict", "to_toml"]
