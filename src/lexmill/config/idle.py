"""Keys that do something only where another key has a certain value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lexmill.errors import UserError

Needs = Mapping[str, tuple[str, tuple[Any, ...]]]
"""By key: the other key, and its values with which this one does something."""


def refuse_idle(config: Any, table: str, needs: Needs) -> None:
    """Raise a `UserError` for a key of a config that is not at its default and cannot do anything.

    Args:
        table: the name of the config's table, for errors.
    """
    for one in fields(config):
        if one.name not in needs or getattr(config, one.name) == one.default:
            continue
        other, values = needs[one.name]
        if getattr(config, other) not in values:
            now, able = getattr(config, other), " or ".join(f"{value}" for value in values)
            told = f"it does nothing where {table}.{other} is {'not given' if now is None else now}"
            raise UserError(told, where=f"{table}.{one.name}", hint=f"leave it out, or set {table}.{other} to {able}")
