"""One config from many places: defaults < stored config < TOML file < flags and `--set`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from lexmill.config.schema import Key, Setting, dotted, nearest, settings
from lexmill.config.toml import plain, read, scalar, split_key
from lexmill.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

C = TypeVar("C")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A config and where its values came from.

    Args:
        value: the config.
        origins: per dotted key, `default`, `stored`, `recipe.toml:12`, `--set` or the flag, e.g. `--epochs`.
    """

    value: C
    origins: dict[str, str]


def load(
    cls: type[C],
    *,
    stored: Mapping[str, Any] | None = None,
    file: Path | None = None,
    sets: Sequence[str] | Mapping[str, Any] = (),
    flags: Mapping[str, Any] | None = None,
) -> Loaded[C]:
    """Compose and check one config.

    Types are strict (no text for a number, no number for text; only an int may stand for a float), and
    `Annotated[int, Ge(1)]` bounds hold. A dict is replaced as a whole by a later source, except that
    `--set field.key=value` changes one key of it. `none` spells None for settings that may be None and hold no text.

    Args:
        cls: a frozen dataclass; its fields may be dataclasses, or dataclasses or None.
        stored: what `to_dict` gave for an earlier config.
        file: a TOML file.
        sets: `a.b=c`, as given to `--set`, where `c` is a TOML value or a bare word; or values by dotted key.
        flags: by dotted key, e.g. `{"train.epochs": 3}`; None means that the flag was not given.

    Raises:
        UserError: for an unknown key, a wrong type, a value out of range, a required setting that nothing sets, or
            a key given twice on the command line. It names the place, the key, what was given, what would be right.
    """
    draft = _Draft(cls)
    if stored is not None:
        draft.put_table(stored, lambda _: "stored")
    if file is not None:
        document = read(file)
        draft.put_table(document.values, document.place)
    for key, value, origin in _command_line(sets, flags or {}):
        draft.put(key, value, lambda _, origin=origin: origin)
    value = cast(C, draft.build())
    return Loaded(value, {dotted(key): origin for key, origin in draft.origins.items()})


