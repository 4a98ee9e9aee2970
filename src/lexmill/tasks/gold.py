"""What a labelled row says of the entities of its text, by tags or by offsets, and which units of the text that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np

from lexmill.errors import UserError
from lexmill.tasks import bio
from lexmill.tasks.units import Spans

SHAPES = 'tags are a list of one a token, or entities: a list of {"start", "end", "label"}, in characters of the text'


class Place(NamedTuple):
    """Characters `start` to `end` of a text, and what stands there."""

    start: int
    end: int
    label: str


class Gold(NamedTuple):
    """The entities of a text, and the places whose tags make none."""

    entities: list[Place]
    loose: list[Place]


def listed(record: Mapping[str, Any], column: str) -> list[Any] | None:
    """The list of a column, None where there is none. Anything else is a `UserError`."""
    given = record.get(column)
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise UserError(f"column '{column}' holds no list", hint=SHAPES)
    return list(cast("Sequence[Any]", given))


def sign_and_label(given: Any) -> tuple[str, str]:
    """Of a tag; an entity given by offsets has the sign `B`."""
    if not isinstance(given, Mapping):
        return bio.split_tag(str(given))
    return "B", str(cast("Mapping[str, Any]", given).get("label", ""))


def gold_of(given: Sequence[Any], text: str, tokens: Spans | None, scheme: bio.Scheme) -> Gold:
    """What the tags, or the entities by offsets, say of a text.

    Args:
        tokens: where the tokens stand in it, if it is made of such.

    Raises:
        UserError: not one tag a token; an entity outside the text, or two that overlap.
    """
    if any(isinstance(one, Mapping) for one in given) or (not given and tokens is None):
        return Gold(_offsets(given, text), [])
    if tokens is None or len(given) != len(tokens):
        what = "a text that is not cut into tokens" if tokens is None else f"{len(tokens)} tokens"
        raise UserError(f"{len(given)} tags for {what}", hint=SHAPES)
    tags = [str(tag) for tag in given]
    entities, loose = bio.entities_in(tags, scheme)
    return Gold(
        [_trimmed(text, int(tokens[one.first, 0]), int(tokens[one.last, 1]), one.label) for one in entities],
        [_trimmed(text, int(tokens[at, 0]), int(tokens[at, 1]), bio.split_tag(tags[at])[1]) for at in loose],
    )


def on_units(gold: Gold, spans: Spans, scheme: bio.Scheme) -> tuple[list[str | None], list[Place]]:
    """The tag of each unit, None where that cannot be said, and the entities that are not made of whole units."""
    entities: list[bio.Entity] = []
    unsaid = np.zeros(len(spans), bool)
    lost: list[Place] = []
    for one in gold.entities:
        touched = _touched(spans, one)
        first, last = np.flatnonzero(touched)[[0, -1]].tolist() if touched.any() else (0, -1)
        if first <= last and spans[first, 0] >= one.start and spans[last, 1] <= one.end:
            entities.append(bio.Entity(first, last, one.label))
        else:
            unsaid |= touched
            lost.append(one)
    for one in gold.loose:
        unsaid |= _touched(spans, one)
    tags = bio.tags_of(entities, len(spans), scheme)
    return [None if skip else tag for tag, skip in zip(tags, unsaid.tolist(), strict=True)], lost


def _touched(spans: Spans, place: Place) -> np.ndarray:
    return (spans[:, 1] > place.start) & (spans[:, 0] < place.end)


def _offsets(given: Sequence[Any], text: str) -> list[Place]:
    try:
        spans = [(int(one["start"]), int(one["end"]), str(one["label"])) for one in given]
    except (KeyError, TypeError, ValueError):
        raise UserError("an entity lacks its 'start', 'end' or 'label'", hint=SHAPES) from None
    found = sorted(_trimmed(text, *span) for span in spans if 0 <= span[0] < span[1] <= len(text))
    if len(found) < len(spans) or any(one.start >= one.end for one in found):
        raise UserError(f"an entity does not lie in its text of {len(text)} characters", hint=SHAPES)
    for one, after in pairwise(found):
        if after.start < one.end:
            both = f"'{text[one.start : one.end]}' and '{text[after.start : after.end]}'"
            raise UserError(f"the entities {both} overlap", hint="leave one of them out")
    return found


def _trimmed(text: str, start: int, end: int, label: str) -> Place:
    """Without blanks at its ends."""
    inner = text[start:end]
    return Place(start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip()), label)
