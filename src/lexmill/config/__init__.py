"""Strict, typed, frozen configs from TOML, `--set a.b=c` and flags, and where each value came from."""

from lexmill.config.idle import refuse_idle
from lexmill.config.load import Loaded, load, read_sets
from lexmill.config.toml import to_dict, to_toml

__all__ = ["Loaded", "load", "read_sets", "refuse_idle", "to_dict", "to_toml"]
