"""TOML in, with the line of every key, and out again (TOML 1.0.0)."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from enum import Enum
from pathlib import Path
from typing import Any

from lexmill.config.schema import Key, quote, settings
from lexmill.errors import UserError

_ERROR = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column \d+|end of document)\)", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A parsed file; `lines` has the 1-based line of each table and value written in it."""

    file: Path
    values: dict[str, Any]
    lines: Mapping[Key, int]

    def place(self, key: Key) -> str:
        """`file:line` of a key, or of the nearest table around it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.file}:{self.lines[key]}" if key else str(self.file)


def read(file: Path) -> Document:
    """Parse a TOML file. Raises `UserError` with `file:line` where it is not TOML."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{file}:{line}", hint="TOML files are UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", where=str(file)) from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _ERROR.fullmatch(str(error))
        what = found["what"] if found else str(error)
        line = int(found["line"]) if found and found["line"] else max(1, len(text.splitlines()))
        raise UserError(f"not valid TOML: {what}", where=f"{file}:{line}") from error
    lines: dict[Key, int] = {}
    for key, line in _lines(text):
        lines.setdefault(key, line)
    return Document(file, values, lines)


def _lines(text: str) -> Iterator[tuple[Key, int]]:
    """Each key with its line. `tomllib` keeps no positions, so every statement is parsed once more on its own: it ends
    at the first line at which it parses, since the beginning of a value of several lines never does."""
    lines = text.replace("\r\n", "\n").split("\n")
    header: Key = ()
    counts: dict[Key, int] = {}
    start = 0
    while start < len(lines):
        end = start + 1
        while (parsed := _parse("\n".join(lines[start:end]))) is None and end < len(lines):
            end += 1
        if lines[start].lstrip().startswith("["):
            header = next(_paths(parsed))
            if lines[start].lstrip().startswith("[["):
                counts[header] = counts.get(header, -1) + 1
                yield header, start + 1
                header = (*header, str(counts[header]))
            yield header, start + 1
        else:
            for key in _paths(parsed):
                yield (*header, *key), start + 1
        start = end


def _parse(statement: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return None


def _paths(value: object) -> Iterator[Key]:
    """Paths to all values below a table, the innermost first."""
    if isinstance(value, dict):
        for name, inner in value.items():
            for key in _paths(inner):
                yield (name, *key)
            yield (name,)


def scalar(text: str) -> Any:
    """What stands right of `=` in `--set a.b=text`: a TOML value, or else the text itself as a string.

    Raises `UserError` where the text begins like a string, list or table but is not one.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("'", '"', "[", "{"):
            raise UserError(f"'{text}' is not a TOML value", hint="quote text as '\"text\"'") from error
        return text
    return parsed["value"] if len(parsed) == 1 else text


def split_key(text: str) -> Key:
    """`a."b.c"` as `("a", "b.c")`; a ValueError where it is not a TOML key."""
    if "\n" in text or "=" in text or not text.strip():
        raise ValueError(text)
    parsed: Any = tomllib.loads(f"{text} = 0")
    key: list[str] = []
    while isinstance(parsed, dict):
        (name, parsed), *_ = parsed.items()
        key.append(name)
    return tuple(key)


def plain(value: Any) -> Any:
    """A value as JSON knows it: paths as text, tuples as lists, enums by value, dataclasses as objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON, to be stored and given to `load(stored=…)` again."""
    return {name: plain(getattr(config, name)) for name in settings(type(config))}


def to_toml(config: Any) -> str:
    """A config as TOML, every setting written out; `load(file=…)` of it gives an equal config."""
    return "\n".join(_table(type(config), to_dict(config), ())).strip() + "\n"


def _table(cls: type[Any], values: Mapping[str, Any], path: Key) -> Iterator[str]:
    rows: list[str] = []
    tables: list[str] = []
    for name, setting in settings(cls).items():
        value = values[name]
        if value is None:
            if setting.none_word:
                rows.append(f'{quote(name)} = "none"')
            elif _default(cls, name) is not None:
                raise TypeError(f"{cls.__name__}.{name} is None, which TOML cannot say: make None its default")
        elif setting.table is not None:
            tables += ["", *_table(setting.table, value, (*path, name))]
        else:
            rows.append(f"{quote(name)} = {_value(value)}")
    if path and (rows or not tables):
        yield f"[{'.'.join(map(quote, path))}]"
    yield from rows
    yield from tables


def _default(cls: type[Any], name: str) -> Any:
    field = cls.__dataclass_fields__[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return "[" + ", ".join(map(_value, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{quote(name)} = {_value(inner)}" for name, inner in value.items()) + "}"
        case _:
            raise TypeError(f"TOML has no value like {value!r}")
