"""What a trunk has beyond its config: modules that adapting puts in, and that stay with the model when it is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from lexmill.errors import UserError


class Addition(ABC):
    """A module at a place that the config leaves plain; its structure is saved as JSON, its tensors as the trunk's."""

    addition: ClassVar[str]
    """What a structure map calls it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The structure, as JSON, without the kind."""

    @classmethod
    @abstractmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> nn.Module:
        """The inverse of `describe`, weights aside; `place` is the module that it takes the place of."""


A = TypeVar("A", bound=type[Addition])
_ADDITIONS: dict[str, type[Addition]] = {}


def register_addition(addition: A) -> A:
    """Class decorator: make an addition known, so that saved models with it can be loaded."""
    _ADDITIONS[addition.addition] = addition
    return addition


def additions(trunk: nn.Module) -> Iterator[tuple[str, Addition]]:
    """Those in a trunk, with their places."""
    for path, module in trunk.named_modules():
        if isinstance(module, Addition):
            yield path, module


def describe_additions(trunk: nn.Module) -> dict[str, dict[str, Any]]:
    """Those in a trunk as JSON, by place."""
    return {path: {"kind": one.addition, **one.describe()} for path, one in additions(trunk)}


def restore_additions(trunk: nn.Module, described: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Put in what `describe_additions` told of. An unknown kind, place or key is a `UserError` at `where`."""
    for path, entry in described.items():
        shape = dict(entry)
        kind, at = shape.pop("kind", None), f"{where}.{path}"
        if kind not in _ADDITIONS:
            known = ", ".join(sorted(_ADDITIONS))
            raise UserError(f"unknown kind of addition {kind!r}", where=at, hint=f"known kinds: {known}")
        parent, _, name = path.rpartition(".")
        try:
            holder = trunk.get_submodule(parent)
            setattr(holder, name, _ADDITIONS[kind].build(getattr(holder, name), shape))
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"does not fit the model: {error}", where=at) from error
