"""Schemes that say by one tag a unit where entities begin and end: BIO (IOB2; Ramshaw and Marcus 1995, Tjong Kim Sang
and Veenstra 1999) and BIOES (also written BILOU or BMES)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lexmill.errors import UserError

Scheme = Literal["BIO", "BIOES"]

OUTSIDE = "O"
_SAME = {"L": "E", "U": "S", "M": "I"}
_NEXT: dict[Scheme, dict[str, str]] = {
    "BIO": {"O": "", "B": "I", "I": "I"},
    "BIOES": {"O": "", "B": "IE", "I": "IE", "E": "", "S": ""},
}
"""What may go on with an entity after each sign; after others, and in `BIO` always, an entity may have ended."""


class Entity(NamedTuple):
    """Units `first` to `last`, both of it, and what they are."""

    first: int
    last: int
    label: str


def split_tag(tag: str) -> tuple[str, str]:
    """The sign, one of `O`, `B`, `I`, `E`, `S`, and the label, empty for `O`. Another tag is a `UserError`."""
    sign, dash, label = tag.partition("-")
    sign = _SAME.get(sign, sign)
    if (tag == OUTSIDE) or (dash and label and sign in "BIES" and len(sign) == 1):
        return sign, label
    raise UserError(f"'{tag}' is no tag of a known scheme", hint="tags are O, B-…, I-… (BIO), with E-… and S-… (BIOES)")


def scheme_of(signs: Iterable[str]) -> Scheme:
    """The scheme that uses these signs. A `UserError` where no entity could begin."""
    found = set(signs)
    if found & {"E", "S"}:
        return "BIOES"
    if "I" in found and "B" not in found:
        raise UserError("no tag begins an entity", hint="tags are O, B-… and I-… (BIO), with E-… and S-… (BIOES)")
    return "BIO"


def entities_in(tags: Sequence[str], scheme: Scheme) -> tuple[list[Entity], list[int]]:
    """The well-formed entities of a sequence of tags, and the units whose tag is part of none though it is not `O`.

    What is well-formed is what `seqeval` takes for an entity in strict mode.
    """
    parts = [split_tag(tag) for tag in tags]
    found: list[Entity] = []
    loose: list[int] = []
    at = 0
    while at < len(parts):
        sign, label = parts[at]
        last = _last(parts, at, scheme)
        if last is not None:
            found.append(Entity(at, last, label))
            at = last
        elif sign != OUTSIDE:
            loose.append(at)
        at += 1
    return found, loose


def _last(parts: Sequence[tuple[str, str]], first: int, scheme: Scheme) -> int | None:
    """The last unit of the entity that begins at `first`; None where none does."""
    sign, label = parts[first]
    if sign == "S":
        return first
    if sign != "B":
        return None
    last = first
    while last + 1 < len(parts) and parts[last][0] != "E" and parts[last + 1] in (("I", label), ("E", label)):
        last += 1
    return last if scheme == "BIO" or parts[last][0] == "E" else None


def tags_of(entities: Iterable[Entity], count: int, scheme: Scheme) -> list[str]:
    """The inverse of `entities_in`, for `count` units and entities that do not overlap."""
    tags = [OUTSIDE] * count
    for first, last, label in entities:
        tags[first : last + 1] = [f"I-{label}"] * (last + 1 - first)
        tags[first] = f"B-{label}"
        if scheme == "BIOES":
            tags[last] = f"E-{label}" if last > first else f"S-{label}"
    return tags


class Transitions(NamedTuple):
    """Which tag may be the first, the last, and follow (column) another (row)."""

    first: Bool[np.ndarray, "tag"]
    last: Bool[np.ndarray, "tag"]
    follow: Bool[np.ndarray, "tag tag"]


def transitions(tags: Sequence[str], scheme: Scheme) -> Transitions:
    """What the scheme allows of sequences of these tags."""
    parts = [split_tag(tag) for tag in tags]
    begins = np.array([sign in "OBS" for sign, _ in parts])
    ends = np.array([scheme == "BIO" or sign in "OES" for sign, _ in parts])
    goes_on = np.array(
        [[label == other and next_ in _NEXT[scheme][sign] for next_, other in parts] for sign, label in parts]
    )
    return Transitions(begins, ends, goes_on | (ends[:, None] & begins[None, :]))


def viterbi(scores: Float[np.ndarray, "unit tag"], allowed: Transitions) -> Int[np.ndarray, "unit"]:
    """The sequence of the highest sum of scores among those allowed (Viterbi 1967); of equal ones that of lower tags,
    from the end."""
    forbidden = np.where(allowed.follow, 0.0, -np.inf)
    total = np.where(allowed.first, scores[0], -np.inf)
    came = np.empty(scores.shape, np.int64)
    for unit in range(1, len(scores)):
        ways = total[:, None] + forbidden
        came[unit] = ways.argmax(0)
        total = ways.max(0) + scores[unit]
    path = np.empty(len(scores), np.int64)
    path[-1] = np.where(allowed.last, total, -np.inf).argmax()
    for unit in range(len(scores) - 1, 0, -1):
        path[unit - 1] = came[unit, path[unit]]
    return path
