"""Which column of the data plays which role, given by the user or guessed, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lexmill.data.sources import Row, Source
from lexmill.errors import UserError

PAIRS = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
         ("text", "text_pair"), ("query", "passage"))  # fmt: skip
"""Names of columns that together hold a pair of texts, likeliest first."""
TEXTS = ("text", "sentence", "question", "utterance", "query", "review", "content", "comment", "message", "body",
         "description", "document", "tweet", "title", "headline",
         "文本", "内容", "句子", "问题", "评论", "标题")  # fmt: skip
"""Names of columns that hold a text, likeliest first."""
LABELS = ("label", "labels", "intent", "category", "class", "target", "sentiment", "topic", "emotion", "tag", "tags",
          "rating", "标签", "类别", "分类", "意图", "情感")  # fmt: skip
"""Names of columns that hold a label, likeliest first."""
_MAX_LABEL_CHARS = 60


@dataclass(frozen=True)
class Role:
    """What a column is for.

    Args:
        name: what it is called in `data.columns`, and in what a task remembers.
        names: names of columns that are taken for it unasked, likeliest first.
        input: whether a model is given it; otherwise it is what the model learns to say.
        required: whether there is no training without it.
        shape: how it is guessed where no name fits: the column with the longest texts, or one with few distinct values.
        blank: whether a row may leave it empty.
        unless: it is not looked for where a column of one of these roles was found.
        beside: it is looked for only where there are columns of all these roles, given or by their names.
    """

    name: str
    names: tuple[str, ...] = ()
    input: bool = True
    required: bool = True
    shape: Literal["text", "label"] | None = None
    blank: bool = False
    unless: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


TEXT_AND_LABEL = (
    Role("text", TEXTS, shape="text"),
    Role("text_pair", required=False),
    Role("label", LABELS, input=False, required=False, shape="label"),
)
"""What most tasks want: a text or a pair of texts, and a label."""


@dataclass(frozen=True)
class Columns(Mapping[str, str]):
    """A mapping of role (`text`, `text_pair`, `label`, …) to column. Several label columns have roles `label.COLUMN`.

    Args:
        roles: the mapping.
        how: per role, how its column was found, for people.
        multi_label: whether the label columns hold lists of labels.
        inputs: the roles that make up the text.
        blank: those of them that a row may leave empty.
    """

    roles: Mapping[str, str]
    how: Mapping[str, str]
    multi_label: bool = False
    inputs: tuple[str, ...] = ("text", "text_pair")
    blank: tuple[str, ...] = ()

    def __getitem__(self, role: str) -> str:
        return self.roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that make up the text: one, or several, e.g. for pairs."""
        return tuple(self.roles[role] for role in self.inputs if role in self.roles)

    @property
    def may_be_empty(self) -> tuple[str, ...]:
        """The columns of `texts` that a row may leave empty."""
        return tuple(self.roles[role] for role in self.blank if role in self.roles)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label columns; none where the data has no labels."""
        return tuple(column for role, column in self.roles.items() if role == "label" or role.startswith("label."))

    def unlabelled(self) -> Columns:
        """Without the label columns."""
        roles = {role: column for role, column in self.roles.items() if column not in self.labels}
        return Columns(roles, {role: self.how[role] for role in roles}, inputs=self.inputs, blank=self.blank)

    def lines(self) -> list[str]:
        """For people: a line a role."""
        return [f"{role}: column '{column}' ({self.how[role]})" for role, column in self.roles.items()]


def guess(
    seen: Sequence[str],
    rows: Sequence[Row],
    given: Mapping[str, str | Sequence[str]] | None = None,
    roles: Sequence[Role] = TEXT_AND_LABEL,
) -> Columns:
    """Find the columns by what the user gave, then by their names, then by the shape of their values.

    Args:
        seen: the columns of the data.
        rows: the first rows.
        given: columns by role, as the user named them; `label` may name several.
        roles: what is looked for.

    Raises:
        UserError: a given column does not exist, a role is unknown, or no column fits a required one.
    """
    found: dict[str, str] = {}
    how: dict[str, str] = {}

    def take(role: str, column: str, why: str) -> None:
        found[role] = column
        how[role] = why

    for role, names in (given or {}).items():
        if all(role != one.name for one in roles):
            known = ", ".join(one.name for one in roles)
            raise UserError(f"this task has no column '{role}'", where="columns", hint=f"it has: {known}")
        several = [names] if isinstance(names, str) else list(names)
        for name in several:
            take(role if len(several) == 1 else f"{role}.{name}", _known(name, role, seen), "given")
    columns = {name: [row.values[name] for row in rows if row.values.get(name) is not None] for name in seen}
    for role in roles:
        if any(taken.partition(".")[0] == role.name for taken in found):
            continue
        if any(other in found for other in role.unless) or not all(
            _named(other, roles, found, seen) for other in role.beside
        ):
            continue
        free = [name for name in seen if name not in found.values()]
        if role.shape == "text":
            stringy = [name for name in free if columns[name] and all(isinstance(v, str) for v in columns[name])]
            pairs = any(one.name == "text_pair" for one in roles) and "text_pair" not in found
            _find_text(role, stringy, columns, take, pairs=pairs)
        else:
            _find_named(role, free, take)
        if role.shape == "label" and role.name not in found:
            _find_label(role, free, columns, take, len(rows))
        if role.required and role.name not in found:
            like = "text" if role.shape == "text" else f"'{role.name}'"
            hint = f"name it with {flag(role.name)}; the columns are: {', '.join(seen)}"
            raise UserError(f"no column looks like {like}", where="columns", hint=hint)
    chosen = [column for role, column in found.items() if role.partition(".")[0] == "label"]
    multi = any(isinstance(row.values.get(column), list) for row in rows for column in chosen)
    return Columns(
        found,
        how,
        multi,
        tuple(role.name for role in roles if role.input),
        tuple(role.name for role in roles if role.blank),
    )


def _named(name: str, roles: Sequence[Role], found: Mapping[str, str], seen: Sequence[str]) -> bool:
    """Whether there is a column for this role, found already or by its name."""
    names = {one for role in roles if role.name == name for one in role.names}
    return name in found or any(_plain(column) in names for column in seen)


def find_columns(
    source: Source, given: Mapping[str, str | Sequence[str] | None], roles: Sequence[Role] = TEXT_AND_LABEL
) -> Columns:
    """`guess` for a file, which its errors name; None stands for what the user did not give."""
    seen, first = source.columns(), source.peek()
    try:
        return guess(seen, first, {role: names for role, names in given.items() if names}, roles)
    except UserError as error:
        raise UserError(error.message, where=f"{source.path}, {error.where}", hint=error.hint) from error


def flag(role: str) -> str:
    """How a person names the column of a role."""
    classic = any(role == one.name for one in TEXT_AND_LABEL)
    return f"--{role.replace('_', '-')}" if classic else f"--column {role}=NAME"


def _known(name: str, role: str, seen: Sequence[str]) -> str:
    if name in seen:
        return name
    close = difflib.get_close_matches(name, seen, n=1)
    did = f"did you mean '{close[0]}'? " if close else ""
    hint = f"{did}the columns are: {', '.join(seen)}"
    raise UserError(f"there is no column '{name}'", where=flag(role), hint=hint)


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _by_name(free: Sequence[str]) -> dict[str, str]:
    return {_plain(name): name for name in reversed(free)}


def _find_named(role: Role, free: Sequence[str], take: Any) -> None:
    by_name = _by_name(free)
    named = next((by_name[name] for name in role.names if name in by_name), None)
    if named is not None:
        take(role.name, named, "by name")


def _find_text(role: Role, stringy: Sequence[str], columns: Mapping[str, list[Any]], take: Any, *, pairs: bool) -> None:
    by_name = _by_name(stringy)
    for first, second in PAIRS if pairs else ():
        if first in by_name and second in by_name:
            take(role.name, by_name[first], "by name")
            take("text_pair", by_name[second], "by name")
            return
    named = next((by_name[name] for name in role.names if name in by_name), None)
    if named is not None:
        take(role.name, named, "by name")
        return
    candidates = [name for name in stringy if _plain(name) not in LABELS]
    if candidates:
        take(role.name, max(candidates, key=lambda name: _mean_chars(columns[name])), "its texts are the longest")


def _find_label(role: Role, free: Sequence[str], columns: Mapping[str, list[Any]], take: Any, num_rows: int) -> None:
    few = {name: len(set(map(str, columns[name]))) for name in free if _label_like(columns[name])}
    few = {name: distinct for name, distinct in few.items() if 1 < distinct <= max(2, num_rows // 2)}
    if few:
        name = min(few, key=lambda name: few[name])
        take(role.name, name, f"it has {few[name]} distinct values in the first {num_rows} rows")


def _label_like(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= _MAX_LABEL_CHARS)
        for value in values
    )


def _mean_chars(values: Sequence[str]) -> float:
    return sum(map(len, values)) / len(values)