def read_sets(sets: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What `--set` says, by dotted key; see `load`. Raises `UserError` for a text that is no `KEY=VALUE`, and for a key
    given twice."""
    return {dotted(key): value for key, value, _ in _command_line(sets, {})}


def _command_line(sets: Sequence[str] | Mapping[str, Any], flags: Mapping[str, Any]) -> list[tuple[Key, Any, str]]:
    given: list[tuple[Key, Any, str]] = []
    for key, value in flags.items():
        if value is not None:
            path = tuple(key.split("."))
            given.append((path, plain(value), f"--{path[-1].replace('_', '-')}"))
    if isinstance(sets, Mapping):
        given += [(_parse_key(name, f"--set {name}"), plain(value), "--set") for name, value in sets.items()]
    else:
        given += [_parse_set(text) for text in sets]
    for i, (key, _, origin) in enumerate(given):
        for earlier, _, other in given[:i]:
            if key[: len(earlier)] == earlier or earlier[: len(key)] == key:
                raise UserError(
                    f"'{dotted(max(key, earlier, key=len))}' is given twice, by {other} and by {origin}",
                    where="command line",
                    hint="give it once",
                )
    return given


def _parse_set(text: str) -> tuple[Key, Any, str]:
    name, equals, value = text.partition("=")
    where = f"--set {text}"
    if not equals:
        raise UserError("no '=' in it", where=where, hint="write --set train.epochs=3")
    key = _parse_key(name, where)
    try:
        return key, plain(scalar(value.strip())), "--set"
    except UserError as error:
        raise UserError(error.message, where=where, hint=error.hint) from error


def _parse_key(name: str, where: str) -> Key:
    try:
        return split_key(name.strip())
    except ValueError as error:
        raise UserError(f"'{name}' is not a key", where=where, hint="write --set train.epochs=3") from error


class _Draft:
    """Values on their way to becoming a config, each with its origin."""

    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls
        self.origins: dict[Key, str] = {}
        self.values = self._defaults(cls, ())

    def _defaults(self, cls: type[Any], at: Key) -> dict[str, Any]:
        """The defaults of a table. What must be given stays absent; a required table gets its own defaults."""
        values: dict[str, Any] = {}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, setting in settings(cls).items():
            field, key = fields[name], (*at, name)
            if field.default is not dataclasses.MISSING:
                values[name] = plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                values[name] = plain(field.default_factory())
            elif setting.table is not None and not setting.optional:
                values[name] = self._defaults(setting.table, key)
                continue
            self._mark(key, setting, values.get(name), lambda _: "default")
        return values

    def _mark(self, key: Key, setting: Setting, value: Any, origin: Callable[[Key], str]) -> None:
        """Note the origin of a value, and of each setting in it where it is a table."""
        for old in [old for old in self.origins if old[: len(key)] == key]:
            del self.origins[old]
        if setting.table is not None and isinstance(value, dict):
            for name, inner in settings(setting.table).items():
                self._mark((*key, name), inner, cast("dict[str, Any]", value).get(name), origin)
        else:
            self.origins[key] = origin(key)

    def put_table(self, table: Mapping[str, Any], origin: Callable[[Key], str], at: Key = ()) -> None:
        for name, value in table.items():
            self.put((*at, name), plain(value), origin)

    def put(self, key: Key, value: Any, origin: Callable[[Key], str]) -> None:
        """Set one key, or all keys of a table."""
        cls, values = self.cls, self.values
        for depth, name in enumerate(key):
            setting = settings(cls).get(name)
            here, rest = key[: depth + 1], key[depth + 1 :]
            if setting is None or (rest and setting.table is None and not setting.open_keys):
                raise self._unknown(key, origin)
            if not rest:
                self._assign(values, here, setting, value, origin)
            elif setting.table is None:
                values[name] = _with_key(values.get(name), rest, value)
                self.origins[here] = origin(key)
                return
            else:
                if values.get(name) is None:
                    del self.origins[here]
                    values[name] = self._defaults(setting.table, here)
                cls, values = setting.table, values[name]

    def _assign(
        self, values: dict[str, Any], key: Key, setting: Setting, value: Any, origin: Callable[[Key], str]
    ) -> None:
        name = key[-1]
        if value == "none" and setting.none_word:
            value = None
        if setting.table is not None and isinstance(value, dict):
            if values.get(name) is None:
                self._mark(key, setting, values.get(name), origin)
                del self.origins[key]
                values[name] = self._defaults(setting.table, key)
            self.put_table(cast("dict[str, Any]", value), origin, key)
            return
        if setting.table is not None and not (value is None and setting.optional):
            hint = f"it holds: {', '.join(map(dotted, _siblings(self.cls, (*key, ''))))}"
            raise UserError(
                f"'{dotted(key)}' is a table of settings, not {value!r}", where=_where(origin(key), key), hint=hint
            )
        values[name] = value
        self._mark(key, setting, value, origin)

    def _unknown(self, key: Key, origin: Callable[[Key], str]) -> UserError:
        close = nearest(self.cls, key)
        hint = f"did you mean '{close}'?" if close else f"it holds: {', '.join(map(dotted, _siblings(self.cls, key)))}"
        return UserError(f"unknown key '{dotted(key)}'", where=_where(origin(key), key), hint=hint)

    def build(self) -> object:
        from pydantic import ValidationError

        text = json.dumps([self.values])
        try:
            return _adapter(self.cls).validate_json(text, strict=True)[0]
        except ValidationError as error:
            raise self._explain(error.errors()) from error

    def _explain(self, faults: Sequence[ErrorDetails]) -> UserError:
        fault = faults[0]
        key, inside = self._locate(fault)
        if fault["type"] == "missing":
            hint = f"give it in the config file or as --set {dotted(key)}=…"
            return UserError(f"'{dotted(key)}' is not set, and has no default", hint=hint)
        where = self._blame(key)
        if fault["type"] == "json_invalid":
            return UserError(f"a value is not Unicode text: {fault['msg']}", where=where)
        if fault["type"] == "value_error":
            what = fault["msg"].removeprefix("Value error, ")
            return UserError(f"{what} (in '{dotted(key)}')" if key else what, where=where)
        # A union gives one fault for each of its members.
        rights = [_right(other) for other in faults if self._locate(other)[0] == key]
        part = f", in it '{'.'.join(inside)}'," if inside and len(rights) == 1 else ""
        hint = "it should be " + " or ".join(dict.fromkeys(rights))
        return UserError(f"'{dotted(key)}'{part} is {fault['input']!r}", where=where, hint=hint)

    def _blame(self, key: Key) -> str | None:
        """The place a person should look at for a fault of a setting, or of the settings in a table."""
        below = [(at, origin) for at, origin in self.origins.items() if at[: len(key)] == key]
        given = [(at, origin) for at, origin in below if origin != "default"]
        for at, origin in given or (below if len(below) == 1 else []):
            return _where(origin, at)
        return None

    def _locate(self, fault: ErrorDetails) -> tuple[Key, Key]:
        """Split the place of a fault into the setting and the place inside its value."""
        loc = tuple(map(str, fault["loc"][1:]))
        cls: type[Any] | None = self.cls
        for depth, name in enumerate(loc):
            if cls is None or name not in settings(cls):
                return loc[:depth], loc[depth:]
            cls = settings(cls)[name].table
        return loc, ()


def _right(fault: ErrorDetails) -> str:
    if fault["type"] == "unexpected_keyword_argument":
        return "left out: there is no such key"
    if fault["type"] in ("dataclass_type", "dict_type"):
        return "a table"
    return fault["msg"].removeprefix("Input should be ")


def _where(origin: str, key: Key) -> str:
    names = {"default": f"default of {dotted(key)}", "stored": "stored config", "--set": f"--set {dotted(key)}=…"}
    return names.get(origin, origin)


def _siblings(cls: type[Any], key: Key) -> list[Key]:
    """The valid keys of the innermost table that a wrong key points into."""
    at: Key = ()
    for name in key[:-1]:
        setting = settings(cls).get(name)
        if setting is None or setting.table is None:
            break
        cls, at = setting.table, (*at, name)
    return [(*at, name) for name in settings(cls)]


def _with_key(value: Any, path: Key, leaf: Any) -> dict[str, Any]:
    """A copy of a dict with one key changed, at any depth."""
    base: dict[str, Any] = dict(cast("dict[str, Any]", value)) if isinstance(value, dict) else {}
    name, *rest = path
    base[name] = _with_key(base.get(name), tuple(rest), leaf) if rest else leaf
    return base


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[tuple[Any]]:
    from pydantic import ConfigDict, TypeAdapter

    # A tuple around it, since pydantic takes no settings for a plain dataclass itself but hands them down to one.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid"))  # pyright: ignore[reportInvalidTypeForm]
