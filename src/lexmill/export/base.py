"""What a format of export is: one file that writes a model for another program, and answers from what it wrote.

A new format is a subclass in its own file, decorated with `register`. `export`, `verify` and the verb know formats only
through this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.tasks import Record

Evidence = dict[str, float]
"""The numbers behind an answer, as `Task.evidence` names them."""


class Format(ABC):
    """One way to write a model down for another program. It has no state: what is set is in its `Options`."""

    name: ClassVar[str]
    """The value of `--format`, and the folder of the artefact that holds its files."""
    about: ClassVar[str]
    """What it is, in one line."""
    Options: ClassVar[type]
    """A frozen dataclass: what a person may set."""

    @abstractmethod
    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        """Write all files into an existing folder, and give the names of those that hold a model of their own; each
        of them is asked the probes.

        The subject's model is in evaluation mode; it may not be changed.

        Raises:
            UserError: this model, or its task, cannot be written in this format.
            MissingExtra: what writes it is not installed.
        """

    @abstractmethod
    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        """What a written file answers to these records, by the names of the subject's own evidence. Nothing of the
        subject's model may be asked: it tells what the task and the tokenizer are."""

    def check(self, subject: Loaded, file: Path) -> None:
        """Raise a `UserError` where a file that was written earlier does not hold the subject's weights, as far as a
        format can tell without asking it. Answers alone miss a changed number where codes are rounded."""
        return

    def tolerance(self, subject: Loaded, options: Any) -> float:
        """The largest max|a-b| / max|b| over the evidence of a probe that still counts as the same answer; of half of
        all probes it may be a quarter of that."""
        return 1e-5


_FORMATS: dict[str, Format] = {}
_ABSENT = {
    "litert": "its converter, litert-torch, is there for Python 3.11 but has not been tried on these models",
}
"""Formats that one may look for, and why there is nothing that writes them."""
F = TypeVar("F", bound=Format)


def register(form: type[F]) -> type[F]:
    """Class decorator: make a format known by its name."""
    _FORMATS[form.name] = form()
    return form


def known() -> list[str]:
    """The names of the formats there are."""
    return sorted(_FORMATS)


def find(name: str) -> Format:
    """The format of this name, or a `UserError` that lists the known ones."""
    if name in _ABSENT:
        hint = "export it as torch, the kind of package that this converter begins from"
        raise UserError(f"the format '{name}' cannot be written: {_ABSENT[name]}", where="--format", hint=hint)
    if name not in _FORMATS:
        raise UserError(f"unknown format '{name}'", where="--format", hint=f"known formats: {', '.join(known())}")
    return _FORMATS[name]
