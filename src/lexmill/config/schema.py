"""What a config dataclass allows: its keys, which of them are tables, and which name is nearest to a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Key = tuple[str, ...]
"""The path of a setting, e.g. `("train", "epochs")`."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Setting:
    """One field of a config dataclass.

    Args:
        table: the dataclass it holds, where it is a table of settings.
        open_keys: whether it is a dict, whose keys are the user's own.
        optional: whether it may be None.
        none_word: whether the word `none` spells None, TOML having no null; not where text is allowed too.
    """

    table: type[Any] | None
    open_keys: bool
    optional: bool
    none_word: bool


def quote(name: str) -> str:
    """A key as TOML writes it: bare where possible, else as a basic string."""
    if _BARE.fullmatch(name):
        return name
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'


def dotted(key: Key) -> str:
    """`("a", "b.c")` as `a."b.c"`."""
    return ".".join(map(quote, key))


@cache
def settings(cls: type[Any]) -> Mapping[str, Setting]:
    """The settings of a config dataclass, by name, in the order of their definition."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _setting(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _members(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin is Union or origin is types.UnionType:
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _setting(annotation: Any) -> Setting:
    members = list(_members(annotation))
    optional = type(None) in members
    members = [member for member in members if member is not type(None)]
    table = members[0] if len(members) == 1 and dataclasses.is_dataclass(members[0]) else None
    open_keys = any((get_origin(member) or member) in (dict, Mapping) for member in members)
    text = any("none" in get_args(member) if get_origin(member) is Literal else _is_text(member) for member in members)
    return Setting(table if isinstance(table, type) else None, open_keys, optional, optional and not text)


def _is_text(member: Any) -> bool:
    return member is Any or (isinstance(member, type) and issubclass(member, (str, Path)))


def keys(cls: type[Any], prefix: Key = ()) -> Iterator[Key]:
    """All settings of a config dataclass, each table before the settings in it."""
    for name, setting in settings(cls).items():
        yield (*prefix, name)
        if setting.table is not None:
            yield from keys(setting.table, (*prefix, name))


def nearest(cls: type[Any], wrong: Key) -> str | None:
    """The valid dotted key most like a wrong one, in the whole or in its last part; None where none is close."""

    def likeness(key: Key) -> float:
        whole = difflib.SequenceMatcher(None, dotted(wrong), dotted(key)).ratio()
        last = difflib.SequenceMatcher(None, wrong[-1], key[-1]).ratio()
        return max(whole, last) + 0.01 * whole

    best = max(keys(cls), key=likeness, default=None)
    return dotted(best) if best is not None and likeness(best) >= 0.6 else None
